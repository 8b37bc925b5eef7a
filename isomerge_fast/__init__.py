"""Merge fine-tuned checkpoints with Iso-C and Iso-CTS (arXiv 2502.04959)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# All public names but the version, and where they are. Type checkers take `as` for public; ``_homes`` reads the lines.
if TYPE_CHECKING:
    from .api import apply as apply
    from .api import merge as merge
    from .checkpoint.state_dict import open_state_dict as open_state_dict
    from .config import MergeConfig as MergeConfig
    from .config import Override as Override
    from .errors import ConfigError as ConfigError
    from .errors import InputError as InputError
    from .errors import IsomergeError as IsomergeError
    from .errors import ResourceError as ResourceError
    from .errors import VerificationError as VerificationError
    from .execution.report import Report as Report
    from .functional import iso_c as iso_c
    from .functional import iso_cts as iso_cts
    from .functional import merge_state_dicts as merge_state_dicts
    from .linalg import ChebyshevSubspace as ChebyshevSubspace
    from .linalg import FullSvd as FullSvd
    from .linalg import GramEigh as GramEigh
    from .linalg import GramNewtonSchulz as GramNewtonSchulz
    from .linalg import PolarExpress as PolarExpress
    from .methods import IsoC as IsoC
    from .methods import IsoCTS as IsoCTS
    from .methods import Mean as Mean
    from .methods import TaskArithmetic as TaskArithmetic
    from .methods import register_method as register_method

# Names that were public, for one release more, and what takes their place.
_DEPRECATED = {"Qdwh": "PolarExpress"}


def _homes() -> dict[str, str]:
    """Return the module of every public name, by the import lines above, but import none: torch takes a second."""
    lines = map(str.split, __loader__.get_source(__name__).splitlines())  # type: ignore[union-attr]
    return {words[5]: words[1] for words in lines if words[:1] == ["from"] and words[4:5] == ["as"]}


_HOMES = _homes()
globals()["__all__"] = ["__version__", *_HOMES]  # as type checkers do not: they go by the lines above


def __getattr__(name: str) -> Any:
    if name in _DEPRECATED:
        import warnings

        instead = _DEPRECATED[name]
        warnings.warn(f"isomerge_fast.{name} is gone: use {instead}", DeprecationWarning, stacklevel=2)
        return __getattr__(instead)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOMES])
