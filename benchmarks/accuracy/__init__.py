"""Measure how good merged networks are on real tasks (``python -m benchmarks.accuracy``)."""
