"""Read the configuration of a merge strictly by one schema: from YAML, from a dict, or made in Python."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from .errors import ConfigError, InputError, nearest, shown
from .parsing.json_types import check
from .parsing.mergekit_recipe import is_recipe, read_recipe
from .parsing.shell_patterns import globs_of
from .parsing.values import Reader, dtype_name, is_list, number, path_text, pattern, refuse, whole_number

MAX_PATH_BYTES = 4_096  # as Linux has it
# How many wrong values one message tells of, and its length where there are several.
MAX_ERRORS, MAX_MESSAGE = 5, 350
# Weights that add up to less are not to be divided by their sum.
SMALLEST_SUM = 1e-8
# ``~`` and ``~user``, as a shell takes them.
_HOME = re.compile(r"~[A-Za-z0-9._-]*(/.*)?", re.DOTALL)
# Words for three kinds of surprise.
CHOICES = {
    "on_extra": ("error", "ignore", "copy"),
    "on_missing": ("error", "zero"),
    "on_other_base": ("error", "ignore"),
}


class Meant:
    """Mark in a field's type the reader of ``parsing.values`` that reads what is given before its type is checked.

    pydantic and ``json_types.check`` call it alike. Neither the type nor the engine needs pydantic.
    """

    def __init__(self, read: Reader, *arguments: Any) -> None:
        self.read, self.arguments = read, arguments

    def __call__(self, value: Any, what: str) -> Any:
        return self.read(value, what, *self.arguments)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic import BeforeValidator

        # Where the value stands, pydantic knows; that goes before the message.
        return BeforeValidator(lambda value: self(value, "")).__get_pydantic_core_schema__(source, handler)


def _options(value: Any, what: str) -> dict[str, Any]:
    """Read names with values; the method that they are for reads the values."""
    if value is None:  # of an override: a key with nothing after it
        return {}
    if not isinstance(value, Mapping):
        refuse(value, what, "names with values, such as {common_fraction: 0.8}")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{what}: the key {shown(key)} is not text")
    return dict(value)


Number = Annotated[float, Meant(number)]
Pattern = Annotated[str, Meant(pattern)]
CheckpointPath = Annotated[str, Meant(path_text, "the path of a checkpoint")]
Options = Annotated[dict[str, Any], Meant(_options)]
# For pydantic: no other keys, and dataclasses made in Python are checked as well.
STRICTLY = {"extra": "forbid", "revalidate_instances": "always"}


@dataclass(frozen=True)
class Override:
    """Give another method to tensors whose name matches ``match`` (a shell pattern); the first match wins."""

    __pydantic_config__ = STRICTLY

    match: Pattern
    method: str
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class WeightRule:
    """Give a weight to tensors whose name matches ``match`` (a shell pattern)."""

    __pydantic_config__ = STRICTLY

    match: Pattern
    weight: Number


@dataclass(frozen=True)
class MergeConfig:
    """Say what to merge, how, and where to.

    Attributes:
        base, experts: Hugging Face checkpoint folders, or bare ``.safetensors`` files. Relative to the working folder;
            ``load_config`` expands ``~``. Experts may all be LoRA adapter folders (``adapter_config.json``) instead.
        out: folder to write; None for a plan only.
        method: iso-c, iso-cts, mean, task-arithmetic, or one of an installed package (docs/new-method.md).
        scaling: the paper's α in θ = θ₀ + α·Δ; or several, each an output ``scaling-<α>`` of one decomposition. 1
            where it is None, which ``plan`` says: the best α is found on validation data.
        options: hyper-parameters of the method.
        weights: w_t, one entry an expert: a number, or rules of which the first that matches a tensor's name gives it
            (1 where none does). Δ_t is multiplied by it, whatever the method: the mean is (1/T) Σ w_t Δ_t. None: 1.
        normalize_weights: w_t are divided by their sum, tensor by tensor.
        exclude: shell patterns; matching tensors are averaged instead of merged by the method.
        overrides: other methods by name pattern.
        dtype: of all float tensors of the output; None keeps each tensor's dtype in the base.
        stochastic_rounding: a seed. What is written as bfloat16 is rounded up or down at random, up with the
            probability by which it lies nearer to the number above, so that small deltas count on average; the same
            seed gives the same bytes. None rounds to the nearest.
        on_extra: what becomes of tensors that an expert has and the base has not: "error", "ignore", or "copy" where
            one expert alone has it.
        on_missing: of tensors that some adapters adapt and others leave alone: "error", or "zero": their Δ_t is zero.
        on_other_base: of adapters that name different bases: "error", or "ignore" where these are the same weights.
        adapter_rank: write a LoRA adapter of this rank instead of a checkpoint: the merged Δ, of which it is the best
            approximation; the report has the error. Experts have to be adapters.
        experts_are_deltas: the experts hold Δ_t = θ_t − θ₀ (task vectors, a saved Δ) and not θ_t.
        save_delta: also write the merged Δ, into ``out/delta``, for ``isomerge apply``. It is kept in float32 (float64
            where an input is that), and what is written beside it is made of it as it is kept.
    """

    __pydantic_config__ = STRICTLY

    base: CheckpointPath
    experts: list[CheckpointPath]
    method: str = "iso-cts"
    scaling: Number | list[Number] | None = None
    options: Options = field(default_factory=dict)
    weights: list[Number | list[WeightRule]] | None = None
    normalize_weights: bool = False
    exclude: list[Pattern] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)
    dtype: Annotated[str, Meant(dtype_name)] | None = None
    stochastic_rounding: Annotated[int, Meant(whole_number, 0)] | None = None
    on_extra: str = "error"
    on_missing: str = "error"
    on_other_base: str = "error"
    adapter_rank: Annotated[int, Meant(whole_number, 1)] | None = None
    experts_are_deltas: bool = False
    save_delta: bool = False
    out: Annotated[str, Meant(path_text)] | None = None

    @property
    def methods(self) -> list[str]:
        """Return the names of all its methods."""
        return [self.method, *(override.method for override in self.overrides)]

    @property
    def scalings(self) -> tuple[float, ...]:
        if self.scaling is None:
            return (1.0,)
        return tuple(self.scaling) if isinstance(self.scaling, list) else (self.scaling,)

    @property
    def described(self) -> dict[str, Any]:
        """Return all keys with their values, given or not: what decides the output's bytes."""
        return {**asdict(self), "scaling": 1.0 if self.scaling is None else self.scaling}

    def weights_of(self, name: str) -> tuple[float, ...] | None:
        """Return w_t of a tensor, or None where none are given; refuse to divide them by a sum of 0."""
        if self.weights is None and not self.normalize_weights:
            return None
        entries = self.weights or [1.0] * len(self.experts)
        found = tuple(_weight(entry, name) for entry in entries)
        if self.normalize_weights:
            total = math.fsum(found)
            if abs(total) < SMALLEST_SUM:
                raise ConfigError(f"normalize_weights: weights {list(found)} of tensor {name!r} add up to {total:g}")
            found = tuple(weight / total for weight in found)
        return found


