"""Read experts of a FusionBench pool from their files, where that gives what the pool would load.

Whether it does is not guessed: one loaded model of every kind is compared with its files, tensor by tensor. Renamed,
converted, adapted and quantized weights show there, and such experts are loaded by the pool, with a line in the log.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf  # type: ignore[import-not-found]  # FusionBench brings it; absent in lint
from torch import Tensor, nn
from transformers.utils import cached_file

from ...checkpoint.layout import INDEX_FILE, SINGLE_FILE, Checkpoint, open_checkpoint
from ...checkpoint.state_dict import StoredStateDict
from ...errors import InputError

log = logging.getLogger(__name__)

# The pools whose way of loading is known, each with what it calls for an entry that is a path and no more.
LOADERS = {
    "base_pool.BaseModelPool": None,
    "clip_vision.modelpool.CLIPVisionModelPool": "transformers.CLIPVisionModel.from_pretrained",
    "causal_lm.causal_lm.CausalLMPool": "transformers.AutoModelForCausalLM.from_pretrained",
    "seq2seq_lm.modelpool.Seq2SeqLMPool": None,
    "seq_classification_lm.seq_classification_lm.SequenceClassificationModelPool": None,
}
DTYPE_KEYS = ("torch_dtype", "dtype")
# Other keys of an entry may change the weights; these do not.
HARMLESS_KEYS = frozenset({"_recursive_", "_convert_", "attn_implementation", "local_files_only", "low_cpu_mem_usage"})


class MustLoad(Exception):
    """Tell why an expert is left to the pool."""


@dataclass(frozen=True)
class Entry:
    """Hold one model of a pool that ``from_pretrained`` loads from safetensors files."""

    kind: tuple[Any, ...]  # what decides how files become tensors; entries that agree in it are loaded alike
    checkpoint: Checkpoint
    dtype: torch.dtype  # of the float tensors that are loaded


class StoredExpert(StoredStateDict):
    """Read an expert's tensors when they are asked for, with the names and dtype of the model that would be loaded.

    ``names`` maps each name in the model to its name in the files.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], dtype: torch.dtype) -> None:
        tensors = {name: checkpoint.tensors[stored] for name, stored in names.items()}
        super().__init__(replace(checkpoint, tensors=tensors))
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._cast(super().__getitem__(name))

    def meta(self) -> dict[str, Tensor]:
        return {name: self._cast(tensor) for name, tensor in super().meta().items()}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


class Experts:
    """Open the experts of a pool one after the other, from their files where that is proven to be the same.

    They must have the names and shapes of ``pretrained``, the loaded pretrained model.
    """

    def __init__(self, pool: Any, pretrained: nn.Module) -> None:
        self._pool, self._state = pool, pretrained.state_dict()
        # {kind: why its files are not what is loaded, or None}
        self._doubts: dict[tuple[Any, ...], str | None] = {}
        # Whether the pretrained model was made from files just now, so that nobody else holds it.
        self.is_private = False
        try:
            entry = entry_of(pool, "_pretrained_")
            self.is_private = True
            self._doubts[entry.kind] = difference(self._stored(entry), self._state)
        except MustLoad as reason:
            log.debug("the pretrained model proves nothing about files: %s", reason)

    def open(self, name: str) -> Mapping[str, Tensor]:
        """Return the state dict of one expert."""
        loaded = None
        try:
            entry = entry_of(self._pool, name)
            stored = self._stored(entry)
            if entry.kind not in self._doubts:
                # The pretrained model is of another kind: the first expert of this one is loaded to be compared.
                loaded = self._pool.load_model(name).state_dict()
                self._doubts[entry.kind] = difference(stored, loaded)
            if (doubt := self._doubts[entry.kind]) is not None:
                raise MustLoad(doubt)
        except MustLoad as reason:
            level = logging.DEBUG if isinstance(self._pool_entry(name), nn.Module) else logging.WARNING
            log.log(level, "isomerge-fast: expert %r is loaded whole: %s", name, reason)
            return self._pool.load_model(name).state_dict() if loaded is None else loaded
        log.info("isomerge-fast: expert %r is read tensor by tensor from %s", name, entry.checkpoint.path)
        return stored

    def _pool_entry(self, name: str) -> Any:
        return (getattr(self._pool, "_models", None) or {}).get(name)

    def _stored(self, entry: Entry) -> StoredExpert:
        return StoredExpert(entry.checkpoint, stored_names(self._state, entry.checkpoint), entry.dtype)


