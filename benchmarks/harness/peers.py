"""Call other people's implementations as their own programs call them."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from benchmarks.harness.processes import measured

ISO_UTILS = "fusion_bench.method.isotropic_merging.iso_utils"
# What that file takes from the rest of its package: a clock that prints, and the name of a type.
STAND_INS = {
    "fusion_bench.utils": SimpleNamespace(timeit_context=lambda *_: contextlib.nullcontext()),
    "fusion_bench.utils.type": SimpleNamespace(StateDictType=dict),
}


@cache
def iso_utils() -> tuple[Any, str]:
    """Return FusionBench's module of ``iso_c`` and ``iso_cts``, and how it was loaded.

    The package imports much that a GPU machine may lack: where it does not import, the file is executed by itself.
    Where not even the file is there, its ImportError is raised.
    """
    try:
        return importlib.import_module(ISO_UTILS), "the package"
    except ImportError:
        package, _, inner = ISO_UTILS.partition(".")
        spec = importlib.util.find_spec(package)
        folders = (spec and spec.submodule_search_locations) or ()
        files = [Path(folder, *inner.split(".")).with_suffix(".py") for folder in folders]
        if not (found := [file for file in files if file.exists()]):
            raise
        return executed_by_itself(found[0]), "its functions' file by itself"


def executed_by_itself(file: Path) -> SimpleNamespace:
    """Return the names of FusionBench's file, executed with ``STAND_INS`` for what it imports of its package."""

    def imported(name: str, *more: Any) -> Any:
        return STAND_INS[name] if name in STAND_INS else builtins.__import__(name, *more)

    names: dict[str, Any] = {"__name__": ISO_UTILS, "__builtins__": vars(builtins) | {"__import__": imported}}
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), names)
    return SimpleNamespace(**names)


def fusion_bench(method: str, deltas: Sequence[dict[str, Tensor]], device: str = "cpu") -> dict[str, Tensor]:
    """Return the merged Δ of FusionBench's ``iso_c`` or ``iso_cts``, and swallow what it prints."""
    module, _ = iso_utils()
    function, more = {"iso-c": (module.iso_c, ()), "iso-cts": (module.iso_cts, (0.8,))}[method]
    with contextlib.redirect_stdout(io.StringIO()):
        return function(list(deltas), *more, accelerator=device)


def mergekit(recipe: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run ``mergekit-yaml`` as a user starts it; see ``measured``. The recipe lies beside ``out``."""
    file = out.with_suffix(".yml")
    file.write_text(json.dumps(recipe))
    return measured([Path(sys.executable).parent / "mergekit-yaml", file, out, "--no-copy-tokenizer"])


def task_arithmetic_recipe(models: Sequence[Path], scaling: float, dtype: str) -> dict[str, Any]:
    """Return mergekit's recipe for θ₀ + α Σ Δ_t, computed in ``dtype`` and written in bf16."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(models[0]),
        "models": [{"model": str(model), "parameters": {"weight": scaling}} for model in models[1:]],
        "parameters": {"normalize": False},
        "dtype": dtype,
        "out_dtype": "bfloat16",
    }
