"""The files beside the weights: configuration, tokenizer and code copied from the base, and the model card."""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, ResourceError, visible
from .checksum import Checksum
from .direct_io import READ_BYTES, page_buffer
from .folder import list_folder, open_own
from .writer import write_blocks_durably

# What a checkpoint needs to load and to be used, and nothing else: no weights, optimizer states, logs or model card.
# One level of sub-folders is for sentence-transformers' modules (1_Pooling/config.json) and chat templates.
COMPANION_PATTERNS = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
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
# Weights and their indexes, whatever else their names look like.
_NEVER = ("*.safetensors", "*.safetensors.index.json")
_DTYPE_KEYS = ("dtype", "torch_dtype")


def companion_files(folder: Path) -> list[str]:
    """Return the relative names of the files to copy, sorted. Each of them can be opened.

    Raises:
        InputError: a folder that cannot be listed; a companion that is no regular file, cannot be read, leads out of
            the folder, or is told from another one by case alone.
    """
    inner = [pattern.split("/")[0] for pattern in COMPANION_PATTERNS if "/" in pattern]
    names = list_folder(folder)
    for name in [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in inner)]:
        if os.path.isdir(folder / name):
            names += [f"{name}/{file}" for file in list_folder(folder / name)]
    found = sorted(name for name in names if any(_matches(name, pattern) for pattern in COMPANION_PATTERNS))
    found = [name for name in found if not any(fnmatch.fnmatchcase(name, pattern) for pattern in _NEVER)]
    found = [name for name in found if not _is_folder(folder / name)]
    known: dict[str, str] = {}
    for name in found:
        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise InputError(f"{folder}: {other!r} and {name!r} are one file where case is not told; remove one")
        try:
            os.close(open_own(folder, name)[0])
        except OSError as error:
            raise InputError(f"{folder / name}: cannot be read ({error.strerror})") from error
    return found


def code_files(companions: Iterable[str]) -> list[str]:
    """Return those that are run where the output is loaded with ``trust_remote_code``."""
    return [name for name in companions if name.endswith(".py")]


def _is_folder(path: Path) -> bool:
    """Whether it is one itself, such as LICENSES; a link to one is a companion that cannot be read."""
    return path.is_dir() and not path.is_symlink()


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def copy_companions(source: Path, target: Path, names: Iterable[str]) -> dict[str, Checksum]:
    """Copy contents, never modes: the output's follow the umask. Return the checksums of what was written.

    Raises:
        InputError: a file that leads out of ``source`` by now.
        ResourceError: naming the file that cannot be read or written.
    """
    written = {}
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
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


def config_with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """``config.json`` with every stated weight dtype replaced by ``dtype`` (e.g. "bfloat16"), in sub-configurations
    too.

    Left as it is when ``dtype`` is None. A top level that states none gets the key the library in use writes.
    """
    result = copy.deepcopy(dict(config))
    if dtype is None:
        return result
    if not any(key in result for key in _DTYPE_KEYS):
        result["dtype"] = dtype
    _replace_dtype(result, dtype)
    return result


def _replace_dtype(node: dict[str, Any], dtype: str) -> None:
    for key, value in node.items():
        if key in _DTYPE_KEYS and (value is None or isinstance(value, str)):
            node[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            _replace_dtype(value, dtype)


def _code(text: str) -> str:
    """Return ``text`` as a code span of Markdown, whatever stands in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if len(fence) > 1 else ""
    return f"{fence}{padding}{visible(text)}{padding}{fence}"


def model_card(recipe: Mapping[str, Any], *, kind: str, citation: str, version: str, library: str | None) -> str:
    """README.md of the merged checkpoint or adapter: what it was made of, and how to make it again.

    Args:
        recipe: the config's keys, those left out that say nothing.
        kind: what the experts are, in the plural.
        library: by which the output is loaded, as model hubs name it.
    """
    base, experts, scaling = recipe["base"], recipe["experts"], recipe["scaling"]
    front = ["---", *([f"library_name: {library}"] if library else []), "tags: [merge, isomerge-fast]", "---"]
    lines = [
        *front,
        "",
        f"# Merge of {len(experts)} {kind} with {recipe['method']}",
        "",
        f"- Base: {_code(base)}",
        *(f"- Expert: {_code(expert)}" for expert in experts),
        f"- Method: {recipe['method']} ({citation}), scaling α = {scaling:g}",
        f"- Made with isomerge-fast {version}",
        "",
        "To make it again, `isomerge run` this file:",
        "",
        "```yaml",
        # A JSON value is a YAML value, and an escape that ``visible`` makes is one of YAML's.
        *(f"{key}: {visible(json.dumps(value, ensure_ascii=False))}" for key, value in recipe.items()),
        "out: merged",
        "```",
        "",
        "`manifest.json` records every input's identity and every tensor's checksum; `isomerge verify` checks them.",
        "",
    ]
    return "\n".join(lines)
