"""The command line ``isomerge``. Importing it loads no torch."""

from .commands import main

__all__ = ["main"]
