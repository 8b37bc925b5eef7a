"""Random merges of every kind against the oracle: ``make fuzz-numerics``.

What may not happen: a result that is certified, and farther from the oracle than its tier promises, where the input
determines the answer (``oracle.judge``); one that is not finite; an error of another kind than ours.

A *family* is a spectrum, how the experts relate to each other, the dtype that they are stored in and their scale. One
input of a family is merged by both methods in all tiers, in every form there is for it: dense, in a batch beside a
tame one, by rows, as factors; a small matrix also in the form of larger ones.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import oracle
from isomerge_fast.errors import IsomergeError
from isomerge_fast.linalg import auto, subspace_chebyshev
from isomerge_fast.linalg.auto import TOLERANCES, small_candidate
from isomerge_fast.methods import MemoryDeltas, MergeStats, TensorSpec, make_method
from isomerge_fast.methods.factors import Factors, merge_factors
from isomerge_fast.methods.rowwise.passes import fits_rowwise
from row_sources import by_rows, rows_of

SHAPES = ((12, 12), (31, 31), (48, 48), (16, 60), (60, 16), (23, 37), (90, 41), (40, 90), (1, 30), (30, 1), (2, 3))
LONG = ((140, 150), (150, 140), (130, 300))
TASKS = (1, 2, 2, 3, 5, 8, 13, 20, 50)
FRACTIONS = (0.8, 0.8, 0.8, 0.5, 0.3, 1.0)
SCALES = (1.0, 1.0, 1e-3, 1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

Draw = Callable[..., np.ndarray]


def spectrum(kind: str, size: int, chance: random.Random) -> np.ndarray:
    """Singular values, the largest 1."""
    if kind == "flat":
        return np.ones(size)
    if kind == "linear":
        return np.linspace(1.0, chance.choice([0.5, 0.1, 0.01]), size)
    if kind == "clusters":
        levels = 10.0 ** -np.arange(chance.choice([2, 3, 5]))
        return np.sort(np.repeat(levels, -(-size // len(levels)))[:size] * np.linspace(1.0, 0.99, size))[::-1]
    if kind == "outlier":
        return np.concatenate([[1.0], np.linspace(2.0, 1.0, size)[1:] * 10.0 ** -chance.uniform(1, 7)])
    if kind == "outliers":
        count = min(size, 3)
        rest = np.linspace(2.0, 1.0, size)[count:] * 10.0 ** -chance.uniform(1, 7)
        return np.concatenate([np.linspace(1.0, 0.5, count), rest])
    if kind == "one small":
        return np.concatenate([np.linspace(1.0, 0.5, size)[: size - 1], [10.0 ** -chance.uniform(3, 8)]])
    if kind == "few small":
        count = min(size, 4)
        return np.concatenate(
            [
                np.linspace(1.0, 0.5, size)[: size - count],
                10.0 ** -np.sort([chance.uniform(2, 8) for _ in range(count)]),
            ]
        )
    condition = float(kind.removeprefix("geometric "))
    return np.logspace(0.0, -np.log10(condition), size)


SPECTRA = (
    "flat",
    "linear",
    "clusters",
    "outlier",
    "outliers",
    "one small",
    "few small",
    "noise",
    *(f"geometric {condition:.0e}" for condition in (1e2, 1e4, 1e5, 1e6, 1e7, 1e8, 1e10, 1e12)),
)
RELATIONS = (
    "own part fades",
    "own part",
    "independent",
    "equal",
    "nearly equal",
    "opposite",
    "nearly opposite",
    "frozen",
    "low rank",
    "duplicates",
    "one-hot",
    "one huge",
    "one huge weight",
)


def matrix(kind: str, shape: tuple[int, int], chance: random.Random, draw: np.random.Generator) -> np.ndarray:
    """Of this spectrum, with singular vectors drawn at random."""
    if kind == "noise":
        return draw.standard_normal(shape) / max(shape) ** 0.5
    size = min(shape)
    u, v = (np.linalg.qr(draw.standard_normal((side, size)))[0] for side in shape)
    return (u * spectrum(kind, size, chance)) @ v.T


def related(
    relation: str, kind: str, shape: tuple[int, int], tasks: int, chance: random.Random, draw: np.random.Generator
) -> list[np.ndarray]:
    """T deltas of that relation."""
    first = matrix(kind, shape, chance, draw)

    def noise(size: float) -> np.ndarray:
        return draw.standard_normal(shape) * (size * np.linalg.norm(first) / first.size**0.5)

    if relation == "own part fades":  # as ``cases.Case``
        size = min(shape)
        u, sigma, v = oracle.thin_svd(first)
        own = draw.standard_normal((tasks, size, shape[1])) / shape[1] ** 0.5
        own -= own.mean(0)
        return [(u * sigma) @ (v.T + part) / tasks for part in own]
    if relation == "own part":
        size = 10.0 ** -chance.uniform(0, 4)
        return [first / tasks + noise(size) for _ in range(tasks)]
    if relation == "independent":
        return [first, *(matrix(kind, shape, chance, draw) for _ in range(tasks - 1))]
    if relation == "equal":
        return [first] * tasks
    if relation == "nearly equal":
        size = 10.0 ** -chance.uniform(1, 7)
        return [first + noise(size) for _ in range(tasks)]
    if relation == "opposite":
        return [first * (-1) ** task for task in range(tasks)]
    if relation == "nearly opposite":
        size = 10.0 ** -chance.uniform(1, 7)
        return [first * (-1) ** task + noise(size) for task in range(tasks)]
    if relation == "frozen":
        return [first if task == 0 else noise(0.5) * (chance.random() < 0.5) for task in range(tasks)]
    if relation == "low rank":
        rank = chance.choice([1, 2, 4])
        return [draw.standard_normal((shape[0], rank)) @ draw.standard_normal((rank, shape[1])) for _ in range(tasks)]
    if relation == "duplicates":
        others = [matrix(kind, shape, chance, draw) for _ in range(max(1, tasks // 2))]
        return [others[task % len(others)] for task in range(tasks)]
    if relation == "one-hot":
        deltas = [np.zeros(shape) for _ in range(tasks)]
        for delta in deltas:
            for _ in range(chance.choice([1, 3])):
                delta[chance.randrange(shape[0]), chance.randrange(shape[1])] = chance.choice([-1.0, 1.0, 0.01])
        return deltas
    deltas = [noise(1.0) for _ in range(tasks)]
    size = 10.0 ** chance.uniform(1, 7)
    if relation == "one huge":
        deltas[0] = deltas[0] * size
    else:
        deltas[0][chance.randrange(shape[0]), chance.randrange(shape[1])] *= size
    return deltas


@dataclass(frozen=True)
class Input:
    """One input of a family, as it is stored.

    Attributes:
        factors: of every delta, for the family that has some.
    """

    family: tuple[str, str, str, float]
    seed: int
    deltas: list[Tensor]
    factors: list[Factors]
    common_fraction: float

    def __str__(self) -> str:
        kind, relation, dtype, scale = self.family
        rows, columns = self.deltas[0].shape
        return (
            f"seed {self.seed}: {rows}x{columns} T={len(self.deltas)} {dtype} {scale:.0e} f={self.common_fraction} "
            f"{kind!r} {relation!r}"
        )


def make_input(family: tuple[str, str, str, float], seed: int) -> Input:
    kind, relation, dtype, scale = family
    chance, draw = random.Random(seed), np.random.default_rng(seed)
    shape = chance.choice(LONG) if chance.random() < 0.03 else chance.choice(SHAPES)
    tasks = chance.choice(TASKS)
    if DTYPES[dtype] == torch.float16:
        scale = min(max(scale, 1e-2), 1e2)
    made = [torch.from_numpy(scale * delta) for delta in related(relation, kind, shape, tasks, chance, draw)]
    factors = []
    if relation == "low rank":
        halves = [torch.linalg.svd(delta / scale, full_matrices=False) for delta in made]
        ranks = [int((sigma > 1e-9 * sigma[0]).sum()) for _, sigma, _ in halves]
        factors = [
            Factors((u[:, :rank] * sigma[:rank]).float(), vh[:rank].float(), scale)
            for (u, sigma, vh), rank in zip(halves, ranks, strict=True)
        ]
    return Input(family, seed, [delta.to(DTYPES[dtype]) for delta in made], factors, chance.choice(FRACTIONS))


@dataclass
class Tally:
    """Per tier: how the solves ended."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    families: set[tuple[str, str, str, float]] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    @property
    def solves(self) -> int:
        return sum(count for (_, what), count in self.counts.items() if what == "solves")

    def __str__(self) -> str:
        columns = ("solves", "certified", "certified misses", "not certified", "refused", "not determined")
        lines = [(tier, [str(self.counts[tier, column]) for column in columns]) for tier in TOLERANCES]
        return "\n".join(
            f"{name:10}" + "".join(f"{cell:>18}" for cell in cells) for name, cells in [("", columns), *lines]
        )


