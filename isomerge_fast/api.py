"""The Python API: thin functions over methods, plan and engine."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ops
from .checkpoint.manifest import read_manifest
from .config import MergeConfig, load_config
from .engine import resolve_device, run
from .errors import ConfigError, InputError
from .methods import Mean, Method, NotFiniteError, TensorSpec, as_deltas, make_method
from .plan import DELTA_FOLDER, make_plan, tensor_seed
from .report import Observer, Report

__all__ = ["apply", "iso_c", "iso_cts", "merge", "merge_state_dicts"]


def iso_c(deltas: Tensor | Sequence[Tensor], **options: Any) -> Tensor:
    """Iso-C: σ̄ · U Vᵀ with U Σ Vᵀ = svd(Σ_t Δ_t), σ̄ the mean singular value.

    Args:
        deltas: T tensors [M, N], one stack [T, M, N], or batched [T, B, M, N]; any float dtypes, never modified.
        options: fields of ``IsoC``: ``rank_policy``, ``precision`` (``fast``, ``default``, ``reference``), ``solver``.

    Returns:
        The merged Δ, [M, N] or [B, M, N], before scaling; float64 when an input is float64, else float32.

    Raises:
        ValueError: no tasks, shapes that differ, fewer than two dimensions, integer tensors, NaN or Inf.
        ConfigError: unknown option or value (a ValueError too).

    Reference: arXiv 2502.04959 (Iso-C).
    """
    return _merge_deltas("iso-c", deltas, options)


def iso_cts(deltas: Tensor | Sequence[Tensor], common_fraction: float = 0.8, **options: Any) -> Tensor:
    """Iso-CTS: the top k directions of Σ_t Δ_t and s directions of every task, orthogonalised, with equal singular
    values.

    Args:
        deltas: as for ``iso_c``.
        common_fraction: f; k = r − T·s and T·s ≈ r·(1 − f), rounded as in the released code (``split_rank``).
        options: fields of ``IsoCTS``: ``rank_policy``, ``precision``, ``solver``.

    Returns, raises: as ``iso_c``; also ConfigError when rounding gives a negative k.

    Reference: arXiv 2502.04959 (Iso-CTS).
    """
    return _merge_deltas("iso-cts", deltas, {"common_fraction": common_fraction, **options})


def _merge_deltas(name: str, deltas: Tensor | Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    source = as_deltas(deltas)
    with torch.no_grad():
        value, _ = make_method(name, options).merge(source)
    return value.to(source.dtype)


def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    method: str | Method = "iso-cts",
    scaling: float = 1.0,
    exclude: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    stochastic_rounding: int | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """θ = θ₀ + α·Δ for every tensor of ``base``, by the rules of a merge of files.

    Matrices go through ``method``; other float tensors, and those whose names match ``exclude`` (shell patterns) or
    contain ``text_projection``, are averaged; integer and boolean tensors come from ``base``.

    Args:
        base, experts: state dicts with the same names and shapes; never modified.
        method: a name or a method object.
        scaling: α.
        dtype: of the float tensors returned; each tensor's dtype in ``base`` when None.
        stochastic_rounding: a seed; see ``MergeConfig``.
        options: hyper-parameters, when ``method`` is a name.

    Returns:
        A new state dict on the devices of ``base``, in its order. Tensors that share memory in ``base`` (tied weights)
        share it in the result.

    Raises:
        InputError: missing or extra tensors, other shapes, NaN or Inf; names the tensor and the expert.
        ConfigError: unknown method, option or value.
    """
    if not experts:
        raise ConfigError("experts is empty; at least one is needed")
    if not isinstance(method, str) and options:
        raise ConfigError("options belong to a method given by name")
    chosen = make_method(method, options) if isinstance(method, str) else method
    problems = []
    for index, expert in enumerate(experts):
        for name, tensor in base.items():
            if name not in expert and not tensor.is_floating_point():
                continue  # integer buffers come from the base
            if name not in expert:
                problems.append(f"experts[{index}]: tensor {name!r} of the base is missing")
            elif expert[name].shape != tensor.shape:
                problems.append(
                    f"experts[{index}]: tensor {name!r} has shape {list(expert[name].shape)}, "
                    f"in the base {list(tensor.shape)}"
                )
            elif expert[name].is_floating_point() != tensor.is_floating_point():
                problems.append(
                    f"experts[{index}]: tensor {name!r} is {expert[name].dtype}, in the base {tensor.dtype}"
                )
        problems += [f"experts[{index}]: tensor {name!r} is not in the base" for name in expert if name not in base]
    if problems:
        raise InputError("the state dicts do not fit each other:", problems)

    if stochastic_rounding is not None:
        outputs = [dtype or tensor.dtype for tensor in base.values() if tensor.is_floating_point()]
        if stochastic_rounding < 0:
            raise ConfigError(f"stochastic_rounding is a seed, 0 or more; got {stochastic_rounding}")
        if torch.bfloat16 not in outputs:
            raise ConfigError("stochastic_rounding: no merged tensor becomes bfloat16 (dtype=torch.bfloat16 does that)")

    result: dict[str, Tensor] = {}
    merged_at: dict[tuple[Any, ...], Tensor] = {}
    with torch.no_grad():
        for name, tensor in base.items():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and place in merged_at:
                result[name] = merged_at[place]
                continue
            sources = [expert[name] for expert in experts] if tensor.is_floating_point() else []
            seed = tensor_seed(stochastic_rounding, name) if (dtype or tensor.dtype) == torch.bfloat16 else None
            result[name] = _merge_one(name, tensor, sources, chosen, scaling, exclude, dtype, seed)
            merged_at[place] = result[name]
    return result


def _merge_one(
    name: str,
    base: Tensor,
    experts: Sequence[Tensor],
    method: Method,
    scaling: float,
    exclude: Sequence[str],
    dtype: torch.dtype | None,
    seed: int | None,
) -> Tensor:
    if not base.is_floating_point():
        return base.clone()
    out_dtype = dtype or base.dtype
    if base.numel() == 0:
        return base.to(out_dtype, copy=True)
    compute = ops.compute_dtype(base.dtype, *(expert.dtype for expert in experts))
    excluded = any(fnmatch.fnmatchcase(name, pattern) for pattern in (*exclude, *method.default_exclude))
    chosen = method if method.accepts(TensorSpec(name, tuple(base.shape), compute)) and not excluded else Mean()
    deltas = [ops.subtract(expert.to(base.device), base, dtype=compute) for expert in experts]
    try:
        value, _ = chosen.merge(as_deltas(deltas))
    except NotFiniteError as error:
        raise InputError(f"tensor {name!r}: base or experts{error.tasks} hold NaN or Inf") from error
    except ConfigError as error:
        raise ConfigError(f"tensor {name!r} {list(base.shape)}: {error}") from error
    return ops.apply_delta(base, value, scalings=[scaling], dtype=out_dtype, seed=seed)[0]


def merge(
    config: str | os.PathLike[str] | Mapping[str, Any] | MergeConfig,
    *,
    device: str = "auto",
    max_ram: int | None = None,
    max_vram: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    observer: Observer | None = None,
) -> Report:
    """Merges checkpoints on disk into a new one, as ``isomerge run`` does.

    Args:
        config: path of a YAML file, a dict with the same keys, or a MergeConfig.
        device, max_ram, max_vram, resume, overwrite, io, observer: see ``engine.run``; ceilings in bytes.

    Returns:
        The report, also written into the output.

    Raises:
        ConfigError, InputError, ResourceError: with a message that names what is wrong; nothing half-written is left.
    """
    return run(
        make_plan(load_config(config), resolve_device(device), max_ram=max_ram, max_vram=max_vram),
        device=device,
        max_ram=max_ram,
        max_vram=max_vram,
        resume=resume,
        overwrite=overwrite,
        io=io,
        observer=observer,
    )


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
