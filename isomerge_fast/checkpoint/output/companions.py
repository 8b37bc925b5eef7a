"""The files beside the weights: which of the base's become files of the output, and which are left behind."""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import InputError, ResourceError
from ...parsing.pointers import HEAD_BYTES, MAX_POINTER_BYTES, PULL, is_pointer
from ..folder import list_folder, open_own
from ..io.checksum import Checksum
from ..io.direct_io import READ_BYTES, page_buffer
from ..io.writer import write_blocks_durably
from ..submodules import Part, check_equal, own_weights, owners_of, part_folders
from .manifest import MANIFEST_FILE, REPORT_FILE, file_name

# Without these a checkpoint does not load or is not used as it was meant: what of them cannot be copied is an error.
# They have any size: tokenizers of hundreds of megabytes exist. One level of sub-folders is for sentence-transformers'
# modules (1_Pooling/config.json) and chat templates.
ESSENTIAL = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    *("spm.model", "*.spm", "tekken.json", "normalizer.json", "bpe.codes", "vocab.bpe", "encoder.json"),
    "sentencepiece*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_*/config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
_ESSENTIAL_FOLDERS = tuple(pattern.split("/")[0] for pattern in ESSENTIAL if "/" in pattern)

# Everything else that is small is copied as well, whatever its name, but for:
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
OTHER_WEIGHTS, _STRAY = "other weights", "a LoRA adapter beside the weights"
_UNLISTED = "cannot be listed"
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
# What every output has of its own at this place; ``delta`` is the folder of the merged Δ.
_WRITTEN = ("readme.md", MANIFEST_FILE, REPORT_FILE, "adapter_config.json", "delta")
# Which DeepSpeed puts beside a training state.
_NO_CODE = ("zero_to_fp32.py",)
_CONFIG = "config.json"  # written anew, of the base's

# Vocabularies of unknown names have up to 60 MB. In the folder itself all names are looked at; below it bounds keep a
# data set, or a tree of logs, from being walked or copied.
MAX_SMALL_BYTES, MAX_SMALL_TOGETHER_BYTES = 100_000_000, 500_000_000
MAX_FOLDER_NAMES, MAX_WALKED_NAMES, MAX_DEPTH = 1_000, 10_000, 6


class _PointerError(InputError):
    """A Git LFS pointer stands where a file is to be."""


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """A file of the base's folder that no output has, or a folder (its name ends in ``/``) with all that is in it."""

    name: str
    why: str
    files: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"name": file_name("", self.name), "why": self.why, "files": self.files, "bytes": self.bytes}


@dataclass(frozen=True)
class FolderContents:
    """What lies beside the merged weights of a folder, by relative names; all of it sorted.

    Attributes:
        companions: the files to copy. Each of them can be opened.
        parts: sub-folders whose weights may belong to the model.
    """

    companions: tuple[str, ...] = ()
    left_behind: tuple[LeftBehind, ...] = ()
    parts: tuple[Part, ...] = ()

    def with_copied(self, names: Iterable[str]) -> FolderContents:
        return replace(self, companions=tuple(sorted({*self.companions, *names})))

    def without(self, left: LeftBehind) -> FolderContents:
        """Return the same with a whole folder left behind."""
        others = [each for each in self.left_behind if not each.name.startswith(left.name)]
        return replace(
            self,
            companions=tuple(name for name in self.companions if not name.startswith(left.name)),
            left_behind=_in_order([*others, left]),
        )


def contents_of(base: Path, merged: Collection[str], experts: Sequence[Path], method: str) -> FolderContents:
    """Return what of the base's folder becomes the output's, with the weights of sub-folders that belong to the model.

    Args:
        merged: names of the files that are merged.
        experts: the checkpoints among them, whose own parts are compared; method: by which they are merged, for the
            advice.

    Raises:
        InputError: as ``sort_folder`` and ``check_equal``.
    """
    contents = sort_folder(base, merged)
    strays = [part for part in contents.parts if part.is_adapter and experts and not owners_of(part, experts)]
    for part in strays:
        contents = contents.without(measure(base, part.folder, _STRAY, MAX_WALKED_NAMES))
    kept = [part for part in contents.parts if part not in strays]
    check_equal(base, kept, experts, method)
    names = [name for part in kept for name in part.names]
    for name in names:
        _check_readable(base, name)
    return contents.with_copied(names)


