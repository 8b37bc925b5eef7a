"""Other people's implementations, called as their own programs call them."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.harness.processes import measured


def fusion_bench(method: str, deltas: Sequence[dict[str, Tensor]], device: str = "cpu") -> dict[str, Tensor]:
    """The merged Δ of FusionBench's ``iso_c`` or ``iso_cts``; what it prints is swallowed."""
    from fusion_bench.method.isotropic_merging import iso_utils

    function, more = {"iso-c": (iso_utils.iso_c, ()), "iso-cts": (iso_utils.iso_cts, (0.8,))}[method]
    with contextlib.redirect_stdout(io.StringIO()):
        return function(list(deltas), *more, accelerator=device)


def mergekit(recipe: dict[str, Any], out: Path) -> dict[str, Any]:
    """``mergekit-yaml`` as a user starts it; see ``measured``. The recipe lies beside ``out``."""
    file = out.with_suffix(".yml")
    file.write_text(json.dumps(recipe))
    return measured([Path(sys.executable).parent / "mergekit-yaml", file, out, "--no-copy-tokenizer"])


def task_arithmetic_recipe(models: Sequence[Path], scaling: float, dtype: str) -> dict[str, Any]:
    """θ₀ + α Σ Δ_t, computed in ``dtype`` and written in bf16."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(models[0]),
        "models": [{"model": str(model), "parameters": {"weight": scaling}} for model in models[1:]],
        "parameters": {"normalize": False},
        "dtype": dtype,
        "out_dtype": "bfloat16",
    }
