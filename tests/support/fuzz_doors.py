"""Drives every verb and every public function with wrong types, odd values and damaged files: ``make fuzz-doors``.

Allowed are a right answer, an error of ours with a message of one line and its problems, and an exit code of the
contract. Not allowed are another exception, a traceback, an input that was changed, or an output that is half written.

    python tests/support/fuzz_doors.py --draws 200000 --seed 0
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer.main

import adapters
import fault_fuzz
import isomerge_fast as imf
from checkpoints import save_folder
from isomerge_fast.checkpoint.output.json_files import write_with_digest
from isomerge_fast.cli import application
from isomerge_fast.config import load_config
from isomerge_fast.errors import IsomergeError
from isomerge_fast.execution.report import Report
from isomerge_fast.execution.verify import verify
from isomerge_fast.planning import cost
from odd_values import FLAGS, TEXTS, odd_arguments, odd_value

CODES = {0, 2, 3, 4, 5}
MOST_BYTES = 1 << 28  # of a file that is compared; a draw may make a larger one, with holes
MAX_SECONDS = 10.0  # of one draw, on a machine that others work on too
SHAPES = {"layers.0.up.weight": (6, 4), "layers.0.norm.weight": (4,), "embed_tokens.weight": (5, 4)}

Door = Callable[["Doors", random.Random], None]


@dataclass
class Tally:
    """How the draws ended, by door, and what may not happen."""

    draws: int = 0
    doors: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def make_folders(root: Path) -> None:
    """Make checkpoints, adapters, a finished merge and settings, under names that a command line can be short with."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    base["position_ids"] = torch.arange(4)
    settings = {"model_type": "llama", "dtype": "float32", "tie_word_embeddings": False, "text_config": {"a": 1}}
    save_folder(root / "base", base, config=settings)
    (root / "base/tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    for task in range(2):
        moved = {name: value + 0.1 if value.is_floating_point() else value for name, value in base.items()}
        save_folder(root / f"expert{task}", moved, config=settings)
        factors = {
            "layers.0.up.weight": (torch.randn(2, 4, generator=generator), torch.randn(6, 2, generator=generator))
        }
        adapters.save_adapter(root / f"adapter{task}", factors, r=2)
    for name in ("sharded-base", "sharded-expert"):
        save_folder(root / name, base, shards=2, config=settings)
    shutil.copy(root / "base/model.safetensors", root / "lone.safetensors")
    (root / "folder.safetensors").mkdir()
    os.mkfifo(root / "fifo")
    (root / "loop").symlink_to("loop")
    config = {"base": "base", "experts": ["expert0", "expert1"], "save_delta": True, "out": "done"}
    with chdir(root):
        imf.merge({**config, "method": "iso-c"})


CONFIG: dict[str, Any] = {
    "base": "base",
    "experts": ["expert0", "expert1"],
    "method": "iso-cts",
    "scaling": [1.0, 0.5],
    "options": {"common_fraction": 0.8, "precision": "default"},
    "weights": [0.5, [{"match": "*up*", "weight": 2.0}]],
    "normalize_weights": False,
    "exclude": ["*embed*"],
    "overrides": [{"match": "*norm*", "method": "mean", "options": {}}],
    "dtype": "bfloat16",
    "stochastic_rounding": 1,
    "on_extra": "error",
    "on_missing": "error",
    "on_other_base": "error",
    "adapter_rank": None,
    "experts_are_deltas": False,
    "save_delta": False,
    "out": "out",
}
RECIPE: dict[str, Any] = {
    "merge_method": "iso_cts",
    "base_model": "base",
    "models": [
        {"model": "expert0", "parameters": {"weight": [{"filter": "up", "value": 0.5}, {"value": 1}]}},
        {"model": {"model": {"path": "expert1"}}, "parameters": {"weight": 1}},
    ],
    "parameters": {"lambda": 1.5, "common_fraction": 0.8, "rank_policy": "range", "weight": 1},
    "dtype": "bfloat16",
    "tokenizer": {"source": "base"},
}
MERGE = ("--base", "base", "--expert", "expert0", "--expert", "expert1")
ADAPTERS = ("--base", "base", "--expert", "adapter0", "--expert", "adapter1")
VERBS: dict[str, tuple[str, ...]] = {
    "plan": ("plan", *MERGE),
    "plan of adapters": ("plan", *ADAPTERS),
    "plan of shards": ("plan", "--base", "sharded-base", "--expert", "sharded-expert"),
    "plan of a file": ("plan", "--base", "lone.safetensors", "--expert", "expert0"),
    "run": ("run", *MERGE, "--method", "iso-c", "--out", "out"),
    "run of adapters": ("run", *ADAPTERS, "--adapter-rank", "2", "--out", "out"),
    "verify": ("verify", "done"),
    "report": ("report", "done"),
    "apply": ("apply", "done", "--scaling", "0.5", "--out", "out"),
}


class Doors:
    """The folders, and one draw after the other on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        make_folders(root)
        self.files, self.known = contents(root), set(os.listdir(root))
        self.tally = Tally()
        self.said: list[str] = []
        self._complaints: list[str] = []

    # --- one draw -----------------------------------------------------------------------------------------------------

    def draw(self, seed: int, index: int) -> None:
        """Try one door, and look at what it leaves."""
        chance = random.Random(f"{seed} {index}")
        door = chance.choices(list(DOORS), [weight for weight, _ in DOORS.values()])[0]
        self.said, self._complaints = [], []
        started = time.perf_counter()
        with chdir(self.root):
            try:
                DOORS[door][1](self, chance)
            except Exception:
                self._complaints.append(traceback.format_exc())
            if (seconds := time.perf_counter() - started) > MAX_SECONDS:
                self._complaints.append(f"took {seconds:.1f} s")
            self._clean_up()
        self.tally.draws += 1
        self.tally.doors[door] += 1
        if self._complaints:
            again = f"python tests/support/fuzz_doors.py --seed {seed} --first {index} --draws 1"
            self.tally.wrong.append("\n".join([f"{door}: {again}", *self.said, *self._complaints]))

    def verb(self, *arguments: str) -> int:
        """Run a verb as the console script does; check its exit code and what it prints."""
        self.said.append(f"isomerge {' '.join(map(repr, arguments))}"[:2_000])
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.object(sys, "argv", ["isomerge", *arguments]), redirect_stdout(out), redirect_stderr(err):
            code = application._exit_code()
        self.tally.ends[f"exit {code}"] += 1
        text = err.getvalue()
        self.said.append(text[-1_500:])
        if code not in CODES:
            self._complaints.append(f"exit code {code}")
        if "Traceback" in text or "Traceback" in out.getvalue():
            self._complaints.append("a traceback")
        if code and "Usage: isomerge" not in text:  # without a verb there is help
            self._check_lines(text, is_json=bool(out.getvalue().startswith('{"error')))
        return code

    def _check_lines(self, text: str, *, is_json: bool) -> None:
        first, *others = text.splitlines() or [""]
        if not is_json and not first.startswith("isomerge: "):
            self._complaints.append("no message")
        if any(not line.startswith("  - ") for line in others):
            self._complaints.append("a message of several lines")
        if len(first) > 8_000:
            self._complaints.append(f"a line of {len(first)} characters")

    def call(self, name: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call a public function; an error of ours is an answer."""
        told = [*map(safe, arguments), *(f"{key}={safe(value)}" for key, value in named.items())]
        self.said.append(f"{name}({', '.join(told)})"[:2_000])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = function(*arguments, **named)
        except IsomergeError as error:
            self.tally.ends[type(error).__name__] += 1
            message = str(error)
            self.said.append(message[:1_500])
            message.encode()
            if message.count("\n") != len(error.problems):
                self._complaints.append(f"a message of several lines: {message!r}")
            if not message.strip():
                self._complaints.append("an empty message")
            return None
        self.tally.ends["returned"] += 1
        return value

    # --- what is left -------------------------------------------------------------------------------------------------

    def damage(self, name: str, content: bytes | None, kind: str = "file") -> None:
        """Put something else in the place of a file; it is put back at the end of the draw."""
        path = self.root / name
        self.said.append(f"{name} becomes {kind} {content[:500] if content is not None else ''!r}")
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to("nowhere")
        elif kind == "file" and content is not None:
            path.write_bytes(content)
        self._damaged[name] = content_of(path)

    _damaged: dict[str, Any] = {}  # noqa: RUF012 - emptied after each draw

    def _clean_up(self) -> None:
        """Check that what was there is as it was, and that what is new is a whole output; put everything back."""
        now = contents(self.root)
        for name, content in self.files.items():
            expected = self._damaged.get(name, content)
            if now.get(name) != expected:
                self._complaints.append(f"{name} was changed")
        for path in sorted(self.root.iterdir()):
            if path.name not in self.known:
                self._check_new(path)
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in {*now, *self.files, *self._damaged}:
            if now.get(name) != self.files.get(name):
                self._put_back(name)
        self._damaged.clear()

    def _check_new(self, path: Path) -> None:
        if path.name.startswith(".") and path.name.endswith(".isomerge"):
            if not any("exit 4" in said or "resume" in said for said in self.said):
                self._complaints.append(f"{path.name} was left behind")
            return
        manifests = sorted(path.rglob("manifest.json"), key=lambda found: len(found.parts))
        try:  # ~/x is a folder in one that was made for it
            verify(manifests[0].parent if manifests else path, samples=0)
        except Exception as error:
            self._complaints.append(f"{path.name} is no whole output: {error}")

    def _put_back(self, name: str) -> None:
        path = self.root / name
        with suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        content = self.files.get(name)
        if isinstance(content, bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def contents(root: Path) -> dict[str, Any]:
    """Return every file below a folder with its bytes; of all else, what it is. By name, folder by folder."""
    found: dict[str, Any] = {}
    folders = [""]
    while folders:
        inside = folders.pop()
        with os.scandir(root / inside) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{inside}{entry.name}/")
                else:
                    found[inside + entry.name] = content_of(entry)
    return {name: found[name] for name in sorted(found, key=lambda name: name.split("/")) if found[name] is not None}


def content_of(entry: os.DirEntry[str] | Path) -> Any:
    """Return the bytes of a file that is not too large; else what it is, or None for a folder and what is absent."""
    if entry.is_symlink():
        return "a link"
    if entry.is_file():
        size = entry.stat().st_size
        return Path(entry).read_bytes() if size < MOST_BYTES else f"{size} bytes"
    return "a fifo" if Path(entry).is_fifo() else None


def safe(value: Any) -> str:
    """Return a value as text, whatever it is."""
    try:
        return repr(value)[:300]
    except Exception:
        return f"<{type(value).__name__}>"


# --- doors ------------------------------------------------------------------------------------------------------------


def odd_verb(doors: Doors, chance: random.Random) -> None:
    """A verb with options that nobody expects, or with one of its own replaced or left out."""
    arguments = list(VERBS[chance.choice(list(VERBS))])
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if chance.random() < 0.6:
            arguments += odd_arguments(chance)
        elif len(arguments) > 1:
            place = chance.randrange(1, len(arguments))
            arguments[place : place + 1] = chance.choice([[], [chance.choice(TEXTS)], [chance.choice(FLAGS)]])
    _verb(doors, chance, arguments)


def _verb(doors: Doors, chance: random.Random, arguments: list[str]) -> None:
    """As JSON, mostly: that is cheaper."""
    doors.verb(*arguments, *(["--format", "json"] if chance.random() < 0.6 else []))


def odd_settings(doors: Doors, chance: random.Random) -> None:
    """A YAML file, ours or mergekit's, that was changed."""
    value = copy.deepcopy(chance.choice([CONFIG, CONFIG, RECIPE]))
    for _ in range(chance.choice([1, 1, 2])):
        if isinstance(value, dict | list) and value:
            value = fault_fuzz.change_json(value, chance)
    content = fault_fuzz.encode(value, chance)
    if chance.random() < 0.25:
        content = fault_fuzz.change_bytes(content, chance, len(content))
    Path("m.yml").write_bytes(content)
    doors.said.append(f"m.yml: {content[:1_500]!r}")
    _verb(doors, chance, [chance.choice(["plan", "plan", "plan", "bench", "run"]), "m.yml", "--max-ram", "1MB"])
    Path("m.yml").unlink()


def odd_option(chance: random.Random, key: str) -> Any:
    """Return an odd value of an argument; what an observer raises by itself is its caller's, so that none is called."""
    value = odd_value(chance)
    return None if key == "observer" and callable(value) else value


def odd_merge(doors: Doors, chance: random.Random) -> None:
    """``merge`` and ``load_config`` of a dict, or a MergeConfig, with a value that has no place there."""
    config: dict[Any, Any] = copy.deepcopy(CONFIG)
    for _ in range(chance.choice([0, 1, 1, 2])):
        config[chance.choice([*config, *config, "x", 3, None])] = odd_value(chance)
    named: dict[str, Any] = {"max_ram": 1_000}  # so that what is sound ends soon
    for _ in range(chance.choice([0, 0, 1, 2])):
        key = chance.choice(["device", "max_ram", "max_vram", "threads", "resume", "overwrite", "io", "observer"])
        named[key] = odd_option(chance, key)
    whole: Any = config
    if chance.random() < 0.3:
        whole = odd_value(chance)
    elif chance.random() < 0.3:
        with suppress(TypeError):
            whole = imf.MergeConfig(**config)
    if chance.random() < 0.5:
        doors.call("load_config", load_config, whole)
    else:
        doors.call("merge", imf.merge, whole, **named)


def odd_deltas(doors: Doors, chance: random.Random) -> None:
    """``iso_c`` and ``iso_cts``."""
    function = chance.choice([imf.iso_c, imf.iso_cts])
    deltas: Any = [torch.ones(3, 2), torch.eye(3, 2)]
    if chance.random() < 0.6:
        deltas = odd_value(chance)
    elif chance.random() < 0.3:
        deltas.insert(chance.randrange(3), odd_value(chance))
    named: dict[str, Any] = {}
    for _ in range(chance.choice([0, 1, 1, 2])):
        key = chance.choice(["weights", "common_fraction", "precision", "rank_policy", "solver", "memory_bytes", "x"])
        named[key] = odd_value(chance)
    doors.call(function.__name__, function, deltas, **named)


def odd_svd(doors: Doors, chance: random.Random) -> None:
    """``randomized_svd``."""
    named: dict[str, Any] = {"a": torch.ones(2, 4, 3), "rank": 2}
    for _ in range(chance.choice([0, 1, 1, 2])):
        named[chance.choice([*named, "n_oversamples", "tolerance"])] = odd_value(chance)
    doors.call("randomized_svd", imf.randomized_svd, **named)


def odd_state_dicts(doors: Doors, chance: random.Random) -> None:
    """``merge_state_dicts``."""
    base: Any = {"w": torch.ones(3, 2), "n": torch.ones(3), "i": torch.arange(3)}
    experts: Any = [{name: value + 1 for name, value in base.items()} for _ in range(2)]
    target = chance.choice([base, experts[0], experts[1]])
    roll = chance.random()
    if roll < 0.2:
        base = odd_value(chance)
    elif roll < 0.4:
        experts = odd_value(chance)
    elif roll < 0.5:
        experts[chance.randrange(2)] = odd_value(chance)
    elif roll < 0.8:
        target[chance.choice(["w", "n", "i", "x", 3, None, "_extra_state", "state_dict"])] = odd_value(chance)
    elif roll < 0.9:
        experts[0] = {f"{chance.choice(['module.', '_orig_mod.', 'model.'])}{name}": v for name, v in base.items()}
    named: dict[str, Any] = {}
    for _ in range(chance.choice([0, 1, 1, 2])):
        keys = ["method", "scaling", "exclude", "dtype", "stochastic_rounding", "weights", "common_fraction", "x"]
        named[chance.choice(keys)] = odd_value(chance)
    doors.call("merge_state_dicts", imf.merge_state_dicts, base, experts, **named)


def odd_paths(doors: Doors, chance: random.Random) -> None:
    """``apply``, ``verify`` and ``open_state_dict``; a method made by hand; a report made of a dict."""
    odd = odd_value(chance)
    kind = chance.randrange(6)
    if kind == 0:
        opened = doors.call("open_state_dict", imf.open_state_dict, odd)
        if opened is not None:
            opened.__exit__(None, None, None)
    elif kind == 1:
        doors.call("verify", verify, *chance.choice([(odd,), ("done",)]), samples=odd_value(chance))
    elif kind == 2:
        doors.call("verify", verify, "done", **{chance.choice(["samples", "seed"]): odd})
    elif kind == 3:
        named: dict[str, Any] = {"merged": "done", "scaling": 0.5, "out": "out"}
        for _ in range(chance.choice([1, 1, 2])):
            keys = [*named, "base", "dtype", "device", "max_ram", "max_vram", "resume", "overwrite", "io", "observer"]
            key = chance.choice(keys)
            named[key] = odd_option(chance, key)
        doors.call("apply", imf.apply, **named)
    elif kind == 4:
        method = chance.choice([imf.IsoC, imf.IsoCTS, imf.Mean, imf.TaskArithmetic])
        doors.call("make_method", imf.methods.make_method, odd, odd_value(chance))
        names = [*method.__dataclass_fields__] or ["x"]
        doors.call("make_method", imf.methods.make_method, method.name, {chance.choice(names): odd})
    else:
        doors.call("merge_state_dicts", imf.merge_state_dicts, "base", ["expert0"], method=odd)


def damaged_input(doors: Doors, chance: random.Random) -> None:
    """A file of a checkpoint or an adapter that is damaged, missing, or no file."""
    verb = chance.choice(["plan", "plan of adapters", "plan of shards", "plan of a file", "run", "run of adapters"])
    arguments = list(VERBS[verb])
    folders = [argument for argument in arguments if argument in {Path(name).parts[0] for name in doors.files}]
    name = chance.choice([n for n in doors.files if Path(n).parts[0] in folders])
    _damage(doors, chance, name)
    _verb(doors, chance, [*arguments, *(odd_arguments(chance) if chance.random() < 0.1 else [])])


def _damage(doors: Doors, chance: random.Random, name: str) -> None:
    before = doors.files[name]
    kind = chance.choice(["file"] * 12 + ["folder", "fifo", "link", "nothing"])
    if kind != "file":
        doors.damage(name, None, kind)
        return
    roll = chance.random()
    if roll < 0.1:
        content = b""
    elif roll < 0.2:
        content = json.dumps(chance.choice(fault_fuzz.VALUES)).encode()
    elif roll < 0.3 or Path(name).suffix not in (".json", ".safetensors"):
        content = fault_fuzz.change_bytes(before, chance, len(before))
    else:
        content = fault_fuzz.damage(before, Path(name), chance)
    doors.damage(name, content)


def damaged_output(doors: Doors, chance: random.Random) -> None:
    """A file of a finished merge that is damaged; sometimes with a digest that fits, as only an enemy writes it."""
    name = chance.choice([n for n in doors.files if Path(n).parts[0] == "done"])
    if chance.random() < 0.6:
        name = chance.choice(["done/report.json", "done/manifest.json"])
        value = json.loads(doors.files[name])
        value.pop("digest")
        for _ in range(chance.choice([1, 1, 2])):
            if isinstance(value, dict | list):
                value = fault_fuzz.change_json(value, chance)
        with suppress(ValueError, AttributeError):  # what JSON cannot hold, or no object
            text = json.dumps(value, indent=1, ensure_ascii=True) if isinstance(value, dict) and value else None
            if text is not None:
                doors.damage(name, text.encode())
                write_with_digest(doors.root / name, [f"{text}\n".encode()])
                doors._damaged[name] = (doors.root / name).read_bytes()
    else:
        _damage(doors, chance, name)
    for verb in chance.sample(["verify", "report", "apply"], chance.choice([1, 2, 3])):
        doors.verb(*VERBS[verb], *(["--format", "json"] if chance.random() < 0.4 else []))


def whole_runs(doors: Doors, chance: random.Random) -> None:
    """What is sound, with ceilings, flags and formats drawn at random."""
    more: list[str] = []
    for option in (["--scaling", "0.5"], ["--save-delta"], ["--dtype", "bfloat16"], ["--weight", "1", "--weight", "2"]):
        more += option if chance.random() < 0.3 else []
    doors.verb(*VERBS["run"], "--threads", "1", *more)
    doors.verb("verify", "out", "--samples", chance.choice(["0", "1", "99999", "-1"]))


def odd_machine(doors: Doors, chance: random.Random) -> None:
    """What takes seconds where it is sound: ``demo`` and ``bench`` with arguments that cannot be."""
    out = chance.choice(["/proc/x", "/dev/null", "base/config.json", "base/config.json/x", "", "loop", "fifo/x"])
    demo = chance.choice([["--out", out], ["--seed", "-1", "--out", "/proc/x"], ["--seed", "9" * 30], ["--seed", "x"]])
    bench = chance.choice(
        [
            *(["--tasks", "0"], ["--tasks", "x"], ["--folder", "/proc/x"], ["--folder", "nowhere", *MERGE]),
            *(["--budget", "-1"], ["--budget", "nan", *MERGE], ["--tasks", "3", *MERGE], ["--max-ram", "x"]),
            *(["--base", "nowhere", "--expert", "base"], ["--device", "x"], [*MERGE, "--max-ram", "1MB"]),
        ]
    )
    doors.verb(*chance.choice([["demo", *demo], ["bench", *bench]]))


def report_of_a_dict(doors: Doors, chance: random.Random) -> None:
    """A Report from JSON that is none, printed."""
    value = json.loads(doors.files["done/report.json"])
    value = fault_fuzz.change_json(value, chance)
    with suppress(ValueError):  # as documented
        Report.from_dict(value)


DOORS: dict[str, tuple[float, Door]] = {
    "odd verb": (30, odd_verb),
    "odd settings": (20, odd_settings),
    "odd merge": (14, odd_merge),
    "odd deltas": (10, odd_deltas),
    "odd svd": (4, odd_svd),
    "odd state dicts": (14, odd_state_dicts),
    "odd paths": (8, odd_paths),
    "damaged input": (16, damaged_input),
    "damaged output": (14, damaged_output),
    "whole runs": (1, whole_runs),
    "odd machine": (1, odd_machine),
    "report of a dict": (4, report_of_a_dict),
}


@contextmanager
def quickened(home: Path) -> Iterator[None]:
    """Let the verbs be read once, nothing be timed, and ``~`` lead nowhere else."""
    with (
        mock.patch.object(application, "app", typer.main.get_command(application.app)),
        mock.patch.object(cost, "_measured_flops", return_value=1e10),
        mock.patch.dict(os.environ, {"HOME": str(home)}),
    ):
        yield


def fuzz(draws: int, seed: int, first: int = 0) -> Tally:
    """Make that many draws."""
    with tempfile.TemporaryDirectory(prefix="isomerge-doors-") as folder, quickened(Path(folder) / "home"):
        doors = Doors(Path(folder) / "work")
        for index in range(first, first + draws):
            doors.draw(seed, index)
        return doors.tally


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the draw to begin with")
    parser.add_argument("--show", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    tally = fuzz(arguments.draws, arguments.seed, arguments.first)
    for line in tally.wrong[: arguments.show]:
        print(line, end="\n\n")
    for counts in (tally.doors, tally.ends):
        print(", ".join(f"{name} {count}" for name, count in counts.most_common()))
    print(f"{tally.draws} draws, {len(tally.wrong)} wrong, {time.monotonic() - started:.0f} s")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
