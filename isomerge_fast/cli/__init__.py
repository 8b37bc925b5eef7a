"""Provide the command line ``isomerge``. Importing it loads no torch."""

from . import commands  # noqa: F401  # registers the verbs
from .application import main

__all__ = ["main"]
