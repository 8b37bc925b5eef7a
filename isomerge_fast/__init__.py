"""isomerge-fast: merge fine-tuned checkpoints with Iso-C and Iso-CTS (arXiv 2502.04959)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import apply, merge
    from .checkpoint.state_dict import open_state_dict
    from .config import MergeConfig, Override
    from .errors import ConfigError, InputError, IsomergeError, ResourceError, VerificationError
    from .execution.report import Report
    from .functional import iso_c, iso_cts, merge_state_dicts
    from .linalg import ChebyshevSubspace, FullSvd, GramEigh, GramNewtonSchulz, PolarExpress
    from .methods import IsoC, IsoCTS, Mean, TaskArithmetic, register_method

# Loaded when first used: `isomerge --help` and shells that only look at the version need no torch.
_HOMES = {
    "apply": "api",
    "iso_c": "functional",
    "iso_cts": "functional",
    "merge": "api",
    "merge_state_dicts": "functional",
    "open_state_dict": "checkpoint.state_dict",
    "MergeConfig": "config",
    "Override": "config",
    "ConfigError": "errors",
    "InputError": "errors",
    "IsomergeError": "errors",
    "ResourceError": "errors",
    "VerificationError": "errors",
    "ChebyshevSubspace": "linalg",
    "FullSvd": "linalg",
    "GramEigh": "linalg",
    "GramNewtonSchulz": "linalg",
    "PolarExpress": "linalg",
    "IsoC": "methods",
    "IsoCTS": "methods",
    "Mean": "methods",
    "TaskArithmetic": "methods",
    "register_method": "methods",
    "Report": "execution.report",
}

__all__ = [
    "ChebyshevSubspace",
    "ConfigError",
    "FullSvd",
    "GramEigh",
    "GramNewtonSchulz",
    "InputError",
    "IsoC",
    "IsoCTS",
    "IsomergeError",
    "Mean",
    "MergeConfig",
    "Override",
    "PolarExpress",
    "Report",
    "ResourceError",
    "TaskArithmetic",
    "VerificationError",
    "__version__",
    "apply",
    "iso_c",
    "iso_cts",
    "merge",
    "merge_state_dicts",
    "open_state_dict",
    "register_method",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
