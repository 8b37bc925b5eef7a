"""Make the ``config.json`` of an output: the base's, changed so that it is true of the weights that were written."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ...errors import joined
from ..layout import Checkpoint
from ..lora.adapter import Adapter

_DTYPE_KEYS = ("dtype", "torch_dtype")
_TIED = "tie_word_embeddings"
# They decide the class of a model with a head, and the shapes of the head. Left out they have defaults.
_HEAD_KEYS = (
    *("architectures", "id2label", "label2id", "num_labels", "problem_type", "num_choices", "classifier_dropout"),
    *("classifier_proj_size", "use_weighted_layer_sum", "summary_type", "summary_use_proj", "summary_proj_to_labels"),
)
_LAST_LAYER = re.compile(r"(.*\.)?(classifier|score)(\.out_proj)?\.weight")
_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")


def output_config(
    base: Checkpoint, donors: Sequence[Checkpoint], copied: Collection[str], dtype: str | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the output's ``config.json``, or None where the base has none, and notes about it.

    ``donors`` are the experts from which the tensors ``copied`` come that the base does not have; ``dtype`` is of the
    output's floats, where it is not the base's.
    """
    if base.config is None:
        return None, []
    config = copy.deepcopy(base.config)
    unties = any(donor.config is None for donor in donors) and any(name.endswith(_OUTPUT_EMBEDDINGS) for name in copied)
    if unties:
        for node in _nodes(config):
            if node is config or _TIED in node:
                node[_TIED] = False
    labels = [note for donor in donors if isinstance(donor, Adapter) and (note := _take_labels(config, donor, copied))]
    kept = ["architectures", *([] if labels else ["labels"]), *([] if unties else ["tying"])]
    notes = _take_head(config, donors, joined(kept, "and")) if donors else []
    return config_with_dtype(config, dtype), [*notes, *labels]


def _take_head(config: dict[str, Any], donors: Sequence[Checkpoint], kept: str) -> list[str]:
    """Put into ``config`` the settings that the donors agree on; return notes on the others, or on all of ``kept``."""
    where = f"config.json keeps the base's {kept}"
    for donor in donors:
        if donor.config is None:
            return [
                f"{where}: {donor.path}, of which tensors are copied, has no config.json; set them where it is a head"
            ]
        if donor.config.get("model_type") != config.get("model_type"):
            return [f"{where}: {donor.path}, of which tensors are copied, is another kind of model"]
    settings = [donor.config for donor in donors if donor.config is not None]
    disputed = []
    for key in (*_HEAD_KEYS, _TIED):
        if any(each.get(key) != settings[0].get(key) for each in settings):
            disputed.append(key)
        else:
            _take(config, settings[0], key)
    if _TIED not in disputed:
        _take_tying(config, settings[0])
    padding = settings[0].get("pad_token_id")
    is_agreed = padding is not None and all(each.get("pad_token_id") == padding for each in settings)
    if is_agreed and config.get("pad_token_id") is None:
        config["pad_token_id"] = padding  # classifiers of decoders look for the last token before the padding
    if not disputed:
        return []
    paths = " and ".join(str(donor.path) for donor in donors)
    return [f"config.json keeps the base's {', '.join(disputed)}: {paths}, of which tensors are copied, differ in that"]


def _take_labels(config: dict[str, Any], donor: Adapter, copied: Collection[str]) -> str | None:
    """Put as many labels into ``config`` as the head of an adapter has rows, and return a note; None where none are
    needed. (An adapter says nothing else of its labels.)
    """
    if donor.settings.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    rows = {donor.tensors[name].shape[0] for name in copied if name in donor.tensors and _LAST_LAYER.fullmatch(name)}
    labels = config.get("id2label")
    if len(rows) != 1 or (isinstance(labels, dict) and len(labels) in rows):
        return None
    (count,) = rows
    config["id2label"] = {str(row): f"LABEL_{row}" for row in range(count)}
    config["label2id"] = {f"LABEL_{row}": row for row in range(count)}
    config.pop("num_labels", None)
    return f"config.json has {count} labels without names, as the head of {donor.path} has {count} rows"


def _take(config: dict[str, Any], donor: Mapping[str, Any], key: str) -> None:
    if key in donor:
        config[key] = copy.deepcopy(donor[key])
    else:
        config.pop(key, None)


def _take_tying(config: dict[str, Any], donor: Mapping[str, Any]) -> None:
    """Take the tying of sub-configurations that both configs have."""
    for key, value in config.items():
        other = donor.get(key)
        if key.endswith("_config") and isinstance(value, dict) and isinstance(other, dict):
            _take(value, other, _TIED)
            _take_tying(value, other)


def _nodes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config and all configurations in it."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield from _nodes(value)


def config_with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return a copy of a config with every stated weight dtype, in sub-configurations too, replaced by ``dtype``.

    A top level that states none gets the key the library in use writes. Without a ``dtype`` nothing is replaced.
    """
    result = copy.deepcopy(dict(config))
    if dtype is None:
        return result
    if not any(key in result for key in _DTYPE_KEYS):
        result["dtype"] = dtype
    for node in _nodes(result):
        node |= {key: dtype for key in _DTYPE_KEYS if key in node and isinstance(node[key], str | None)}
    return result
