"""LoRA adapters as PEFT saves them: which of the base's tensors each pair of factors moves, and by how much.

    Δ = scale · B A,    A [r, in], B [out, r],    scale = lora_alpha / r, or lora_alpha / √r with use_rslora.

Headers and settings only, as in ``layout``; PEFT is not needed. What a setting or a tensor would add to that formula is
refused by its name: an adapter is either read as what it is, or not at all.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InputError, shown
from ...ops import FLOAT_DTYPES
from ...parsing.linear_regex import NamePattern, PatternError, is_plain_name
from ..folder import list_folder, read_own
from ..layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    DTYPE_NAMES,
    MAX_SETTINGS_BYTES,
    TOKEN_TABLES,
    Checkpoint,
    FileIdentity,
    StoredTensor,
    parse_settings,
    read_header,
)

MAX_RANK = 2**31
MAX_EXPRESSIONS = 1_000  # of one setting

_MERGE_FIRST = "merge it into its base with PEFT's merge_and_unload, and give that folder as the expert"
_CONVERT = "peft.save_as_lora makes a plain LoRA of it, or " + _MERGE_FIRST
_SAVE_CONVERTED = (
    "its base was changed when it was made; save it again with save_pretrained(folder, "
    "path_initial_model_for_weight_conversion=…), which makes a plain LoRA of it and says so in the settings"
)

# Switches of PEFT that change what an adapter means, with what to do; each may be null, false or empty.
_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA is not applied to every token, and is no change of the weights",
    "arrow_config": "Arrow chooses between adapters token by token, which is no change of the weights",
    "enable_lora": _MERGE_FIRST,
    "kasa_config": "KaSA cuts its base and puts a diagonal between the factors; " + _MERGE_FIRST,
    "layer_replication": "the adapter's model has more layers than its base, which no merge with that base can hold",
    "lora_bias": "B has a bias of its own; " + _MERGE_FIRST,
    "megatron_config": "parallel layers may hold shards only; save the gathered adapter without it",
    "monteclora_config": "MonteCLoRA draws its weights at random; " + _CONVERT,
    "target_parameters": "factors of parameters that are not a module's weight are not read; " + _MERGE_FIRST,
    "trainable_token_indices": "single rows of an embedding are not read; " + _MERGE_FIRST,
    "use_bdlora": "one of the factors is block-diagonal and stored by blocks; " + _MERGE_FIRST,
    "use_dora": "DoRA's magnitudes are no part of B A; " + _CONVERT,
    "use_qalora": "A is pooled over groups of a quantized base; " + _MERGE_FIRST,
    "velora_config": "VeLoRA is not read; " + _CONVERT,
}

# Settings that are used here, and those that steer training or loading only.
_USED = {
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
}
_HARMLESS = {
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Starting points that leave the base as it was; the factors in the file are all of the change.
_PLAIN_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_CHANGED_STARTS = ("pissa", "olora", "corda", "lora_ga")

_LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?")
PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraPair:
    """Δ = scale · B A [out, in], or its transpose.

    Attributes:
        name: of the base's tensor; a: A [r, in]; b: B [out, r], both as they are stored.
        transposed: Δ = scale (B A)ᵀ [in, out]: embeddings, and layers that store their weight so (GPT-2's Conv1D).
    """

    name: str
    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[M, N] of Δ."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class Adapter(Checkpoint):
    """An adapter by the names of its base. ``tensors`` are those that it holds whole: modules_to_save, trained biases.

    Attributes:
        pairs: the factors, by the name of the base's tensor.
        settings: ``adapter_config.json`` as parsed.
        copies: tensors of the base that lie in the file as well, frozen under their factors; they are not read.
    """

    pairs: dict[str, LoraPair] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict, compare=False)
    copies: tuple[str, ...] = ()

    @property
    def stored_tensors(self) -> int:
        return len(self.tensors) + 2 * len(self.pairs)


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder with an ``adapter_config.json``, be it one that cannot be read."""
    return os.path.lexists(Path(path) / ADAPTER_CONFIG_FILE)


def base_name(adapter: Adapter) -> str | None:
    """What its base was called where it was trained: a name on the Hub, or a path there."""
    return adapter.settings.get("base_model_name_or_path") or None


def open_adapter(path: str | os.PathLike[str], base: Checkpoint) -> Adapter:
    """What is in an adapter folder, by the names of ``base``; headers and settings only.

    Names are tried as they are, then with one prefix removed or added (``bert.encoder…`` on a file that says
    ``encoder…``). Where that does not help they stay as they are, and ``incompatibilities`` says what the base has not.

    Raises:
        InputError: malformed, unknown or refused; the message names the file, and the tensor or the setting.
    """
    folder = Path(path)
    weights = _weights_file(folder)
    settings, settings_identity = _read_settings(folder / ADAPTER_CONFIG_FILE)
    scales = _Scales(folder / ADAPTER_CONFIG_FILE, settings)
    stored, weights_identity = read_header(weights)
    factors, full = _sort(weights, stored)
    rename = _renaming(weights, [f"{module}.weight" for module in factors], base)

    pairs: dict[str, LoraPair] = {}
    for module, found in factors.items():
        a, b = found.pair(weights, module)
        scale = scales.of(module, a, b)
        pairs[rename(f"{module}.weight")] = LoraPair(rename(f"{module}.weight"), a, b, scale, found.is_embedding)
    pairs = _turned(weights, pairs, base, bool(settings.get("fan_in_fan_out")))
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
    """Whether this is the frozen layer under a pair of factors, which PEFT saves beside them where that is an
    embedding. Of another shape it belongs to a vocabulary that was resized.
    """
    return own is not None and tensor.shape == own.shape and "base_layer" in tensor.name.split(".")


def incompatibilities(base: Checkpoint, adapter: Adapter) -> Iterator[str]:
    """Yield what of the factors does not fit ``base``, without the adapter's name: modules that it has not, a line in
    all; other shapes. What the adapter holds whole is compared like any checkpoint.
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
    """The one file of an adapter's weights."""
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


def _read_settings(file: Path) -> tuple[dict[str, Any], FileIdentity]:
    """``adapter_config.json``, when all that it switches on is read here."""
    data, status = read_own(file.parent, file.name, MAX_SETTINGS_BYTES)
    settings = parse_settings(data, str(file))
    check_settings(file, settings)
    return settings, FileIdentity.of(status, hashlib.sha256(data).hexdigest())


def check_settings(where: object, settings: Mapping[str, Any]) -> None:
    """Refuses the settings of what is no plain LoRA, and those that are not known.

    Args:
        where: what the message begins with: a file, or an adapter in memory.
        settings: as in ``adapter_config.json``.

    Raises:
        InputError: naming the setting, its value and what to do.
    """
    kind = settings.get("peft_type")
    if kind is None:
        raise InputError(f"{where}: no peft_type in it; a PEFT adapter says what it is")
    if kind != "LORA":
        hint = _CONVERT if isinstance(kind, str) else "expected a name"
        raise InputError(f"{where}: peft_type {shown(kind)} is not read, only 'LORA'; {hint}")
    for key, value in settings.items():
        if key in _USED or key in _HARMLESS or _is_off(value):
            continue
        if key in _REFUSED:
            raise InputError(f"{where}: {key} is {shown(value)}: {_REFUSED[key]}")
        raise InputError(
            f"{where}: {key} is {shown(value)}, a setting that is not known here, of a newer PEFT perhaps; "
            "if it changes nothing about how the adapter is applied, set it to null"
        )
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(settings.get(key, False), bool):
            raise InputError(f"{where}: {key} is {shown(settings[key])}, expected true or false")
    if settings.get("bias", "none") not in ("none", "all", "lora_only"):
        raise InputError(f"{where}: bias is {shown(settings['bias'])}, expected 'none', 'all' or 'lora_only'")
    if not isinstance(settings.get("base_model_name_or_path"), str | None):
        raise InputError(f"{where}: base_model_name_or_path is {shown(settings['base_model_name_or_path'])}, no name")

    start = settings.get("init_lora_weights", True)
    if start is None or isinstance(start, bool) or (isinstance(start, str) and start.lower() in _PLAIN_STARTS):
        return
    hint = "not known here; " + _MERGE_FIRST
    if isinstance(start, str) and start.lower().startswith(_CHANGED_STARTS):
        hint = _SAVE_CONVERTED
    elif start == "loftq":
        hint = "it belongs to a quantized base; " + _MERGE_FIRST
    raise InputError(f"{where}: init_lora_weights is {shown(start)}: {hint}")


def _is_off(value: Any) -> bool:
    """null, false or empty; not 0, which may be a value like any other."""
    return value is None or value is False or (isinstance(value, str | list | dict | set) and not value)


class _Scales:
    """The scale of every module, by PEFT's rules.

    A pattern holds for modules whose name it matches from the start or from behind a dot, up to the end; of several,
    the first in the file does.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self._file, self._root = file, bool(settings.get("use_rslora"))
        self._rank = _number(file, "r", settings.get("r"), is_rank=True)
        self._alpha = _number(file, "lora_alpha", settings.get("lora_alpha"))
        self._ranks = _Patterns(file, "rank_pattern", settings, is_rank=True)
        self._alphas = _Patterns(file, "alpha_pattern", settings)

    def of(self, module: str, a: StoredTensor, b: StoredTensor) -> float:
        """Raises InputError where the rank of A and B is not what the settings say."""
        rank = self._ranks.find(module, self._rank)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise InputError(
                f"{a.file}: {a.name!r} {list(a.shape)} and {b.name!r} {list(b.shape)} are not of rank {int(rank)}, "
                f"which {self._file.name} says (r, rank_pattern)"
            )
        alpha = self._alphas.find(module, self._alpha)
        return alpha / math.sqrt(rank) if self._root else alpha / rank


class _Patterns:
    """``rank_pattern`` or ``alpha_pattern``.

    A pattern of letters, digits, ``_``, ``-`` and dots is a name or the end of one, and is looked up: a file may have
    one for every module. The others are tried one after the other.
    """

    def __init__(self, file: Path, key: str, settings: Mapping[str, Any], *, is_rank: bool = False) -> None:
        given = settings.get(key)
        if not isinstance(given, dict | None):
            raise InputError(f"{file}: {key} is {shown(given)}, expected names with numbers")
        self._places: dict[str, int] = {}
        self._names: dict[str, int] = {}
        self._expressions: list[tuple[int, NamePattern]] = []
        self._numbers: list[float] = []
        for place, (pattern, value) in enumerate((given or {}).items()):
            self._numbers.append(_number(file, f"{key} of {shown(pattern)}", value, is_rank=is_rank))
            self._places[pattern] = place
            if is_plain_name(pattern):
                self._names[pattern] = place
                continue
            if len(self._expressions) == MAX_EXPRESSIONS:
                raise InputError(f"{file}: {key} has more than {MAX_EXPRESSIONS} regular expressions; refused")
            try:
                self._expressions.append((place, NamePattern(pattern)))
            except PatternError as error:
                raise InputError(f"{file}: {key}: {shown(pattern)} {error}") from error

    def find(self, module: str, default: float) -> float:
        ends = [module, *(module[place + 1 :] for place, character in enumerate(module) if character == ".")]
        named = min((self._names[end] for end in ends if end in self._names), default=len(self._numbers))
        earlier = (place for place, pattern in self._expressions if place < named and pattern.matches(module))
        # A name may hold characters that mean something else in a pattern.
        place = next(earlier, named if named < len(self._numbers) else self._places.get(module))
        return default if place is None else self._numbers[place]


def _number(file: Path, what: str, value: Any, *, is_rank: bool = False) -> float:
    """A finite number; a whole one above 0 where it is a rank."""
    if is_rank:
        if type(value) is not int or not 0 < value < MAX_RANK:
            raise InputError(f"{file}: {what} is {shown(value)}, expected a whole number above 0")
        return value
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except OverflowError:
        pass
    raise InputError(f"{file}: {what} is {shown(value)}, expected a finite number")


@dataclass
class _Found:
    """The factors of one module."""

    is_embedding: bool
    sides: dict[str, StoredTensor] = field(default_factory=dict)

    def pair(self, file: Path, module: str) -> tuple[StoredTensor, StoredTensor]:
        """(A, B), when both are there, are matrices of floats and fit each other."""
        for side, other in (("A", "B"), ("B", "A")):
            if side not in self.sides:
                raise InputError(f"{file}: module {module!r} has {self.sides[other].name!r}, but no {side} beside it")
        a, b = self.sides["A"], self.sides["B"]
        for tensor in (a, b):
            where = f"{file}: {tensor.name!r} {list(tensor.shape)}"
            if len(tensor.shape) > 2:
                raise InputError(f"{where}: LoRA of a convolution is not read; {_MERGE_FIRST}")
            if len(tensor.shape) < 2 or 0 in tensor.shape:
                raise InputError(f"{where}: no matrix; was it saved before its shards were gathered?")
            if tensor.dtype not in FLOAT_DTYPES:
                raise InputError(f"{where} is {DTYPE_NAMES[tensor.dtype]}: quantized factors are not read")
        if a.shape[0] != b.shape[1]:
            raise InputError(f"{file}: {a.name!r} {list(a.shape)} and {b.name!r} {list(b.shape)} have different ranks")
        return a, b


def _sort(file: Path, stored: Mapping[str, StoredTensor]) -> tuple[dict[str, _Found], dict[str, StoredTensor]]:
    """(factors by module, whole tensors by name), by the names of the model that the adapter was trained in.

    Written out without PEFT, names still hold the adapter's own (``lora_A.default.weight``); one is enough to tell.
    """
    factors: dict[str, _Found] = {}
    full: dict[str, StoredTensor] = {}
    copies: list[tuple[str, StoredTensor]] = []
    adapters: dict[str | None, str] = {}  # of the factors, and the first name that holds it
    kept_by: dict[str | None, str] = {}  # of modules_to_save, likewise
    for name, tensor in stored.items():
        short = name.removeprefix(PREFIX)
        match = _LINEAR.fullmatch(short) or _EMBEDDING.fullmatch(short)
        if match is None:
            plain, adapter, is_copy = _whole_name(file, name, short)
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
            raise InputError(f"{file}: {name!r} lies inside another adapted layer, which is not read; {_MERGE_FIRST}")
        _refuse_variants(file, name, module)
        adapters.setdefault(match["adapter"], name)
        found = factors.setdefault(module, _Found(is_embedding))
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
    _settle_copies(file, full, copies)
    return factors, full


def _whole_name(file: Path, name: str, short: str) -> tuple[str, str | None, bool]:
    """(the name in the plain model, the adapter's name where the tensor's holds one, whether it is a second copy).

    With ``bias: all`` PEFT writes biases of modules_to_save up to three times: the base's (``original_module``), and
    the trained one with and without ``modules_to_save``; what it loads is the plain name.
    """
    if re.search(r"\.lora_B(\.[^.]+)?\.bias$", short):
        raise InputError(f"{file}: {name!r}: {_REFUSED['lora_bias']}")
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
    """Refuses tensors that plain LoRA has not, wherever the settings come from."""
    for part in short.split("."):
        if part == "lora_magnitude_vector":
            raise InputError(f"{file}: {name!r}: {_REFUSED['use_dora']}")
        if part == "token_adapter" or part.startswith("trainable_tokens"):
            raise InputError(f"{file}: {name!r}: {_REFUSED['trainable_token_indices']}")
        if part.startswith("lora_"):
            raise InputError(f"{file}: {name!r} is no tensor of a plain LoRA; {_MERGE_FIRST}")


def _settle_copies(file: Path, full: dict[str, StoredTensor], copies: list[tuple[str, StoredTensor]]) -> None:
    """Of what is there more than once the plain name counts, then what was trained; the base's alone is refused."""
    for name, tensor in copies:
        if "original_module" in tensor.name.split("."):
            continue
        plain = full.setdefault(name, tensor)
        if plain is not tensor and ("modules_to_save" in plain.name.split(".") or plain.shape != tensor.shape):
            raise InputError(f"{file}: {plain.name!r} and {tensor.name!r} are both {name!r}")
    for name, tensor in copies:
        if name not in full:
            raise InputError(f"{file}: {tensor.name!r} is the base's own, and what was trained in its place is missing")


def _renaming(file: Path, names: list[str], base: Checkpoint) -> _Renaming:
    """From the adapter's names to the base's: the same, or else one prefix removed or added that makes all fit."""
    if all(name in base.tensors for name in names):
        return _Renaming("", "", base)
    first, found = names[0], []
    dots = [place for place, character in enumerate(first) if character == "."]
    found += [_Renaming(first[: dot + 1], "", base) for dot in dots]
    found += [_Renaming("", own.removesuffix(first), base) for own in base.tensors if own.endswith("." + first)]
    found = [
        rename
        for rename in found
        if all(name.startswith(rename.removed) and rename.strictly(name) in base.tensors for name in names)
    ]
    if len(found) > 1:
        raise InputError(
            f"{file}: {first!r} may be {found[0](first)!r} or {found[1](first)!r} of the base {base.path}; "
            "name the adapter's tensors as the base does"
        )
    return found[0] if found else _Renaming("", "", base)


@dataclass(frozen=True)
class _Renaming:
    """``removed`` and ``added`` are prefixes with their dots."""

    removed: str
    added: str
    base: Checkpoint

    def strictly(self, name: str) -> str:
        return self.added + name.removeprefix(self.removed)

    def __call__(self, name: str) -> str:
        """What lies outside the prefix, as a head beside an encoder, keeps its name where the base has that."""
        renamed = self.strictly(name)
        return name if renamed not in self.base.tensors and name in self.base.tensors else renamed


def _turned(file: Path, pairs: dict[str, LoraPair], base: Checkpoint, fan_in_fan_out: bool) -> dict[str, LoraPair]:
    """The pairs with ``transposed`` settled.

    PEFT sets ``fan_in_fan_out`` anew for every layer that it meets, so that the file tells of the last one only. The
    shapes tell, but for square ones; these follow the setting, where no other layer speaks against it.
    """
    settled: dict[str, LoraPair] = {}
    square: list[str] = []
    against: list[str] = []
    for name, pair in pairs.items():
        own = base.tensors.get(name)
        turned = fan_in_fan_out
        if pair.transposed:
            turned = True
        elif own is not None and own.shape in (pair.shape, pair.shape[::-1]):
            if pair.shape[0] == pair.shape[1]:
                square.append(name)
            else:
                turned = own.shape != pair.shape
                if turned != fan_in_fan_out:
                    against.append(name)
        settled[name] = LoraPair(name, pair.a, pair.b, pair.scale, turned)
    if square and against:
        raise InputError(
            f"{file}: whether {square[0]!r} {list(pairs[square[0]].shape)} is stored transposed cannot be told: "
            f"fan_in_fan_out is {str(fan_in_fan_out).lower()}, and {against[0]!r} is not so; {_MERGE_FIRST}"
        )
    return settled
