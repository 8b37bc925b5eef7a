"""Run the command line as ``python -m isomerge_fast``."""

from .cli import main

if __name__ == "__main__":
    main()
