"""Find methods by name: the built-in ones, those of installed packages, and those that a process registers."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from ..errors import ConfigError, nearest, shown
from ..parsing.shell_patterns import globs_of
from ..parsing.values import refuse
from .base import Method, read_option
from .iso_c import IsoC
from .iso_cts import IsoCTS
from .linear import Mean, TaskArithmetic
from .source import TensorSpec

METHODS: dict[str, type[Method]] = {method.name: method for method in (IsoC, IsoCTS, Mean, TaskArithmetic)}
# The entry points of packages that bring a method: ``median = package.module:Median``.
GROUP = "isomerge_fast.methods"

_registered: dict[str, type[Method]] = {}

M = TypeVar("M", bound=type[Method])


def register_method(method: M) -> M:
    """Make a method known by its name in this process; also as a decorator. Return the class.

    Other processes, such as ``isomerge verify``, find what an installed package has an entry point for.

    Raises:
        ConfigError: no class of a method, or a name that another one has.
    """
    checked = _checked(method, f"class {shown(method)}")
    name, whose = checked.name, _class_name(checked)
    other = METHODS.get(name) or _registered.get(name)
    if other is not None and _class_name(other) != whose:  # a notebook's cell may be run again
        raise ConfigError(f"method {name!r} of {whose}: that name is {_class_name(other)}'s")
    _registered[name] = checked
    return method


def method_class(name: object) -> type[Method]:
    """Return the class of the method of that name. Packages are asked where it is not known in this process."""
    if isinstance(name, str):
        known = METHODS.get(name) or _registered.get(name)
        if known is not None:
            return known
        entry = _entries().get(name)
        if entry is not None:
            return _loaded(entry)
    raise ConfigError(f"method {shown(name)} is unknown{nearest(name, {*METHODS, *_registered, *_entries()})}")


def origins_of(names: Iterable[str]) -> dict[str, str]:
    """Return the origins of methods that are not built in: a distribution with its version, or a class of a process."""
    found = {}
    for name in dict.fromkeys(names):
        if name in _registered:
            found[name] = _class_name(_registered[name])
        elif name not in METHODS and name in (entries := _entries()):
            found[name] = _distribution(entries[name])
    return found


def _entries() -> dict[str, EntryPoint]:
    """Return the entry points of installed packages, by name; each name is one package's, and no built-in method's."""
    found: dict[str, list[EntryPoint]] = defaultdict(list)
    for entry in entry_points(group=GROUP):
        found[entry.name].append(entry)
    for name, entries in found.items():
        whose = [_distribution(entry) for entry in entries]
        if name in METHODS:
            raise ConfigError(f"method {name!r} of {whose[0]}: that name is a built-in method's")
        if len(entries) > 1:
            raise ConfigError(f"method {name!r} is brought by {' and by '.join(whose)}: uninstall one of them")
    return {name: entries[0] for name, entries in found.items()}


def _loaded(entry: EntryPoint) -> type[Method]:
    what = f"method {entry.name!r} of {_distribution(entry)}: {entry.value}"
    try:
        found = entry.load()
    except Exception as error:  # whatever a package does when it is imported
        raise ConfigError(f"{what} cannot be loaded ({type(error).__name__}: {error})") from error
    method = _checked(found, what)
    if method.name != entry.name:
        raise ConfigError(f"{what} has the name {shown(method.name)}")
    return method


def _checked(found: Any, what: str) -> type[Method]:
    """Return ``found`` if it is a method that can be made of its options' defaults; raise ConfigError otherwise."""
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"{what} is no method: it is a subclass of isomerge_fast.methods.Method")
    if missing := sorted(found.__abstractmethods__):
        raise ConfigError(f"{what} does not define {', '.join(missing)}")
    if not isinstance(inspect.getattr_static(found, "name", None), str):
        raise ConfigError(f"{what} has no name: name: ClassVar[str] = '...'")
    if "__dataclass_fields__" not in vars(found):
        raise ConfigError(f"{what} is no dataclass of its own: @dataclass(frozen=True) stands above it")
    for option in fields(found):
        if option.default is MISSING and option.default_factory is MISSING:
            raise ConfigError(f"{what}: its option {option.name!r} has no default")
    return found


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value


def _class_name(method: type[Method]) -> str:
    return f"{method.__module__}.{method.__qualname__}"


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Return the method ``name`` with ``options`` as its fields, all checked."""
    method = method_class(name)
    if not isinstance(options, Mapping | None):
        refuse(options, "options", "names with values, such as {common_fraction: 0.8}")
    known = {field.name: field for field in fields(method)}
    read = {}
    for key, value in (options or {}).items():
        if key not in known:
            hint = nearest(key, known) if known else " (it has none)"
            raise ConfigError(f"option {shown(key)} of method {name!r} is unknown{hint}")
        read[key] = read_option(name, known[key], value)
    return method(**read)


def given_method(method: str | Method, options: Mapping[str, Any]) -> Method:
    """Return the method that a caller names, with its options, or has made already."""
    if isinstance(method, str):
        return make_method(method, options)
    if not isinstance(method, Method):
        refuse(method, "method", f"a name ({', '.join(METHODS)}) or a method object, such as IsoC()")
    if options:
        raise ConfigError(f"option {shown(next(iter(options)))}: options belong to a method given by name")
    return method


def method_for(method: Method, spec: TensorSpec, exclude: Sequence[str] = ()) -> Method:
    """Return ``method``, or the mean where it does not accept the tensor or a pattern excludes it.

    The patterns are ``exclude`` and the method's own.
    """
    place = globs_of((*exclude, *method.default_exclude)).first(spec.name)
    return method if method.accepts(spec) and place is None else Mean()
