"""Merge tensors in memory: deltas, state dicts, tensors that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .errors import InputError
from .execution.memory_inputs import Array, as_tensor, read_deltas, read_weights
from .execution.state_dicts import StateDictMerge
from .linalg.auto import TOLERANCES
from .linalg.randomized import SvdResult, top_triplets
from .methods import MemoryDeltas, Method, TensorSpec, given_method, make_method
from .methods.certified import exact_products
from .methods.source import checked_weights
from .parsing.values import number, refuse, whole_number
from .planning.routes import merge_with_retry


def iso_c(deltas: Array | Sequence[Array], *, weights: Sequence[float] | None = None, **options: Any) -> Tensor:
    """Merge deltas by Iso-C: σ̄ · U Vᵀ with U Σ Vᵀ = svd(Σ_t w_t Δ_t), σ̄ the mean singular value.

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
    """Merge deltas by Iso-CTS: give common and task-specific directions equal singular values.

    These are the top k directions of Σ_t w_t Δ_t and s directions of every w_t Δ_t, orthogonalised.

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
    """Merge state dicts: θ = θ₀ + α·Δ for every tensor of ``base``, by the rules of a merge of files.

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
    merge = StateDictMerge(given_method(method, options), scaling, exclude, dtype, stochastic_rounding, weights)
    return dict(merge.merge(base, experts))


@torch.no_grad()
def randomized_svd(a: Array, rank: int, *, n_oversamples: int = 9, tolerance: float | None = None) -> SvdResult:
    """Find the top singular triplets of matrices and prove that they are: A ≈ U diag(s) Vᴴ, U and V of k columns.

    Like ``torch.linalg.svd`` cut off after k, and unlike ``torch.svd_lowrank``: that returns V and not Vᴴ, it does not
    say how far its vectors are from the singular ones, and what it finds depends on torch's generator. Here every
    matrix has evidence. Where a way to find the triplets misses its certificate, the next one follows and the evidence
    says so: products with A alone where it is nearly of rank k; a Chebyshev-filtered search in the float64 Gram matrix;
    all eigenvectors of that; a full float64 SVD. The draw is fixed: the same input gives the same result.

        ‖A v − s u‖ and ‖Aᵀu − s v‖ ≤ tolerance · s_1,        ‖sin θ‖_F/√k ≤ tolerance,

    θ between the spans of U and V and those of the true top k vectors. Where s_k and s_{k+1} are so close that float64
    cannot tell these (``determined`` is false), the former alone is certified, and that no σ beyond the k exceeds s_k
    by more than tolerance · s_1; ``captured`` says how much of ‖A‖_F² is in the result. The signs of pairs of vectors
    are arbitrary.

    Args:
        a: a tensor or a numpy array [M, N] or [..., M, N], float64, float32, bfloat16 or float16, of any strides; never
            modified. Everything but the first products with nearly low-rank matrices is computed in float64, in blocks.
        rank: k, from 0 to min(M, N).
        n_oversamples: p, 1 or more: k + p columns are searched for (on a GPU up to 128 where that costs no time). More
            take fewer steps where singular values beyond the k-th lie close together.
        tolerance: 1e-5 when left out, of float64 input 1e-8. It is for the float64 vectors and values, before they are
            rounded to the dtype of the result.

    Returns:
        ``SvdResult`` with ``u`` [..., M, k], ``s`` [..., k] descending, ``vh`` [..., k, N] and ``evidence``; it unpacks
        as ``u, s, vh``. Float64 of float64 input, else float32: tensors without a graph on the device of A. Columns are
        orthonormal also where A has fewer than k directions. The evidence is a ``SvdEvidence``, whose fields have a
        number a matrix, [...]: ``residual``, ``orthogonality``, ``angle``, ``gap``, ``captured``, ``determined`` and
        ``certified``, and names: ``algorithm`` of the ways taken, ``escalations`` of those given up and why.

    Raises:
        InputError: no matrices, other dtypes, a meta tensor, NaN or Inf (a ValueError).
        ConfigError: a rank, a number of columns or a tolerance that cannot be (a ValueError too).

    Reference: Halko, Martinsson, Tropp, SIAM Review 53 (2011); Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219
    (2006).
    """
    matrices = as_tensor(a, "a").detach()
    if matrices.dtype not in ops.FLOAT_DTYPES:
        raise InputError(f"a is {matrices.dtype}; expected float64, float32, bfloat16 or float16")
    if matrices.ndim < 2:
        raise InputError(f"a has shape {list(matrices.shape)}; expected a matrix [M, N] or a batch of them [..., M, N]")
    if matrices.is_meta:
        raise InputError("a is a meta tensor, which has no numbers")
    kept = whole_number(rank, "rank", 0, min(matrices.shape[-2:]))
    columns = whole_number(n_oversamples, "n_oversamples", 1)
    tier = "reference" if matrices.dtype == torch.float64 else "default"
    limit = TOLERANCES[tier] if tolerance is None else number(tolerance, "tolerance")
    if limit <= 0:
        refuse(tolerance, "tolerance", "a number above 0")
    if count := int(ops.count_nonfinite(matrices)):
        raise InputError(f"a {list(matrices.shape)} has {count} entries that are NaN or infinite")
    with exact_products(matrices.device):
        return top_triplets(matrices, kept, n_oversamples=columns, tolerance=limit)
