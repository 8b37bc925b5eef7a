"""Says what of the files of a planned output might surprise: of its folder, its settings and its headers."""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint.header_metadata import kept_metadata
from ..checkpoint.lora.adapter import Adapter
from ..checkpoint.lora.merged_settings import lost_heads
from ..checkpoint.output.file_kinds import OTHER_WEIGHTS, other_weights, weights_among
from ..checkpoint.submodules import submodules_of
from ..errors import listed, shown
from .plan import Plan


def file_notes_of(plan: Plan) -> Iterable[str]:
    """Yield what might surprise, each with what changes it."""
    parts = weights_among(plan.companions)
    if parts:
        yield f"copied as the base has it, byte for byte: {listed(parts)} (no expert has another one)"
    yield from _other_weights(plan)
    yield from _parts_of_experts(plan)
    if plan.adapter_settings is None:
        yield from plan.config_and_notes[1]
    else:
        adapters = [expert for expert in plan.experts if isinstance(expert, Adapter)]
        if heads := lost_heads(adapters, plan.adapter_settings):
            yield (
                f"the merged adapter has no {heads}, so its task_type is null: PEFT then takes the head of the model "
                "that it is loaded into as it is"
            )
    for path, identity in plan.base.files.items():
        if left := kept_metadata(identity.metadata)[1]:
            yield f"{path}: too large to be kept of its metadata: {listed([shown(key) for key in left])}"


def _other_weights(plan: Plan) -> Iterable[str]:
    """Yield the files of weights beside the merged ones that may belong to the model, which no output has."""
    if plan.config.adapter_rank is not None:
        return
    for checkpoint in (plan.base, *plan.experts):
        if isinstance(checkpoint, Adapter) or not checkpoint.is_folder:
            continue
        found = other_weights(checkpoint.names, {file.name for file in checkpoint.files})
        if checkpoint is plan.base:
            found += [
                left.name for left in plan.left_behind if left.why.startswith(OTHER_WEIGHTS) and left.name.endswith("/")
            ]
        if found:
            yield (
                f"{checkpoint.path}: weights beside the merged ones, which may belong to the model, are left behind: "
                f"{listed(found)}; copy what does into the output"
            )


def _parts_of_experts(plan: Plan) -> Iterable[str]:
    """Yield the modules with weights that an expert has and the output has not."""
    if plan.config.adapter_rank is not None:
        return
    for expert in plan.experts:
        if isinstance(expert, Adapter) or not expert.is_folder:
            continue
        missing = [name for part in submodules_of(expert.path) for name in part.names if name not in plan.companions]
        if missing:
            yield f"{expert.path}: left out, as the base has none there: {listed(missing)}"