def sort_folder(folder: Path, merged: Collection[str] = ()) -> FolderContents:
    """Return what lies in a checkpoint's folder beside the files that are merged, ``merged``.

    Raises:
        InputError: a folder that cannot be listed; an essential file that is no regular file, cannot be read, leads out
            of the folder, or is told from another one by case alone. What is not essential is then left behind.
    """
    sorter = _Sorter(folder, merged)
    sorter.sort()
    return FolderContents(tuple(sorted(sorter.copied)), _in_order(sorter.left), tuple(sorter.parts))


def _in_order(left: Iterable[LeftBehind]) -> tuple[LeftBehind, ...]:
    return tuple(sorted(left, key=lambda each: each.name))


def _check_readable(folder: Path, name: str) -> int:
    """Return a file's bytes; raise InputError where it cannot be read, leads out of the folder, or is not there itself
    but a pointer to it.
    """
    try:
        descriptor, status = open_own(folder, name)
        with open(descriptor, "rb", buffering=0) as file:
            head = file.read(HEAD_BYTES) if status.st_size <= MAX_POINTER_BYTES else b""
    except OSError as error:
        raise InputError(f"{folder / name}: cannot be read ({error.strerror})") from error
    if is_pointer(head):
        raise _PointerError(f"{folder / name}: a Git LFS pointer, not the file itself; {PULL}")
    return status.st_size


def code_files(companions: Iterable[str]) -> list[str]:
    """Return those that are run where the output is loaded with ``trust_remote_code``."""
    return [name for name in companions if name.endswith(".py")]


def weights_among(companions: Iterable[str]) -> list[str]:
    """Return those that are weights: of sub-folders, which are copied where nothing has changed them."""
    return [name for name in companions if _WEIGHTS.search(name)]


def other_weights(names: Iterable[str], merged: Collection[str]) -> list[str]:
    """Return those of a folder's files that hold weights which may be no copy of the merged ones: a head in a file of
    its own, a projection, a pickled vocabulary.
    """
    stems = {name.partition(".")[0] for name in merged}
    return [
        name
        for name in names
        if _WEIGHTS.search(name)
        and not name.startswith(".")
        and name not in merged
        and name.partition(".")[0] not in stems
        and not _THE_SAME_WEIGHTS.fullmatch(name)
        and not any(_matches_any(name, patterns) for patterns in LEFT_BEHIND.values())
    ]


def measure(folder: Path, name: str, why: str, most: int) -> LeftBehind:
    """Return what is left behind as a whole, with its files and bytes; no more than ``most`` files are counted."""
    if not os.path.isdir(folder / name):
        return LeftBehind(name, why, 1, _size(folder / name))
    files = size = 0
    folders = [folder / name]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    elif files == most:
                        return LeftBehind(f"{name}/", f"{why}, counted up to {most:,} files", files, size)
                    else:
                        files, size = files + 1, size + _size(Path(entry.path))
        except OSError:
            why = why if why == _UNLISTED else f"{why}, {_UNLISTED}"
    return LeftBehind(f"{name}/", why, files, size)


