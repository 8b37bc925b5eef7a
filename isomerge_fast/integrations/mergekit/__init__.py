"""Iso-C and Iso-CTS inside mergekit: its registry, and its own command line with them registered."""

from .registration import main, register_all

__all__ = ["main", "register_all"]
