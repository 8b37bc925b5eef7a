"""Read LoRA adapters as PEFT saves them: which of the base's tensors each pair of factors changes, and by how much.

    Δ = scale · B A,    A [r, in], B [out, r],    scale = lora_alpha / r, or lora_alpha / √r with use_rslora.

Headers and settings only, as in ``layout``; PEFT is not needed. A setting or a tensor that would add to that formula is
refused by its name: an adapter is read as what it is, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...ops import FLOAT_DTYPES
from ..folder import list_folder
from ..layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    DTYPE_NAMES,
    TOKEN_TABLES,
    Checkpoint,
    StoredTensor,
    read_header,
)
from .factors import sort_tensors
from .settings import MERGE_FIRST, Scales, read_settings


@dataclass(frozen=True)
class LoraPair:
    """Hold the factors of Δ = scale · B A [out, in], or of its transpose."""

    name: str  # of the base's tensor
    a: StoredTensor  # A [r, in], as it is stored
    b: StoredTensor  # B [out, r], likewise
    scale: float
    transposed: bool  # Δ = scale (B A)ᵀ [in, out]: embeddings, and layers that store their weight so (GPT-2's Conv1D)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Return [M, N] of Δ."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class Adapter(Checkpoint):
    """Hold an adapter by the names of its base.

    ``tensors`` are those that it holds whole: modules_to_save, trained biases.
    """

    pairs: dict[str, LoraPair] = field(default_factory=dict)  # the factors, by the name of the base's tensor
    settings: dict[str, Any] = field(default_factory=dict, compare=False)  # ``adapter_config.json`` as parsed
    copies: tuple[str, ...] = ()  # tensors of the base that lie in the file too, frozen under their factors; never read

    @property
    def stored_tensors(self) -> int:
        return len(self.tensors) + 2 * len(self.pairs)


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a folder with an ``adapter_config.json``, even one that cannot be read."""
    return os.path.lexists(Path(path) / ADAPTER_CONFIG_FILE)


def base_name(adapter: Adapter) -> str | None:
    """Return the name of the adapter's base where it was trained: on the Hub, or a path there."""
    return adapter.settings.get("base_model_name_or_path") or None


def open_adapter(path: str | os.PathLike[str], base: Checkpoint) -> Adapter:
    """Open an adapter folder, by the names of ``base``; read headers and settings only.

    Names are tried as they are, then with one prefix removed or added (``bert.encoder…`` on a file that says
    ``encoder…``). Where that does not help they stay, and ``incompatibilities`` lists those that the base lacks.
    """
    folder = Path(path)
    weights = _weights_file(folder)
    settings, settings_identity = read_settings(folder / ADAPTER_CONFIG_FILE)
    scales = Scales(folder / ADAPTER_CONFIG_FILE, settings)
    stored, weights_identity = read_header(weights)
    factors, full = sort_tensors(weights, stored)
    rename = _renaming(weights, [f"{module}.weight" for module in factors], base)

    pairs: dict[str, LoraPair] = {}
    for module, found in factors.items():
        a, b = found.pair(weights, module)
        name = rename(f"{module}.weight")
        pairs[name] = LoraPair(name, a, b, scales.of(module, a, b), found.is_embedding)
    pairs = _oriented(weights, pairs, base, bool(settings.get("fan_in_fan_out")))
    tensors: dict[str, StoredTensor] = {}
    copies: list[str] = []
    for name, tensor in full.items():
        target = rename(name)
        if target in pairs and _is_the_bases_own(tensor, base.tensors.get(target)):
            copies.append(target)
            continue
        if target in tensors:
            raise InputError(f"{weights}: {tensors[target].name!r} and {tensor.name!r} are both {target!r} of the base")
        if target in pairs:
            raise InputError(
                f"{weights}: {target!r} is there whole ({tensor.name!r}) and as factors ({pairs[target].a.name!r}); "
                "one of the two is too many, or of another vocabulary; save again with save_embedding_layers=False"
            )
        tensors[target] = tensor
    files = {weights: weights_identity, folder / ADAPTER_CONFIG_FILE: settings_identity}
    return Adapter(folder, tensors, files, pairs=pairs, settings=settings, copies=tuple(copies))


def _is_the_bases_own(tensor: StoredTensor, own: StoredTensor | None) -> bool:
    """Return whether a tensor is the frozen layer under a pair of factors, which PEFT saves beside those of embeddings.

    One of another shape belongs to a vocabulary that was resized.
    """
    return own is not None and tensor.shape == own.shape and "base_layer" in tensor.name.split(".")