def _weight(entry: float | list[WeightRule], name: str) -> float:
    if not isinstance(entry, list):
        return float(entry)
    place = globs_of((*[rule.match for rule in entry],)).first(name)
    return 1.0 if place is None else float(entry[place].weight)


def recorded_config(description: Mapping[str, Any]) -> MergeConfig:
    """Return the config of a merge from what its manifest says of it, as strictly checked as any other."""
    base, *experts = (recorded["path"] for recorded in description["inputs"])
    raw = {**description["config"], "base": base, "experts": experts}
    try:
        check(raw, MergeConfig, "config")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    weights = raw.get("weights")
    if weights is not None:
        weights = [[WeightRule(**rule) for rule in each] if isinstance(each, list) else each for each in weights]
    overrides = [Override(**override) for override in raw.get("overrides", [])]
    return _checked(MergeConfig(**{**raw, "overrides": overrides, "weights": weights}), "config")


def load_config(source: str | os.PathLike[str] | Mapping[str, Any] | MergeConfig, **changes: Any) -> MergeConfig:
    """Return a checked MergeConfig from a YAML file, a dict or a MergeConfig.

    ``changes`` replace keys where they are not None. What has the key ``merge_method`` is read as mergekit's recipe.

    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type, or a value out of range; names the file and
            key.
        InputError: paths that are right from the file's own folder only.
    """
    where = "config"
    if isinstance(source, MergeConfig):
        raw: Mapping[Any, Any] = {each.name: getattr(source, each.name) for each in fields(source)}
    elif isinstance(source, Mapping):
        raw = source
    else:
        from .parsing.strict_yaml import read_mapping

        where = path_text(source, "config", "the path of a YAML file, a dict or a MergeConfig")
        raw = read_mapping(Path(where))
    if is_recipe(raw):
        raw = read_recipe(raw, where)
    changes = {key: value for key, value in changes.items() if value is not None}
    config = _at_home(_checked(_validated({**raw, **changes}, where), where))
    if isinstance(source, str | os.PathLike):
        _check_places(config, Path(source))
    return config


