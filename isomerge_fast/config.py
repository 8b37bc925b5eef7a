"""The configuration of a merge: one schema, read strictly from YAML, from a dict, or made in Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError, nearest

OUTPUT_DTYPES = ("float64", "float32", "float16", "bfloat16")
ON_EXTRA = ("error", "ignore", "copy")


@dataclass(frozen=True)
class Override:
    """Another method for the tensors whose name matches ``match`` (shell pattern); the first match wins."""

    match: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeConfig:
    """What to merge, how, and where to.

    Attributes:
        base, experts: Hugging Face checkpoint folders, or bare ``.safetensors`` files. Relative to the working folder.
        out: folder to write; None for a plan only.
        method: iso-c, iso-cts, mean or task-arithmetic.
        scaling: the paper's α in θ = θ₀ + α·Δ; or several, each an output ``scaling-<α>`` of one decomposition.
        options: hyper-parameters of the method.
        exclude: shell patterns; matching tensors are averaged instead of merged by the method.
        overrides: other methods by name pattern.
        dtype: of all float tensors of the output; None keeps each tensor's dtype in the base.
        stochastic_rounding: a seed. What is written as bfloat16 is rounded up or down at random, up with the
            probability by which it lies nearer to the number above, so that small deltas count on average; the same
            seed gives the same bytes. None rounds to the nearest.
        on_extra: what becomes of tensors that an expert has and the base has not: "error", "ignore", or "copy" where
            one expert alone has it.
        experts_are_deltas: the experts hold Δ_t = θ_t − θ₀ (task vectors, a saved Δ) and not θ_t.
        save_delta: also write the merged Δ, into ``out/delta``, for ``isomerge apply``. It is kept in float32 (float64
            where an input is that), and what is written beside it is made of it as it is kept.
    """

    base: str
    experts: list[str]
    method: str = "iso-cts"
    scaling: float | list[float] = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)
    dtype: str | None = None
    stochastic_rounding: int | None = None
    on_extra: str = "error"
    experts_are_deltas: bool = False
    save_delta: bool = False
    out: str | None = None

    @property
    def scalings(self) -> tuple[float, ...]:
        return tuple(self.scaling) if isinstance(self.scaling, list) else (self.scaling,)


def load_config(source: str | os.PathLike[str] | Mapping[str, Any] | MergeConfig, **changes: Any) -> MergeConfig:
    """A checked MergeConfig from a YAML file, a dict or a MergeConfig; ``changes`` replace keys where they are not
    None.

    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type, or a value out of range; names the file and
        key.
    """
    changes = _plain({key: value for key, value in changes.items() if value is not None})
    if isinstance(source, MergeConfig):
        return _checked(replace(source, **changes), "config")
    if isinstance(source, Mapping):
        raw, where = _plain(source), "config"
    else:
        where = str(source)
        raw = _read_yaml(Path(source))
    return _checked(_validate({**raw, **changes}, where), where)


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Path objects, alone or in a list, as strings."""

    def text(value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    return {
        key: [text(item) for item in value] if isinstance(value, list | tuple) else text(value)
        for key, value in raw.items()
    }


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Refuses a key that is given twice, which YAML's own loader lets the last one win."""

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{path}:{node.start_mark.line + 1}: key {key!r} is given twice")
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        with open(path, encoding="utf-8") as file:
            raw = yaml.load(file, StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a mapping of keys to values")
    return raw


def _validate(raw: Mapping[str, Any], where: str) -> MergeConfig:
    from pydantic import TypeAdapter, ValidationError

    known = {field.name for field in fields(MergeConfig)}
    for key in raw:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
    for index, override in enumerate(raw.get("overrides") or []):
        for key in override if isinstance(override, Mapping) else ():
            override_keys = {field.name for field in fields(Override)}
            if key not in override_keys:
                raise ConfigError(
                    f"{where}: unknown key {key!r} in overrides[{index}]{nearest(str(key), override_keys)}"
                )
    # pydantic checks the stdlib dataclass as it stands, so there is one schema and the engine needs no pydantic.
    try:
        return TypeAdapter(MergeConfig).validate_python({key: value for key, value in raw.items() if value is not None})
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


def _checked(config: MergeConfig, where: str) -> MergeConfig:
    if not config.experts:
        raise ConfigError(f"{where}: experts is empty; at least one is needed")
    if not config.scalings:
        raise ConfigError(f"{where}: scaling is an empty list")
    for value in config.scalings:
        if not abs(value) < float("inf"):
            raise ConfigError(f"{where}: scaling {value!r} is not a finite number")
    if len({f"{value:g}" for value in config.scalings}) != len(config.scalings):
        raise ConfigError(f"{where}: scaling lists a value twice")
    if config.dtype is not None and config.dtype not in OUTPUT_DTYPES:
        raise ConfigError(f"{where}: dtype {config.dtype!r} is unknown{nearest(config.dtype, OUTPUT_DTYPES)}")
    if config.stochastic_rounding is not None and not 0 <= config.stochastic_rounding < 2**63:
        raise ConfigError(f"{where}: stochastic_rounding is a seed, 0 or more; got {config.stochastic_rounding}")
    if config.on_extra not in ON_EXTRA:
        raise ConfigError(f"{where}: on_extra {config.on_extra!r} is unknown{nearest(config.on_extra, ON_EXTRA)}")
    for key in ("save_delta", "experts_are_deltas"):
        if getattr(config, key) and config.on_extra == "copy":
            raise ConfigError(f"{where}: on_extra: copy and {key} exclude each other: what the base lacks has no delta")
    if config.out is not None and Path(config.out).suffix == ".safetensors":
        raise ConfigError(f"{where}: out is a folder ({config.out}); the weights go into model.safetensors inside it")
    return config
