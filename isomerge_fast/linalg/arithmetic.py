"""Describe what decides the last digits of a merge beside its inputs and options: the GPU and its libraries."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from ..ops import traits_of
from .cusolver import describe_eigensolvers


def describe_arithmetic(device: torch.device) -> str:
    """Return in words what a merge on ``device`` is computed with; resumed with anything else, its bytes would differ.

    Of a GPU: the model (libraries choose by its multiprocessors), all of its memory (batches follow from it), and the
    versions of what launches on it. torch's own version is recorded elsewhere.
    """
    traits = traits_of(device)
    if not traits.is_gpu:
        return device.type
    model = f"{traits.name}, {traits.memory_bytes} bytes"
    return f"{model}; triton {_version('triton')}; {describe_eigensolvers(device)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
