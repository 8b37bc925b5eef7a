"""Merge fine-tuned checkpoints with Iso-C and Iso-CTS (arXiv 2502.04959)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Every public name, by the module it is in, which is loaded when the name is first used: ``isomerge --help`` and shells
# that only look at the version need no torch.
_NAMES = {
    "api": "apply merge",
    "checkpoint.state_dict": "open_state_dict",
    "config": "MergeConfig Override",
    "errors": "ConfigError InputError IsomergeError ResourceError VerificationError",
    "execution.report": "Report",
    "functional": "iso_c iso_cts merge_state_dicts randomized_svd",
    "linalg": "ChebyshevSubspace FullSvd GramEigh GramNewtonSchulz PolarExpress",
    "methods": "IsoC IsoCTS Mean TaskArithmetic register_method",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
globals()["__all__"] = ["__version__", *_HOMES]  # type checkers go by the imports below
# Names that were public, for one release more, and what takes their place.
_DEPRECATED = {"Qdwh": "PolarExpress"}

if TYPE_CHECKING:  # the same names, for type checkers: by PEP 484 `as` makes them public
    from .api import apply as apply, merge as merge
    from .checkpoint.state_dict import open_state_dict as open_state_dict
    from .config import MergeConfig as MergeConfig, Override as Override
    from .errors import (
        ConfigError as ConfigError,
        InputError as InputError,
        IsomergeError as IsomergeError,
        ResourceError as ResourceError,
        VerificationError as VerificationError,
    )
    from .execution.report import Report as Report
    from .functional import (
        iso_c as iso_c,
        iso_cts as iso_cts,
        merge_state_dicts as merge_state_dicts,
        randomized_svd as randomized_svd,
    )
    from .linalg import (
        ChebyshevSubspace as ChebyshevSubspace,
        FullSvd as FullSvd,
        GramEigh as GramEigh,
        GramNewtonSchulz as GramNewtonSchulz,
        PolarExpress as PolarExpress,
    )
    from .methods import (
        IsoC as IsoC,
        IsoCTS as IsoCTS,
        Mean as Mean,
        TaskArithmetic as TaskArithmetic,
        register_method as register_method,
    )


def __getattr__(name: str) -> Any:
    if name in _DEPRECATED:
        import warnings

        instead = _DEPRECATED[name]
        warnings.warn(f"isomerge_fast.{name} is deprecated: it gives {instead}", DeprecationWarning, stacklevel=2)
        return __getattr__(instead)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOMES])
