"""Run ``python -m isomerge_fast.cli``."""

from . import main

if __name__ == "__main__":
    main()