Solve = Callable[[Any], tuple[Tensor, bool, MergeStats]]


def forms(given: Input, precision: str) -> Iterator[tuple[str, Solve]]:
    """The ways in which this input can be merged; each gives the value, whether it is certified, and the evidence."""
    rows, columns = given.deltas[0].shape

    def dense(method: Any) -> tuple[Tensor, bool, MergeStats]:
        value, stats = method.merge(MemoryDeltas(given.deltas))
        return value, not stats.missed(), stats

    def in_general(method: Any) -> tuple[Tensor, bool, MergeStats]:
        with mock.patch.object(auto, "SMALL_SIDE", 0):
            return dense(method)

    def batch(method: Any) -> tuple[Tensor, bool, MergeStats]:
        tame = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        value, stats = method.merge(MemoryDeltas([torch.stack([tame.to(x.dtype), x]) for x in given.deltas]))
        return value[1], not any(bool(flags[1]) for flags in stats.missed().values()), stats

    def rowwise(method: Any) -> tuple[Tensor, bool, MergeStats]:
        value, stats = by_rows(method, rows_of(given.deltas, 17))
        return value, not stats.missed(), stats

    yield "dense", dense
    yield "batch", batch
    if small_candidate((rows, columns), len(given.deltas), torch.device("cpu")) and precision != "reference":
        yield "not as a small matrix", in_general
    if given.deltas[0].dtype != torch.float64 and fits_rowwise(
        TensorSpec("", (rows, columns), torch.float32), precision
    ):
        yield "by rows", rowwise