def _at_home(config: MergeConfig) -> MergeConfig:
    """Return the config with ``~`` at the start of a path expanded, as a shell does it and YAML does not."""

    def expanded(path: str) -> str:
        return os.path.expanduser(path) if _HOME.fullmatch(path) else path

    out = None if config.out is None else expanded(config.out)
    return replace(config, base=expanded(config.base), experts=[*map(expanded, config.experts)], out=out)


def _check_places(config: MergeConfig, file: Path) -> None:
    """Raise InputError where a path of a YAML file is right from the file's folder, and not from the working folder."""
    for path in (config.base, *config.experts):
        beside = file.parent / path
        if not os.path.lexists(path) and os.path.lexists(beside):
            raise InputError(
                f"{file}: {path} is not there, but {beside} is; paths are relative to the folder that isomerge runs in"
            )


# ------------------------------------------------------------------------------------------------------- what is wrong

# What is expected at a place, where no single reader reads the value.
_OVERRIDE, _RULE = "{match: '*norm*', method: mean}", "{match: '*mlp*', weight: 0.5}"
EXPECTED = {
    "experts": "a list of paths: [path/a, path/b]",
    "weights": "an entry for each expert, a number or rules: [0.5, [{match: '*mlp*', weight: 2.0}]]",
    "weights[]": f"a number or rules: [{_RULE}]",
    "weights[][]": _RULE,
    "scaling": "a number or several: [0.8, 1.0]",
    "exclude": "a list of patterns: ['*lm_head*', '*norm*']",
    "overrides": f"a list: [{_OVERRIDE}]",
    "overrides[]": _OVERRIDE,
    **dict.fromkeys(("normalize_weights", "experts_are_deltas", "save_delta"), "true or false"),
}
# The dataclass whose fields stand at a place.
_KINDS = {"": MergeConfig, "overrides[]": Override, "weights[][]": WeightRule}
_KEYS = {place: [each.name for each in fields(kind)] for place, kind in _KINDS.items()}


@cache
def _schema() -> Any:
    """Return pydantic's checks of the dataclass as it stands, so that there is one schema."""
    from pydantic import TypeAdapter

    return TypeAdapter(MergeConfig)


def _validated(raw: Mapping[Any, Any], where: str) -> MergeConfig:
    from pydantic import ValidationError

    given = {key: value for key, value in raw.items() if value is not None or key not in _KEYS[""]}
    try:
        return _schema().validate_python(given)
    except ValidationError as error:
        wrong = [_complaint(each) for each in error.errors(include_url=False) if not _is_of_another_kind(each)]
    told = wrong[:MAX_ERRORS]
    while len(told) > 1 and sum(map(len, told)) > MAX_MESSAGE:
        told.pop()
    more = [f"… and {len(wrong) - len(told)} more"] if len(wrong) > len(told) else []
    raise ConfigError(f"{where}: {'. '.join([*told, *more])}")


def _is_of_another_kind(error: Mapping[str, Any]) -> bool:
    """Return whether an error is about the kind that was not meant, where a number or a list may stand.

    pydantic says of a list that it is no number, and of another value that it is no list.
    """
    kind, tried = ("value_error", "function-before[") if is_list(error["input"]) else ("list_type", "list[")
    return error["type"] == kind and str(error["loc"][-1]).startswith(tried)


