"""Merges of what is in memory: deltas, state dicts, tensors that are read when they are asked for."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from . import ops
from .errors import ConfigError, InputError
from .methods import Method, NotFiniteError, OutOfRangeError, TensorSpec, as_deltas, make_method, method_for
from .methods.protocol import check_factors, require_matrices
from .patterns import require_matches
from .planner import tensor_seed

Array = Tensor | np.ndarray


def iso_c(deltas: Array | Sequence[Array], *, weights: Sequence[float] | None = None, **options: Any) -> Tensor:
    """Iso-C: σ̄ · U Vᵀ with U Σ Vᵀ = svd(Σ_t w_t Δ_t), σ̄ the mean singular value.

    Args:
        deltas: T tensors or numpy arrays [M, N], one stack [T, M, N], or batched [T, B, M, N]; float64, float32,
            bfloat16 or float16, also mixed, of any strides, on one device; never modified.
        weights: w_t, T numbers; 1 when left out.
        options: fields of ``IsoC``: ``rank_policy``, ``precision`` (``fast``, ``default``, ``reference``), ``solver``.

    Returns:
        The merged Δ, [M, N] or [B, M, N], before scaling: a tensor without a graph on the device of the deltas, float64
        when one of them is float64, else float32. Of meta tensors a meta tensor, after the same checks.

    Raises:
        ValueError: no tasks, shapes or devices that differ, fewer than two dimensions, integer tensors, NaN or Inf.
        ConfigError: unknown option or value, or weights that are not T finite numbers (a ValueError too).

    Reference: arXiv 2502.04959 (Iso-C).
    """
    return _merge_deltas("iso-c", deltas, weights, options)


def iso_cts(
    deltas: Array | Sequence[Array],
    common_fraction: float = 0.8,
    *,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    """Iso-CTS: the top k directions of Σ_t w_t Δ_t and s directions of every w_t Δ_t, orthogonalised, with equal
    singular values.

    Args:
        deltas, weights: as for ``iso_c``.
        common_fraction: f; k = r − T·s and T·s ≈ r·(1 − f), rounded as in the released code (``split_rank``).
        options: fields of ``IsoCTS``: ``rank_policy``, ``precision``, ``solver``.

    Returns, raises: as ``iso_c``; also ConfigError when rounding gives a negative k.

    Reference: arXiv 2502.04959 (Iso-CTS).
    """
    return _merge_deltas("iso-cts", deltas, weights, {"common_fraction": common_fraction, **options})


@torch.no_grad()
def _merge_deltas(
    name: str, deltas: Array | Sequence[Array], weights: Sequence[float] | None, options: Mapping[str, Any]
) -> Tensor:
    method = make_method(name, options)
    if isinstance(deltas, Tensor | np.ndarray):
        tensors: Sequence[Tensor] | Tensor = _as_tensor(deltas, "deltas")
    else:
        tensors = [_as_tensor(delta, f"deltas[{task}]") for task, delta in enumerate(deltas)]
    source = as_deltas(tensors)
    for task, tensor in enumerate(tensors):
        if tensor.dtype not in ops.FLOAT_DTYPES:
            raise InputError(f"deltas[{task}] is {tensor.dtype}, which is not merged")
    factors = _check_weights(weights, source.n_tasks)
    check_factors("weight", factors, source.dtype)
    if source.device.type == "meta":
        require_matrices(name, source.shape)
        method.check(TensorSpec("deltas", tuple(source.shape[-2:]), source.dtype), source.n_tasks)
        return torch.empty(source.shape, dtype=source.dtype, device="meta")
    if weights is not None:
        source = as_deltas([source.delta(task) * factor for task, factor in enumerate(factors)])
    value, _ = method.merge(source)
    return value.to(source.dtype)


def merge_state_dicts(
    base: Mapping[str, Array],
    experts: Sequence[Mapping[str, Array]],
    method: str | Method = "iso-cts",
    scaling: float = 1.0,
    exclude: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    stochastic_rounding: int | None = None,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """θ = θ₀ + α·Δ for every tensor of ``base``, by the rules of a merge of files.

    Matrices go through ``method``; other float tensors, and those whose names match ``exclude`` (shell patterns) or
    contain ``text_projection``, are averaged; integer and boolean tensors come from ``base``.

    Args:
        base, experts: state dicts with the same names and shapes, of tensors or numpy arrays; never modified. One from
            ``open_state_dict`` is checked without reading it, and then read one tensor at a time. Float tensors may
            differ in dtype and device; what is not float64 is computed in float32, on the device of the base's tensor.
        method: a name or a method object.
        scaling: α.
        dtype: of the float tensors returned; each tensor's dtype in ``base`` when None.
        stochastic_rounding: a seed; see ``MergeConfig``.
        weights: w_t, a number for every expert: Δ_t becomes w_t Δ_t everywhere, in averages (1/T) Σ_t w_t Δ_t.
        options: hyper-parameters, when ``method`` is a name.

    Returns:
        A new state dict on the devices of ``base``, in its order, that shares no memory with it and has no graph.
        Tensors that share memory in ``base`` (tied weights) share it in the result: what the experts hold under the
        first of their names is merged. Of a base and experts on the meta device, meta tensors after the same checks.

    Raises:
        InputError: missing or extra tensors, other shapes, meta tensors beside real ones, NaN or Inf; names the tensor
            and the expert.
        ConfigError: unknown method, option or value; a pattern of ``exclude`` that matches no tensor.
    """
    if not isinstance(method, str) and options:
        raise ConfigError("options belong to a method given by name")
    chosen = make_method(method, options) if isinstance(method, str) else method
    merged = merge_tensors(
        base,
        experts,
        chosen,
        scaling=scaling,
        exclude=exclude,
        dtype=dtype,
        stochastic_rounding=stochastic_rounding,
        weights=weights,
    )
    return dict(merged)


def merge_tensors(
    base: Mapping[str, Array],
    experts: Sequence[Mapping[str, Array]],
    method: Method,
    *,
    scaling: float,
    exclude: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    stochastic_rounding: int | None = None,
    weights: Sequence[float] | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, merged tensor) in the order of ``base``, each made when it is asked for; all checks come before that.

    Args:
        device: where to compute; the device of the base's tensor when None.
        Others: as for ``merge_state_dicts``.

    Raises:
        As ``merge_state_dicts``.
    """
    if not experts:
        raise ConfigError("experts is empty; at least one is needed")
    factors = _check_weights(weights, len(experts))
    known = _shapes_of(base, "base")
    dtypes = _check_fit(known, isinstance(base, Described), experts)
    for name, tensor in known.items():
        if tensor.is_floating_point():
            compute = ops.compute_dtype(*dtypes[name])
            check_factors(f"tensor {name!r}: scaling", [scaling], compute)
            check_factors(f"tensor {name!r}: weight", factors, compute)
    require_matches([("exclude", exclude)], known)
    if stochastic_rounding is not None:
        outputs = [dtype or tensor.dtype for tensor in known.values() if tensor.is_floating_point()]
        if stochastic_rounding < 0:
            raise ConfigError(f"stochastic_rounding is a seed, 0 or more; got {stochastic_rounding}")
        if torch.bfloat16 not in outputs:
            raise ConfigError("stochastic_rounding: no merged tensor becomes bfloat16 (dtype=torch.bfloat16 does that)")

    def walk() -> Iterator[tuple[str, Tensor]]:
        names = Counter(_place(tensor) for tensor in known.values())
        tied: dict[tuple[Any, ...], Tensor] = {}
        for name, tensor in known.items():
            place = _place(tensor)
            if place in tied:
                yield name, tied[place]
                continue
            seed = tensor_seed(stochastic_rounding, name) if (dtype or tensor.dtype) == torch.bfloat16 else None
            origin = _as_tensor(base[name], f"base: tensor {name!r}") if isinstance(base, Described) else tensor
            spec = TensorSpec(name, tuple(tensor.shape), ops.compute_dtype(*dtypes[name]))
            merged = _merge_one(spec, origin, experts, factors, method, scaling, exclude, dtype, seed, device)
            if names[place] > 1:
                tied[place] = merged
            yield name, merged

    return walk()


