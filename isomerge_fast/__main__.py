"""``python -m isomerge_fast``."""

from .cli import main

main()