def entry_of(pool: Any, name: str) -> Entry:
    """Return what the pool would load for ``name``, from the configuration and the files' headers.

    It raises MustLoad where it is not known that ``from_pretrained`` would load plain safetensors files.
    """
    loader = type(pool).load_model
    known = {f"fusion_bench.modelpool.{place}.load_model": target for place, target in LOADERS.items()}
    if f"{loader.__module__}.{loader.__qualname__}" not in known:
        raise MustLoad(f"{type(pool).__name__} loads models in a way of its own")
    target = known[f"{loader.__module__}.{loader.__qualname__}"]
    entry = pool._models[name]
    if isinstance(entry, str):
        options: dict[str, Any] = {"pretrained_model_name_or_path": entry}
    elif isinstance(entry, dict | DictConfig):
        options = dict(_plain(entry))
        target = options.pop("_target_", None)
    else:
        raise MustLoad(f"its entry is a {type(entry).__name__}")
    options |= _plain(getattr(pool, "model_kwargs", None) or getattr(pool, "_model_kwargs", None) or {})
    path = options.pop("pretrained_model_name_or_path", None)
    if not isinstance(target, str) or not target.startswith("transformers.") or not target.endswith(".from_pretrained"):
        raise MustLoad(f"it is made by {target}, which is not from_pretrained of transformers")
    if not isinstance(path, str):
        raise MustLoad("its entry has no pretrained_model_name_or_path")
    unknown = sorted(set(options) - HARMLESS_KEYS - set(DTYPE_KEYS))
    if unknown:
        raise MustLoad(f"its entry has {', '.join(unknown)}, which may change the weights")
    checkpoint = _checkpoint(_folder(path, getattr(pool, "_platform", "hf")))
    config = checkpoint.config or {}
    dtype = _loaded_dtype(options, checkpoint)
    architectures = tuple(config.get("architectures") or ())
    kind = (target, config.get("model_type"), architectures, config.get("tie_word_embeddings"), dtype)
    return Entry(kind, checkpoint, dtype)


def stored_names(state: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, str]:
    """Return {name in the model: name in the files}: the same, or with one prefix before all.

    Tied weights are stored once. It raises MustLoad where a tensor is missing or has another shape, or the files hold
    tied weights twice.
    """
    tied: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        tied.setdefault(key, []).append(name)
    first = next(iter(tied.values()), [""])[0]
    ends = (stored.removesuffix(first) for stored in checkpoint.tensors if stored.endswith(f".{first}"))
    prefix = "" if first in checkpoint.tensors else next(ends, "")
    found = {}
    for names in tied.values():
        stored = [prefix + name for name in names if prefix + name in checkpoint.tensors]
        if not stored:
            raise MustLoad(f"{checkpoint.path}: no tensor {names[0]!r} in its files")
        if len(stored) > 1:
            raise MustLoad(f"{checkpoint.path}: {' and '.join(stored)} are tied in the model, and both in its files")
        shape = checkpoint.tensors[stored[0]].shape
        if shape != tuple(state[names[0]].shape):
            raise MustLoad(
                f"{checkpoint.path}: {stored[0]!r} is {list(shape)}, in the model {[*state[names[0]].shape]}"
            )
        found |= dict.fromkeys(names, stored[0])
    return {name: found[name] for name in state}


def difference(stored: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> str | None:
    """Return the first tensor that is not loaded as the files hold it, in words; None where all are."""
    for name in stored:
        if name not in loaded:
            return f"tensor {name!r} is not in the model that was loaded"
        tensor, there = loaded[name], stored[name]
        if tensor.dtype != there.dtype or not torch.equal(tensor.cpu(), there):
            return f"tensor {name!r} is not loaded as its file holds it ({there.dtype} {list(there.shape)})"
    return None


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config


def _folder(path: str, platform: str) -> Path:
    """Return a local folder, or the snapshot of a hub id that transformers would load from."""
    if os.path.isdir(path):
        return Path(path)
    if platform not in ("hf", "huggingface"):
        raise MustLoad(f"{path} is no folder, and comes from {platform}")
    try:
        config = cached_file(path, "config.json")
    except OSError as error:
        raise MustLoad(f"{path}: no folder, and not in the cache ({str(error).splitlines()[0]})") from error
    return Path(str(config)).parent


def _checkpoint(folder: Path) -> Checkpoint:
    if (folder / "adapter_config.json").exists():
        raise MustLoad(f"{folder} holds an adapter")
    try:
        checkpoint = open_checkpoint(folder)
    except InputError as error:
        raise MustLoad(str(error)) from error
    if checkpoint.index_name not in (None, INDEX_FILE) or (
        checkpoint.index_name is None and [path.name for path in checkpoint.files] != [SINGLE_FILE]
    ):
        raise MustLoad(f"{folder}: its files have other names than {SINGLE_FILE} or those in {INDEX_FILE}")
    if checkpoint.config is None:
        raise MustLoad(f"{folder} has no config.json")
    for key in ("quantization_config", "auto_map"):
        if key in checkpoint.config:
            raise MustLoad(f"{folder}: config.json has {key}")
    return checkpoint


def _loaded_dtype(options: Mapping[str, Any], checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that the entry names, else config.json, else all floats of the files; else raise MustLoad."""
    said = [options[key] for key in DTYPE_KEYS if options.get(key) not in (None, "auto")]
    config = checkpoint.config or {}
    if not said:
        said = [config[key] for key in DTYPE_KEYS if config.get(key) is not None][:1]
    if not said:
        meta = StoredStateDict(checkpoint).meta()
        said = list({tensor.dtype for tensor in meta.values() if tensor.is_floating_point()})
    dtype = getattr(torch, said[0], None) if len(said) == 1 and isinstance(said[0], str) else said[0] if said else None
    if len(said) != 1 or not isinstance(dtype, torch.dtype):
        raise MustLoad(f"{checkpoint.path}: the dtype it would be loaded in is not clear ({said})")
    return dtype
