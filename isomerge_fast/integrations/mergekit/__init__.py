"""Register Iso-C and Iso-CTS in mergekit, and run its own command line with them registered."""

from .registration import main, register_all

__all__ = ["main", "register_all"]
