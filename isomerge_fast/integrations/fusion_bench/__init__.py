"""Offer Iso-C and Iso-CTS as FusionBench algorithms: ``_target_: isomerge_fast.integrations.fusion_bench.IsoCFast``."""

from .algorithms import IsoCFast, IsoCTSFast, merge_pool

__all__ = ["IsoCFast", "IsoCTSFast", "merge_pool"]
