"""Run the command line as ``python -m isomerge_fast``."""

from .cli import main

main()
