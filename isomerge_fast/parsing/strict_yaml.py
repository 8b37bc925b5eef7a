"""Read YAML that strangers wrote: plain values only, and no short text that unfolds into a long one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, shortened, shown
from .regular_files import read_regular

# Room for a rule for every tensor of a model and every expert.
MAX_CHARACTERS, MAX_VALUES = 2_000_000, 100_000
MAX_BYTES = 4 * MAX_CHARACTERS
MAX_DEPTH, MAX_KEYS, MAX_DIGITS = 20, 1_000, 100

_PREFIX = "tag:yaml.org,2002:"
_TAGS = {_PREFIX + name for name in ("bool", "float", "int", "map", "merge", "null", "seq", "str")}


class _Loader(yaml.SafeLoader):
    """Read dates as text, and stop at absurdly many values or keys of one mapping."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [(tag, expression) for tag, expression in resolvers if tag in _TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    composed = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.composed += 1
        if self.composed > 2 * MAX_VALUES:  # keys are nodes too
            raise _Refused(f"more than {MAX_VALUES} values", parent)
        if isinstance(parent, yaml.MappingNode) and len(parent.value) >= MAX_KEYS:
            raise _Refused(f"more than {MAX_KEYS} keys in one mapping", parent)
        if self.depth > MAX_DEPTH:
            raise _Refused("nested too deeply", parent)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Refused(Exception):
    """Say what is refused, and where."""

    def __init__(self, reason: str, node: Any) -> None:
        super().__init__(f"line {node.start_mark.line + 1}: {reason}")


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of one YAML document: texts, numbers, true, false, null, lists, and mappings from texts.

    Keys that are given twice, other kinds of values and absurdly many of them are refused. ``where``, such as the
    file's name, begins every message.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{where}: {len(text)} characters; refused above {MAX_CHARACTERS}")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except _Refused as error:
        raise ConfigError(f"{where}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ConfigError(f"{where}: not YAML ({place}{_cut(error.problem or error.context)})") from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{where}: not YAML (character {error.position + 1}: {_cut(error.reason)})") from error
    except RecursionError as error:  # of aliases of aliases
        raise ConfigError(f"{where}: nested too deeply") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # what PyYAML makes of `!!bool maybe`
        raise ConfigError(f"{where}: not YAML ({_cut(error)})") from error
    finally:
        if loader is not None:
            loader.dispose()


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping of keys to values that a YAML file holds; see ``parse_yaml``."""
    try:
        data, _ = read_regular(path, MAX_BYTES)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML (not UTF-8: {error.reason} at byte {error.start})") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a mapping of keys to values")
    return raw


def _measure(node: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the values and levels below a node, with every alias counted as often as it is used.

    ``known`` has the result by the ``id`` of a node; (0, 0) while it is being measured.
    """
    if id(node) in known:
        if known[id(node)] == (0, 0):
            raise _Refused("an alias inside what it stands for", node)
        return known[id(node)]
    if node.tag not in _TAGS:
        raise _Refused(f"the tag {shown(node.tag.removeprefix(_PREFIX))} is not read", node)
    if isinstance(node, yaml.ScalarNode):
        if node.tag in (_PREFIX + "int", _PREFIX + "float") and len(node.value) > MAX_DIGITS:
            raise _Refused(f"a number of {len(node.value)} characters", node)
        return known.setdefault(id(node), (1, 0))
    known[id(node)] = 0, 0
    children = node.value
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [value for _, value in node.value]
    sizes = [_measure(child, known) for child in children]
    values, levels = 1 + sum(size for size, _ in sizes), 1 + max((level for _, level in sizes), default=0)
    if levels > MAX_DEPTH:
        raise _Refused("nested too deeply", node)
    if values > MAX_VALUES:
        raise _Refused(f"more than {MAX_VALUES} values, aliases written out", node)
    known[id(node)] = values, levels
    return values, levels


def _check_keys(node: Any) -> None:
    """Refuse keys that are no text, and keys that are given twice, of which PyYAML takes the last."""
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (_PREFIX + "str", _PREFIX + "merge"):
            raise _Refused(f"the key {shown(key.value) if isinstance(key, yaml.ScalarNode) else '…'} is not text", key)
        if key.value in seen:
            raise _Refused(f"key {shown(key.value)} is given twice", key)
        seen.add(key.value)


def _cut(reason: object) -> str:
    return shortened(" ".join(str(reason).split()), 200)
