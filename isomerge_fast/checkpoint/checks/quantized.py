"""Recognise quantized weights, on whose packed numbers no arithmetic means anything.

The tensors tell: packed integers or float8 beside their scales. So do ``config.json`` and the files that quantizers put
beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ...errors import shown
from ...ops import FLOAT_DTYPES
from ...parsing.strict_json import parse_settings
from ..folder import read_own
from ..layout import COPIED_DTYPES, DTYPE_NAMES, MAX_SETTINGS_BYTES, Checkpoint, StoredTensor
from ..lora.adapter import Adapter

_CONFIG_KEYS = ("quantization_config", "compression_config")
SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")

# By the last part of a packed tensor's name: what lies beside it in its module, and which tool writes that.
_LAYOUTS: dict[str, dict[str, str]] = {
    "qweight": dict.fromkeys(("qzeros", "g_idx", "scales"), "GPTQ or AWQ"),
    "weight": {
        "weight_scale_2": "NVFP4",
        "weight_scale_inv": "FP8 in blocks",
        **dict.fromkeys(("SCB", "weight_format", "weight.SCB"), "bitsandbytes int8"),
        "biases": "MLX",
    },
    "weight_packed": dict.fromkeys(("weight_scale", "weight_shape", "weight_zero_point"), "compressed-tensors"),
    "W_q": dict.fromkeys(("scale", "zero", "meta"), "HQQ"),
    "_data": {"_scale": "quanto"},
    "_weight_qdata": {"_weight_scale": "torchao"},
    "codes": {"codebooks": "AQLM"},
    "Qidxs": {"SU": "QuIP#"},
    "indices": {"centroids.weight": "VPTQ"},
}
# The end of a packed tensor's name, the end in its place of the tensor beside it, and the tool.
_ENDINGS = (
    ("", ".quant_map", "bitsandbytes 4-bit"),
    ("", ".absmax", "bitsandbytes 4-bit"),
    ("", ".quant_state.bitsandbytes__nf4", "bitsandbytes nf4"),
    ("", ".quant_state.bitsandbytes__fp4", "bitsandbytes fp4"),
    ("", "_scale_inv", "FP8 in blocks"),
    ("_blocks", "_scales", "MXFP4"),
    (":qdata", ":scale", "torchao"),
)
# Names of scales in the module, and endings of scales that follow the tensor's own name.
_MODULE_SCALES = ("scale", "scales", "weight_scale", "weight_scales", "scale_weight", "w_scale", "wscales", "qscale")
_OWN_SCALES = ("_scale", "_scales", ".scale", ".scales", ".weight_scale")
# Integers that are no weights though a scale may lie beside them.
_INDICES = re.compile(
    r"(.*[._])?(ids?|idx|g_idx|index|indices|mask\w*|bias|masked_bias|tracked|table|tril|codebooks?|hash\w*|buckets?|"
    r"tokens?|positions?|lengths?|shape)"
)
_FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_DTYPES = (*FLOAT_DTYPES, *_FLOAT8_DTYPES)
_GENERIC = _INTEGERS, _FLOAT8 = "integers", "float8"
_WAY_OUT = "dequantize them and save in float first, or take the float weights that they were made of"


_Evidence = tuple[StoredTensor, str, str]  # the packed tensor, the tool, the name of what shows it


def quantized(checkpoint: Checkpoint) -> str | None:
    """Return what shows that a checkpoint's weights are quantized, and what to do, or None."""
    if isinstance(checkpoint, Adapter):
        return None
    found = _packed(checkpoint.tensors)
    if found is not None:
        stored, kind, beside = found
        tensor = f"tensor {stored.name!r} {DTYPE_NAMES[stored.dtype]} {list(stored.shape)}"
        shows = f"{kind}: {tensor}" + (f" beside {beside!r}" if beside else "")
        return f"{stored.file}: quantized weights ({shows}) cannot be merged; {_WAY_OUT}"
    for place, value in _settings(checkpoint):
        shows = f"{place}: quantized weights ({_name_of(value)}) cannot be merged"
        return f"{shows}; {_WAY_OUT} (where they are float already, take this out)"
    return None


