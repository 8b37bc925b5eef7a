"""Prove all that only a GPU can, in two calls of seven and three minutes; docs/gpu.md says what and how.

``__main__`` runs the list of ``schedule``, a process a stage (``runner``), and puts their rows together
(``harness.readings``, ``summary``). None of these imports torch: whatever a stage does to its process or its GPU, the
rows of the others are there. The stages themselves stand in one file for each topic.
"""
