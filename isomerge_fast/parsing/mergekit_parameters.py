"""Read the parameters of mergekit's merge methods, which may differ between models and between tensors."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import SHOWN_CHARACTERS, ConfigError, nearest, shown
from .values import Reader, flag, number, word

_MISSING = object()


@dataclass(frozen=True)
class Parameter:
    """Describe a parameter of a merge method."""

    read: Reader
    per_model: bool = False  # whether every model may have its own
    default: Any = None  # None for an option of our method, which has a default of its own; ``_MISSING`` for none


@dataclass(frozen=True)
class Method:
    """Describe a merge method of mergekit's: our name for it, and its parameters."""

    ours: str
    parameters: Mapping[str, Parameter]

    @property
    def options(self) -> list[str]:
        """Return the parameters that are options of our method."""
        return [name for name, parameter in self.parameters.items() if parameter.default is None]


_LAMBDA = Parameter(number, default=1.0)
_ISO = {
    "weight": Parameter(number, per_model=True, default=1.0),
    "lambda": _LAMBDA,
    "rank_policy": Parameter(word),
    "precision": Parameter(word),
}
_REQUIRED_WEIGHT = Parameter(number, per_model=True, default=_MISSING)
_TASK_ARITHMETIC = {
    "weight": _REQUIRED_WEIGHT,
    "lambda": _LAMBDA,
    **dict.fromkeys(("normalize", "rescale", "int8_mask"), Parameter(flag, default=False)),
    "density": Parameter(number, per_model=True, default=1.0),
}
METHODS = {
    "iso_c": Method("iso-c", _ISO),
    "iso_cts": Method("iso-cts", {**_ISO, "common_fraction": Parameter(number)}),
    "task_arithmetic": Method("task-arithmetic", _TASK_ARITHMETIC),
    "linear": Method("task-arithmetic", {"weight": _REQUIRED_WEIGHT, "normalize": Parameter(flag, default=True)}),
}


@dataclass(frozen=True)
class Rule:
    """Give a value to the tensors whose name contains ``part``; to all of them where that is None."""

    part: str | None
    value: Any


@dataclass(frozen=True)
class Scope:
    """Hold a ``parameters`` mapping, and its name in messages."""

    where: str
    values: Mapping[str, Any]


class ParameterReader:
    """Read the parameters of a recipe's method, ``name``; refuse what is not honoured, with ``where`` and its key."""

    def __init__(self, where: str, name: object) -> None:
        self.where = where
        if not isinstance(name, str) or name not in METHODS:
            self.fail(f"merge_method {shown(name)} is not honoured{nearest(name, METHODS)}")
        self.name, self.method = name, METHODS[name]

    def check_keys(self, prefix: str, values: Mapping[Any, Any], known: Iterable[str]) -> None:
        for key in values:
            if not isinstance(key, str):
                self.fail(f"the key {prefix}{shown(key)} is not text")
            if key not in known:
                named = key if len(key) <= SHOWN_CHARACTERS else shown(key)
                self.fail(f"unknown key {prefix}{named}{nearest(key, known)}")

    def refuse(self, key: str, reason: str) -> NoReturn:
        self.fail(f"{key} is not honoured: {reason}")

    def fail(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.where}: {message}")

    def scope(self, key: str, values: Any, *, per_model: bool = False) -> Scope:
        """Return a ``parameters`` mapping of the recipe, or of one model."""
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            self.fail(f"{key} is {shown(values)}; expected names with values")
        known = self.method.parameters
        self.check_keys(f"{key}.", values, known)
        for name in values if per_model else ():
            if not known[name].per_model:
                self.refuse(f"{key}.{name}", "it is one for all models; give it under parameters")
        return Scope(key, values)

    def rules(self, name: str, scopes: Sequence[Scope]) -> list[Rule]:
        """Return a parameter as rules: the first that matches a tensor's name counts, and the last matches every name.

        A model's own scope comes first, then the recipe's, then the default.
        """
        parameter = self.method.parameters[name]
        rules: list[Rule] = []
        for scope in scopes:
            rules += self._rules_of(f"{scope.where}.{name}", scope.values.get(name), parameter.read)
        if parameter.default is not _MISSING:
            rules.append(Rule(None, parameter.default))
        elif not rules:
            self.fail(f"{scopes[0].where}.{name} is missing; {self.name} has no default for it")
        elif all(rule.part is not None for rule in rules):
            self.refuse(place_of(name, scopes), "no value for tensors that match no filter; end with {value: ...}")
        end = next(index for index, rule in enumerate(rules) if rule.part is None)
        return rules[: end + 1]

    def _rules_of(self, key: str, setting: Any, read: Reader) -> Iterator[Rule]:
        if setting is None or setting == []:
            return
        if not isinstance(setting, Mapping | list):
            yield Rule(None, read(setting, f"{self.where}: {key}"))
            return
        for index, entry in enumerate([setting] if isinstance(setting, Mapping) else setting):
            gradient = "a gradient over the layers; give a filter for each of them"
            if not isinstance(entry, Mapping):
                self.refuse(key, gradient)
            here = key if isinstance(setting, Mapping) else f"{key}[{index}]"
            self.check_keys(f"{here}.", entry, ("filter", "value"))
            part = entry.get("filter")
            if part is not None and not isinstance(part, str):
                self.fail(f"{here}.filter is {shown(part)}; expected a part of a tensor's name, or '*'")
            if isinstance(entry.get("value"), list):
                self.refuse(f"{here}.value", gradient)
            value = read(entry.get("value"), f"{self.where}: {here}.value")
            yield Rule(None if part in ("", "*") else part, value)

    def same_for_all(self, name: str, shared: Scope) -> Any:
        """Return a parameter that has one value for all models and tensors."""
        rules = self.rules(name, (shared,))
        if any(rule.value != rules[0].value for rule in rules):
            self.refuse(place_of(name, (shared,)), "it differs between tensors; only weight may")
        return rules[0].value


def place_of(name: str, scopes: Iterable[Scope]) -> str:
    """Return the key under which a parameter was given."""
    return next((f"{scope.where}.{name}" for scope in scopes if name in scope.values), name)


def constant(rules: Sequence[Rule]) -> float | None:
    """Return the value of all tensors, or None where it depends on the name."""
    return rules[0].value if all(rule.value == rules[0].value for rule in rules) else None


def weight_entry(rules: Sequence[Rule]) -> float | list[dict[str, Any]]:
    """Return an entry of ``weights`` of a MergeConfig: a number, or shell patterns with numbers."""
    if (value := constant(rules)) is not None:
        return value
    patterns = ["*" if rule.part is None else f"*{glob.escape(rule.part)}*" for rule in rules]
    return [{"match": pattern, "weight": rule.value} for pattern, rule in zip(patterns, rules, strict=True)]
