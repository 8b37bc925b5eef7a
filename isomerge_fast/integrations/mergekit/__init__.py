"""Export what plugs into mergekit."""

from .registration import main, register_all

__all__ = ["main", "register_all"]