def _complaint(error: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors in the words of ``parsing.values``."""
    kind, loc, value = error["type"], error["loc"], error["input"]
    place = _place(loc[:-1] if kind in ("missing", "unexpected_keyword_argument", "invalid_key") else loc)
    begin = f"{place}: " if place else ""
    if kind == "missing":
        return f"{place} has no {loc[-1]!r}; expected {EXPECTED[_kind_of(place)]}" if place else f"{loc[-1]} is missing"
    if kind == "unexpected_keyword_argument":
        return f"{begin}unknown key {shown(loc[-1])}{nearest(loc[-1], _KEYS[_kind_of(place)])}"
    if kind == "invalid_key":
        return f"{begin}the key {shown(value)} is not text"
    if kind == "string_unicode":  # half of a surrogate pair in a key
        return f"{begin}{shown(value)} is not text"
    if kind == "value_error":
        return f"{place}{error['ctx']['error']}"
    return f"{place} is {shown(value)}; expected {EXPECTED.get(_kind_of(place), 'a word')}"


def _place(loc: Iterable[int | str]) -> str:
    """Return a place as ``weights[0][1].weight``, without the alternatives that pydantic tried."""
    names = {name for keys in _KEYS.values() for name in keys}
    parts = (
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if isinstance(part, int) or part in names
    )
    return "".join(parts).removeprefix(".")


def _kind_of(place: str) -> str:
    """Return ``weights[][]`` for ``weights[0][1]``."""
    return re.sub(r"\d+", "", place)


def _checked(config: MergeConfig, where: str) -> MergeConfig:
    for problem in _problems(config):
        raise ConfigError(f"{where}: {problem}")
    return config


def _problems(config: MergeConfig) -> Iterator[str]:
    """Yield what is wrong with values of the right types; each check may rely on those before it."""
    if not config.experts:
        yield "experts is empty; at least one is needed"
    yield from _value_problems(config)
    if not config.scalings:
        yield "scaling is an empty list"
    if len({f"{value:g}" for value in config.scalings}) != len(config.scalings):
        yield "scaling lists a value twice"
    for key, choices in CHOICES.items():
        if (given := getattr(config, key)) not in choices:
            yield f"{key} {shown(given)} is unknown{nearest(given, choices)}"
    if config.weights is not None and len(config.weights) != len(config.experts):
        yield f"weights has {len(config.weights)} entries for {len(config.experts)} experts"
    for key in ("save_delta", "stochastic_rounding", "experts_are_deltas"):
        if config.adapter_rank is not None and getattr(config, key) not in (None, False):
            yield f"adapter_rank and {key} exclude each other"
    for key in ("save_delta", "experts_are_deltas"):
        if getattr(config, key) and config.on_extra == "copy":
            yield f"on_extra: copy and {key} exclude each other: what the base lacks has no delta"
    if config.out is not None and Path(config.out).suffix == ".safetensors":
        yield f"out is a folder ({config.out}); the weights go into model.safetensors inside it"


def _is_possible(path: str) -> bool:
    """Return whether a file can have this path."""
    try:
        return "\0" not in path and len(os.fsencode(path)) <= MAX_PATH_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _value_problems(config: MergeConfig) -> Iterator[str]:
    """Yield paths that no file can have, options that are no plain values, and what cannot be written as JSON."""
    out = [] if config.out is None else [config.out]
    for key, paths in {"base": [config.base], "experts": config.experts, "out": out}.items():
        for each in paths:
            if not each:
                yield f"{key} has an empty path"
            if not _is_possible(each):
                yield f"{key} is {shown(each)}, not a path that a file can have"
    for options in (config.options, *(override.options for override in config.overrides)):
        for key, value in options.items():
            if not isinstance(value, str | int | float | None) or (isinstance(value, int) and abs(value) >= 2**63):
                yield f"option {shown(key)} is {shown(value)}; expected a word or a number"
    for key in (each.name for each in fields(config) if each.name != "out"):
        value = getattr(config, key)
        try:
            json.dumps(value, default=asdict, ensure_ascii=False).encode()
        except ValueError:  # half of a surrogate pair, or a number with thousands of digits
            yield f"{key} is {shown(value)}, which cannot be written down"
