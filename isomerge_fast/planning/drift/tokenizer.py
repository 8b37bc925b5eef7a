"""Compare special tokens, chat templates and generation settings, which lie in files beside a model's weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checkpoint.folder import read_own
from ...checkpoint.layout import Checkpoint, parse_settings
from ...errors import InputError
from .values import brief, brief_key, same

TOKENIZER, TOKENS_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
GENERATION, TEMPLATE, OLD_TEMPLATE = "generation_config.json", "chat_template.jinja", "chat_template.json"
# Larger ones are not compared. Real ones have under a megabyte.
MAX_BYTES, MAX_VALUES = 8_000_000, 400_000
MAX_DIGITS = 12  # of a token's number
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_SWITCHES = ("add_bos_token", "add_eos_token")
# What tokenizers have by their class: a file that does not name them may mean them all the same.
_USUAL = re.compile(r"</?s>|<(unk|pad|mask|bos|eos)>|\[(UNK|SEP|PAD|CLS|MASK)\]|<\|endoftext\|>")
_SAMPLING = (
    *("do_sample", "length_penalty", "max_length", "max_new_tokens", "min_p", "no_repeat_ngram_size", "num_beams"),
    *("repetition_penalty", "temperature", "top_k", "top_p", "typical_p"),
)
_STEERING = ("begin_suppress_tokens", "stop_strings", "suppress_tokens")
_TEMPLATE_ITEM, _SAMPLING_ITEM = "chat template", "sampling defaults"


class SettingsReader:
    """Read small files of checkpoints, and parse equal ones once.

    What cannot be read is a problem to be told of, and no error: it is not needed for the weights.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._parsed: dict[bytes, dict[str, Any]] = {}

    def bytes_of(self, folder: Path, name: str) -> bytes | None:
        """Return a file's bytes, or None where there is none or it cannot be read."""
        if not os.path.lexists(folder / name):
            return None
        try:
            return read_own(folder, name, MAX_BYTES)[0]
        except InputError as error:
            self._tell(error)
            return None

    def settings(self, folder: Path, name: str) -> dict[str, Any]:
        """Return a JSON object, or an empty one."""
        data = self.bytes_of(folder, name)
        if data is None:
            return {}
        try:
            if data not in self._parsed:
                self._parsed[data] = parse_settings(data, str(folder / name), most_values=MAX_VALUES)
            return self._parsed[data]
        except InputError as error:
            self._tell(error)
            return {}

    def _tell(self, error: InputError) -> None:
        if str(error) not in self.problems:
            self.problems.append(str(error))


@dataclass
class TokenSettings:
    """Hold what a checkpoint's files say of tokens, chat and generation."""

    items: dict[str, Any] = field(default_factory=dict)  # values by what they are called in a note
    added: dict[str, Any] = field(default_factory=dict)  # added tokens with their numbers
    files: set[str] = field(default_factory=set)  # names of those that are there


def tokenizer_differences(ours: TokenSettings, theirs: TokenSettings) -> Iterator[str]:
    """Yield how an expert differs from the base in special tokens, chat template and generation.

    What the base says and the expert does not counts where the expert has a file that would say it.
    """
    if not theirs.files:
        return
    for key, value in theirs.items.items():
        yield from _difference(key, value, ours)
    for key, value in ours.items.items():
        where = GENERATION if key.endswith(GENERATION) else TOKENIZER
        is_minor = _is_usual(value) or key == _SAMPLING_ITEM or key.startswith(("bos_token_id", "pad_token_id"))
        if key not in theirs.items and where in theirs.files and not is_minor:
            yield f"no {key}" + ("" if key == _TEMPLATE_ITEM else f" (base {brief(value)})")
    yield from _added(ours, theirs)


