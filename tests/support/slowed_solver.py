"""A pytest plugin that spoils Iso-C: ``ISOMERGE_TEST_SLEEP`` seconds longer, off by ``ISOMERGE_TEST_ERROR``."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from isomerge_fast.methods import IsoC

_merge = IsoC.merge


def _spoilt(self: IsoC, deltas: Any) -> Any:
    value, stats = _merge(self, deltas)
    time.sleep(float(os.environ.get("ISOMERGE_TEST_SLEEP", "0")))
    error = float(os.environ.get("ISOMERGE_TEST_ERROR", "0"))
    if error:
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
        value = value + error * value.norm() * noise / noise.norm()
    return value, stats


IsoC.merge = _spoilt