class _Sorter:
    """Sorts one folder, the essential files first: of two names that case alone tells apart these are kept."""

    def __init__(self, folder: Path, merged: Collection[str]) -> None:
        self.copied: list[str] = []
        self.left: list[LeftBehind] = []
        self.parts: list[Part] = []
        self._folder, self._merged = folder, merged
        self._home = Path(os.path.realpath(folder))
        self._part_folders: frozenset[str] = frozenset()
        self._small: list[str] = []
        self._walked = self._bytes = 0
        self._uncounted = MAX_WALKED_NAMES
        self._known = {_caseless(name): name for name in (*_WRITTEN, _CONFIG, *merged)}

    def sort(self) -> None:
        names = list_folder(self._folder)
        self._part_folders = part_folders(self._folder, names)
        self._sort_names("", names)
        for name in sorted(self._small, key=lambda name: (not _is_essential(name), name)):
            if why := self._obstacle(name):
                self._leave(name, why)
            else:
                self.copied.append(name)

    def _sort_names(self, within: str, names: Iterable[str]) -> None:
        for name in names:
            path = f"{within}/{name}" if within else name
            if path in self._merged or path == _CONFIG or name.startswith("."):
                continue
            place = self._folder / path
            # A link to a folder under an essential file's name is an error, as any other that is no file.
            is_folder = os.path.isdir(place) and not (place.is_symlink() and _is_essential(path))
            if _caseless(path) in _WRITTEN:
                self._leave(path, "the output has its own")
            elif not is_folder and _is_essential(path) and not _WEIGHTS.search(name) and name not in _NO_CODE:
                self._small.append(path)
            elif why := next((why for why, patterns in LEFT_BEHIND.items() if _matches_any(name, patterns)), None):
                self._leave(path, why)
            elif _WEIGHTS.search(name):
                self._leave(path, OTHER_WEIGHTS)
            elif is_folder:
                self._sort_folder(path)
            else:
                self._small.append(path)

    def _sort_folder(self, path: str) -> None:
        is_essential = "/" not in path and _matches_any(path, _ESSENTIAL_FOLDERS)
        place = self._folder / path
        if place.is_symlink() and not (is_essential and Path(os.path.realpath(place)).is_relative_to(self._home)):
            # Of what is essential there each file is refused; the rest is not looked into.
            inside = list_folder(place, most=MAX_FOLDER_NAMES) if is_essential else []
            self._small += [file for name in inside if _is_essential(file := f"{path}/{name}")]
            self.left.append(LeftBehind(f"{path}/", "a link to a folder", 0, 0))
            return None
        try:
            names = list_folder(self._folder / path, most=MAX_FOLDER_NAMES + 1)
        except InputError:
            if is_essential:
                raise
            return self._leave(path, _UNLISTED)
        self._walked += len(names)
        if len(names) > MAX_FOLDER_NAMES:
            return self._leave(path, f"holds more than {MAX_FOLDER_NAMES:,} names")
        if self._walked > MAX_WALKED_NAMES:
            return self._leave(path, f"not looked through, after {MAX_WALKED_NAMES:,} names of other folders")
        if path.count("/") >= MAX_DEPTH:
            return self._leave(path, f"more than {MAX_DEPTH} folders deep")
        weights = own_weights(names)
        is_part = any(f"{path}/".startswith(f"{part}/") for part in self._part_folders)
        if weights and (is_part or "adapter_config.json" in names):
            self.parts.append(Part(path, tuple(weights), is_adapter=not is_part))
        elif not is_part and any(_WEIGHTS.search(name) for name in names):
            return self._leave(path, OTHER_WEIGHTS)
        return self._sort_names(path, [name for name in names if name not in weights])

    def _leave(self, path: str, why: str) -> None:
        self.left.append(measure(self._folder, path, why, self._uncounted))
        self._uncounted -= self.left[-1].files

    def _obstacle(self, name: str) -> str | None:
        """Return why a file is not copied, or None.

        Raises:
            InputError: it is essential.
        """
        is_essential = _is_essential(name)
        other = self._known.setdefault(_caseless(name), name)
        if other != name:
            if is_essential:
                raise InputError(
                    f"{self._folder}: {other!r} and {name!r} are one file where case is not told; remove one"
                )
            return f"one file with {other!r} where case is not told"
        if not is_essential and not name.isprintable():
            return "control characters in its name"
        try:
            size = _check_readable(self._folder, name)
        except InputError as error:
            if is_essential:
                raise
            reason = error.__cause__
            if isinstance(reason, OSError):
                return f"cannot be read ({reason.strerror})"
            return "a Git LFS pointer" if isinstance(error, _PointerError) else "a link out of its folder"
        if is_essential:
            return None
        if size > MAX_SMALL_BYTES:
            return f"larger than {MAX_SMALL_BYTES // 1_000_000} MB"
        if self._bytes + size > MAX_SMALL_TOGETHER_BYTES:
            return f"beyond {MAX_SMALL_TOGETHER_BYTES // 1_000_000} MB of other files"
        self._bytes += size
        return None


def _is_essential(name: str) -> bool:
    return any(_matches(name, pattern) for pattern in ESSENTIAL)


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _caseless(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _size(path: Path) -> int:
    """Of what a link leads to; 0 where it leads nowhere."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def copy_companions(source: Path, target: Path, names: Iterable[str]) -> dict[str, Checksum]:
    """Copy contents, never modes: the output's follow the umask. Return the checksums of what was written.

    Raises:
        InputError: a file that leads out of ``source`` by now.
        ResourceError: naming the file that cannot be read or written.
    """
    written = {}
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        written[name] = write_blocks_durably(target / name, _blocks(source, name))
    return written


def _blocks(source: Path, name: str) -> Iterator[memoryview]:
    """Yield a file's bytes in blocks, each valid until the next: a tokenizer may have hundreds of megabytes."""
    block, position = page_buffer()[:READ_BYTES], 0
    try:
        descriptor, _ = open_own(source, name)
        with open(descriptor, "rb", buffering=0) as file:
            while count := os.preadv(file.fileno(), [block], position):
                yield block[:count]
                position += count
    except OSError as error:
        raise ResourceError(f"{source / name}: cannot be read ({error.strerror}); --resume continues") from error
