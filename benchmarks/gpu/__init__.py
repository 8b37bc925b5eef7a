"""Prove all that only a GPU can; docs/gpu.md says what and how.

What runs the stages and puts their rows together, ``__main__``, ``schedule``, ``runner``, ``summary`` and
``harness.readings``, imports no torch: whatever a stage does to its process or its GPU, the others' rows are there.
"""
