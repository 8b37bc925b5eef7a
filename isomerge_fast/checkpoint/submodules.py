"""Find weights in sub-folders that belong to the model: modules of sentence-transformers, adapters beside a base.

They are not merged, since their tensors have names of their own. Where all checkpoints hold the same file it is copied,
and where they do not the merge is refused, with the commands that merge them apart.
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
# A folder's weights are loaded from the first of these formats that it has.
_FORMATS = (r"\.safetensors(\.index\.json)?$", r"\.(bin|pt|pth)(\.index\.json)?$")


@dataclass(frozen=True)
class Submodule:
    """Name a sub-folder with weights, by its relative path, and their files in it."""

    folder: str
    files: tuple[str, ...]
    is_adapter: bool

    @property
    def names(self) -> list[str]:
        return [f"{self.folder}/{file}" for file in self.files]


def loaded_weights(names: Collection[str]) -> list[str]:
    """Return the files that a loader takes of a folder with these names: those of the first format that is there.

    Formats are safetensors before pickles. Indexes and an adapter's settings are among the files.
    """
    found = ([name for name in names if re.search(pattern, name)] for pattern in _FORMATS)
    weights = next((files for files in found if files), [])
    return [*weights, ADAPTER_CONFIG_FILE] if weights and ADAPTER_CONFIG_FILE in names else weights


def listed_modules(folder: Path, names: Collection[str]) -> frozenset[str]:
    """Return the sub-folders that ``modules.json`` lists as modules, and those that a router's settings lead to."""
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


def submodules_of(folder: Path) -> Iterator[Submodule]:
    """Yield the modules with weights that a folder's ``modules.json`` lists."""
    for path in sorted(listed_modules(folder, list_folder(folder))):
        if weights := _weights_in(folder / path):
            yield Submodule(path, tuple(weights), is_adapter=False)


def experts_with(module: Submodule, experts: Iterable[Path]) -> list[Path]:
    """Return the experts that hold weights in this sub-folder."""
    return [expert for expert in experts if _weights_in(expert / module.folder)]


def check_same_weights(base: Path, modules: Iterable[Submodule], experts: Sequence[Path], method: str) -> None:
    """Raise InputError where an expert holds other weights than the base in a sub-folder that belongs to the model.

    Experts that hold none there leave the base's as they are.
    """
    flaws = [(module, flaw) for module in modules if (flaw := _flaw(base, module, experts)) is not None]
    if flaws:
        raise InputError(
            f"{'; '.join(flaw for _, flaw in flaws)}. Sub-folders are not merged with the rest; merge them apart, and "
            "the rest with a base without their weights (verify each before the last step):",
            _commands(base, [module for module, _ in flaws], experts, method),
        )


def _flaw(base: Path, module: Submodule, experts: Sequence[Path]) -> str | None:
    """Return how an expert's weights differ from the base's, in words, or None."""
    said, own = "the adapter_config.json in it" if module.is_adapter else _MODULES, base / module.folder
    for expert in experts_with(module, experts):
        if flaw := _difference(own, expert / module.folder, module.files):
            return f"{own}: belongs to the model ({said}), and {flaw}"
    return None


def _difference(mine: Path, other: Path, files: Sequence[str]) -> str | None:
    """Return how another folder's weights differ from these, in words, or None."""
    theirs = _weights_in(other)
    if theirs != list(files):
        return f"holds {', '.join(files)}, {other} {', '.join(theirs)}"
    for file in files:
        try:
            flaw = _file_difference(mine / file, other / file)
        except OSError as error:
            raise InputError(f"{error.filename or mine / file}: cannot be read ({error.strerror})") from error
        if flaw is not None:
            return f"{file} {flaw}"
    return None


def _file_difference(mine: Path, other: Path) -> str | None:
    first, status = open_regular(mine)
    with open(first, "rb") as ours:
        second, other_status = open_regular(other)
        with open(second, "rb") as others:
            if os.path.samestat(status, other_status):
                return None
            is_same = status.st_size == other_status.st_size
            if is_same and status.st_size > MAX_COMPARED_BYTES:
                return f"has {status.st_size} bytes, too many to see that {other} is the same"
            while is_same and (block := ours.read(_BLOCK_BYTES)):
                is_same = block == others.read(_BLOCK_BYTES)
    return None if is_same else f"is not the same in {other.parent}"


def _commands(base: Path, modules: Sequence[Submodule], experts: Sequence[Path], method: str) -> Iterator[str]:
    """Yield shell commands, a line each, that merge every module by itself, or copy an adapter from one expert."""
    rest = f"{base.name or 'base'}-rest"

    def run(first: Path | str, others: Iterable[Path], out: str) -> str:
        given = [word for other in others for word in ("--expert", str(other))]
        return shlex.join(["isomerge", "run", "--base", str(first), *given, "--method", method, "--out", out])

    yield shlex.join(["cp", "-rL", str(base), rest])
    yield shlex.join(["rm", *(f"{rest}/{name}" for module in modules for name in module.names)])
    yield run(rest, experts, "merged")
    last_steps = []
    for module in modules:
        folder, owners = module.folder, [expert / module.folder for expert in experts_with(module, experts)]
        if module.is_adapter:
            last_steps.append(shlex.join(["cp", "-rL", str(owners[0]), "merged/"]) + " (or another expert's)")
            continue
        for place in (base / folder, *owners):
            if pickles := [name for name in _weights_in(place) if name.endswith(PICKLES)]:
                yield f"(cd {shlex.quote(str(place))} && {conversion(pickles)})"
        apart = f"merged-{folder.replace('/', '-')}"
        yield run(base / folder, owners, apart)
        last_steps.append(f"cp {shlex.quote(apart)}/*.safetensors* {shlex.quote(f'merged/{folder}')}/")
    yield from last_steps


def _weights_in(folder: Path) -> list[str]:
    """Return the files of weights in a folder that may not be there."""
    return loaded_weights(list_folder(folder)) if os.path.isdir(folder) else []
