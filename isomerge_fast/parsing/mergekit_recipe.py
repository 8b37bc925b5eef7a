"""Read a merge recipe in mergekit's YAML as keys of our own configuration. mergekit itself is not needed."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import shown
from .mergekit_parameters import ParameterReader, Rule, Scope, constant, place_of, weight_entry
from .values import dtype_name

KEYS = (
    *("base_model", "chat_template", "dtype", "merge_method", "models", "modules", "out_dtype", "parameters"),
    *("slices", "tokenizer", "tokenizer_source"),
)
# Different filters whose combinations are all tried, to find the sums that weights may have.
MOST_FILTERS = 10
MAX_PATH_CHARACTERS = 4_096


def is_recipe(raw: Mapping[str, Any]) -> bool:
    """Return whether this is mergekit's YAML and not ours."""
    return "merge_method" in raw


def read_recipe(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys of a MergeConfig that ask for the merge that mergekit makes of this recipe.

        iso_c, iso_cts, task_arithmetic:  θ = θ₀ + λ · method(w_t Δ_t)
        linear:                           θ = Σ w_t θ_t / Σ w_t = θ₀ + Σ (w_t / Σ w) Δ_t, whichever model is θ₀

    ``raw`` is the parsed YAML, and ``where`` begins every message. Keys that are as in a MergeConfig by default may be
    left out. A ConfigError names the key that cannot be honoured, that mergekit refuses itself, or that is unknown.
    """
    return _Recipe(raw, where).read()


@dataclass(frozen=True)
class _Reference:
    """Hold mergekit's model reference: a path, and perhaps a LoRA adapter on it."""

    path: str
    adapter: str | None = None

    def __str__(self) -> str:
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"


# By model: the scopes in which its parameters are looked up, and the rules of its weight.
_Models = dict[_Reference, tuple[Scope, ...]]
_Weights = dict[_Reference, list[Rule]]


class _Recipe(ParameterReader):
    """Read one recipe."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.check_keys("", raw, KEYS)
        self.raw = {key: value for key, value in raw.items() if value is not None}
        super().__init__(where, self.raw.get("merge_method"))
        self.shared = self.scope("parameters", self.raw.get("parameters"))

    def read(self) -> dict[str, Any]:
        for key in ("slices", "modules"):
            if self.raw.get(key):
                self.refuse(key, "whole models are merged here; list them under models, or run the recipe in mergekit")
        base = self._reference("base_model", self.raw["base_model"]) if "base_model" in self.raw else None
        if base and base.adapter is not None:
            self.refuse("base_model", "a base with an adapter; merge the adapter into it first")
        models = self._models()
        self._check_tokenizer(base)
        if "chat_template" in self.raw:
            self.refuse("chat_template", "the output has the base's")
        read_models = self._linear if self.name == "linear" else self._around_a_base
        base, weights, normalize = read_models(base, models)
        if not weights:
            self.fail("models: no model beside the base; at least one is needed")
        config: dict[str, Any] = {"method": self.method.ours, "base": base.path}
        config["experts"] = [self._expert_path(base, reference) for reference in weights]
        if "lambda" not in self.method.parameters:
            config["scaling"] = 1.0  # the sum is the whole of it
        elif "lambda" in self.shared.values or self.name == "task_arithmetic":
            config["scaling"] = self.same_for_all("lambda", self.shared)
        options = {key: self.same_for_all(key, self.shared) for key in self.method.options}
        config["options"] = {key: value for key, value in options.items() if value is not None}
        if normalize or any(constant(rules) != 1.0 for rules in weights.values()):
            config["weights"] = [weight_entry(rules) for rules in weights.values()]
        if normalize:
            config["normalize_weights"] = True
        for key in ("out_dtype", "dtype"):
            if key in self.raw:
                return {**config, "dtype": dtype_name(self.raw[key], f"{self.where}: {key}")}
        return config

    def _around_a_base(self, base: _Reference | None, models: _Models) -> tuple[_Reference, _Weights, bool]:
        """Return the base, the weights of the experts, and whether these are normalized, for methods around a base.

        The base may be among the models. It has no delta, and its weight means nothing.
        """
        if base is None:
            self.fail(f"base_model is missing; {self.name} changes one")
        experts = {reference: scopes for reference, scopes in models.items() if reference != base}
        for key, harmless in (("density", 1.0), ("rescale", False)):
            if key not in self.method.parameters:
                continue
            for own in experts.values():
                scopes = own if self.method.parameters[key].per_model else (self.shared,)
                if any(rule.value != harmless for rule in self.rules(key, scopes)):
                    self.refuse(place_of(key, scopes), f"{self.name} drops nothing; leave it out, as {harmless!r}")
        normalize = False
        if "normalize" in self.method.parameters:
            self.same_for_all("int8_mask", self.shared)  # of any value: no mask is made without a consensus of signs
            normalize = self.same_for_all("normalize", self.shared)
        return base, self._weights(experts), normalize

    def _weights(self, models: _Models) -> _Weights:
        return {reference: self.rules("weight", scopes) for reference, scopes in models.items()}

    def _linear(self, base: _Reference | None, models: _Models) -> tuple[_Reference, _Weights, bool]:
        """Return the same for the weighted mean of all models; a base that is not among them is added to them.

        The base's own delta is zero, but its weight is part of the sum. Weights that are all numbers are divided here,
        and the base is read once; else it is also an expert.
        """
        if base is None:
            base = _Reference(next(iter(models)).path)
        elif base not in models:
            nothing = Scope("base_model (mergekit adds it to the models): parameters", {})
            models = {**models, base: (nothing, self.shared)}
        weights = self._weights(models)
        experts = {reference: rules for reference, rules in weights.items() if reference != base}
        numbers = [constant(rules) for rules in weights.values()]
        if not self.same_for_all("normalize", self.shared):
            if any(not math.isclose(total, 1.0, rel_tol=1e-6) for total in self._sums([*weights.values()])):
                self.refuse(
                    place_of("normalize", (self.shared,)),
                    "false needs weights that add up to 1 for every tensor; give such weights, or leave it out",
                )
            return base, experts, False
        if None in numbers:
            return base, weights, True
        total = math.fsum(number for number in numbers if number is not None)
        if abs(total) < 1e-8:
            self.fail(f"the weights of the models add up to {total:g}, and are to be divided by that")
        return base, {each: [Rule(None, rules[0].value / total)] for each, rules in experts.items()}, False

    def _sums(self, weights: list[list[Rule]]) -> Iterable[float]:
        """Yield the sums that weights may have: for every combination of filters that a name might match."""
        parts = sorted({rule.part for rules in weights for rule in rules if rule.part is not None})
        if len(parts) > MOST_FILTERS:
            self.refuse(place_of("normalize", (self.shared,)), f"false with more than {MOST_FILTERS} filters")
        for flags in itertools.product((False, True), repeat=len(parts)):
            matched = {None, *itertools.compress(parts, flags)}
            yield math.fsum(next(rule.value for rule in rules if rule.part in matched) for rules in weights)

    def _models(self) -> _Models:
        listed = self.raw.get("models")
        if not isinstance(listed, list) or not listed:
            self.fail("models is missing; it lists the models to be merged")
        models: _Models = {}
        for index, entry in enumerate(listed):
            key = f"models[{index}]"
            if not isinstance(entry, Mapping) or entry.get("model") is None:
                self.fail(f"{key} is {shown(entry)}; expected {{model: path/to/it, parameters: ...}}")
            self.check_keys(f"{key}.", entry, ("model", "parameters"))
            own = self.scope(f"{key}.parameters", entry.get("parameters"), per_model=True)
            reference = self._reference(f"{key}.model", entry["model"])
            if reference in models:
                self.fail(f"{key}.model: {reference} is listed twice")
            models[reference] = (own, self.shared)
        return models

    def _reference(self, key: str, value: Any) -> _Reference:
        """Return the reference of mergekit's ``path``, ``path+adapter`` or {model: ..., lora: ...}, of folders on disk.

        A path that exists and has a + or @ in it is that path, unless what stands before the + exists too.
        """
        if isinstance(value, Mapping):
            self.check_keys(f"{key}.", value, ("model", "lora", "override_architecture"))
            if value.get("override_architecture") is not None:
                self.refuse(f"{key}.override_architecture", "tensors are matched by name; the base's config is kept")
            if value.get("model") is None:
                self.fail(f"{key}.model is missing")
            path, lora = self._path(f"{key}.model", value["model"]), value.get("lora")
            return _Reference(path, None if lora is None else self._path(f"{key}.lora", lora))
        text = self._text(key, value)
        path, plus, adapter = text.partition("+")
        if not plus:
            return _Reference(self._path(key, text))
        if os.path.exists(text):
            if os.path.exists(path) and os.path.exists(adapter):
                self.fail(f"{key}: {text!r} is a path, and {path!r} with adapter {adapter!r}; write {{model: ...}}")
            return _Reference(text)
        if "+" in adapter:
            self.fail(f"{key}: {text!r} has more than one +, and is no path")
        return _Reference(self._path(key, path), self._path(key, adapter))

    def _path(self, key: str, value: Any) -> str:
        """Return the path of mergekit's ``path`` or {path: ...}; refuse ``path@revision`` and {revision: ...}."""
        if isinstance(value, Mapping):
            self.check_keys(f"{key}.", value, ("path", "revision"))
            if value.get("revision") is not None:
                self.refuse(f"{key}.revision", "checkpoints are folders on disk; give the folder of that revision")
            return self._text(f"{key}.path", value.get("path"))
        text = self._text(key, value)
        if "@" in text and not os.path.exists(text):
            self.refuse(key, f"{text!r} names a revision; checkpoints are folders on disk")
        return text

    def _text(self, key: str, value: Any) -> str:
        if not isinstance(value, str | os.PathLike) or not os.fspath(value):
            self.fail(f"{key} is {shown(value)}; expected the path of a checkpoint")
        text = str(os.fspath(value))
        if "\0" in text or len(text) > MAX_PATH_CHARACTERS:
            self.fail(f"{key} is {shown(text)}, not a path that a file can have")
        return text

    def _expert_path(self, base: _Reference, reference: _Reference) -> str:
        """Return the path of the checkpoint, or of the adapter where it is one on the base."""
        if reference.adapter is None:
            return reference.path
        if os.path.realpath(reference.path) != os.path.realpath(base.path):
            self.fail(
                f"{reference}: an adapter on another model than {base.path} is not honoured; merge it into that first"
            )
        return reference.adapter

    def _check_tokenizer(self, base: _Reference | None) -> None:
        """Refuse tokenizers but the base's: its files are copied, and no row of an embedding is moved."""
        source, key = self.raw.get("tokenizer_source"), "tokenizer_source"
        if "tokenizer" in self.raw:
            if source is not None:
                self.fail("tokenizer and tokenizer_source exclude each other")
            tokenizer, key = self.raw["tokenizer"], "tokenizer.source"
            if not isinstance(tokenizer, Mapping):
                self.fail(f"tokenizer is {shown(tokenizer)}; expected {{source: base}}")
            self.check_keys("tokenizer.", tokenizer, ("source", "tokens", "pad_to_multiple_of"))
            for name in ("tokens", "pad_to_multiple_of"):
                if tokenizer.get(name):
                    self.refuse(f"tokenizer.{name}", "no row of an embedding is added or moved")
            source = tokenizer.get("source") or "union"  # mergekit's default
        if source is None:
            return
        if base is None:
            self.refuse(key, "without a base_model, whose tokenizer the output has")
        if source != "base" and (source == "union" or self._reference(key, source) != base):
            self.refuse(key, f"{shown(source)}; the output has the tokenizer of base_model: 'base'")
