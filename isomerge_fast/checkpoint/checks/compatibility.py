"""Say what keeps experts from being merged into a base: names, shapes and kinds that differ, a line for each cause."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from ...errors import MAX_PROBLEMS
from ...ops import FLOAT_DTYPES
from ..layout import COPIED_DTYPES, DTYPE_NAMES, TOKEN_TABLES, Checkpoint, StoredTensor
from ..lora.adapter import Adapter, incompatibilities
from .prefixes import INNER_WRAPPERS, Prefix, find_prefixes

MOST_NAMED = 3  # of the tensors of one line; of more, only the first is named
MOST_EXPERTS = 4  # named in one line

# Classifiers' last layers, with a row for every class.
_HEADS = re.compile(
    r"(.*\.)?(classifier|score|qa_outputs|classification_head|heads?|fc|logits_proj)\.(\w+\.)?(weight|bias)"
)
_LOAD_AS_ONE = "load all with one class, such as AutoModel, which leaves heads out, and save them again"

_WRAPPERS = {
    "_orig_mod.": "save the model that torch.compile wraps (model._orig_mod.save_pretrained)",
    "base_model.model.": "merge its adapter into it (PEFT: merge_and_unload), and save that model",
    "module.": "save the model inside its wrapper (model.module.save_pretrained)",
}


def problems_of(base: Checkpoint, experts: Sequence[Checkpoint], on_extra: str) -> list[list[str]]:
    """Return a line per problem with the base, which names all experts that have it; grouped by the first of these."""
    owners: dict[str, list[str]] = {}
    for expert in experts:
        for cause in _causes(base, expert, on_extra):
            who = owners.setdefault(cause, [])
            if str(expert.path) not in who:
                who.append(str(expert.path))
    problems: dict[str, list[str]] = {}
    for cause, who in owners.items():
        more = f" and {len(who) - MOST_EXPERTS} more" if len(who) > MOST_EXPERTS else ""
        problems.setdefault(who[0], []).append(f"{', '.join(who[:MOST_EXPERTS])}{more}: {cause}")
    return list(problems.values())


def interleaved(groups: Sequence[Sequence[str]]) -> list[str]:
    """Return all lines, group by group; if they are too many for a message, the first line of each group, and so on."""
    lines = [line for group in groups for line in group]
    if len(lines) <= MAX_PROBLEMS:
        return lines
    return [line for each in zip_longest(*groups) for line in each if line is not None]


def _causes(base: Checkpoint, expert: Checkpoint, on_extra: str) -> Iterator[str]:
    """Yield the problems of one expert, without its name."""
    missing: dict[str, StoredTensor] = {}
    if isinstance(expert, Adapter):
        yield from incompatibilities(base, expert)
    else:  # position_ids and the like, which older releases saved and newer do not: the base has them
        missing = {
            name: stored
            for name, stored in base.tensors.items()
            if name not in expert.tensors and stored.dtype not in COPIED_DTYPES
        }
    extra = {name: expert.tensors[name] for name in sorted(expert.tensors.keys() - base.tensors.keys())}
    # Almost all of tens of thousands of tensors are alike: only the others are kept.
    pairs = [
        (own, other)
        for name, own in base.tensors.items()
        if (other := expert.tensors.get(name)) is not None and (own.shape != other.shape or own.dtype != other.dtype)
    ]
    for prefix in find_prefixes(_shapes(missing), _shapes(extra)) if missing and extra else ():
        yield _prefix_problem(base, expert, prefix)
        pairs += [(missing.pop(name), extra.pop(other)) for name, other in prefix.names.items()]
    yield from _missing_problems(base, expert, missing)
    pairs = [(own, other) for own, other in pairs if own.dtype in FLOAT_DTYPES]  # others are copied from the base
    yield from _shape_problems(base, [(own, other) for own, other in pairs if own.shape != other.shape])
    yield from _dtype_problems(base, [(own, other) for own, other in pairs if own.shape == other.shape])
    if on_extra == "error":
        each = [f"{name!r} {list(stored.shape)}" for name, stored in extra.items()]
        it = "it" if len(each) == 1 else "them"
        hint = f" (on_extra: ignore leaves {it} out, copy takes {it})"
        found = [(f"tensor {one} is not in the base {base.path}", one) for one in each]
        yield from _one_or_all(found, f"tensors are not in the base {base.path}", hint)


def _shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape for name, stored in tensors.items()}


def _prefix_problem(base: Checkpoint, expert: Checkpoint, prefix: Prefix) -> str:
    count = f"{len(prefix.names)} names differ" if len(prefix.names) > 1 else "1 name differs"
    if not prefix.removed:
        what = f"the prefix {prefix.added!r}, which the base {base.path} has not"
    elif not prefix.added:
        what = f"the prefix {prefix.removed!r}, which only the base {base.path} has"
    else:
        what = f"their prefix, {prefix.added!r} instead of {prefix.removed!r} in the base {base.path}"
    own, other = next(iter(prefix.names.items()))
    return f"{count} only by {what} ({other!r} is {own!r} there); {_remedy(base, expert, prefix)}"


def _remedy(base: Checkpoint, expert: Checkpoint, prefix: Prefix) -> str:
    for wrapper, mend in _WRAPPERS.items():
        if wrapper in (prefix.added, prefix.removed):
            return mend
    for names in (prefix.added, prefix.removed):
        if found := [part for part in INNER_WRAPPERS if part in names]:
            changes = "".join(f".replace({part!r}, '')" for part in found)
            return (
                "strip the wrappers' part from the names before they are saved: "
                f"{{name{changes}: tensor for name, tensor in state.items()}}"
            )
    wanted, found = _class_of(base.config), _class_of(expert.config)
    if wanted and found and wanted != found:
        return f"load it as {wanted}, the base's class, and save it again (it is a {found})"
    return "load base and expert with the same class and release of transformers, and save both again"


def _class_of(config: Mapping[str, Any] | None) -> str | None:
    classes = (config or {}).get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    return name if isinstance(name, str) and name.isidentifier() and len(name) <= 100 else None


def _missing_problems(base: Checkpoint, expert: Checkpoint, missing: Mapping[str, StoredTensor]) -> Iterator[str]:
    wanted, own = _class_of(base.config), _class_of(expert.config)
    is_other = bool(wanted and own and wanted != own)
    is_tied = not is_other and bool((expert.config or {}).get("tie_word_embeddings"))
    of_classes = f" (it is a {own}, the base a {wanted}; {_LOAD_AS_ONE})" if is_other else ""
    of_ties = " (the expert ties its word embeddings; save base and experts with the same tying)"
    for are_tied, hint in ((True, of_ties), (False, of_classes)):
        found = [stored for name, stored in missing.items() if (is_tied and "lm_head" in name) == are_tied]
        each = [f"{stored.name!r} {list(stored.shape)}" for stored in found]
        lines = [(f"tensor {one} of the base {base.path} is missing", one) for one in each]
        yield from _one_or_all(lines, f"tensors of the base {base.path} are missing", hint)


def _shape_problems(base: Checkpoint, pairs: list[tuple[StoredTensor, StoredTensor]]) -> Iterator[str]:
    tables, heads, others = [], [], []
    for own, other in pairs:
        found = others
        if own.shape[1:] == other.shape[1:]:  # another number of rows
            found = tables if TOKEN_TABLES.search(own.name) else heads if _HEADS.fullmatch(own.name) else others
        has, there = list(other.shape), list(own.shape)
        alone = f"tensor {own.name!r} has shape {has}, in the base {base.path} {there}"
        found.append((alone, f"{own.name!r} {has}, there {there}"))
    for found, what, hint in (
        (tables, "another number of rows than", " (another vocabulary size?)"),
        (heads, "another number of rows than", f" (a head of other classes? {_LOAD_AS_ONE})"),
        (others, "other shapes than", ""),
    ):
        yield from _one_or_all(found, f"tensors have {what} in the base {base.path}", hint)


def _dtype_problems(base: Checkpoint, pairs: list[tuple[StoredTensor, StoredTensor]]) -> Iterator[str]:
    found = []
    for own, other in pairs:
        if other.dtype not in FLOAT_DTYPES:
            has, there = DTYPE_NAMES[other.dtype], DTYPE_NAMES[own.dtype]
            alone = f"tensor {own.name!r} is {has}, in the base {base.path} {there}"
            found.append((alone, f"{own.name!r} {has}, there {there}"))
    yield from _one_or_all(found, f"tensors are no floats, and in the base {base.path} they are")


def _one_or_all(found: Sequence[tuple[str, str]], together: str, hint: str = "") -> Iterator[str]:
    """Yield one line for problems of one kind; each has a sentence for itself alone, and its part of a list."""
    if len(found) == 1:
        yield found[0][0] + hint
    elif found:
        parts = [part for _, part in found]
        listed = f": {'; '.join(parts)}" if len(parts) <= MOST_NAMED else f", such as {parts[0]}"
        yield f"{len(parts)} {together}{listed}{hint}"