@runtime_checkable
class Described(Protocol):
    """A state dict that tells shapes and dtypes without reading: see ``open_state_dict``."""

    def meta(self) -> Mapping[str, Tensor]:
        """Every tensor on the meta device."""
        ...


def _shapes_of(state: Mapping[str, Array], what: str) -> dict[str, Tensor]:
    """The tensors themselves, or on the meta device where they would have to be read."""
    if isinstance(state, Described):
        return dict(state.meta())
    return {name: _as_tensor(value, f"{what}: tensor {name!r}") for name, value in state.items()}


def _check_fit(
    base: Mapping[str, Tensor], is_stored: bool, experts: Sequence[Mapping[str, Array]]
) -> dict[str, list[torch.dtype]]:
    """The dtypes that every tensor has in the base and the experts.

    Raises:
        InputError: with everything that keeps these state dicts from being merged.
    """
    dtypes = {name: [tensor.dtype] for name, tensor in base.items()}
    problems = [
        f"base: tensor {name!r} is {tensor.dtype}, which is not merged"
        for name, tensor in base.items()
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in ops.FLOAT_DTYPES)
    ]
    for index, expert in enumerate(experts):
        stored = expert.meta() if isinstance(expert, Described) else None
        for name, tensor in base.items():
            where = f"experts[{index}]: tensor {name!r}"
            if name not in expert:
                if tensor.is_floating_point():  # integer buffers come from the base
                    problems.append(f"{where} of the base is missing")
                continue
            value = _as_tensor(expert[name], where) if stored is None else stored[name]
            dtypes[name].append(value.dtype)
            is_real, base_is_real = stored is not None or not value.is_meta, is_stored or not tensor.is_meta
            if value.shape != tensor.shape:
                problems.append(f"{where} has shape {list(value.shape)}, in the base {list(tensor.shape)}")
            elif value.is_floating_point() != tensor.is_floating_point():
                problems.append(f"{where} is {value.dtype}, in the base {tensor.dtype}")
            elif value.is_floating_point() and value.dtype not in ops.FLOAT_DTYPES:
                problems.append(f"{where} is {value.dtype}, which is not merged")
            elif is_real != base_is_real:
                there, here = ("holds numbers", "a meta tensor") if is_real else ("is a meta tensor", "numbers")
                problems.append(f"{where} {there}, in the base {here}: all on the meta device, or none")
        problems += [f"experts[{index}]: tensor {name!r} is not in the base" for name in expert if name not in base]
    if problems:
        raise InputError("the state dicts do not fit each other:", problems)
    return dtypes


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors that are the same memory have in common; of empty ones nothing is."""
    memory = tensor.untyped_storage()._cdata if tensor.is_meta else tensor.data_ptr()
    alone = None if tensor.numel() else id(tensor)
    return (tensor.device, memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, alone)


@torch.no_grad()
def _merge_one(
    spec: TensorSpec,
    base: Tensor,
    experts: Sequence[Mapping[str, Array]],
    weights: Sequence[float],
    method: Method,
    scaling: float,
    exclude: Sequence[str],
    dtype: torch.dtype | None,
    seed: int | None,
    device: torch.device | None,
) -> Tensor:
    if not base.is_floating_point():
        return base.clone()
    out_dtype = dtype or base.dtype
    if base.numel() == 0:
        return base.to(out_dtype, copy=True)
    name = spec.name
    chosen = method_for(method, spec, exclude)
    try:
        if base.is_meta:
            chosen.check(spec, len(experts))
            return torch.empty(base.shape, dtype=out_dtype, device="meta")
        origin = base.to(device or base.device)
        deltas = [
            _delta(_as_tensor(expert[name], f"experts[{index}]: tensor {name!r}"), origin, spec.dtype, weight)
            for index, (expert, weight) in enumerate(zip(experts, weights, strict=True))
        ]
        value, _ = chosen.merge(as_deltas(deltas))
    except NotFiniteError as error:
        inputs = [base, *(_as_tensor(expert[name], f"tensor {name!r}") for expert in experts)]
        held = any(bool(ops.count_nonfinite(tensor)) for tensor in inputs)
        what = "hold NaN or Inf" if held else f"are too far apart for {_dtype_name(spec.dtype)}"
        raise InputError(f"tensor {name!r}: base or experts{error.tasks} {what}") from error
    except OutOfRangeError as error:
        raise InputError(f"tensor {name!r}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"tensor {name!r} {list(base.shape)}: {error}") from error
    (merged,) = ops.apply_delta(origin, value, scalings=[scaling], dtype=out_dtype, seed=seed)
    if count := int(ops.count_nonfinite(merged)):
        raise InputError(
            f"tensor {name!r}: {count} merged weights overflow {_dtype_name(out_dtype)} at scaling {scaling:g}"
        )
    return merged.to(base.device)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _delta(expert: Tensor, base: Tensor, dtype: torch.dtype, weight: float) -> Tensor:
    delta = ops.subtract(expert.to(base.device), base, dtype=dtype)
    return delta if weight == 1.0 else delta.mul_(weight)


def _check_weights(weights: Sequence[float] | None, tasks: int) -> Sequence[float]:
    """w_t, or ones.

    Raises:
        ConfigError: another number of weights than tasks, or one that is not a finite number.
    """
    if weights is None:
        return (1.0,) * tasks
    values = [float(weight) for weight in weights]
    if len(values) != tasks or not all(math.isfinite(value) for value in values):
        raise ConfigError(f"weights: expected {tasks} finite numbers, one a task; got {values}")
    return values


def _as_tensor(value: object, what: str) -> Tensor:
    """A tensor as it is, an array as a tensor in the same memory: a copy only where torch has no such strides or bytes.

    Raises:
        InputError: neither of the two, or of a kind that holds no plain numbers; ``what`` begins the message.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise InputError(f"{what} is {value.layout}; expected a dense tensor")
        return value
    if not isinstance(value, np.ndarray | np.generic):
        raise InputError(f"{what} is a {type(value).__name__}; expected a tensor or a numpy array")
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(f"{what} is a masked array, whose mask would be lost; fill it first")
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise InputError(f"{what} is a numpy array of {array.dtype}; expected float16, float32, float64 or integers")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing is written to it
        try:
            return torch.from_numpy(array)
        except ValueError:  # negative strides, or steps that are no multiple of an element
            return torch.from_numpy(array.copy())
