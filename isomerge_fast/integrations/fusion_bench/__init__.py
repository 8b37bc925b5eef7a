"""Offer Iso-C and Iso-CTS as FusionBench algorithms: ``_target_: isomerge_fast.integrations.fusion_bench.IsoCFast``."""

from .algorithms import IsoCFast, IsoCTSFast, merge_pool

for algorithm in (IsoCFast, IsoCTSFast):  # FusionBench writes a class's module into the configs that it saves
    algorithm.__module__ = __name__

__all__ = ["IsoCFast", "IsoCTSFast", "merge_pool"]