def as_factors(given: Input, method: Any) -> tuple[Tensor, bool, MergeStats]:
    merged, stats = merge_factors(method, given.factors, tuple(given.deltas[0].shape))
    return merged.left @ merged.right, not stats.missed(), stats


def judge(deltas: list[np.ndarray], name: str, eps: float, common_fraction: float) -> oracle.Judgement:
    """``oracle.judge`` of what has an answer."""
    if not all(np.isfinite(delta).all() for delta in deltas):
        return oracle.Judgement(np.zeros(deltas[0].shape), {"not finite"})
    if name == "iso-cts" and oracle.split_rank(min(deltas[0].shape), len(deltas), common_fraction)[0] < 0:
        return oracle.Judgement(np.zeros(deltas[0].shape), {"k < 0"})
    return oracle.judge(deltas, name, eps, common_fraction)


class Fuzzer:
    """Solves inputs until there are enough, and keeps count."""

    def __init__(self) -> None:
        self.tally = Tally()

    def try_input(self, given: Input) -> None:
        """Every method, tier and form."""
        self.tally.families.add(given.family)
        dtype = torch.promote_types(given.deltas[0].dtype, torch.float32)
        stored = [delta.double().numpy() for delta in given.deltas]
        products = [each.scale * (each.left.double() @ each.right.double()).numpy() for each in given.factors]
        for name in ("iso-c", "iso-cts"):
            options = {} if name == "iso-c" else {"common_fraction": given.common_fraction}
            judged = judge(stored, name, torch.finfo(dtype).eps, given.common_fraction)
            of_factors = judge(products, name, 2.0**-23, given.common_fraction) if products else None
            for precision in TOLERANCES:
                method = make_method(name, {**options, "precision": precision})
                for form, solve in forms(given, precision):
                    self._try(f"{name} {precision} {form}", precision, given, judged, lambda s=solve, m=method: s(m))
                if of_factors is not None:
                    self._try(
                        f"{name} {precision} factors",
                        precision,
                        given,
                        of_factors,
                        lambda m=method: as_factors(given, m),
                    )

    def _try(
        self,
        what: str,
        precision: str,
        given: Input,
        judged: oracle.Judgement,
        solve: Callable[[], tuple[Tensor, bool, MergeStats]],
    ) -> None:
        counts, promise = self.tally.counts, TOLERANCES[precision]
        counts[precision, "solves"] += 1
        self.tally.forms[what.split(" ", 2)[2]] += 1
        try:
            value, certified, stats = solve()
        except (IsomergeError, ValueError):  # the methods' own refusals are ValueErrors
            counts[precision, "refused"] += 1
            return
        except Exception as error:
            self.tally.wrong.append(f"{what}: {given}: {type(error).__name__}: {error}")
            return
        if not bool(torch.isfinite(value).all()):
            self.tally.wrong.append(f"{what}: {given}: not finite; {stats.to_dict()}")
            return
        error = oracle.relative_error(value.double().numpy(), judged.value)
        determined = not judged.doubts and judged.uncertainty <= 0.3 * promise
        counts[precision, "certified" if certified else "not certified"] += 1
        if not determined:
            counts[precision, "not determined"] += 1
            for doubt in judged.doubts or {"float64"}:
                self.tally.reasons[doubt] += 1
        elif certified and error > promise:
            counts[precision, "certified misses"] += 1
            self.tally.wrong.append(
                f"{what}: {given}: off by {error:.1e} (known to {judged.uncertainty:.0e}); {stats.to_dict()}"
            )
        elif not certified:
            self.tally.reasons[f"not certified {'and wrong' if error > promise else 'though right'}"] += 1


