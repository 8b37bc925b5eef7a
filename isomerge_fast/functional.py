"""Merges of what is in memory: deltas, state dicts, tensors that are read when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import ops
from .errors import ConfigError, InputError
from .execution.memory_inputs import (
    Array,
    Described,
    as_tensor,
    check_fit,
    read_deltas,
    read_experts,
    read_weights,
    shapes_of,
)
from .methods import (
    DeltaSource,
    MemoryDeltas,
    Method,
    NotFiniteError,
    OutOfRangeError,
    RowBlock,
    TensorSpec,
    given_method,
    make_method,
    method_for,
)
from .methods.source import check_finite, checked_weights
from .parsing.values import dtype_name, list_of, number, pattern, whole_number
from .planning.drafts import tensor_seed
from .planning.part_sizes import ROW_STEP
from .planning.pattern_checks import require_matches
from .planning.routes import memory_route, merge_with_retry

# So much of a tensor is rounded at once.
PART_ELEMENTS = 1 << 22


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
        InputError: no tasks, shapes or devices that differ, no matrices, integer tensors, NaN or Inf (a ValueError).
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
    given = read_deltas(deltas)
    compute = ops.compute_dtype(*(tensor.dtype for tensor in given))
    factors = checked_weights(read_weights(weights, len(given)), compute)
    source = MemoryDeltas(given, weights=factors, dtype=compute)
    if source.device.type == "meta":
        method.check(TensorSpec("deltas", tuple(source.shape[-2:]), source.dtype), source.n_tasks)
        return torch.empty(source.shape, dtype=source.dtype, device="meta")
    value, _ = merge_with_retry(method, source)
    return value.to(source.dtype)


def merge_state_dicts(
    base: Mapping[str, Array],
    experts: Iterable[Mapping[str, Array]],
    method: str | Method = "iso-cts",
    scaling: float = 1.0,
    exclude: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
    stochastic_rounding: int | None = None,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """θ = θ₀ + α·Δ for every tensor of ``base``, by the rules of a merge of files.

    Matrices go through ``method``; other float tensors, and those whose names match ``exclude`` (shell patterns) or
    contain ``text_projection``, are averaged; integer and boolean tensors come from ``base``. So do buffers that a
    model computes for itself (``inv_freq``) where an expert lacks one or has it in another shape.

    Args:
        base, experts: state dicts with the same names and shapes, of tensors or numpy arrays; never modified. One from
            ``open_state_dict`` is checked without reading it, and then read tensor by tensor. Float tensors may
            differ in dtype and device; what is not float64 is computed in float32, on the device of the base's tensor.
        method: a name or a method object.
        scaling: α.
        dtype: of the float tensors returned, or its name; each tensor's dtype in ``base`` when None.
        stochastic_rounding: a seed; see ``MergeConfig``.
        weights: w_t, a number for every expert: Δ_t becomes w_t Δ_t everywhere, in averages (1/T) Σ_t w_t Δ_t.
        options: hyper-parameters, when ``method`` is a name.

    Returns:
        A new state dict on the devices of ``base``, in its order, that shares no memory with it and has no graph.
        Tensors that share memory in ``base`` (tied weights) share it in the result: what the experts hold under the
        first of their names is merged. Of a base and experts on the meta device, meta tensors after the same checks.

    Raises:
        InputError: no tensors, missing or extra ones, other shapes, meta tensors beside real ones, NaN or Inf; names
            the tensor and the expert.
        ConfigError: unknown method, option or value; no state dicts; a pattern of ``exclude`` that matches no tensor.
    """
    merged = merge_tensors(
        base,
        experts,
        given_method(method, options),
        scaling=scaling,
        exclude=exclude,
        dtype=dtype,
        stochastic_rounding=stochastic_rounding,
        weights=weights,
    )
    return dict(merged)


def merge_tensors(
    base: Mapping[str, Array],
    experts: Iterable[Mapping[str, Array]],
    method: Method,
    *,
    scaling: float,
    exclude: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
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
    scaling = number(scaling, "scaling")
    exclude = list_of(pattern, "a list of patterns: ['*lm_head*', '*norm*']")(exclude, "exclude")
    wanted: torch.dtype | None = None if dtype is None else getattr(torch, dtype_name(dtype, "dtype"))
    seed = None if stochastic_rounding is None else whole_number(stochastic_rounding, "stochastic_rounding", 0)
    known = shapes_of(base, "base")
    states = read_experts(experts)
    given = read_weights(weights, len(states))
    dtypes = check_fit(known, isinstance(base, Described), states)
    weights_in: dict[torch.dtype, Sequence[float] | None] = {}
    for name, found in dtypes.items():
        compute, where = ops.compute_dtype(*found), f"tensor {name!r}: "
        check_finite(f"{where}scaling", [scaling], compute)
        if compute not in weights_in:
            weights_in[compute] = checked_weights(given, compute, where)
    require_matches([("exclude", exclude)], known)
    if seed is not None:
        outputs = [wanted or tensor.dtype for tensor in known.values() if tensor.is_floating_point()]
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
            bits = tensor_seed(seed, name) if (wanted or tensor.dtype) == torch.bfloat16 else None
            origin = as_tensor(base[name], f"base: tensor {name!r}") if isinstance(base, Described) else tensor
            if name in dtypes:
                spec = TensorSpec(name, tuple(tensor.shape), ops.compute_dtype(*dtypes[name]))
                factors = weights_in[spec.dtype]
                merged = _merge_one(spec, origin, states, factors, method, scaling, exclude, wanted, bits, device)
            else:
                merged = origin.detach().clone()
            if names[place] > 1:
                tied[place] = merged
            yield name, merged

    return walk()


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
    weights: Sequence[float] | None,
    method: Method,
    scaling: float,
    exclude: Sequence[str],
    dtype: torch.dtype | None,
    seed: int | None,
    device: torch.device | None,
) -> Tensor:
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
        tensors = [
            as_tensor(expert[name], f"experts[{index}]: tensor {name!r}").to(origin.device)
            for index, expert in enumerate(experts)
        ]
        if base.ndim == 0:  # tensors are walked by rows, of which it has none
            origin, tensors = origin[None], [tensor[None] for tensor in tensors]
        source = MemoryDeltas(tensors, origin, weights=weights, dtype=spec.dtype, full_spec=spec)
        merged = merge_source(chosen, source, origin, scaling=scaling, dtype=out_dtype, seed=seed).view(base.shape)
    except NotFiniteError as error:
        inputs = [base, *(as_tensor(expert[name], f"tensor {name!r}") for expert in experts)]
        held = any(bool(ops.count_nonfinite(tensor)) for tensor in inputs)
        what = "hold NaN or Inf" if held else f"are too far apart for {_dtype_name(spec.dtype)}"
        raise InputError(f"tensor {name!r}: base or experts{error.tasks} {what}") from error
    except OutOfRangeError as error:
        raise InputError(f"tensor {name!r}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"tensor {name!r} {list(base.shape)}: {error}") from error
    if count := int(ops.count_nonfinite(merged)):
        raise InputError(
            f"tensor {name!r}: {count} merged weights overflow {_dtype_name(out_dtype)} at scaling {scaling:g}"
        )
    return merged.to(base.device)


def merge_source(
    method: Method, source: DeltaSource, base: Tensor, *, scaling: float, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """Return θ₀ + α·Δ of one tensor, or of a batch of matrices [B, M, N], rounded once to ``dtype``.

    Args:
        source: of the deltas, with all copies in memory as they are stored: no T deltas are made of them.
        base: θ₀, as the source has it.
        seed: of stochastic rounding.

    Raises:
        NotFiniteError, OutOfRangeError, ConfigError: see ``methods``.
    """
    sink = _MergedTensor(base, scaling, dtype, seed)
    memory_route(method, base.shape).run(source, sink)
    return sink.merged


class _MergedTensor:
    """The ``Sink`` of one tensor in memory."""

    def __init__(self, base: Tensor, scaling: float, dtype: torch.dtype, seed: int | None) -> None:
        self._base, self._scaling, self._dtype, self._seed = base, scaling, dtype, seed
        self._row_elements = prod(base.shape[1:])

    @cached_property
    def merged(self) -> Tensor:
        """The tensor, made when its first rows come: after what the method takes to make them."""
        return torch.empty(self._base.shape, dtype=self._dtype, device=self._base.device)

    def add(self, block: RowBlock, value: Callable[[RowBlock], Tensor], *, shared: bool) -> None:
        """See ``Sink``."""
        for part in self._parts(block) if shared else (block,):
            assert part.base is not None
            (self.merged[part.rows],) = ops.apply_delta(
                part.base,
                value(part),
                scalings=[self._scaling],
                dtype=self._dtype,
                seed=self._seed,
                first=part.rows.start * self._row_elements,
            )

    def _parts(self, block: RowBlock) -> Iterator[RowBlock]:
        """Yield the block in parts, for what is made of one to be small beside the whole."""
        elements = ops.traits_of(block.like.device).block_elements(PART_ELEMENTS)
        count, step = len(block.like), ROW_STEP * max(1, elements // max(1, ROW_STEP * self._row_elements))
        return (block.part(slice(start, min(start + step, count))) for start in range(0, count, step))

    def copy(self, block: RowBlock) -> None:
        """See ``Sink``."""
        assert block.base is not None
        self.merged[block.rows] = block.base

    def add_factors(self, left: Tensor, right: Tensor) -> None:
        """See ``Sink``."""
        raise AssertionError("a tensor in memory is no adapter")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
