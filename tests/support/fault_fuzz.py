"""Damages headers, indexes and configurations of real checkpoints, and plans a merge with what comes out.

Allowed are an error of ours that names the damaged file, or a plan whose tensors are those that safetensors reads. Not
allowed are another exception, more than a second, or 200 MB.

    python tests/support/fault_fuzz.py --inputs 100000 --seed 0
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoints import make_base, make_expert, save_folder
from isomerge_fast.checkpoint.io.reader import Reader, files_of, whole
from isomerge_fast.checkpoint.layout import DTYPES, Checkpoint
from isomerge_fast.checkpoint.output.model_config import config_with_dtype
from isomerge_fast.config import MergeConfig
from isomerge_fast.errors import IsomergeError
from isomerge_fast.planning.planner import make_plan

MAX_SECONDS, MAX_BYTES = 1.0, 200_000_000
NUMBERS = [-1, 0, 1, 2, 3, 8, 2**31, 2**32 - 1, 2**48, 2**53 + 1, 2**63 - 1, 2**64, 10**30, 0.5, 1e400, -0.0]
NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "x" * 300,
    "é",
    "\ud800",
    "💾" * 80,
    "C:\\x",
    "__metadata__",
]
VALUES: list[Any] = [None, True, False, [], {}, "", "F32", "weights", [[]], {"a": {}}, [1, 2], *NUMBERS, *NAMES]
BYTES = [0, 1, 9, 10, 0x22, 0x2C, 0x3A, 0x5B, 0x5D, 0x7B, 0x7D, 0x7F, 0x80, 0xFF]

Change = Callable[[random.Random, Any], Any]


@dataclass
class Tally:
    inputs: int = 0
    plans: int = 0
    slowest: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places in a JSON value, as paths of keys."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += nodes(item, (*path, key))
    return found


def change_json(value: Any, chance: random.Random) -> Any:
    """One place replaced, removed, renamed, doubled or moved by a little."""
    path = chance.choice(nodes(value))
    if not path:
        return copy.deepcopy(chance.choice(VALUES))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    action = chance.randrange(6)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[chance.choice([*NAMES, *parent])] = parent.pop(key)
    elif action == 2 and type(old) is int:
        parent[key] = old + chance.choice([-8, -1, 1, 4, 8, old])
    elif action == 3 and isinstance(parent, list):
        parent.insert(chance.randrange(len(parent) + 1), copy.deepcopy(chance.choice([old, *VALUES])))
    elif action == 4:
        other = chance.choice(nodes(value))
        found = value
        for step in other:
            found = found[step]
        parent[key] = copy.deepcopy(found)
    else:
        sizes = [1] * chance.choice([1, 40, 65, 300])
        parent[key] = copy.deepcopy(chance.choice([*VALUES, chance.choice(list(DTYPES)), sizes]))
    return value


def change_bytes(content: bytes, chance: random.Random, end: int) -> bytes:
    """A few of the first ``end`` bytes changed, cut out, put in or repeated; or the file cut short or made longer."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = chance.randrange(max(1, min(end, len(data))))
        action = chance.randrange(7)
        if action <= 1 and data:
            data[at] = chance.choice(BYTES) if action else chance.randrange(256)
        elif action == 2:
            del data[at : at + chance.choice([1, 2, 8, 100])]
        elif action == 3:
            data[at:at] = bytes(chance.choice(BYTES) for _ in range(chance.choice([1, 3])))
        elif action == 4:
            data[at:at] = data[at : at + chance.choice([1, 10, 60])]
        elif action == 5:
            del data[chance.randrange(len(data) + 1) :]
        else:
            data += bytes(chance.choice([1, 7, 8, 4096]))
    return bytes(data)


def encode(value: Any, chance: random.Random) -> bytes:
    """As JSON, at times with a key twice, spaces, escapes or nesting that a careful parser minds."""
    text = json.dumps(value, ensure_ascii=chance.random() < 0.9)
    action = chance.randrange(12)
    if action == 0 and isinstance(value, dict) and value:
        key = chance.choice(list(value))
        text = "{" + f"{json.dumps(key)}: {json.dumps(value[key])}, " + text[1:]
    elif action == 1:
        text = text + " " * chance.choice([1, 8, 1000])
    elif action == 2:
        text = "[" * 5000 + text + "]" * 5000
    return text.encode("utf-8", "surrogatepass")