def families(seed: int) -> Iterator[tuple[str, str, str, float]]:
    """All of them in an order drawn at random, again and again."""
    every = list(itertools.product(SPECTRA, RELATIONS, DTYPES, SCALES))
    random.Random(seed).shuffle(every)
    return itertools.cycle(every)


def search_in_small_matrices(put: Callable[[Any, str, object], None]) -> None:
    """Lets task parts be searched for in matrices that are small enough to be solved by the thousand."""
    put(subspace_chebyshev, "SMALLEST_SIDE", 24)
    put(subspace_chebyshev, "LARGEST_FRACTION", 0.6)


def fuzz(solves: int, seed: int) -> Tally:
    """That many solves or more."""
    fuzzer = Fuzzer()
    for index, family in enumerate(families(seed)):
        if fuzzer.tally.solves >= solves:
            return fuzzer.tally
        fuzzer.try_input(make_input(family, seed * 1_000_000 + index))
    raise AssertionError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--solves", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    search_in_small_matrices(setattr)
    started = time.monotonic()
    tally = fuzz(options.solves, options.seed)
    for line in tally.wrong[: options.show]:
        print(line)
    print(tally)
    print(", ".join(f"{form} {count}" for form, count in tally.forms.items()))
    print(", ".join(f"{reason} {count}" for reason, count in tally.reasons.most_common()))
    print(
        f"{tally.solves} solves of {len(tally.families)} families, {len(tally.wrong)} wrong, "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
