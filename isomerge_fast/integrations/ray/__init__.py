"""Merges over Ray, on many GPUs and machines."""
