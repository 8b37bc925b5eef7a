"""Offer Iso-C and Iso-CTS as FusionBench algorithms, with the arguments and results of its own classes.

In a method's YAML: ``_target_: isomerge_fast.integrations.fusion_bench.IsoCFast``.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import ConfigError, nearest
from ...execution.state_dicts import StateDictMerge
from ...methods import IsoC, IsoCTS, Method
from ...planning.pattern_checks import require_matches
from ..peers import FUSION_BENCH, require

require("fusion-bench", FUSION_BENCH, "fusion-bench")

# isort: split
from fusion_bench import (  # type: ignore[import-not-found]  # noqa: E402  # an extra, after the line that says it is one
    BaseAlgorithm,
    BaseModelPool,
    auto_register_config,
)
from fusion_bench.mixins import LightningFabricMixin  # type: ignore[import-not-found]  # noqa: E402  # likewise

from .files import Experts  # noqa: E402  # it imports what FusionBench brings

LOG = logging.getLogger("isomerge_fast")
KEYS = ("scaling_factor", "common_space_fraction", "exclude_keys", "precision", "rank_policy")


class EveryMatrix(IsoC):
    """Merge by Iso-C, and like FusionBench exclude no names that the caller has not excluded."""

    default_exclude: ClassVar[tuple[str, ...]] = ()


class EveryMatrixCTS(IsoCTS):
    """Merge by Iso-CTS, and like FusionBench exclude no names that the caller has not excluded."""

    default_exclude: ClassVar[tuple[str, ...]] = ()


class _Fast(BaseAlgorithm, LightningFabricMixin):
    """Run ``merge_pool`` as an algorithm."""

    _method: Method
    scaling_factor: float
    exclude_keys: Sequence[str] | None

    def __init__(self, **about: Any) -> None:
        for key in about:  # FusionBench itself would only log an unknown key
            if not (key.startswith("_") and key.endswith("_")):
                raise ConfigError(f"key {key!r} is unknown{nearest(key, KEYS)}")
        super().__init__(**about)

    def run(self, modelpool: BaseModelPool) -> Any:
        """Return the pretrained model with merged weights; see ``merge_pool``."""
        return merge_pool(modelpool, self._method, self.scaling_factor, self.exclude_keys, self.fabric.device)


@auto_register_config
class IsoCFast(_Fast):
    """Merge matrices by Iso-C and other tensors by the mean, θ = θ₀ + α·Δ, like ``ISO_C_Merge`` of FusionBench.

    Args:
        scaling_factor: α.
        exclude_keys: exact names of matrices that are averaged.
        about: keys that FusionBench writes into every YAML (``_usage_``, ``_version_``, ``_recursive_``).
        precision, rank_policy: see ``IsoC``. With ``min-dim`` the mean singular value is FusionBench's also where the
            sum of the deltas is rank-deficient; the directions that it then pairs arbitrarily are left out.

    Reference: arXiv 2502.04959 (Iso-C).
    """

    def __init__(
        self,
        scaling_factor: float,
        exclude_keys: Sequence[str] | None = None,
        precision: str = "default",
        rank_policy: str = "min-dim",
        **about: Any,
    ) -> None:
        self._method = EveryMatrix(rank_policy=rank_policy, precision=precision)
        self.scaling_factor, self.exclude_keys = scaling_factor, exclude_keys
        super().__init__(**about)


@auto_register_config
class IsoCTSFast(_Fast):
    """Merge matrices by Iso-CTS and other tensors by the mean, θ = θ₀ + α·Δ, like ``ISO_CTS_Merge`` of FusionBench.

    Args:
        common_space_fraction: ``common_fraction`` of ``IsoCTS``.
        Others: as for ``IsoCFast``.

    Reference: arXiv 2502.04959 (Iso-CTS).
    """

    def __init__(
        self,
        scaling_factor: float,
        common_space_fraction: float = 0.8,
        exclude_keys: Sequence[str] | None = None,
        precision: str = "default",
        rank_policy: str = "min-dim",
        **about: Any,
    ) -> None:
        self._method = EveryMatrixCTS(common_space_fraction, rank_policy=rank_policy, precision=precision)
        self.scaling_factor, self.exclude_keys = scaling_factor, exclude_keys
        self.common_space_fraction = common_space_fraction
        super().__init__(**about)


def _known_keys(keys: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the keys that are names; warn of others, which FusionBench's own classes pass over in silence."""
    try:
        require_matches([("exclude_keys", map(glob.escape, keys))], names)
    except ConfigError as error:
        LOG.warning("%s", error)
    return [key for key in keys if key in names]


@torch.no_grad()
def merge_pool(
    pool: Any, method: Method, scaling: float, exclude_keys: Sequence[str] | None, device: torch.device
) -> Any:
    """Return the pool's pretrained model, with θ₀ + α·Δ in place of its weights θ₀.

    Experts are read from their files tensor by tensor where that gives what the pool would load (``Experts``), else
    loaded by the pool. A model that the pool holds in memory is written to as FusionBench does, but only when every
    tensor is merged; one that was loaded for this merge, at once.

    Args:
        pool: a FusionBench model pool with a pretrained model.
        device: where to compute; the weights stay where they are.

    Raises:
        InputError: experts that do not fit the pretrained model, NaN or Inf; names the tensor and the expert.
        ConfigError: no experts, or a common fraction that leaves a negative number of common directions.
    """
    pretrained = pool.load_pretrained_model()
    if isinstance(pretrained, nn.Module):
        opened = Experts(pool, pretrained)
        base, experts, at_once = pretrained.state_dict(), map(opened.open, pool.model_names), opened.is_private
    else:  # a state dict that the pool itself reads lazily, experts likewise
        base, experts, at_once = pretrained, map(pool.load_model, pool.model_names), False
    exclude = [glob.escape(key) for key in _known_keys(exclude_keys or (), base)]
    # Integers and booleans stay those of the pretrained model: FusionBench's own classes stop at them.
    merged = StateDictMerge(method, scaling, exclude, device=device).merge(base, list(experts))
    if not at_once:
        pretrained.load_state_dict(dict(merged))
        return pretrained
    for name, tensor in merged:
        base[name].copy_(tensor)
    return pretrained
