"""Merge over Ray: worker processes on many GPUs or machines take the work items of a merge one by one."""
