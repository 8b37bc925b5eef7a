"""Merge files to files from Python: thin functions over plan and engine. ``functional`` merges what is in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint.layout import ADAPTER_CONFIG_FILE
from .checkpoint.output.manifest import MANIFEST_FILE, Manifest, file_name, read_manifest
from .config import MergeConfig, load_config, recorded_config
from .errors import ConfigError, InputError, VerificationError
from .execution.engine import resolve_device, run
from .execution.report import Observer, Report
from .methods import make_method
from .parsing.values import path_text, refuse, size
from .planning.outputs import DELTA_FOLDER
from .planning.plan import OriginalMerge, Plan, TensorPlan
from .planning.planner import make_plan

__all__ = ["apply", "merge"]


def merge(
    config: str | os.PathLike[str] | Mapping[str, Any] | MergeConfig,
    *,
    device: str = "auto",
    max_ram: int | str | None = None,
    max_vram: int | str | None = None,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    observer: Observer | None = None,
    ray: bool | str | None = False,
) -> Report:
    """Merge checkpoints on disk into a new one, as ``isomerge run`` does.

    Args:
        config: path of a YAML file, a dict with the same keys, or a MergeConfig.
        device, max_ram, max_vram, threads, resume, overwrite, io, observer: see ``engine.Execution``; ceilings in
            bytes, or as ``"8GiB"``.
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
    if checked.out is None:
        raise ConfigError("out is not given: the folder that the merge is written into")
    options = _ceilings(max_ram, max_vram)
    running = {"resume": resume, "overwrite": overwrite, "io": io, "observer": observer}
    ray = False if ray is None else ray
    if not isinstance(ray, bool | str):
        refuse(ray, "ray", "true, false, or an address such as host:6379")
    if ray is False:
        plan = make_plan(checked, resolve_device(device), **options)
        return run(plan, device=device, threads=threads, **options, **running)
    from .integrations.ray.session import ray_executor

    with ray_executor(None if ray is True else ray, device=device, threads=threads) as executor:
        plan = executor.plan(checked, **options)
        return run(
            plan, device=executor.device, threads=executor.threads, executor=executor.merge, **options, **running
        )


def apply(
    merged: str | os.PathLike[str],
    scaling: float | list[float],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    device: str = "auto",
    max_ram: int | str | None = None,
    max_vram: int | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    observer: Observer | None = None,
) -> Report:
    """Apply the Δ that a merge with ``save_delta`` kept with another α: θ = θ₀ + α·Δ.

    Nothing is decomposed again, and the bytes are those that the merge gives with this α.

    Args:
        merged: output of that merge.
        scaling: α, or several.
        base: where the base lies now; where it lay then when None.
        dtype: of the output's float tensors; as in that merge when None.
        out, device, max_ram, max_vram, resume, overwrite, io, observer: as for ``merge``.

    Raises:
        InputError: no Δ there; or Δ is not as it was kept, or the base is not the one that it was made for, which is
            seen in their headers before anything is written, or in their bytes while they are read: then nothing is
            left.
        VerificationError: the manifest was changed.
        ConfigError, ResourceError: as ``merge``.
    """
    folder = Path(path_text(merged, "merged", "the output of a merge"))
    ceilings = _ceilings(max_ram, max_vram)
    manifest = read_manifest(folder)
    try:
        then = recorded_config(manifest["description"])
        make_method(then.method, then.options)  # and none of the overrides: the kept Δ needs no method any more
    except ConfigError as error:
        raise VerificationError(f"{folder / MANIFEST_FILE}: not the manifest of a merge ({error})") from error
    if not then.save_delta:
        raise InputError(f"{folder}: holds no merged Δ; merge again with save_delta")
    config = load_config(
        {
            "base": then.base if base is None else base,
            "experts": [folder / DELTA_FOLDER],
            "experts_are_deltas": True,
            "method": "task-arithmetic",
            "scaling": scaling,
            "dtype": then.dtype if dtype is None else dtype,
            "stochastic_rounding": then.stochastic_rounding,
            "out": out,
        }
    )
    plan = _with_origin(make_plan(config, resolve_device(device), **ceilings), then, folder, manifest)
    running = {"resume": resume, "overwrite": overwrite, "io": io, "observer": observer}
    return run(plan, device=device, **ceilings, **running)


def _ceilings(max_ram: int | str | None, max_vram: int | str | None) -> dict[str, Any]:
    """Return the ceilings in bytes, by name."""
    given = {"max_ram": max_ram, "max_vram": max_vram}
    return {name: None if value is None else size(value, name) for name, value in given.items()}


def _with_origin(plan: Plan, then: MergeConfig, folder: Path, manifest: Manifest) -> Plan:
    """Return the plan of applying a kept Δ, with the checksums that its merge recorded; refuse files changed since."""
    base, *experts = (recorded["files"] for recorded in manifest["description"]["inputs"])
    then_base = {name: (entry["size"], entry["header_sha256"]) for name, entry in base.items()}
    kept = {name: (entry["bytes"], entry["header_sha256"]) for name, entry in manifest["shards"].items()}
    another = f"not the base that the delta in {folder} was made for"
    for path, identity in plan.base.files.items():
        if then_base.pop(path.name, None) != (identity.size, identity.header_sha256):
            raise InputError(f"{path}: {another}")
    if then_base:
        raise InputError(f"{plan.base.path}: {another}: no {min(then_base)}")
    for path, identity in plan.experts[0].files.items():
        if kept.get(file_name(DELTA_FOLDER, path.name)) != (identity.size, identity.header_sha256):
            raise InputError(f"{path}: not the delta that the merge kept (its size or header differs)")
    return replace(
        plan,
        tensors=tuple(_with_checksums(tensor, folder, manifest) for tensor in plan.tensors),
        original_merge=OriginalMerge(then, any(ADAPTER_CONFIG_FILE in files for files in experts)),
    )


def _with_checksums(tensor: TensorPlan, folder: Path, manifest: Manifest) -> TensorPlan:
    """Return a tensor's plan with the checksums of its base and its Δ, from the manifest of the merge that kept Δ.

    A checksum that is missing there raises VerificationError.
    """
    try:
        kept = manifest["outputs"][DELTA_FOLDER]["tensors"]
        delta = [kept[expert.name]["checksum"] for expert in tensor.experts]
        return replace(tensor, checksums=(manifest.get("base", {})[tensor.name], *delta))
    except KeyError as error:
        raise VerificationError(f"{folder / MANIFEST_FILE}: has no checksum of tensor {tensor.name!r}") from error
