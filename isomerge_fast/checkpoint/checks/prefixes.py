"""Find the prefix by which one model's names differ from another's: ``model.``, ``vit.``, ``_orig_mod.``, …"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest

# Names that are compared with all others to find candidates, and candidates that are tried on all names.
SAMPLES, MOST_CANDIDATES = 8, 16
# Models differ by one prefix, or by one for each kind of module. With more prefixes the names are just other names.
MOST_PREFIXES = 6
# Activation checkpointing, FSDP and torch.compile put these into the middle of names too.
INNER_WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")
# So many tensors of the same names and shapes show that two prefixes without anything in common belong together.
MANY = 8

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Prefix:
    """Map a model's names to another model's: ``added + name.removeprefix(removed)``."""

    removed: str  # with ``#`` for numbers that both have, such as those of layers
    added: str  # likewise
    names: Mapping[str, str]  # of the one model, each with the name in the other


def find_prefixes(missing: Mapping[str, Shape], extra: Mapping[str, Shape]) -> list[Prefix]:
    """Return the prefixes that turn names of ``missing`` into names of ``extra``; that of most names comes first.

    ``missing`` has the names and shapes of one model that the other lacks, ``extra`` those of the other.
    """
    left, other = dict(missing), dict(extra)
    found: list[Prefix] = []
    while left and other and len(found) < MOST_PREFIXES and (prefix := _most_common(left, other)) is not None:
        found.append(prefix)
        for name, renamed in prefix.names.items():
            del left[name], other[renamed]
    return found


def _most_common(missing: Mapping[str, Shape], extra: Mapping[str, Shape]) -> Prefix | None:
    names = sorted(missing)
    by_end: dict[str, list[str]] = {}
    for name in sorted(extra):
        by_end.setdefault(name.rpartition(".")[2], []).append(name)
    candidates: Counter[tuple[str, str]] = Counter()
    for sample in names[:: max(1, len(names) // SAMPLES)]:
        candidates.update({_difference(sample, other) for other in by_end.get(sample.rpartition(".")[2], ())})
    best: Prefix | None = None
    for (removed, added), _ in sorted(candidates.items(), key=lambda item: (-item[1], item[0]))[:MOST_CANDIDATES]:
        renamed = _renamed(names, removed, added)
        fitting = Prefix(removed, added, {name: other for name, other in renamed.items() if other in extra})
        if _is_likely(fitting, missing, extra) and (best is None or len(fitting.names) > len(best.names)):
            best = fitting
    return best


def _is_likely(prefix: Prefix, missing: Mapping[str, Shape], extra: Mapping[str, Shape]) -> bool:
    """Return whether fitting names are those of the same tensors, since one layer's are like another's."""
    alike = sum(missing[name] == extra[other] for name, other in prefix.names.items())
    if 2 * alike <= len(prefix.names):
        return False
    removed, added = prefix.removed, prefix.added
    if not (removed and added) or sorted(removed.split(".")) == sorted(added.split(".")):
        return True
    if _unwrapped(removed) == _unwrapped(added):
        return True
    if added.startswith(removed) or removed.startswith(added) or added.endswith(removed) or removed.endswith(added):
        return True
    is_other_layer = _NUMBER.sub("#", removed) == _NUMBER.sub("#", added)
    return not is_other_layer and alike >= MANY and 2 * alike > len(missing)


_NUMBER = re.compile(r"\d+")


def _difference(name: str, other: str) -> tuple[str, str]:
    """Return the beginnings of two names before the last parts that they share."""
    parts, others = name.split("."), other.split(".")
    same = 0
    while same < min(len(parts), len(others)) and parts[-1 - same] == others[-1 - same]:
        same += 1
    heads = parts[: len(parts) - same], others[: len(others) - same]
    removed, added = ("".join(f"{part}." for part in head) for head in heads)
    if _NUMBER.findall(removed) == _NUMBER.findall(added):
        return _NUMBER.sub("#", removed), _NUMBER.sub("#", added)
    return removed, added


def _renamed(names: Iterable[str], removed: str, added: str) -> dict[str, str]:
    """Return the names that begin with ``removed``, each with what it becomes."""
    begins = re.compile(re.escape(removed).replace(r"\#", r"(\d+)")).match
    pieces = added.split("#")
    return {
        name: "".join(chain(*zip_longest(pieces, found.groups(), fillvalue=""))) + name[found.end() :]
        for name in names
        if (found := begins(name))
    }


def _unwrapped(name: str) -> str:
    """Return a name without the parts that wrappers add."""
    for part in INNER_WRAPPERS:
        name = name.replace(part, "")
    return name
