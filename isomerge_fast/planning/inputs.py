"""Open the checkpoints and adapters of a merge, and find from headers all that keeps them from being merged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..checkpoint.checks.bare_lora import bare_lora
from ..checkpoint.checks.buffers import Buffers, set_aside_buffers, without_tensors
from ..checkpoint.checks.compatibility import interleaved, problems_of
from ..checkpoint.checks.quantized import quantized
from ..checkpoint.layout import COPIED_DTYPES, DTYPE_NAMES, Checkpoint, StoredTensor, open_checkpoint
from ..checkpoint.lora.adapter import Adapter, base_name, is_adapter, open_adapter
from ..checkpoint.lora.merged_settings import lost_biases
from ..checkpoint.output.staging import staging_folder
from ..config import MergeConfig
from ..errors import ConfigError, InputError, first_of
from ..ops import FLOAT_DTYPES


@dataclass(frozen=True)
class Inputs:
    """Hold what is merged."""

    base: Checkpoint
    experts: tuple[Checkpoint, ...]  # without the buffers that are not merged
    extras: dict[str, StoredTensor]  # tensors that one expert alone has and that are to be copied
    buffers: Buffers  # those that are not merged


def open_inputs(config: MergeConfig) -> Inputs:
    """Return the base and the experts, opened, when they fit each other; else raise, with all problems at once."""
    if is_adapter(config.base):
        raise InputError(f"{config.base}: a LoRA adapter; the base is the checkpoint that it was trained on")
    base = open_checkpoint(config.base)
    opened = _open_experts(config, base)
    if config.out is not None:
        check_out(Path(config.out), [base, *opened])
    unmergeable = {str(each.path): why for each in (base, *opened) if (why := _unmergeable(each)) is not None}
    groups = [[why] for why in unmergeable.values()]
    experts, buffers, extras = opened, Buffers(), {}
    if str(base.path) not in unmergeable:
        mergeable = [expert for expert in opened if str(expert.path) not in unmergeable]
        experts, buffers = set_aside_buffers(base, mergeable, extras_are_copied=config.on_extra == "copy")
        extras, conflicts = _extras(base, experts) if config.on_extra == "copy" else ({}, [])
        adapters = [expert for expert in experts if isinstance(expert, Adapter)]
        weights = without_tensors(base, buffers.from_base)
        groups += [*problems_of(weights, experts, config.on_extra), [*_disagreements(adapters, config), *conflicts]]
    problems = interleaved(groups)
    if problems:
        raise InputError(f"{len(problems)} problem(s) found before any output was written:", first_of(problems))
    return Inputs(base, experts, extras, buffers)


def check_out(out: Path, inputs: Iterable[Checkpoint]) -> None:
    """Raise ConfigError where writing ``out`` would replace or delete an input.

    No file of an input lies, whatever links and mounts lead to it, in the output folder or in that where it is built.
    """
    taken = [Path(os.path.realpath(out)), staging_folder(out)]
    there = [os.stat(folder) for folder in taken if folder.is_dir()]

    @cache
    def is_taken(folder: Path) -> bool:
        return folder in taken or any(os.path.samestat(os.stat(folder), each) for each in there)

    for checkpoint in inputs:
        for path in (checkpoint.path, *checkpoint.files):
            real = Path(os.path.realpath(path))
            folder = real if real.is_dir() else real.parent
            if any(map(is_taken, (folder, *folder.parents))):
                what = f"the input {checkpoint.path}" + (f" ({path.name})" if path != checkpoint.path else "")
                raise ConfigError(f"out ({out}) is or contains {what}; choose another folder")


def _open_experts(config: MergeConfig, base: Checkpoint) -> tuple[Checkpoint, ...]:
    """Open checkpoints, or LoRA adapters of the base: all of one kind, with no options for the other."""
    adapters = [is_adapter(path) for path in config.experts]
    if any(adapters) and not all(adapters):
        lines = [
            f"{path}: {'a LoRA adapter' if adapter else 'a checkpoint'}"
            for path, adapter in zip(config.experts, adapters, strict=True)
        ]
        raise InputError("experts are adapters or checkpoints, not both; merge the adapters into their base:", lines)
    if any(adapters):
        if config.experts_are_deltas:
            raise ConfigError("experts_are_deltas: LoRA adapters are that by themselves; leave it out")
        return tuple(open_adapter(path, base) for path in config.experts)
    for key in ("adapter_rank", "on_missing", "on_other_base"):
        if getattr(config, key) not in (None, "error"):
            raise ConfigError(f"{key} is for experts that are LoRA adapters, and these are checkpoints")
    return tuple(open_checkpoint(path) for path in config.experts)


def adapts(expert: Checkpoint, name: str) -> bool:
    """Return whether an expert has, or adapts, a tensor of the base."""
    return name in expert.tensors or (isinstance(expert, Adapter) and name in expert.pairs)


def require_possible_rank(adapter_rank: int, experts: Iterable[Checkpoint]) -> None:
    """Raise ConfigError where no matrix that the adapters adapt can have such a rank."""
    pairs = [pair for expert in experts if isinstance(expert, Adapter) for pair in expert.pairs.values()]
    largest = max((min(pair.shape) for pair in pairs), default=adapter_rank)
    if adapter_rank > largest:
        raise ConfigError(f"adapter_rank is {adapter_rank}; no adapted matrix has a rank above {largest}")


def _disagreements(adapters: Sequence[Adapter], config: MergeConfig) -> Iterable[str]:
    """Yield the problems of adapters with each other."""
    bases = {name: adapter for adapter in adapters if (name := last_part(base_name(adapter)))}
    if len(bases) > 1 and config.on_other_base == "error":
        found = ", ".join(f"{adapter.path} of {base_name(adapter)}" for adapter in bases.values())
        yield (
            f"adapters of different bases: {found} (adapter_config.json, base_model_name_or_path; "
            "on_other_base: ignore, where these are the same weights)"
        )
    touched = {name for adapter in adapters for name in (*adapter.pairs, *adapter.tensors)}
    for adapter in adapters:
        alone = sorted(name for name in touched if not adapts(adapter, name))
        if alone and config.on_missing == "error":
            yield (
                f"{adapter.path}: leaves {len(alone)} tensor(s) alone that other adapters adapt, such as {alone[0]!r} "
                "(on_missing: zero takes their delta as zero)"
            )
    if config.adapter_rank is not None:
        yield from lost_biases(adapters)
    both = sorted(
        name for name in touched if len({name in adapter.pairs for adapter in adapters if adapts(adapter, name)}) > 1
    )
    if both:
        yield f"{_tensors_are(both)} adapted in one adapter and trained as a whole in another"


def _tensors_are(names: Sequence[str]) -> str:
    """Return the beginning of a sentence about tensors: ``tensor 'a' is`` or ``3 tensors, such as 'a', are``."""
    return f"tensor {names[0]!r} is" if len(names) == 1 else f"{len(names)} tensors, such as {names[0]!r}, are"


def last_part(name: str | None) -> str:
    """Return the last part of a path or a hub id, in lower case: a model may be named by either."""
    return (name or "").rstrip("/").rpartition("/")[2].lower()


def _extras(base: Checkpoint, experts: tuple[Checkpoint, ...]) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return the tensors that one expert alone has, and the problem with those that several have.

    Headers do not tell whether these agree.
    """
    owners: dict[str, list[StoredTensor]] = {}
    for expert in experts:
        for name, stored in sorted(expert.tensors.items(), key=lambda item: (str(item[1].file), item[1].start)):
            if name not in base.tensors:
                owners.setdefault(name, []).append(stored)
    problems = []
    if shared := [name for name, found in owners.items() if len(found) > 1]:
        found = owners[shared[0]]
        where = ", ".join(f"{DTYPE_NAMES[stored.dtype]}{list(stored.shape)} in {stored.file}" for stored in found)
        problems.append(
            f"{_tensors_are(shared)} not in the base, and not in one expert alone: {where} (on_extra: copy takes what "
            "one expert alone has, ignore leaves all of them out)"
        )
    return {name: found[0] for name, found in owners.items() if len(found) == 1}, problems


def _unmergeable(checkpoint: Checkpoint) -> str | None:
    """Return why arithmetic on a checkpoint's stored numbers would silently ruin it; None where it would not."""
    why = quantized(checkpoint) or bare_lora(checkpoint)
    if why is not None:
        return why
    mergeable = COPIED_DTYPES.union(FLOAT_DTYPES)
    found = [stored for stored in checkpoint.tensors.values() if stored.dtype not in mergeable]
    if not found:
        return None
    more = f", and {len(found) - 1} more are likewise" if len(found) > 1 else ""
    return f"{checkpoint.path}: tensor {found[0].name!r} is {DTYPE_NAMES[found[0].dtype]}, which cannot be merged{more}"
