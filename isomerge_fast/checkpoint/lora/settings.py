"""Check the settings of a LoRA adapter, ``adapter_config.json``, and read the scale of every module from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError, shown
from ...parsing.linear_regex import NamePattern, PatternError, is_plain_name
from ..folder import read_own
from ..layout import MAX_SETTINGS_BYTES, FileIdentity, StoredTensor, parse_settings

MAX_RANK = 2**31
MAX_EXPRESSIONS = 1_000  # of one setting

MERGE_FIRST = "merge it into its base with PEFT's merge_and_unload, and give that folder as the expert"
_CONVERT = "peft.save_as_lora makes a plain LoRA of it, or " + MERGE_FIRST
_SAVE_CONVERTED = (
    "its base was changed when it was made; save it again with save_pretrained(folder, "
    "path_initial_model_for_weight_conversion=…), which makes a plain LoRA of it and says so in the settings"
)

# Settings that change what an adapter means, and what to do; each may be null, false or empty.
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA is not applied to every token, and is no change of the weights",
    "arrow_config": "Arrow chooses between adapters token by token, which is no change of the weights",
    "enable_lora": MERGE_FIRST,
    "kasa_config": "KaSA cuts its base and puts a diagonal between the factors; " + MERGE_FIRST,
    "layer_replication": "the adapter's model has more layers than its base, which no merge with that base can hold",
    "lora_bias": "B has a bias of its own; " + MERGE_FIRST,
    "megatron_config": "parallel layers may hold shards only; save the gathered adapter without it",
    "monteclora_config": "MonteCLoRA draws its weights at random; " + _CONVERT,
    "target_parameters": "factors of parameters that are not a module's weight are not read; " + MERGE_FIRST,
    "trainable_token_indices": "single rows of an embedding are not read; " + MERGE_FIRST,
    "use_bdlora": "one of the factors is block-diagonal and stored by blocks; " + MERGE_FIRST,
    "use_dora": "DoRA's magnitudes are no part of B A; " + _CONVERT,
    "use_qalora": "A is pooled over groups of a quantized base; " + MERGE_FIRST,
    "velora_config": "VeLoRA is not read; " + _CONVERT,
}

# Settings that are used here, and those that steer training or loading only.
USED = {
    *("alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha"),
    *("peft_type", "r", "rank_pattern", "use_rslora"),
}
HARMLESS = {
    *("auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core"),
    *("modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules"),
    "task_type",
}
# Initialisations that leave the base as it was: the factors in the file are the whole change.
_PLAIN_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_CHANGED_STARTS = ("pissa", "olora", "corda", "lora_ga")


def read_settings(file: Path) -> tuple[dict[str, Any], FileIdentity]:
    """Read an ``adapter_config.json``; refuse it where it switches on what is not read here."""
    data, status = read_own(file.parent, file.name, MAX_SETTINGS_BYTES)
    settings = parse_settings(data, str(file))
    check_settings(file, settings)
    return settings, FileIdentity.of(status, hashlib.sha256(data).hexdigest())


def check_settings(where: object, settings: Mapping[str, Any]) -> None:
    """Refuse settings (``adapter_config.json``) of anything but a plain LoRA, and unknown settings.

    ``where``, the file or the adapter in memory, begins the message.
    """
    kind = settings.get("peft_type")
    if kind is None:
        raise InputError(f"{where}: no peft_type in it; a PEFT adapter says what it is")
    if kind != "LORA":
        hint = _CONVERT if isinstance(kind, str) else "expected a name"
        raise InputError(f"{where}: peft_type {shown(kind)} is not read, only 'LORA'; {hint}")
    for key, value in settings.items():
        if key in USED or key in HARMLESS or _is_off(value):
            continue
        if key in REFUSED:
            raise InputError(f"{where}: {key} is {shown(value)}: {REFUSED[key]}")
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
    hint = "not known here; " + MERGE_FIRST
    if isinstance(start, str) and start.lower().startswith(_CHANGED_STARTS):
        hint = _SAVE_CONVERTED
    elif start == "loftq":
        hint = "it belongs to a quantized base; " + MERGE_FIRST
    raise InputError(f"{where}: init_lora_weights is {shown(start)}: {hint}")


def _is_off(value: Any) -> bool:
    """Return whether a setting is null, false or empty; 0 may be a value like any other."""
    return value is None or value is False or (isinstance(value, str | list | dict | set) and not value)


class Scales:
    """Give the scale of every module, by PEFT's rules.

    A pattern holds for modules whose name it matches from the start or from behind a dot, up to the end; of several,
    the first in the file does.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self._file, self._root = file, bool(settings.get("use_rslora"))
        self._rank = _number(file, "r", settings.get("r"), is_rank=True)
        self._alpha = _number(file, "lora_alpha", settings.get("lora_alpha"))
        self._ranks = ModulePatterns(file, "rank_pattern", settings, is_rank=True)
        self._alphas = ModulePatterns(file, "alpha_pattern", settings)

    def of(self, module: str, a: StoredTensor, b: StoredTensor) -> float:
        """Return a module's scale; raise InputError where A and B are not of the rank that the settings say."""
        rank = self._ranks.find(module, self._rank)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise InputError(
                f"{a.file}: {a.name!r} {list(a.shape)} and {b.name!r} {list(b.shape)} are not of rank {int(rank)}, "
                f"which {self._file.name} says (r, rank_pattern)"
            )
        alpha = self._alphas.find(module, self._alpha)
        return alpha / math.sqrt(rank) if self._root else alpha / rank


class ModulePatterns:
    """Look up the numbers of modules in ``rank_pattern`` or ``alpha_pattern``.

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
    """Return a finite number; for a rank, a whole one above 0."""
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