def incompatibilities(base: Checkpoint, adapter: Adapter) -> Iterator[str]:
    """Yield how factors do not fit ``base``, without the adapter's name; one line is for all missing modules.

    Tensors that the adapter holds whole are compared like those of any checkpoint.
    """
    absent = {name: pair for name, pair in adapter.pairs.items() if name not in base.tensors}
    for name, pair in list(absent.items())[:1]:
        tied = bool((base.config or {}).get("tie_word_embeddings")) and "lm_head" in name
        hint = " (the base ties its word embeddings; untie them before training on them)" if tied else ""
        if len(absent) > 1:
            yield f"{len(absent)} tensors that it changes are not in the base {base.path}, such as {name!r}{hint}"
        else:
            yield f"tensor {name!r} {list(pair.shape)}, {_changed_by(pair)}, is not in the base {base.path}{hint}"
    for name, pair in adapter.pairs.items():
        own = base.tensors.get(name)
        if own is not None and own.shape != pair.shape:
            vocabulary = TOKEN_TABLES.search(name) and own.shape[1:] == pair.shape[1:]
            hint = " (another vocabulary size?)" if vocabulary else ""
            yield (
                f"tensor {name!r}, {_changed_by(pair)}, has shape {list(pair.shape)}, "
                f"in the base {base.path} {list(own.shape)}{hint}"
            )
        elif own is not None and own.dtype not in FLOAT_DTYPES:
            yield f"tensor {name!r}, {_changed_by(pair)}, is {DTYPE_NAMES[own.dtype]} in the base {base.path}"


def _changed_by(pair: LoraPair) -> str:
    return f"the module that {pair.a.name!r} and {pair.b.name!r} change"


def _weights_file(folder: Path) -> Path:
    """Return the one file of an adapter's weights."""
    if not is_adapter(folder):
        raise InputError(f"{folder}: not a LoRA adapter; there is no {ADAPTER_CONFIG_FILE} in it")
    names = list_folder(folder)
    models = [name for name in names if _is_of_a_model(name)]
    if models:
        raise InputError(
            f"{folder}: holds an adapter ({ADAPTER_CONFIG_FILE}) and weights beside it ({', '.join(models[:5])}); "
            "which of the two is meant cannot be told, so put them into folders of their own"
        )
    if ADAPTER_FILE in names:
        return folder / ADAPTER_FILE
    if "adapter_model.bin" in names:
        raise InputError(
            f"{folder}: only pickled weights (adapter_model.bin), which are never opened. Convert: "
            "PeftModel.from_pretrained(base_model, folder).save_pretrained(other_folder)"
        )
    raise InputError(f"{folder}: {ADAPTER_FILE} is missing")


def _is_of_a_model(name: str) -> bool:
    if name.endswith((".safetensors", ".safetensors.index.json")):
        return name != ADAPTER_FILE
    return name.startswith("pytorch_model") and name.endswith(".bin")


def _renaming(file: Path, names: list[str], base: Checkpoint) -> Callable[[str], str]:
    """Return the function from the adapter's names to the base's: the same, or with one prefix removed or added.

    The prefix makes all of ``names`` fit. A name without it, as of a head beside an encoder, stays if the base has it.
    """
    if all(name in base.tensors for name in names):
        return lambda name: name
    first = names[0]
    prefixes = [(first[: dot + 1], "") for dot, character in enumerate(first) if character == "."]
    prefixes += [("", own.removesuffix(first)) for own in base.tensors if own.endswith("." + first)]
    fitting = [
        (removed, added)
        for removed, added in prefixes
        if all(name.startswith(removed) and added + name.removeprefix(removed) in base.tensors for name in names)
    ]
    if len(fitting) > 1:
        either, other = (added + first.removeprefix(removed) for removed, added in fitting[:2])
        raise InputError(
            f"{file}: {first!r} may be {either!r} or {other!r} of the base {base.path}; "
            "name the adapter's tensors as the base does"
        )
    ((removed, added),) = fitting or [("", "")]

    def rename(name: str) -> str:
        renamed = added + name.removeprefix(removed)
        return name if renamed not in base.tensors and name in base.tensors else renamed

    return rename


def _oriented(file: Path, pairs: Mapping[str, LoraPair], base: Checkpoint, fan_in_fan_out: bool) -> dict[str, LoraPair]:
    """Return the pairs with ``transposed`` decided: by the shapes, or by ``fan_in_fan_out`` where the layer is square.

    PEFT sets ``fan_in_fan_out`` anew for every layer that it meets, so that the file tells of the last one only. Where
    the shapes of another layer contradict it, square layers are refused by an InputError.
    """
    oriented: dict[str, LoraPair] = {}
    square: list[str] = []
    against: list[str] = []
    for name, pair in pairs.items():
        own = base.tensors.get(name)
        transposed = pair.transposed or fan_in_fan_out
        if not pair.transposed and own is not None and own.shape in (pair.shape, pair.shape[::-1]):
            if pair.shape[0] == pair.shape[1]:
                square.append(name)
            else:
                transposed = own.shape != pair.shape
                if transposed != fan_in_fan_out:
                    against.append(name)
        oriented[name] = replace(pair, transposed=transposed)
    if square and against:
        raise InputError(
            f"{file}: whether {square[0]!r} {list(pairs[square[0]].shape)} is stored transposed cannot be told: "
            f"fan_in_fan_out is {str(fan_in_fan_out).lower()}, and {against[0]!r} is not so; {MERGE_FIRST}"
        )
    return oriented
