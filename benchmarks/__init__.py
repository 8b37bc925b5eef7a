"""Measurements: ratios to peers in one run, with the error beside every time."""
