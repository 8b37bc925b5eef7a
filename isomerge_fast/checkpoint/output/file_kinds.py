"""Tell the kinds of files in a checkpoint's folder by their names: essential ones, weights, and what is left behind."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable

# Without these a checkpoint does not load or is not used as it was meant: one that cannot be copied is an error. They
# have any size: tokenizers of hundreds of megabytes exist. One level of sub-folders is for sentence-transformers'
# modules (1_Pooling/config.json) and chat templates.
ESSENTIAL = (
    "generation_config.json",
    *("tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "normalizer.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "tekken.json", "bpe.codes", "vocab.bpe", "encoder.json"),
    *("spiece.model", "spm.model", "*.spm", "sentencepiece*.model"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "image_processor_config.json"),
    *("video_preprocessor_config.json", "feature_extractor_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/config.json"),
    *("*.py", "LICENSE*", "NOTICE*"),
)
_ESSENTIAL_FOLDERS = tuple(pattern.split("/")[0] for pattern in ESSENTIAL if "/" in pattern)

# All other small files are copied as well, whatever their names, except:
LEFT_BEHIND = {
    "training state": (
        *("optimizer.*", "optimizer_*", "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*", "random_states_*"),
        *("trainer_state.json", "training_args.*", "training_state*", "zero_to_fp32.py", "latest", "checkpoint"),
        *("checkpoint-*", "global_step*", "pytorch_model_fsdp*"),
    ),
    "logs": (
        *("events.out.tfevents*", "*.log", "trainer_log.jsonl", "*_results.json", "*evaluation*_results.csv"),
        *("training_*.png", "nohup.out", "runs", "wandb", "logs", "tensorboard", "mlruns", "lightning_logs", "swanlab"),
    ),
    "caches": ("__pycache__", "*.pyc", "*.lock", "*.incomplete", "unsloth_compiled_cache"),
    "other formats": (
        *("onnx", "openvino*", "coreml", "original", "metal", "gguf", "ggml", "tflite", "tensorrt", "mlx", "flax"),
        *("saved_model", "*.mlpackage", "*.mlmodelc"),
    ),
}
OTHER_WEIGHTS = "other weights"
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ptl|pte|ckpt|h5|hdf5|keras|msgpack|gguf|ggml|onnx|onnx_data(_\d+)?|onnx\.data|ot|pkl"
    r"|pickle|joblib|npz|npy|tflite|mlmodel|engine|plan|trt|nemo|pb|pdparams|pdmodel|params|distcp|llamafile|dduf)"
    r"(\.index(\.\w+)?\.json)?$|\.ckpt\.(data-.*|index|meta)$",
    re.IGNORECASE,
)
# The model's own weights once more, in another format or precision, or in other shards.
_THE_SAME_WEIGHTS = re.compile(
    r"(diffusion_|open_clip_)?(pytorch_)?(model|lora_weights)([.-].*)?\.\w+|(tf|flax|rust)_model.*|consolidated.*"
    r"|.*\.(h5|keras|msgpack|gguf|ggml|onnx|onnx_data.*|ot|tflite|mlmodel|pb|llamafile|dduf)"
)
# DeepSpeed puts it beside a training state: it is no code of the model.
_NO_CODE = "zero_to_fp32.py"


def is_essential(path: str) -> bool:
    """Return whether a checkpoint is not usable without a file: by its path in the folder."""
    return any(path.count("/") == each.count("/") and fnmatch.fnmatchcase(path, each) for each in ESSENTIAL)


def is_essential_file(path: str) -> bool:
    """Return whether a file is essential, and neither weights nor DeepSpeed's ``zero_to_fp32.py``."""
    name = path.rpartition("/")[2]
    return is_essential(path) and not is_weights(name) and name != _NO_CODE


def is_essential_folder(path: str) -> bool:
    """Return whether essential files may lie in a sub-folder."""
    return "/" not in path and _matches_any(path, _ESSENTIAL_FOLDERS)


def is_weights(name: str) -> bool:
    """Return whether a file holds weights, or is an index of such files."""
    return _WEIGHTS.search(name) is not None


def why_left_behind(name: str) -> str | None:
    """Return why no output has a file or folder of this name, or None."""
    why = next((why for why, patterns in LEFT_BEHIND.items() if _matches_any(name, patterns)), None)
    return OTHER_WEIGHTS if why is None and is_weights(name) else why


def other_weights(names: Iterable[str], merged: Collection[str]) -> list[str]:
    """Return a folder's files whose weights may be no copy of the merged ones: a head in a file of its own, a
    projection, a pickled vocabulary.
    """
    stems = {name.partition(".")[0] for name in merged}
    return [
        name
        for name in names
        if why_left_behind(name) == OTHER_WEIGHTS
        and not name.startswith(".")
        and name.partition(".")[0] not in stems
        and not _THE_SAME_WEIGHTS.fullmatch(name)
    ]


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