def change_header(content: bytes, chance: random.Random) -> bytes:
    """The header of a safetensors file changed as JSON; its length told rightly, mostly."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    for _ in range(chance.choice([1, 1, 2])):
        header = change_json(header, chance)
    text = encode(header, chance)
    told = (
        len(text) if chance.random() < 0.95 else chance.choice([0, 1, len(text) - 1, len(text) + 1, 2**40, 2**64 - 1])
    )
    return struct.pack("<Q", told) + text + content[8 + size :]


def damage(content: bytes, path: Path, chance: random.Random) -> bytes:
    is_json = path.suffix == ".json"
    if chance.random() < 0.3:
        return change_bytes(content, chance, len(content) if is_json else 8 + struct.unpack("<Q", content[:8])[0])
    if not is_json:
        return change_header(content, chance)
    value = json.loads(content)
    for _ in range(chance.choice([1, 1, 2])):
        value = change_json(value, chance)
    return encode(value, chance)


class Fuzzer:
    """Checkpoints below ``root``, of which one file at a time is damaged."""

    def __init__(self, root: Path, seed: int) -> None:
        self._chance = random.Random(seed)
        base = {name: tensor for name, tensor in make_base().items() if name != "conv.weight"}
        config = {"model_type": "test", "dtype": "float32", "text_config": {"dtype": "float32"}}
        self._single = [
            save_folder(root / f"single{index}", tensors, config=config)
            for index, tensors in enumerate((base, make_expert(base, 0)))
        ]
        self._sharded = [
            save_folder(root / f"sharded{index}", tensors, shards=2, config=config)
            for index, tensors in enumerate((base, make_expert(base, 0)))
        ]
        self.tally = Tally()

    def try_input(self) -> None:
        chance = self._chance
        pair = chance.choice([self._single, self._sharded])
        path = chance.choice(sorted(path for folder in pair for path in folder.iterdir()))
        before = path.read_bytes()
        content = damage(before, path, chance)
        path.write_bytes(content)
        try:
            self._check(pair, path, content)
        finally:
            path.write_bytes(before)

    def _check(self, pair: list[Path], path: Path, content: bytes) -> None:
        config = MergeConfig(str(pair[0]), [str(pair[1])], method="iso-c", out=str(pair[0].parent / "out"))
        started = time.perf_counter()
        plan = None
        complaint = ""
        try:
            plan = make_plan(config)
            json.dumps(config_with_dtype(plan.base.config or {}, "bfloat16"), ensure_ascii=False).encode()
            self.tally.plans += 1
        except IsomergeError as error:
            message = str(error)
            self.tally.errors[type(error).__name__] += 1
            # Of two files that do not fit each other both are named, or the folder with the index that does not hold.
            if path.parent.name not in message and path.name not in message:
                complaint = f"does not name {path}: {message}"
            try:
                message.encode()
            except UnicodeEncodeError:
                complaint = f"a message that cannot be printed: {message!r}"
        except BaseException:
            complaint = traceback.format_exc()
        seconds = time.perf_counter() - started
        self.tally.inputs += 1
        self.tally.slowest = max(self.tally.slowest, seconds)
        if seconds > MAX_SECONDS:
            complaint += f" took {seconds:.1f} s"
        if plan is not None and path.suffix == ".safetensors":
            complaint += self._compare(plan.base if path.parent == pair[0] else plan.experts[0], path)
        if complaint:
            self.tally.wrong.append(f"{path.name} {content[:2000]!r}: {complaint}")

    def _compare(self, checkpoint: Checkpoint, path: Path) -> str:
        """What safetensors reads otherwise."""
        ours = {name: stored for name, stored in checkpoint.tensors.items() if stored.file == path}
        with safe_open(path, framework="pt") as opened:
            names = set(opened.keys())
        if names != set(ours):
            return f"planned {sorted(ours)}, safetensors reads {sorted(names)}"
        theirs = load_file(path)
        with Reader(files_of(checkpoint)) as reader:
            for name, stored in ours.items():
                value, expected = reader.read(whole(stored)), theirs[name]
                same = value.dtype == expected.dtype and value.shape == expected.shape
                if (
                    not same
                    or value.reshape(-1).view(torch.uint8).tolist() != expected.reshape(-1).view(torch.uint8).tolist()
                ):
                    return f"{name!r} is not what safetensors reads"
        return ""


def fuzz(inputs: int, seed: int) -> Tally:
    """Tries that many damaged inputs."""
    with tempfile.TemporaryDirectory(prefix="isomerge-fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder), seed)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(inputs):
            fuzzer.try_input()
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > MAX_BYTES:
            fuzzer.tally.wrong.append(f"took {grown} bytes of memory")
        return fuzzer.tally


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    tally = fuzz(arguments.inputs, arguments.seed)
    for line in tally.wrong[:20]:
        print(line)
    seconds = time.monotonic() - started
    errors = ", ".join(f"{name} {count}" for name, count in sorted(tally.errors.items()))
    print(f"{tally.plans} plans, {errors}; slowest {tally.slowest:.2f} s")
    print(f"{tally.inputs} inputs, {len(tally.wrong)} wrong, {seconds:.0f} s")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
