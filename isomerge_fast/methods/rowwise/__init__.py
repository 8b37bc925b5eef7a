"""Merge in passes over rows: nothing of a tensor's size is held."""
