"""Run ``python -m isomerge_fast.cli``."""

from . import main

main()
