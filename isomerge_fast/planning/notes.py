"""Tell what might surprise about a planned merge, and which setting changes it."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from ..checkpoint.checks.bare_lora import factors_among
from ..checkpoint.checks.buffers import Buffers
from ..checkpoint.header_metadata import kept_metadata
from ..checkpoint.layout import DTYPE_NAMES, Checkpoint, StoredTensor
from ..checkpoint.lora.adapter import Adapter, base_name
from ..checkpoint.lora.merged_settings import lost_heads
from ..checkpoint.output.file_kinds import OTHER_WEIGHTS, is_weights, other_weights
from ..checkpoint.submodules import submodules_of
from ..errors import MAX_LISTED, listed, shown
from ..methods import make_method
from ..ops import FLOAT_DTYPES
from .drift import drift_notes
from .inputs import last_part
from .pattern_checks import idle_patterns, rules_of
from .plan import LeftOut, Plan, TensorPlan
from .tensor_roles import HEADS, POSITIONS, ROUTERS, SEGMENTS, TOKENS, Roles, labels_of, looks_like_a_head

# Published values of α lie between 0.9 and 1.9, those of docs/accuracy.md between 0.02 and 1.2.
LARGEST_SCALING = 4.0
WIDE_DTYPES = (torch.float32, torch.float64)


def notes_of(plan: Plan) -> Iterator[str]:
    """Yield all notes on a plan: what might surprise, and what changes it."""
    yield from _code_notes(plan)
    yield from _scaling_notes(plan)
    yield from _role_notes(plan)
    yield from _pattern_notes(plan)
    yield from _tensor_notes(plan)
    yield from _left_out_notes(plan.left_out)
    yield from _factor_notes(plan)
    yield from _buffer_notes(plan.buffers)
    yield from _expert_notes(plan)
    yield from drift_notes(plan.base, plan.experts)
    if plan.config.dtype in ("float16", "bfloat16") and any(t.base.dtype in WIDE_DTYPES for t in plan.tensors):
        yield f"float tensors are rounded to {plan.config.dtype}; the base is wider"
    yield from _file_notes(plan)


def _code_notes(plan: Plan) -> Iterator[str]:
    if code := [name for name in plan.companions if name.endswith(".py")]:
        yield (
            f"code is copied from {plan.base.path}, which loading the output with trust_remote_code would run: "
            f"{listed(code)}"
        )


def _scaling_notes(plan: Plan) -> Iterator[str]:
    """Yield notes on an α that was not chosen, or that nobody has found to be good."""
    config = plan.config
    if config.scaling is None and config.method != "mean":
        yield (
            "scaling is not given, so α = 1; the best α is found on validation data: several --scaling share one "
            "decomposition, or --save-delta and isomerge apply"
        )
    if large := [f"{value:g}" for value in config.scalings if abs(value) > LARGEST_SCALING]:
        yield f"scaling {', '.join(large)}: published values of α lie between 0.9 and 1.9; is it meant?"
    if negative := [f"{value:g}" for value in config.scalings if value < 0]:
        yield f"scaling {', '.join(negative)}: a negative α moves the base away from its experts"
    if 0.0 in config.scalings:
        yield "scaling 0: nothing of the experts is in the output, which is the base"


def _role_notes(plan: Plan) -> Iterator[str]:
    """Yield notes on matrices of another kind than a layer's, which the methods' papers do not single out."""
    roles = Roles(plan.base)
    found: dict[str, list[TensorPlan]] = {}
    for tensor in plan.tensors:
        chosen = tensor.reason.startswith("overrides")
        if tensor.method is None or tensor.method.any_shape or chosen:
            continue
        if (role := roles.of(tensor.name, tensor.base.shape)) is not None:
            found.setdefault(role, []).append(tensor)
    for group in ((TOKENS, POSITIONS, SEGMENTS), (ROUTERS,)):
        roles_here = [role for role in group if role in found]
        if tensors := [tensor for role in roles_here for tensor in found[role]]:
            yield (
                f"{' and '.join(roles_here)} are matrices and are merged by {_methods_of(tensors)}, as published; to "
                f"average them: {_override_line(tensors)}"
            )
    if heads := found.get(HEADS):
        yield (
            f"{HEADS} ({listed([tensor.name for tensor in heads])}) are merged by {_methods_of(heads)} like any other "
            f"matrix, which blends the classes of different tasks into one head; {_compared_labels(plan.experts)}; to "
            f"average them: {_override_line(heads)}; where the tasks differ, each expert's own head is the right one"
        )


def _methods_of(tensors: Iterable[TensorPlan]) -> str:
    return " and ".join(sorted({tensor.action for tensor in tensors}))


def _override_line(tensors: Sequence[TensorPlan]) -> str:
    """Return the line of a config that averages tensors, with one pattern for all that differ only in numbers."""
    groups: dict[str, list[str]] = {}
    for tensor in tensors:
        groups.setdefault(re.sub(r"\d+", "*", glob.escape(tensor.name)), []).append(tensor.name)
    patterns = [pattern if len(names) > 1 else glob.escape(names[0]) for pattern, names in groups.items()]
    lines = [f'{{match: "{pattern}", method: mean}}' for pattern in patterns[:MAX_LISTED]]
    more = [f"and {len(patterns) - MAX_LISTED} more"] if len(patterns) > MAX_LISTED else []
    return f"overrides: [{', '.join(lines + more)}]"


def _compared_labels(experts: Sequence[Checkpoint]) -> str:
    """Return a sentence on whether the experts have the same classes."""
    labels = [_named_labels(expert) for expert in experts]
    if any(each is None for each in labels):
        return "whether these are the same classes cannot be told, as not every config.json names them (id2label)"
    if all(each == labels[0] for each in labels):
        return "their labels (id2label) are the same"
    told = "; ".join(f"{expert.path}: {shown(each)}" for expert, each in zip(experts[:3], labels, strict=False))
    return f"their labels (id2label) differ ({told}{'; …' if len(experts) > 3 else ''})"


def _named_labels(checkpoint: Checkpoint) -> list[str] | None:
    """Return the names of the classes; None where they have only numbers."""
    labels = labels_of(checkpoint)
    return None if labels is None or all(re.fullmatch(r"LABEL_\d+", each) for each in labels) else labels


def _pattern_notes(plan: Plan) -> Iterator[str]:
    if not any(patterns for _, patterns in rules_of(plan.config)):
        return
    merged = [tensor.name for tensor in plan.tensors if tensor.method is not None]
    names = {*merged}
    copied = [name for name in plan.base.tensors if name not in names]
    copied += [tensor.name for tensor in plan.copied_extras]
    copied += [name for each in plan.left_out for name in each.tensors]
    yield from idle_patterns(plan.config, merged, copied)


def _tensor_notes(plan: Plan) -> Iterator[str]:
    base, tensors = plan.base, plan.tensors
    stacks = [tensor.name for tensor in tensors if tensor.method and len(tensor.base.shape) == 3]
    if stacks and make_method(plan.config.method, plan.config.options).default_exclude:
        yield f"{len(stacks)} 3-D tensor(s), such as {stacks[0]!r}, are averaged: the methods are defined on matrices"
    extras = {tensor.name: tensor.base for tensor in plan.copied_extras}
    for expert in plan.experts if extras else ():
        if own := {name: stored for name, stored in extras.items() if name in expert.tensors}:
            yield f"{len(own)} tensor(s) that only {expert.path} has are copied: {_with_shapes(own)}"
    if any(
        tensor.method is None and tensor.base.dtype not in FLOAT_DTYPES
        for tensor in tensors
        if tensor.name in base.tensors
    ):
        yield "integer and boolean tensors come from the base"


def _left_out_notes(left_out: Sequence[LeftOut]) -> Iterator[str]:
    """Yield what of the experts is lost, one note for all that lose the same tensors."""
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[LeftOut]] = {}
    for each in left_out:
        groups.setdefault(tuple((name, stored.shape) for name, stored in each.tensors.items()), []).append(each)
    for members in groups.values():
        tensors = members[0].tensors
        whose = listed([str(each.expert.path) for each in members])
        heads = [name for name in tensors if looks_like_a_head(name)]
        lost = f"; {listed(heads)}: a trained head, by its name, which is lost" if heads else ""
        labels = [_named_labels(each.expert) for each in members]
        if heads and any(labels):
            lost += " with its labels (" + "; ".join(shown(each) for each in labels[:3] if each) + ")"
        yield f"{len(tensors)} tensor(s) of {whose} are left out, as the base has none: {_with_shapes(tensors)}{lost}"


def _factor_notes(plan: Plan) -> Iterator[str]:
    """Yield notes on LoRA factors inside checkpoints, beside the weights that they change."""
    lost = (name for each in plan.left_out for name in each.tensors)
    for names, what in (
        ((tensor.name for tensor in plan.tensors if tensor.method is not None), "is merged as a tensor of its own"),
        (lost, "is left out"),
    ):
        if found := factors_among(names):
            yield (
                f"{len(found)} LoRA factor(s) inside checkpoints, such as {found[0]!r}: each {what}, which is no merge "
                "of the changes that they make; merge them into their weights first (PEFT: merge_and_unload)"
            )


def _with_shapes(tensors: Mapping[str, StoredTensor]) -> str:
    return listed([f"{name!r} {list(stored.shape)}" for name, stored in tensors.items()])


def _expert_notes(plan: Plan) -> Iterator[str]:
    """Yield notes on experts of another base or kind, and on those that are given twice."""
    config, base, experts = plan.config, plan.base, plan.experts
    paths = [os.path.realpath(expert.path) for expert in experts]
    for expert in experts:
        trained_on = base_name(expert) if isinstance(expert, Adapter) else None
        if trained_on and last_part(trained_on) != last_part(str(base.path)):
            yield f"{expert.path} was trained on {shown(trained_on)}: see to it that {base.path} is the same"
        if isinstance(expert, Adapter) and expert.copies:
            yield f"{expert.path}: {listed(expert.copies)} of its base lies in it too; the base's own is taken"
    for index, path in enumerate(paths):
        if path in paths[:index]:
            yield f"expert {config.experts[index]} is given more than once"
        if path == os.path.realpath(base.path):
            yield f"expert {config.experts[index]} is the base itself: its delta is zero"
    for expert in experts:
        mine, other = (base.config or {}).get("model_type"), (expert.config or {}).get("model_type")
        if mine and other and mine != other:
            yield f"{expert.path} is a {shown(other)} model, the base a {shown(mine)}; their tensors fit all the same"


def _buffer_notes(buffers: Buffers) -> Iterator[str]:
    """Yield what becomes of buffers that base and experts do not have alike."""
    computed = "buffer(s) that the model computes for itself are"
    for found, what in (
        (buffers.from_base, f"{computed} the base's, since experts lack them or have others"),
        (buffers.left_out, f"{computed} left out, since the base lacks them"),
        (buffers.others, "integer or boolean tensor(s) are the base's, though experts have others"),
    ):
        if found:
            first = found[0]
            example = f"{first.name!r} {DTYPE_NAMES[first.dtype]} {list(first.shape)} in {first.file}"
            yield f"{len(found)} {what}, such as {example}"


def _file_notes(plan: Plan) -> Iterator[str]:
    """Yield notes on the files of the output: its folder, its settings and its headers."""
    if parts := [name for name in plan.companions if is_weights(name)]:
        yield f"copied as the base has it, byte for byte: {listed(parts)} (no expert has another one)"
    if plan.adapter_settings is None:
        yield from _other_weights(plan)
        yield from _lost_modules(plan)
        yield from plan.config_and_notes[1]
    elif heads := lost_heads(plan.adapters, plan.adapter_settings):
        yield (
            f"the merged adapter has no {heads}, so its task_type is null: PEFT then takes the head of the model "
            "that it is loaded into as it is"
        )
    for path, identity in plan.base.files.items():
        if left := kept_metadata(identity.metadata)[1]:
            yield f"{path}: too large to be kept of its metadata: {listed([shown(key) for key in left])}"


def _other_weights(plan: Plan) -> Iterator[str]:
    """Yield the files of weights beside the merged ones that may belong to the model, which no output has."""
    for checkpoint in _whole_models(plan.base, *plan.experts):
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


def _lost_modules(plan: Plan) -> Iterator[str]:
    """Yield the modules with weights that an expert has and the output has not."""
    for expert in _whole_models(*plan.experts):
        if missing := [
            name for part in submodules_of(expert.path) for name in part.names if name not in plan.companions
        ]:
            yield f"{expert.path}: left out, as the base has none there: {listed(missing)}"


def _whole_models(*checkpoints: Checkpoint) -> list[Checkpoint]:
    return [each for each in checkpoints if each.is_folder and not isinstance(each, Adapter)]
