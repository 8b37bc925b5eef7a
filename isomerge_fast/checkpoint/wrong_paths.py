"""Say of a path that holds no checkpoint what it is instead, and which path to give.

Only names are looked at, some hundred of a folder at most, and the hub cache's own note of a model's revision.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from ..errors import InputError, joined
from ..parsing.regular_files import read_regular
from .folder import list_folder

MOST_NAMES = 500  # of a folder, looked at
MOST_SHOWN = 5  # of them, in a message

# With or without the Hub's address, and a revision. (pathlib makes one slash of two.)
_HUB_ID = re.compile(
    r"(?:hf:/+|(?:https?:/+)?(?:huggingface|hf)\.co/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@([\w.-]+)|/(?:tree|blob|resolve)/([\w.-]+)(?:/.*)?)?/?"
)
_OLD_HUB_ID = re.compile(r"[A-Za-z][\w.-]*")  # gpt2, bert-base-uncased: no owner
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")
_REVISION = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]*")
_TRAINER_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# The Trainer writes them; they hold no weights.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.\w+")
_PLAIN_NAME = re.compile(r"[\w.-]+")


def explain_missing(path: Path) -> str:
    """Return the message about a path that is not there."""
    if path.is_symlink():
        return f"{path}: a link to {os.readlink(path)}, which is not there"
    return f"{path}: no such checkpoint folder or .safetensors file{_what_is_meant(str(path))}"


def explain_other_file(path: Path) -> str:
    """Return the message about a file that is no .safetensors file."""
    if path.name.endswith(PICKLES):
        return f"{path}: pickled weights, which are never opened. Convert in its folder: {conversion([path.name])}"
    if path.name.endswith(".gguf"):
        return f"{path}: GGUF is not read; give the model's .safetensors files"
    return f"{path}: neither a folder nor a .safetensors file"


def explain_several(folder: Path, names: Sequence[str], weights: Sequence[str]) -> str:
    """Return the message about a folder with several .safetensors files, ``weights``, and no index of them."""
    if "model_index.json" in names:
        return f"{_pipeline(folder, names)}; or give one of its own files ({_some(weights)}) by its path"
    if all(_SHARD.fullmatch(name) for name in weights):
        return f"{folder}: shards ({_some(weights)}) without the .safetensors.index.json that lists them; copy that too"
    for name in weights:
        plain = re.sub(r"\.[^.]+\.safetensors$", ".safetensors", name)
        if plain != name and plain in weights:
            return (
                f"{folder}: {plain} and {name} are two variants of the same weights; move one out of the folder, or "
                "give one of them by its path"
            )
    return (
        f"{folder}: several .safetensors files and no model.safetensors.index.json ({_some(weights)}); "
        "give one of them by its path, or move the others out of the folder"
    )


def explain_no_weights(folder: Path, names: Sequence[str]) -> str:
    """Return the message about a folder without a .safetensors file."""
    nothing = f"{folder}: no .safetensors file in it"
    if "snapshots" in names and (found := _snapshots(folder)):
        return f"{nothing}: it is the hub cache's folder of a model; give its snapshot, {_any(found)}"
    if "model_index.json" in names:
        return _pipeline(folder, names)
    inner = _with_weights(folder, names)
    steps = {name: int(match[1]) for name in inner if (match := _TRAINER_CHECKPOINT.fullmatch(name))}
    if steps:
        return f"{nothing}; the newest checkpoint in it is {folder / max(steps, key=lambda name: steps[name])}"
    pickles = [name for name in names if name.endswith(PICKLES) and not _NO_WEIGHTS.fullmatch(name)]
    if pickles:
        said = f"only pickled weights ({pickles[0]}), which are never opened"
        return f"{folder}: {said}. Convert in its folder: {conversion(pickles)}"
    if inner:
        return f"{nothing}; {_any([str(folder / name) for name in inner])} has some"
    other = next((name for name in names if name.endswith((".gguf", ".h5", ".msgpack", ".onnx"))), None)
    return nothing if other is None else f"{nothing}, and {other} is not read; save the model as safetensors"


def conversion(pickles: Sequence[str]) -> str:
    """Return the command that turns the pickles of its working folder into one file with the same tensors and names.

    (Loading them into a class of transformers may change names.) File names are somebody else's, and the command is to
    be run: only plain ones stand in it.
    """
    first = pickles[0]
    name = "*" + Path(first).suffix
    if len(pickles) > 1 and first.startswith("pytorch_model"):  # shards: pytorch_model-00001-of-00002.bin
        name = "pytorch_model*.bin"
    elif len(pickles) == 1 and _PLAIN_NAME.fullmatch(first):
        name = first
    return (
        'python -c "import glob, torch; from safetensors.torch import save_file; t = {}; '
        f"[t.update(torch.load(f, map_location='cpu', weights_only=True)) for f in sorted(glob.glob('{name}'))]; "
        "save_file({k: v.contiguous().clone() for k, v in t.items()}, 'model.safetensors', {'format': 'pt'})\""
    )


def _pipeline(folder: Path, names: Sequence[str]) -> str:
    components = _with_weights(folder, names)
    if not components:
        return f"{folder}: a pipeline, of whose components none has .safetensors files"
    return (
        f"{folder}: a pipeline, whose components are merged one by one: "
        f"give {_any([str(folder / name) for name in components])}, and the same component of all others"
    )


def _what_is_meant(text: str) -> str:
    """Return a hint about a path that is not there, or nothing."""
    listed = [part.strip() for part in re.split("[,;]", text) if part.strip()]
    spaced = text.split()
    if (len(listed) > 1 and any(map(os.path.exists, listed))) or (len(spaced) > 1 and all(map(os.path.exists, spaced))):
        parts = listed if len(listed) > 1 else spaced
        return f"; experts are given one by one: {_flags(parts)} (in YAML as a list)"
    if re.search(r"[*?\[]", text):
        is_small = sum(1 for part in text.split("/") if re.search(r"[*?\[]", part)) < 3 and "**" not in text
        found = sorted(islice(glob.iglob(text), MOST_NAMES)) if is_small else []
        found = [path for path in found if path.endswith(".safetensors") or os.path.isdir(path)]
        return f"; patterns are not expanded: {_flags(found)}" if found else "; patterns are not expanded"
    if "$" in text:
        expanded = os.path.expandvars(text)
        return "; variables are not expanded" + (f": give {expanded}" if os.path.exists(expanded) else "")
    return _found_elsewhere(text)


def _found_elsewhere(text: str) -> str:
    """Return where a model of this name is (in the hub's cache, beside, on the Hub), or nothing."""
    hub_id = _HUB_ID.fullmatch(text)
    repository = hub_id[1] if hub_id else text
    revision = (hub_id[2] or hub_id[3] or "main") if hub_id else "main"
    if hub_id or _PLAIN_NAME.fullmatch(text):
        for cache in _hub_caches(os.environ):
            found = _snapshots(cache / f"models--{repository.replace('/', '--')}", revision)
            if found:
                return f"; the hub's cache has a model of this name: give {_any(found)}"
    near = _nearest(Path(text))
    if near is not None:
        return f" (did you mean {near}?)"
    if hub_id is not None and not os.path.isdir(os.path.dirname(text) or "."):
        download = f"hf download {repository}" + (f" --revision {revision}" if revision != "main" else "")
        return f"; a model of the Hub is downloaded first: {download} prints the folder to give"
    if address := _ADDRESS.fullmatch(text):
        place = f"/{address[2]}" if address[1].lower() == "file" else "the folder that it is downloaded to"
        return f"; an address, and only paths are read: give {place}"
    if _OLD_HUB_ID.fullmatch(text):
        return f"; if it is a model of the Hub: hf download {text} prints the folder to give"
    return ""


def _hub_caches(environment: Mapping[str, str]) -> Iterator[Path]:
    """Yield the folders in which the hub's client keeps its downloads."""
    given = {"HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}
    for variable, below in given.items():
        if environment.get(variable):
            yield Path(os.path.expanduser(environment[variable])) / below
    yield Path(os.path.expanduser("~/.cache/huggingface/hub"))  # pathlib's raises where there is no home


def _snapshots(repository: Path, revision: str = "main") -> list[str]:
    """Return the snapshots with weights in a model's folder of the hub's cache: that of a revision, or else all."""
    try:
        commit = read_regular(repository / "refs" / revision, 200)[0].decode("ascii").strip()
    except (OSError, ValueError):
        commit = revision
    snapshot = repository / "snapshots" / commit
    if _REVISION.fullmatch(commit) and _has_weights(snapshot):
        return [str(snapshot)]
    snapshots = repository / "snapshots"
    return [str(snapshots / name) for name in _names(snapshots) if _has_weights(snapshots / name)]


def _nearest(path: Path) -> str | None:
    """Return the path that may be meant: the POSIX spelling, or a neighbour with almost the same name."""
    posix = str(path).replace("\\", "/")
    if posix != str(path) and os.path.exists(posix):
        return posix
    if not path.name:
        return None
    close = difflib.get_close_matches(path.name[:100], _names(path.parent), n=1, cutoff=0.8)
    return str(path.parent / close[0]) if close else None


def _with_weights(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the sub-folders that hold .safetensors files."""
    return [name for name in names[:MOST_NAMES] if _has_weights(folder / name)]


def _has_weights(folder: Path) -> bool:
    return any(name.endswith(".safetensors") for name in _names(folder))


def _names(folder: Path) -> list[str]:
    try:
        return list_folder(folder)[:MOST_NAMES]
    except InputError:
        return []


def _flags(paths: Iterable[str]) -> str:
    first = list(islice(paths, MOST_SHOWN + 1))
    return " ".join(f"--expert {path}" for path in first[:MOST_SHOWN]) + (" …" if len(first) > MOST_SHOWN else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_SHOWN]) + (", …" if len(names) > MOST_SHOWN else "")


def _any(names: Sequence[str]) -> str:
    if len(names) > MOST_SHOWN:
        return f"{_some(names)} or another"
    return joined(names, "or")
