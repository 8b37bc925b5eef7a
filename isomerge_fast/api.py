"""The Python API of merges from files to files: thin functions over plan and engine. ``in_memory`` has the others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint.manifest import read_manifest
from .config import MergeConfig, load_config
from .engine import resolve_device, run
from .errors import InputError
from .plan import DELTA_FOLDER, make_plan
from .report import Observer, Report

__all__ = ["apply", "merge"]


def merge(
    config: str | os.PathLike[str] | Mapping[str, Any] | MergeConfig,
    *,
    device: str = "auto",
    max_ram: int | None = None,
    max_vram: int | None = None,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    observer: Observer | None = None,
    ray: bool | str = False,
) -> Report:
    """Merges checkpoints on disk into a new one, as ``isomerge run`` does.

    Args:
        config: path of a YAML file, a dict with the same keys, or a MergeConfig.
        device, max_ram, max_vram, threads, resume, overwrite, io, observer: see ``engine.run``; ceilings in bytes.
        ray: share the work out among the workers of a Ray cluster: ``host:port`` of it; ``"local"``: one that is
            started on this machine; True: that which this process is connected to, that of ``RAY_ADDRESS``, or that
            which this machine belongs to, else as ``"local"``. Ceilings and threads are each worker's.

    Returns:
        The report, also written into the output.

    Raises:
        ConfigError, InputError, ResourceError: with a message that names what is wrong; nothing half-written is left.
        MissingPackageError: ``ray`` without Ray.
    """
    checked = load_config(config)
    options: dict[str, Any] = {"max_ram": max_ram, "max_vram": max_vram}
    running = {"resume": resume, "overwrite": overwrite, "io": io, "observer": observer}
    if ray is False:
        plan = make_plan(checked, resolve_device(device), **options)
        return run(plan, device=device, threads=threads, **options, **running)
    from .integrations.ray_crew import ray_crew

    with ray_crew(None if ray is True else ray, device=device, threads=threads) as crew:
        plan = crew.plan(checked, **options)
        return run(plan, device=crew.device, threads=crew.threads, crew=crew, **options, **running)


def apply(
    merged: str | os.PathLike[str],
    scaling: float | list[float],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    device: str = "auto",
    max_ram: int | None = None,
    max_vram: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    observer: Observer | None = None,
) -> Report:
    """θ = θ₀ + α·Δ for another α, from the Δ that a merge with ``save_delta`` kept: nothing is decomposed again.

    The same bytes as that merge gives with this α.

    Args:
        merged: output of that merge.
        scaling: α, or several.
        base: where the base lies now; where it lay then when None.
        dtype: of the output's float tensors; as in that merge when None.
        out, device, max_ram, max_vram, resume, overwrite, io, observer: as for ``merge``.

    Raises:
        InputError: no Δ there, or the base is not the one that it was made for.
        ConfigError, ResourceError: as ``merge``.
    """
    folder = Path(merged)
    description = read_manifest(folder)["description"]
    if not description["config"]["save_delta"]:
        raise InputError(f"{folder}: holds no merged Δ; merge again with save_delta")
    recorded = description["inputs"][0]
    config = load_config(
        {
            "base": recorded["path"] if base is None else base,
            "experts": [folder / DELTA_FOLDER],
            "experts_are_deltas": True,
            "method": "task-arithmetic",
            "scaling": scaling,
            "dtype": dtype or description["config"]["dtype"],
            "stochastic_rounding": description["config"]["stochastic_rounding"],
            "out": out,
        }
    )
    plan = make_plan(config, resolve_device(device), max_ram=max_ram, max_vram=max_vram)
    for path, identity in plan.base.files.items():
        then = recorded["files"].get(path.name)
        if then is None or (then["size"], then["header_sha256"]) != (identity.size, identity.header_sha256):
            raise InputError(f"{path}: not the base that the delta in {folder} was made for")
    return run(
        plan,
        device=device,
        max_ram=max_ram,
        max_vram=max_vram,
        resume=resume,
        overwrite=overwrite,
        io=io,
        observer=observer,
    )
