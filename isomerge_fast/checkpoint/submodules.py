"""Weights in sub-folders that belong to the model: modules of sentence-transformers, adapters beside a base.

They are not merged: their tensors have names of their own. Where all checkpoints hold the same file it is copied, and
where they do not the merge is refused, with how to merge them apart.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..parsing.regular_files import open_regular
from .folder import list_folder, read_own
from .layout import ADAPTER_CONFIG_FILE, parse_json
from .wrong_paths import PICKLES, conversion

# Compared byte by byte at planning: a dense module has 3 to 20 MB, the adapters of a multimodal model some hundred.
MAX_COMPARED_BYTES = 2_000_000_000
_MAX_LIST_BYTES, _MAX_LIST_VALUES = 1_000_000, 10_000
_BLOCK_BYTES = 1 << 20
_MODULES = "modules.json"
# What is loaded where it is there, and what is loaded else.
_FORMATS = (r"\.safetensors(\.index\.json)?$", r"\.(bin|pt|pth)(\.index\.json)?$")


@dataclass(frozen=True)
class Part:
    """A sub-folder with weights, by its relative name, and the names of their files in it."""

    folder: str
    files: tuple[str, ...]
    is_adapter: bool

    @property
    def names(self) -> list[str]:
        return [f"{self.folder}/{file}" for file in self.files]


def own_weights(names: Iterable[str]) -> list[str]:
    """Return the files of weights that are loaded from a folder with these names, indexes and settings with them."""
    found = ([name for name in names if re.search(pattern, name)] for pattern in _FORMATS)
    weights = next((files for files in found if files), [])
    return [*weights, ADAPTER_CONFIG_FILE] if weights and ADAPTER_CONFIG_FILE in names else weights


def part_folders(folder: Path, names: Collection[str]) -> frozenset[str]:
    """Return the sub-folders that ``modules.json`` says are modules; of a router, those that it leads to as well.

    Files that are no such lists name none.
    """
    if _MODULES not in names:
        return frozenset()
    listed = _read(folder, _MODULES)
    found = [entry.get("path") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    for name in {"router_config.json", "config.json"} & {*names}:
        settings = _read(folder, name)
        types = settings.get("types") if isinstance(settings, dict) else None
        found += types if isinstance(types, dict) else ()
    paths = (os.path.normpath(path) for path in found if isinstance(path, str) and path)
    return frozenset(path for path in paths if path != "." and not path.startswith(("/", "..")))


def _read(folder: Path, name: str) -> Any:
    try:
        data, _ = read_own(folder, name, _MAX_LIST_BYTES)
        return parse_json(data, str(folder / name), most_values=_MAX_LIST_VALUES)
    except InputError:
        return None  # what cannot be copied is refused where it is sorted


def parts_of(folder: Path) -> Iterator[Part]:
    """Yield the modules with weights of a folder, from its ``modules.json``."""
    for path in sorted(part_folders(folder, list_folder(folder))):
        if weights := _weights_in(folder / path):
            yield Part(path, tuple(weights), is_adapter=False)


def owners_of(part: Part, experts: Iterable[Path]) -> list[Path]:
    """Return the experts that hold weights in this sub-folder."""
    return [expert for expert in experts if _weights_in(expert / part.folder)]


def check_equal(base: Path, parts: Sequence[Part], experts: Sequence[Path], method: str) -> None:
    """Raise InputError where an expert holds other weights than the base in a sub-folder that belongs to the model.

    Args:
        experts: all of them; those that hold none there leave the base's as they are.
    """
    flaws = [(part, flaw) for part in parts if (flaw := _flaw(base, part, experts)) is not None]
    if flaws:
        raise InputError(
            f"{'; '.join(flaw for _, flaw in flaws)}. Sub-folders are not merged with the rest; merge them apart, and "
            "the rest with a base without their weights (verify each before the last step):",
            _commands(base, [part for part, _ in flaws], experts, method),
        )


def _flaw(base: Path, part: Part, experts: Sequence[Path]) -> str | None:
    """Return how an expert's weights differ from the base's, in words."""
    said = "the adapter_config.json in it" if part.is_adapter else _MODULES
    for expert in owners_of(part, experts):
        flaw = _difference(base / part.folder, expert / part.folder, part.files)
        if flaw is not None:
            return f"{base / part.folder}: belongs to the model ({said}), and {flaw}"
    return None


def _difference(mine: Path, other: Path, files: Sequence[str]) -> str | None:
    """Return how another folder's weights differ from these, in words."""
    theirs = _weights_in(other)
    if theirs != list(files):
        return f"holds {', '.join(files)}, {other} {', '.join(theirs)}"
    for file in files:
        try:
            first, status = open_regular(mine / file)
            with open(first, "rb") as ours:
                second, other_status = open_regular(other / file)
                with open(second, "rb") as others:
                    if os.path.samestat(status, other_status):
                        continue
                    if status.st_size == other_status.st_size > MAX_COMPARED_BYTES:
                        return f"{file} has {status.st_size} bytes, too many to see that {other / file} is the same"
                    is_same = status.st_size == other_status.st_size
                    while is_same and (block := ours.read(_BLOCK_BYTES)):
                        is_same = block == others.read(_BLOCK_BYTES)
        except OSError as error:
            raise InputError(f"{error.filename or mine / file}: cannot be read ({error.strerror})") from error
        if not is_same:
            return f"{file} is not the same in {other}"
    return None


def _commands(base: Path, parts: Sequence[Part], experts: Sequence[Path], method: str) -> Iterator[str]:
    """Yield what merges parts apart, or of adapters takes one expert's, line by line."""
    rest = f"{base.name or 'base'}-rest"

    def run(first: Path | str, others: Iterable[Path], out: str) -> str:
        given = [word for other in others for word in ("--expert", str(other))]
        return shlex.join(["isomerge", "run", "--base", str(first), *given, "--method", method, "--out", out])

    yield shlex.join(["cp", "-rL", str(base), rest])
    yield shlex.join(["rm", *(f"{rest}/{name}" for part in parts for name in part.names)])
    yield run(rest, experts, "merged")
    owners = {part.folder: [expert / part.folder for expert in owners_of(part, experts)] for part in parts}
    aparts = {part.folder: f"merged-{part.folder.replace('/', '-')}" for part in parts if not part.is_adapter}
    for folder, apart in aparts.items():
        for place in (base / folder, *owners[folder]):
            if pickles := [name for name in _weights_in(place) if name.endswith(PICKLES)]:
                yield f"(cd {shlex.quote(str(place))} && {conversion(pickles)})"
        yield run(base / folder, owners[folder], apart)
    for part in parts:
        if part.is_adapter:
            yield shlex.join(["cp", "-rL", str(owners[part.folder][0]), "merged/"]) + " (or another expert's)"
        else:
            yield f"cp {shlex.quote(aparts[part.folder])}/*.safetensors* {shlex.quote(f'merged/{part.folder}')}/"


def _weights_in(folder: Path) -> list[str]:
    """Return the files of weights in a folder that may not be there."""
    return own_weights(list_folder(folder)) if os.path.isdir(folder) else []
