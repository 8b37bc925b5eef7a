"""Recognise buffers that a model's code computes: older releases of transformers saved them, newer ones do not.

Where checkpoints disagree about one, nothing that was trained is at stake: the base's is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ...ops import FLOAT_DTYPES
from ..layout import COPIED_DTYPES, Checkpoint, StoredTensor
from ..lora.adapter import Adapter

# Their names, from behind a dot to the end: rotary frequencies and their tables, positions, masks, and the indices of
# windowed attention.
_NAMES = re.compile(
    r"(.*\.)?("
    r"(original_)?inv_freq|(cos|sin)_cached?|rotary\w*\.(cos|sin)|freqs_(cis|cos|sin)|rope\.freqs|rope_embed\.periods"
    r"|position_ids|token_type_ids|embed_positions(\.weights|\._float_tensor)?|num_batches_tracked"
    r"|masked_bias|causal_mask|attn_mask|relative_position_index|relative_coords_table"
    r")"
)
# The noise schedule of latent diffusion, at the top of its single files.
_SCHEDULE = re.compile(r"betas|\w*alphas_cumprod(_prev)?|posterior_(variance|log_variance_clipped|mean_coef[12])")
# Causal masks: [1, 1, n, n] or [n, n]. (A 1-D ``attn.bias`` is trained.)
_MASKS = re.compile(r"(.*\.)?(\w*(attn|attention)\.(bias|mask)|tril)")
# Position tables that are trained in most models, and computed in these.
_TABLES = re.compile(r"(.*\.)?embed_positions\.weight")
_COMPUTING = frozenset(
    {"autoformer", "fsmt", "informer", "marian", "pegasus", "pegasus_x", "roformer", "time_series_transformer"}
)


@dataclass(frozen=True)
class Buffers:
    """List the buffers about which base and experts disagree."""

    # Floats of the base that are copied: an expert lacks them, or has them in another shape or kind.
    from_base: tuple[StoredTensor, ...] = ()
    left_out: tuple[StoredTensor, ...] = ()  # what experts have and the base lacks
    # What experts have in another shape or kind than the base's integers, which are copied anyway.
    others: tuple[StoredTensor, ...] = ()


def is_computed(name: str, shape: Sequence[int], model_type: object = None) -> bool:
    """Return whether a tensor is a buffer that the model's code computes: by its name, and for a mask by its shape."""
    if _NAMES.fullmatch(name) or _SCHEDULE.fullmatch(name):
        return True
    if _MASKS.fullmatch(name):
        return len(shape) >= 2 and shape[-1] == shape[-2] and all(size == 1 for size in shape[:-2])
    return model_type in _COMPUTING and _TABLES.fullmatch(name) is not None


def set_aside_buffers(
    base: Checkpoint, experts: Sequence[Checkpoint], *, extras_are_copied: bool
) -> tuple[tuple[Checkpoint, ...], Buffers]:
    """Return the experts without the buffers that are not merged, and these buffers.

    With ``extras_are_copied`` what one expert alone has stays: it is copied, buffers too.
    """
    whole = [expert for expert in experts if not isinstance(expert, Adapter)]
    model_type = (base.config or {}).get("model_type")
    from_base: dict[str, StoredTensor] = {}
    left_out: dict[str, StoredTensor] = {}
    others: dict[str, StoredTensor] = {}
    for expert in whole:
        for name in sorted(expert.tensors.keys() - base.tensors.keys()):
            is_copied = extras_are_copied and sum(name in other.tensors for other in whole) == 1
            if not is_copied and is_computed(name, expert.tensors[name].shape, model_type):
                left_out.setdefault(name, expert.tensors[name])
        for name, own in base.tensors.items():
            other = expert.tensors.get(name)
            if other is not None and own.shape == other.shape and _is_float(own) == _is_float(other):
                continue
            if own.dtype in COPIED_DTYPES:
                if other is not None:
                    others.setdefault(name, other)
            elif is_computed(name, own.shape, model_type):
                from_base.setdefault(name, own)
    found = Buffers(tuple(from_base.values()), tuple(left_out.values()), tuple(others.values()))
    aside = (*found.from_base, *found.left_out, *found.others)
    return tuple(expert if isinstance(expert, Adapter) else without_tensors(expert, aside) for expert in experts), found


def without_tensors(checkpoint: Checkpoint, tensors: Iterable[StoredTensor]) -> Checkpoint:
    """Return the checkpoint without its tensors that have the names of ``tensors``."""
    names = {stored.name for stored in tensors}
    if names.isdisjoint(checkpoint.tensors):
        return checkpoint
    kept = {name: stored for name, stored in checkpoint.tensors.items() if name not in names}
    return replace(checkpoint, tensors=kept)


def _is_float(stored: StoredTensor) -> bool:
    return stored.dtype in FLOAT_DTYPES
