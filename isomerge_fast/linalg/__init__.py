"""Solvers: polar factors and dominant subspaces behind the protocols of ``protocol.py``; ``auto.py`` picks one."""