def _packed(tensors: Mapping[str, StoredTensor]) -> _Evidence | None:
    """Return a packed tensor, the tool, and the name of what shows it: the plainest case of all, or None."""
    plainest: _Evidence | None = None
    for stored in tensors.values():
        found = _evidence(stored, tensors)
        if found is not None and found[1] not in _GENERIC:
            return found
        if found is not None and (plainest is None or (found[2] and not plainest[2])):
            plainest = found
    return plainest


def _evidence(stored: StoredTensor, tensors: Mapping[str, StoredTensor]) -> _Evidence | None:
    """Return (packed tensor, tool, name of the tensor that shows it) where ``stored`` looks packed, else None."""
    name = stored.name
    module, _, last = name.rpartition(".")
    inside = f"{module}." if module else ""
    if stored.dtype in FLOAT_DTYPES:  # bitsandbytes and HQQ may pack four bits into them
        table = tensors.get(f"{name}.quant_map")
        if table is not None and table.dtype in FLOAT_DTYPES:
            return stored, "bitsandbytes 4-bit", table.name
        is_hqq = module and last == "W_q" and {f"{inside}scale", f"{inside}zero"} <= tensors.keys()
        return (stored, "HQQ", f"{inside}scale") if is_hqq else None
    is_float8 = stored.dtype in _FLOAT8_DTYPES
    if not is_float8 and (stored.dtype not in COPIED_DTYPES or stored.dtype == torch.bool or len(stored.shape) < 2):
        return None
    for beside, kind in _LAYOUTS.get(last, {}).items():
        if inside + beside in tensors:
            return stored, kind, inside + beside
    for ending, other, kind in _ENDINGS:
        if name.endswith(ending) and (beside := name.removesuffix(ending) + other) in tensors:
            return stored, kind, beside
    scales = (*(name + ending for ending in _OWN_SCALES), *(inside + scale for scale in _MODULE_SCALES))
    scale = next((each for each in scales if each in tensors and tensors[each].dtype in _SCALE_DTYPES), "")
    if is_float8:
        return stored, _FLOAT8, scale
    if stored.dtype in (torch.int64, torch.uint64):  # a table to look numbers up in: nobody packs weights so wide
        return None
    if last.endswith("weight") or (scale and not _INDICES.fullmatch(last)):
        return stored, _INTEGERS, scale
    return None


def _settings(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of every setting that tells of quantized weights."""
    if checkpoint.config is not None:
        for key, value in _nested(checkpoint.config):
            yield f"{checkpoint.path / 'config.json'}, {key}", value
    for name in SIDE_FILES:
        if name in checkpoint.names:
            file = str(checkpoint.path / name)
            value = parse_settings(read_own(checkpoint.path, name, MAX_SETTINGS_BYTES)[0], file, as_python=True)
            if value:
                yield file, value


def _nested(config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the path and value of every setting under one of the keys, at any depth."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        path, node = waiting.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key in _CONFIG_KEYS and value:
                yield f"{path}{key}", value
            elif isinstance(value, dict | list):
                waiting.append((f"{path}{key}.", value))


def _name_of(value: Any) -> str:
    """Return a setting's name of the kind: Hugging Face's ``quant_method``, ModelOpt's ``quant_algo``."""
    for key in ("quant_method", "quant_algo", "quantization"):
        if isinstance(value, dict) and value.get(key):
            return _name_of(value[key])
    if isinstance(value, dict):
        return next((f"{key}: {shown(value[key])}" for key in ("bits", "w_bit") if key in value), "of an unknown kind")
    return value if isinstance(value, str) and len(value) <= 40 else shown(value)
