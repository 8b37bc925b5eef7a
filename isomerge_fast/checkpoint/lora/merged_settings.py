"""Write the ``adapter_config.json`` of a merged LoRA adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .adapter import Adapter
from .factors import PREFIX

_SUFFIX = re.compile(r"\.(lora_[AB]\.weight|lora_embedding_[AB]|weight|bias)$")
# Keys of one adapter that are not true of the merged one.
_CLEARED = ("rank_pattern", "alpha_pattern")
_EMPTY = ("exclude_modules", "layers_to_transform", "layers_pattern", "revision", "loftq_config", "eva_config")
# By a model's task: PEFT trains these modules whole, and does not load an adapter without them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def lost_heads(adapters: Sequence[Adapter], settings: dict[str, Any]) -> str | None:
    """Return the heads that the adapters' task needs and the merged adapter lacks, in words, or None."""
    task = adapters[0].settings.get("task_type")
    heads = _HEADS.get(task, ()) if isinstance(task, str) else ()
    saved = [name.rpartition(".")[2] for name in settings["modules_to_save"] or ()]
    return " or ".join(heads) if heads and not {*heads} & {*saved} else None


def merged_settings(adapters: Sequence[Adapter], names: Iterable[str], rank: int) -> dict[str, Any]:
    """Return the first adapter's settings, with one rank and scale 1 for the modules of the tensors in ``names``."""
    settings = dict(adapters[0].settings)
    factored, whole = set(), set()
    for name in names:
        (factored if ".lora_" in name else whole).add(_SUFFIX.sub("", name).removeprefix(PREFIX))
    settings |= {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "bias": "none",
        "target_modules": sorted(factored),
        "modules_to_save": sorted(whole) or None,
    }
    settings |= {key: {} for key in _CLEARED if key in settings}
    settings |= {key: None for key in _EMPTY if key in settings}
    if lost_heads(adapters, settings):
        settings["task_type"] = None
    return settings


def lost_biases(adapters: Sequence[Adapter]) -> Iterable[str]:
    """Yield problems with adapters whose trained biases a merged adapter cannot hold."""
    for adapter in adapters:
        if adapter.settings.get("bias", "none") != "none":
            yield f"{adapter.path}: bias: {adapter.settings['bias']}, trained biases, which a merged adapter would lose"
