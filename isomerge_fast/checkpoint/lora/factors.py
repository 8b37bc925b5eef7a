"""Sort the tensors of a LoRA file into factors of modules and tensors that the adapter holds whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import InputError
from ...ops import FLOAT_DTYPES
from ..layout import DTYPE_NAMES, StoredTensor
from .settings import MERGE_FIRST, REFUSED

_LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?")
PREFIX = "base_model.model."


@dataclass
class Factors:
    """Collect the factors of one module."""

    is_embedding: bool
    sides: dict[str, StoredTensor] = field(default_factory=dict)

    def pair(self, file: Path, module: str) -> tuple[StoredTensor, StoredTensor]:
        """Return A and B; refuse them where one is missing, is no matrix of floats, or does not fit the other."""
        for side, other in (("A", "B"), ("B", "A")):
            if side not in self.sides:
                raise InputError(f"{file}: module {module!r} has {self.sides[other].name!r}, but no {side} beside it")
        a, b = self.sides["A"], self.sides["B"]
        for tensor in (a, b):
            where = f"{file}: {tensor.name!r} {list(tensor.shape)}"
            if len(tensor.shape) > 2:
                raise InputError(f"{where}: LoRA of a convolution is not read; {MERGE_FIRST}")
            if len(tensor.shape) < 2 or 0 in tensor.shape:
                raise InputError(f"{where}: no matrix; was it saved before its shards were gathered?")
            if tensor.dtype not in FLOAT_DTYPES:
                raise InputError(f"{where} is {DTYPE_NAMES[tensor.dtype]}: quantized factors are not read")
        if a.shape[0] != b.shape[1]:
            raise InputError(f"{file}: {a.name!r} {list(a.shape)} and {b.name!r} {list(b.shape)} have different ranks")
        return a, b


def sort_tensors(file: Path, stored: Mapping[str, StoredTensor]) -> tuple[dict[str, Factors], dict[str, StoredTensor]]:
    """Return the factors by module and the whole tensors by name, with the names of the model that was trained.

    Written out without PEFT, names still hold the adapter's own (``lora_A.default.weight``); one is enough to tell.
    """
    factors: dict[str, Factors] = {}
    full: dict[str, StoredTensor] = {}
    copies: list[tuple[str, StoredTensor]] = []
    adapters: dict[str | None, str] = {}  # named by factors, each with the first tensor that names it
    kept_by: dict[str | None, str] = {}  # named by modules_to_save, likewise
    for name, tensor in stored.items():
        short = name.removeprefix(PREFIX)
        match = _LINEAR.fullmatch(short) or _EMBEDDING.fullmatch(short)
        if match is None:
            plain, adapter, is_copy = _plain_name(file, name, short)
            if adapter is not None:
                kept_by.setdefault(adapter, name)
            if is_copy:
                copies.append((plain, tensor))
            elif plain in full:
                raise InputError(f"{file}: {full[plain].name!r} and {name!r} are both {plain!r}")
            else:
                full[plain] = tensor
            continue
        module, is_embedding = match["module"], match.re is _EMBEDDING
        if any(part in ("base_layer", "modules_to_save") for part in module.split(".")):
            raise InputError(f"{file}: {name!r} lies inside another adapted layer, which is not read; {MERGE_FIRST}")
        _refuse_variants(file, name, module)
        adapters.setdefault(match["adapter"], name)
        found = factors.setdefault(module, Factors(is_embedding))
        if found.is_embedding != is_embedding or match["side"] in found.sides:
            other = next(iter(found.sides.values()))
            raise InputError(f"{file}: {other.name!r} and {name!r} are factors of one module, {module!r}, twice")
        found.sides[match["side"]] = tensor
    named = {adapter: name for adapter, name in (adapters | kept_by).items() if adapter is not None}
    for owners in (adapters, named):
        if len(owners) > 1:
            first, second = list(owners.values())[:2]
            raise InputError(
                f"{file}: {first!r} and {second!r} belong to different adapters; save each into a folder of its own"
            )
    if not factors:
        raise InputError(f"{file}: no LoRA factors in it")
    _add_copies(file, full, copies)
    return factors, full


def _plain_name(file: Path, name: str, short: str) -> tuple[str, str | None, bool]:
    """Return a tensor's name in the plain model, the adapter's name in it if any, and whether it is a second copy.

    With ``bias: all`` PEFT writes biases of modules_to_save up to three times: the base's (``original_module``), and
    the trained one with and without ``modules_to_save``; what it loads is the plain name.
    """
    if re.search(r"\.lora_B(\.[^.]+)?\.bias$", short):
        raise InputError(f"{file}: {name!r}: {REFUSED['lora_bias']}")
    _refuse_variants(file, name, short)
    parts = [part for part in short.split(".") if part != "base_layer"]
    if "original_module" in parts:
        return ".".join(part for part in parts if part != "original_module"), None, True
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        rest = parts[place + 1 :]
        adapter = rest.pop(0) if len(rest) > 1 else None
        return ".".join([*parts[:place], *rest]), adapter, True
    return ".".join(parts), None, False


def _refuse_variants(file: Path, name: str, short: str) -> None:
    """Refuse tensors that a plain LoRA does not have, whatever its settings say."""
    for part in short.split("."):
        if part == "lora_magnitude_vector":
            raise InputError(f"{file}: {name!r}: {REFUSED['use_dora']}")
        if part == "token_adapter" or part.startswith("trainable_tokens"):
            raise InputError(f"{file}: {name!r}: {REFUSED['trainable_token_indices']}")
        if part.startswith("lora_"):
            raise InputError(f"{file}: {name!r} is no tensor of a plain LoRA; {MERGE_FIRST}")


def _add_copies(file: Path, full: dict[str, StoredTensor], copies: list[tuple[str, StoredTensor]]) -> None:
    """Add trained copies whose plain name is missing to ``full``; refuse a copy of the base's own that stands alone."""
    for name, tensor in copies:
        if "original_module" in tensor.name.split("."):
            continue
        plain = full.setdefault(name, tensor)
        if plain is not tensor and ("modules_to_save" in plain.name.split(".") or plain.shape != tensor.shape):
            raise InputError(f"{file}: {plain.name!r} and {tensor.name!r} are both {name!r}")
    for name, tensor in copies:
        if name not in full:
            raise InputError(f"{file}: {tensor.name!r} is the base's own, and what was trained in its place is missing")
