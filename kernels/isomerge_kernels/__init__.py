"""Hold the kernels of isomerge-fast: the passes over every byte of a merge, and the products of its solvers.

``task_sum``, ``apply_delta`` and ``symmetric_matmul`` are Triton kernels with their launchers, for NVIDIA and AMD GPUs;
``reference`` holds each operation in plain torch: what a CPU runs, and what the kernels are tested against.
Import through ``isomerge_fast.ops``, the one door.
"""
