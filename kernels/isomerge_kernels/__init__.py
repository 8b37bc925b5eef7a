"""Kernels of isomerge-fast: the passes over every byte of a merge.

``reference`` holds each operation in plain torch; it runs on any device and is what kernels are tested against.
Import through ``isomerge_fast.ops``, the one door.
"""