def _difference(key: str, value: Any, ours: TokenSettings) -> Iterator[str]:
    mine = ours.items.get(key)
    if mine is None:
        if key == _SAMPLING_ITEM:
            yield f"{key} ({', '.join(value)}; the base has none)"
        elif key == _TEMPLATE_ITEM:
            yield f"{key} (the base has none)"
        elif not (_is_usual(value) and TOKENIZER in ours.files):
            yield f"{key} {brief(value)} (the base has none)"
    elif key == _SAMPLING_ITEM:
        other = [name for name in _SAMPLING if not same(mine.get(name), value.get(name))]
        if other:
            yield f"{key} ({', '.join(other)})"
    elif not same(mine, value):
        yield key if key == _TEMPLATE_ITEM else f"{key} {brief(value)} (base {brief(mine)})"


def _is_usual(value: Any) -> bool:
    return isinstance(value, str) and _USUAL.fullmatch(value) is not None


def _added(ours: TokenSettings, theirs: TokenSettings) -> Iterator[str]:
    """Yield how many added tokens the base's tokenizer lacks, or has under other numbers."""
    if not ours.added and TOKENIZER in ours.files and ADDED not in theirs.files:
        return  # tokenizer.json has them, which is not read
    known = {value for value in ours.items.values() if isinstance(value, str)} | ours.added.keys()
    new = [token for token in theirs.added if token not in known]
    if new:
        first = f"{brief(new[0])} {brief(theirs.added[new[0]])}"
        yield f"{len(new)} added token(s) that the base's files do not name, such as {first}"
    moved = [
        token for token in theirs.added if token in ours.added and not same(theirs.added[token], ours.added[token])
    ]
    if moved:
        numbers = f"{brief(theirs.added[moved[0]])} (base {brief(ours.added[moved[0]])})"
        yield f"{len(moved)} added token(s) of other numbers, such as {brief(moved[0])} {numbers}"


def token_settings(checkpoint: Checkpoint, reader: SettingsReader) -> TokenSettings:
    """Return what a checkpoint's files say of tokens, chat and generation."""
    folder, found = checkpoint.path, TokenSettings()
    names = (TOKENIZER, TOKENS_MAP, ADDED, GENERATION, TEMPLATE, OLD_TEMPLATE)
    found.files = {name for name in names if os.path.lexists(folder / name)}
    tokenizer = reader.settings(folder, TOKENIZER)
    named = {**reader.settings(folder, TOKENS_MAP), **{k: v for k, v in tokenizer.items() if v is not None}}
    for key in (*_TOKENS, *_SWITCHES):
        value = named.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None:
            found.items[key] = value
    template = _template(folder, tokenizer, reader)
    if template is not None:
        found.items[_TEMPLATE_ITEM] = template
    generation = reader.settings(folder, GENERATION)
    if not generation and checkpoint.config:  # transformers takes them from there
        generation = {key: value for key, value in checkpoint.config.items() if key.endswith("_token_id")}
    for key, value in generation.items():
        steers = key.endswith(("_token_id", "_token_ids")) or key.startswith("forced_") or key in _STEERING
        if steers and value is not None:
            found.items[f"{brief_key(key)} of {GENERATION}"] = value
    sampling = {key: generation[key] for key in _SAMPLING if generation.get(key) is not None}
    if sampling:
        found.items[_SAMPLING_ITEM] = sampling
    found.added = {**_decoded(tokenizer), **reader.settings(folder, ADDED)}
    return found


def _decoded(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the added tokens of a tokenizer_config.json, with their numbers."""
    decoder = tokenizer.get("added_tokens_decoder")
    entries = decoder.items() if isinstance(decoder, dict) else ()
    return {
        entry["content"]: int(number) if number.isdecimal() and len(number) < MAX_DIGITS else number
        for number, entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("content"), str)
    }


def _template(folder: Path, tokenizer: Mapping[str, Any], reader: SettingsReader) -> Any:
    """Return the chat template: a file of its own, else that of the tokenizer's settings."""
    data = reader.bytes_of(folder, TEMPLATE)
    if data is not None:
        return data.decode(errors="replace").strip()
    template = reader.settings(folder, OLD_TEMPLATE).get("chat_template", tokenizer.get("chat_template"))
    return template.strip() if isinstance(template, str) else template
