"""Values that nobody expects where another kind is: of Python, and as texts of a command line."""

from __future__ import annotations

import random
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

import isomerge_fast as imf

ITSELF: list[Any] = []
ITSELF.append(ITSELF)


class Awkward:
    """An object that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def numbers() -> Iterator[Any]:
    """Yield what is a number, or nearly."""
    yield from (
        True,
        False,
        0,
        1,
        -1,
        3,
        10**30,
        -(2**63),
        10**5_000,
        0.5,
        1.0,
        -0.0,
        1e300,
        float("nan"),
        float("inf"),
    )
    yield from (1 + 2j, Decimal("0.5"), Fraction(1, 3), np.float32(0.5), np.float64(0.5), np.int64(2), np.bool_(True))
    yield from (
        np.float16("nan"),
        np.array(1.0),
        torch.tensor(0.5),
        torch.tensor(2),
        torch.tensor([1.0]),
        torch.empty(0),
    )
    yield from ("1", "1e-1", "8e-1", "0x10", "1_000", "nan", "inf", " 1 ", "½", "1" * 5_000, b"1")


def words() -> Iterator[Any]:
    """Yield texts, and what stands for one."""
    yield from ("", " ", "x", "*", "[", "iso-c", "iso_cts", "Iso-CTS", "mean", "bfloat16", "bf16", "torch.float32")
    yield from ("auto", "cpu", "cuda", "cuda:99", "cpu:x", "error", "zero", "8GiB", "-1GiB", "1e9", "4G", "solver")
    yield from (
        "a\nb",
        "a\0b",
        "\ud800",
        "é",
        "\x1b[31m",
        "x" * 5_000,
        "/",
        ".",
        "..",
        "/dev/null",
        "/proc/x",
        "~",
        "~/x",
    )
    yield from (b"x", Path(), Path("x"), bytearray(b"x"), torch.bfloat16, torch.int8, np.float32, np.dtype("float32"))
    yield from (torch.device("cpu"), torch.device("meta"))


def things() -> Iterator[Any]:
    """Yield containers, objects and what has the wrong shape."""
    yield from (None, [], {}, (), set(), [None], [1], ["x"], [[]], [[1.0]], [[{}]], {"a": 1}, {1: 2}, {"weight": 1})
    yield from ([{"match": "*", "weight": 1}], [{"match": "*"}], [{"match": 3, "method": "mean"}], {"state_dict": {}})
    yield from ({"match": "*", "method": "mean"}, [[{"match": "", "weight": "x"}]], range(3), ITSELF, {"a": ITSELF})
    yield from (object(), object, Awkward(), print, lambda: 1, ..., (x for x in ()), (x for x in "ab"), iter(()))
    yield from (torch.nn.Linear(2, 2), torch.ones(2, 3), torch.ones(2, 2, 3), torch.ones(2, 2, 3, 3), torch.ones(()))
    yield from (torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 2, dtype=torch.complex64), torch.ones(2).to_sparse())
    yield from (torch.full((2, 3), float("nan")), torch.ones(2, 3, device="meta"), torch.zeros(2, 0), np.ones((2, 3)))
    yield from (torch.ones(2, 3).to(torch.float8_e4m3fn), np.array(["x"]), np.array([None]), np.ones((0, 3)))
    yield from (
        [torch.ones(2, 3)],
        [torch.ones(2, 3), torch.ones(3, 2)],
        [torch.ones(2, 3), None],
        {"w": torch.ones(2)},
    )
    yield from ([{"w": torch.ones(2, 3)}], [{}], [None, {}], {"w": None}, {None: torch.ones(2)}, {"w": 3}, {"w": "x"})
    yield from (imf.IsoC(), imf.Mean, imf.MergeConfig("b", ["e"]), imf.MergeConfig(None, None))  # type: ignore[arg-type]  # what a caller gives, not what is declared
    yield from (imf.Override("*", "mean"), imf.ConfigError("x"))


def odd_value(chance: random.Random) -> Any:
    """Return one of these; generators are fresh each time."""
    return chance.choice(list(chance.choice([numbers, words, things])()))


# --- of the command line ----------------------------------------------------------------------------------------------

TEXTS = (
    *(
        "",
        " ",
        "x",
        "-",
        "--",
        "-1",
        "0",
        "1",
        "2",
        "0.5",
        "1e-1",
        "1e400",
        "nan",
        "inf",
        "-inf",
        "9" * 40,
        "9" * 5_000,
    ),
    *(
        "true",
        "null",
        "[",
        "[1",
        "{",
        "{a: 1}",
        "[1, 2]",
        "!!int x",
        "&a [*a]",
        "*x",
        "a: b: c",
        "\t",
        "#",
        "|",
        "2024-01-01",
    ),
    *(
        "iso-c",
        "iso_c",
        "Iso-CTS",
        "isocts",
        "mean",
        "task-arithmetic",
        "ties",
        "bf16",
        "torch.bfloat16",
        "bfloat16",
        "int8",
    ),
    *("error", "ignore", "copy", "zero", "auto", "buffered", "cpu", "cuda", "cuda:0", "cpu:1", "tpu", "cpu:99", "meta"),
    *(
        "8GiB",
        "4G",
        "1MB",
        "-1",
        "1e9",
        "8 GiB",
        "1" * 400 + "TB",
        "*",
        "*w*",
        "=",
        "a=",
        "=1",
        "a=b=c",
        "*=mean",
        "*=",
        "=mean",
    ),
    *(
        "a\nb",
        "é",
        "\udcff",
        "\x1b[31m",
        "x" * 5_000,
        "/",
        ".",
        "..",
        "/dev/null",
        "/dev/full",
        "/proc/x",
        "/proc/self/mem",
    ),
    *("common_fraction", "common_fraction=", "common_fraction=8e-1", "common_fraction=[1", "common_fraction=2"),
    *(
        "precision=best",
        "precision=[1",
        "rank_policy=3",
        "solver=x",
        "memory_bytes=1e9",
        "tasks_at_once=0",
        "memory_bytes=0",
    ),
    *(
        "nowhere:1",
        "base",
        "expert0",
        "adapter0",
        "done",
        "done/delta",
        "m.yml",
        "base/config.json",
        "base/model.safetensors",
    ),
    *("fifo", "loop", "folder.safetensors", "lone.safetensors", "base/", "./base/../base", "~/x", "$HOME", "org/name"),
)
FLAGS = (
    *(
        "--base",
        "--expert",
        "--method",
        "--scaling",
        "--option",
        "--weight",
        "--exclude",
        "--dtype",
        "--out",
        "--folder",
    ),
    *(
        "--stochastic-rounding",
        "--on-extra",
        "--on-missing",
        "--on-other-base",
        "--adapter-rank",
        "--device",
        "--max-ram",
    ),
    *(
        "--max-vram",
        "--threads",
        "--io",
        "--workers",
        "--flops",
        "--worker-rate",
        "--storage-rate",
        "--tasks",
        "--budget",
    ),
    *("--samples", "--seed", "--format", "--override", "--bogus", "--sclaing", "-x"),
)
SWITCHES = (
    "--save-delta",
    "--resume",
    "--overwrite",
    "--normalize-weights",
    "--experts-are-deltas",
    "--help",
    "--version",
)


def odd_arguments(chance: random.Random) -> list[str]:
    """Return one odd option, or an argument that stands alone."""
    roll = chance.random()
    if roll < 0.75:
        return [chance.choice(FLAGS), chance.choice(TEXTS)]
    return [chance.choice(SWITCHES)] if roll < 0.9 else [chance.choice(TEXTS)]
