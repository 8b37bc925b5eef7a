"""A merge recipe in mergekit's YAML, read as keys of our own configuration. mergekit itself is not needed."""

from __future__ import annotations

import glob
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..errors import SHOWN_CHARACTERS, ConfigError, nearest, shown
from .values import Reader, dtype_name, flag, number, word

KEYS = (
    "base_model",
    "chat_template",
    "dtype",
    "merge_method",
    "models",
    "modules",
    "out_dtype",
    "parameters",
    "slices",
    "tokenizer",
    "tokenizer_source",
)
# How many different filters are tried in all combinations to find what weights add up to.
MOST_FILTERS = 10
MAX_PATH_CHARACTERS = 4_096


def is_recipe(raw: Mapping[str, Any]) -> bool:
    """Whether this is mergekit's YAML and not ours."""
    return "merge_method" in raw


def read_recipe(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of a MergeConfig that ask for the merge that mergekit makes of this recipe.

        iso_c, iso_cts, task_arithmetic:  θ = θ₀ + λ · method(w_t Δ_t)
        linear:                           θ = Σ w_t θ_t / Σ w_t = θ₀ + Σ (w_t / Σ w) Δ_t, whichever model is θ₀

    Args:
        raw: the parsed YAML.
        where: begins every message, such as the file's name.

    Returns:
        A dict of plain values. Keys that are as in a MergeConfig by default may be left out.

    Raises:
        ConfigError: what cannot be honoured, what mergekit refuses itself, and unknown keys; names the key.
    """
    return _Recipe(raw, where).read()


# ----------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class _Parameter:
    """Of a merge method.

    Attributes:
        per_model: whether every model may have its own.
        default: MISSING where mergekit has none.
    """

    read: Reader
    per_model: bool = False
    default: Any = None


MISSING = object()
_LAMBDA = _Parameter(number, default=1.0)
_ISO = {
    "weight": _Parameter(number, per_model=True, default=1.0),
    "lambda": _LAMBDA,
    "rank_policy": _Parameter(word),
    "precision": _Parameter(word),
}
_REQUIRED_WEIGHT = _Parameter(number, per_model=True, default=MISSING)


@dataclass(frozen=True)
class _Method:
    """A merge method of mergekit's: our name for it, and its parameters."""

    ours: str
    parameters: dict[str, _Parameter]
    options: tuple[str, ...] = field(default=())


METHODS = {
    "iso_c": _Method("iso-c", _ISO, ("rank_policy", "precision")),
    "iso_cts": _Method(
        "iso-cts",
        {**_ISO, "common_fraction": _Parameter(number)},
        ("rank_policy", "precision", "common_fraction"),
    ),
    "task_arithmetic": _Method(
        "task-arithmetic",
        {
            "weight": _REQUIRED_WEIGHT,
            "lambda": _LAMBDA,
            "normalize": _Parameter(flag, default=False),
            "rescale": _Parameter(flag, default=False),
            "int8_mask": _Parameter(flag, default=False),
            "density": _Parameter(number, per_model=True, default=1.0),
        },
    ),
    "linear": _Method("task-arithmetic", {"weight": _REQUIRED_WEIGHT, "normalize": _Parameter(flag, default=True)}),
}


@dataclass(frozen=True)
class _Rule:
    """A value for the tensors whose name contains ``part``; for all of them where that is None."""

    part: str | None
    value: Any


@dataclass(frozen=True)
class _Scope:
    """A ``parameters`` mapping, and how messages call it."""

    where: str
    values: Mapping[str, Any]


# --------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class _Reference:
    """mergekit's model reference: a path, and perhaps a LoRA adapter on it."""

    path: str
    adapter: str | None = None

    def __str__(self) -> str:
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"


@dataclass(frozen=True)
class _Model:
    """An entry of ``models``, or the base that mergekit adds to them."""

    reference: _Reference
    scopes: tuple[_Scope, ...]


class _Recipe:
    """One recipe while it is read."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._check_keys("", raw, KEYS)
        self.raw = {key: value for key, value in raw.items() if value is not None}
        self.name, self.method = self._method()
        self.shared = self._scope("parameters", self.raw.get("parameters"))

    def read(self) -> dict[str, Any]:
        for key in ("slices", "modules"):
            if self.raw.get(key):
                self._refuse(key, "whole models are merged here; list them under models, or run the recipe in mergekit")
        base = self._reference("base_model", self.raw["base_model"]) if "base_model" in self.raw else None
        if base and base.adapter is not None:
            self._refuse("base_model", "a base with an adapter; merge the adapter into it first")
        models = self._models()
        self._check_tokenizer(base)
        if "chat_template" in self.raw:
            self._refuse("chat_template", "the output has the base's")
        if self.name == "linear":
            base, experts, weights, normalize = self._linear(base, models)
        else:
            base, experts, weights, normalize = self._around_a_base(base, models)
        config: dict[str, Any] = {"method": self.method.ours, "base": base.path}
        if not experts:
            self._fail("models: no model beside the base; at least one is needed")
        config["experts"] = [self._expert_path(base, model) for model in experts]
        if "lambda" not in self.method.parameters:
            config["scaling"] = 1.0  # the sum is the whole of it
        elif "lambda" in self.shared.values or self.name == "task_arithmetic":
            config["scaling"] = self._same_for_all("lambda")
        options = {key: self._same_for_all(key) for key in self.method.options}
        config["options"] = {key: value for key, value in options.items() if value is not None}
        if normalize or any(_constant(rules) != 1.0 for rules in weights):
            config["weights"] = [_written(rules) for rules in weights]
        if normalize:
            config["normalize_weights"] = True
        dtype = self._dtype("out_dtype") or self._dtype("dtype")
        return config if dtype is None else {**config, "dtype": dtype}

    # ------------------------------------------------------------------------------------------------- what is merged

    def _around_a_base(
        self, base: _Reference | None, models: list[_Model]
    ) -> tuple[_Reference, list[_Model], list[list[_Rule]], bool]:
        """(base, experts, weights, whether these are normalized) of the methods that change a base.

        The base may be among the models. It has no delta, and whatever weight it has says nothing.
        """
        if base is None:
            self._fail(f"base_model is missing; {self.name} changes one")
        experts = [model for model in models if model.reference != base]
        for key, harmless in (("density", 1.0), ("rescale", False)):
            if key not in self.method.parameters:
                continue
            for model in experts:
                scopes = model.scopes if self.method.parameters[key].per_model else (self.shared,)
                if any(rule.value != harmless for rule in self._rules(key, scopes)):
                    self._refuse(self._called(key, scopes), f"{self.name} drops nothing; leave it out, as {harmless!r}")
        normalize = False
        if "normalize" in self.method.parameters:
            self._same_for_all("int8_mask")  # of any value: no mask is made without a consensus of signs
            normalize = self._same_for_all("normalize")
        return base, experts, [self._rules("weight", model.scopes) for model in experts], normalize

    def _linear(
        self, base: _Reference | None, models: list[_Model]
    ) -> tuple[_Reference, list[_Model], list[list[_Rule]], bool]:
        """The same of the weighted mean of all models. A base that is not among them is added to them, as by mergekit.

        Its own delta is zero, but its weight is part of the sum. Where all weights are numbers they are divided here,
        and the base is read once; else it is also an expert.
        """
        terms = list(models)
        if base is None:
            base = _Reference(models[0].reference.path)
        elif all(model.reference != base for model in models):
            nothing = _Scope("base_model (mergekit adds it to the models): parameters", {})
            terms.append(_Model(base, (nothing, self.shared)))
        weights = [self._rules("weight", term.scopes) for term in terms]
        experts = [(term, rules) for term, rules in zip(terms, weights, strict=True) if term.reference != base]
        numbers = [_constant(rules) for rules in weights]
        if not self._same_for_all("normalize"):
            if any(not math.isclose(total, 1.0, rel_tol=1e-6) for total in self._sums(weights)):
                self._refuse(
                    self._called("normalize", (self.shared,)),
                    "false needs weights that add up to 1 for every tensor; give such weights, or leave it out",
                )
            normalize = False
        elif None in numbers:
            return base, terms, weights, True
        else:
            total = math.fsum(number for number in numbers if number is not None)
            if abs(total) < 1e-8:
                self._fail(f"the weights of the models add up to {total:g}, and are to be divided by that")
            experts = [(term, [_Rule(None, rules[0].value / total)]) for term, rules in experts]
            normalize = False
        return base, [term for term, _ in experts], [rules for _, rules in experts], normalize

    def _sums(self, weights: list[list[_Rule]]) -> Iterable[float]:
        """What the weights may add up to: for every combination of filters that a name might match."""
        parts = sorted({rule.part for rules in weights for rule in rules if rule.part is not None})
        if len(parts) > MOST_FILTERS:
            self._refuse(self._called("normalize", (self.shared,)), f"false with more than {MOST_FILTERS} filters")
        for flags in itertools.product((False, True), repeat=len(parts)):
            matched = {None, *itertools.compress(parts, flags)}
            yield math.fsum(next(rule.value for rule in rules if rule.part in matched) for rules in weights)

    def _models(self) -> list[_Model]:
        listed = self.raw.get("models")
        if not isinstance(listed, list) or not listed:
            self._fail("models is missing; it lists the models to be merged")
        models: dict[_Reference, _Model] = {}
        for index, entry in enumerate(listed):
            key = f"models[{index}]"
            if not isinstance(entry, Mapping) or entry.get("model") is None:
                self._fail(f"{key} is {shown(entry)}; expected {{model: path/to/it, parameters: ...}}")
            self._check_keys(f"{key}.", entry, ("model", "parameters"))
            own = self._scope(f"{key}.parameters", entry.get("parameters"), per_model=True)
            model = _Model(self._reference(f"{key}.model", entry["model"]), (own, self.shared))
            if model.reference in models:
                self._fail(f"{key}.model: {model.reference} is listed twice")
            models[model.reference] = model
        return list(models.values())

    def _reference(self, key: str, value: Any) -> _Reference:
        """mergekit's ``path``, ``path+adapter`` or {model: ..., lora: ...}, of folders on disk.

        A path that exists and has a + or @ in it is that path, unless what stands before the + exists too.
        """
        if isinstance(value, Mapping):
            self._check_keys(f"{key}.", value, ("model", "lora", "override_architecture"))
            if value.get("override_architecture") is not None:
                self._refuse(f"{key}.override_architecture", "tensors are matched by name; the base's config is kept")
            if value.get("model") is None:
                self._fail(f"{key}.model is missing")
            lora = value.get("lora")
            return _Reference(
                self._path(f"{key}.model", value["model"]), None if lora is None else self._path(f"{key}.lora", lora)
            )
        text = self._text(key, value)
        path, plus, adapter = text.partition("+")
        if not plus:
            return _Reference(self._path(key, text))
        if os.path.exists(text):
            if os.path.exists(path) and os.path.exists(adapter):
                self._fail(f"{key}: {text!r} is a path, and {path!r} with adapter {adapter!r}; write {{model: ...}}")
            return _Reference(text)
        if "+" in adapter:
            self._fail(f"{key}: {text!r} has more than one +, and is no path")
        return _Reference(self._path(key, path), self._path(key, adapter))

    def _path(self, key: str, value: Any) -> str:
        """mergekit's ``path``, ``path@revision`` or {path: ..., revision: ...}; revisions are refused."""
        if isinstance(value, Mapping):
            self._check_keys(f"{key}.", value, ("path", "revision"))
            if value.get("revision") is not None:
                self._refuse(f"{key}.revision", "checkpoints are folders on disk; give the folder of that revision")
            return self._text(f"{key}.path", value.get("path"))
        text = self._text(key, value)
        if "@" in text and not os.path.exists(text):
            self._refuse(key, f"{text!r} names a revision; checkpoints are folders on disk")
        return text

    def _text(self, key: str, value: Any) -> str:
        if not isinstance(value, str | os.PathLike) or not os.fspath(value):
            self._fail(f"{key} is {shown(value)}; expected the path of a checkpoint")
        text = str(os.fspath(value))
        if "\0" in text or len(text) > MAX_PATH_CHARACTERS:
            self._fail(f"{key} is {shown(text)}, not a path that a file can have")
        return text

    def _expert_path(self, base: _Reference, model: _Model) -> str:
        """The checkpoint, or the adapter where it is one on the base."""
        reference = model.reference
        if reference.adapter is None:
            return reference.path
        if os.path.realpath(reference.path) != os.path.realpath(base.path):
            self._fail(
                f"{reference}: an adapter on another model than {base.path} is not honoured; merge it into that first"
            )
        return reference.adapter

    # ----------------------------------------------------------------------------------------------------- parameters

    def _scope(self, key: str, values: Any, *, per_model: bool = False) -> _Scope:
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            self._fail(f"{key} is {shown(values)}; expected names with values")
        known = self.method.parameters
        self._check_keys(f"{key}.", values, known)
        for name in values if per_model else ():
            if not known[name].per_model:
                self._refuse(f"{key}.{name}", "it is one for all models; give it under parameters")
        return _Scope(key, values)

    def _rules(self, name: str, scopes: Sequence[_Scope]) -> list[_Rule]:
        """A parameter as rules of which the first that matches a tensor's name counts; the last matches every name.

        A model's own, then the recipe's, then the default: a scope of which no filter matches leaves it to the next.
        """
        rules: list[_Rule] = []
        for scope in scopes:
            rules += self._rules_of(f"{scope.where}.{name}", scope.values.get(name), self.method.parameters[name].read)
        default = self.method.parameters[name].default
        if default is MISSING:
            if not rules:
                self._fail(f"{scopes[0].where}.{name} is missing; {self.name} has no default for it")
            if all(rule.part is not None for rule in rules):
                self._refuse(
                    self._called(name, scopes), "no value for tensors that match no filter; end with {value: ...}"
                )
        else:
            rules.append(_Rule(None, default))
        end = next(index for index, rule in enumerate(rules) if rule.part is None)
        return rules[: end + 1]

    def _rules_of(self, key: str, setting: Any, read: Reader) -> Iterable[_Rule]:
        if setting is None or setting == []:
            return
        if not isinstance(setting, Mapping | list):
            yield _Rule(None, read(setting, f"{self.where}: {key}"))
            return
        for index, entry in enumerate([setting] if isinstance(setting, Mapping) else setting):
            if not isinstance(entry, Mapping):
                self._refuse(key, "a gradient over the layers; give a filter for each of them")
            here = key if isinstance(setting, Mapping) else f"{key}[{index}]"
            self._check_keys(f"{here}.", entry, ("filter", "value"))
            part = entry.get("filter")
            if part is not None and not isinstance(part, str):
                self._fail(f"{here}.filter is {shown(part)}; expected a part of a tensor's name, or '*'")
            if isinstance(entry.get("value"), list):
                self._refuse(f"{here}.value", "a gradient over the layers; give a filter for each of them")
            value = read(entry.get("value"), f"{self.where}: {here}.value")
            yield _Rule(None if part in ("", "*") else part, value)

    def _same_for_all(self, name: str) -> Any:
        """A parameter that has one value for all models and tensors."""
        rules = self._rules(name, (self.shared,))
        if any(rule.value != rules[0].value for rule in rules):
            self._refuse(self._called(name, (self.shared,)), "it differs between tensors; only weight may")
        return rules[0].value

    def _called(self, name: str, scopes: Sequence[_Scope]) -> str:
        """Where a parameter was given."""
        return next((f"{scope.where}.{name}" for scope in scopes if name in scope.values), name)

    # ----------------------------------------------------------------------------------------------- the rest of keys

    def _method(self) -> tuple[str, _Method]:
        name = self.raw.get("merge_method")
        if not isinstance(name, str) or name not in METHODS:
            self._fail(f"merge_method {shown(name)} is not honoured{nearest(name, METHODS)}")
        return name, METHODS[name]

    def _check_tokenizer(self, base: _Reference | None) -> None:
        """The base's tokenizer files are copied, and no row of an embedding is moved."""
        source, key = self.raw.get("tokenizer_source"), "tokenizer_source"
        if "tokenizer" in self.raw:
            if source is not None:
                self._fail("tokenizer and tokenizer_source exclude each other")
            tokenizer, key = self.raw["tokenizer"], "tokenizer.source"
            if not isinstance(tokenizer, Mapping):
                self._fail(f"tokenizer is {shown(tokenizer)}; expected {{source: base}}")
            self._check_keys("tokenizer.", tokenizer, ("source", "tokens", "pad_to_multiple_of"))
            for name in ("tokens", "pad_to_multiple_of"):
                if tokenizer.get(name):
                    self._refuse(f"tokenizer.{name}", "no row of an embedding is added or moved")
            source = tokenizer.get("source") or "union"  # mergekit's default
        if source is None:
            return
        if base is None:
            self._refuse(key, "without a base_model, whose tokenizer the output has")
        if source != "base" and (source == "union" or self._reference(key, source) != base):
            self._refuse(key, f"{shown(source)}; the output has the tokenizer of base_model: 'base'")

    def _dtype(self, key: str) -> str | None:
        value = self.raw.get(key)
        return None if value is None else dtype_name(value, f"{self.where}: {key}")

    # ------------------------------------------------------------------------------------------------------- messages

    def _check_keys(self, prefix: str, values: Mapping[Any, Any], known: Iterable[str]) -> None:
        for key in values:
            if not isinstance(key, str):
                self._fail(f"the key {prefix}{shown(key)} is not text")
            if key not in known:
                self._fail(
                    f"unknown key {prefix}{key if len(key) <= SHOWN_CHARACTERS else shown(key)}{nearest(key, known)}"
                )

    def _refuse(self, key: str, reason: str) -> NoReturn:
        self._fail(f"{key} is not honoured: {reason}")

    def _fail(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.where}: {message}")


def _constant(rules: list[_Rule]) -> float | None:
    """The value of all tensors, or None where it depends on the name."""
    return rules[0].value if all(rule.value == rules[0].value for rule in rules) else None


def _written(rules: list[_Rule]) -> float | list[dict[str, Any]]:
    """As an entry of ``weights``: a number, or shell patterns with numbers."""
    constant = _constant(rules)
    if constant is not None:
        return constant
    patterns = ["*" if rule.part is None else f"*{glob.escape(rule.part)}*" for rule in rules]
    return [{"match": pattern, "weight": rule.value} for pattern, rule in zip(patterns, rules, strict=True)]
