"""Measure what this machine can do: its ceilings, the published algorithms as a baseline, and ours beside them."""
