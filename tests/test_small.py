"""Small matrices: their own form of Iso-C and Iso-CTS gives what the oracle does, in few calls, or declines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import isomerge_fast as imf
import oracle
from allocation import peak_bytes
from isomerge_fast.linalg import auto
from isomerge_fast.linalg.auto import TOLERANCES, small_candidate
from isomerge_fast.methods import MemoryDeltas, MergeStats, Method, TensorSpec, iso_c, iso_cts, make_method
from isomerge_fast.methods.small import SmallMerge
from pretend_gpu import CUDA, H100, pretend_gpu

CPU = torch.device("cpu")
METHODS = ("iso-c", "iso-cts")
SHAPES = ((16, 16), (63, 63), (32, 48), (48, 32), (63, 200), (200, 63), (8, 900), (900, 8), (2, 3), (1, 30), (30, 1))
SHAPES += ((100, 100), (128, 128), (120, 250), (250, 120))
EPS = 2.0**-23


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the form for small matrices gave a result, of every time that it was asked."""
    seen: list[bool] = []
    for module, name in ((iso_c, "small_iso_c"), (iso_cts, "small_iso_cts")):
        real = getattr(module, name)

        def ask(*arguments: object, real=real) -> SmallMerge | None:
            found = real(*arguments)
            seen.append(found is not None)
            return found

        monkeypatch.setattr(module, name, ask)
    return seen


def draw(shape: tuple[int, ...], tasks: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(shape, generator=generator)
    return [0.01 * (shared + torch.randn(shape, generator=generator)) for _ in range(tasks)]


def method_of(name: str, **options: object) -> Method:
    return make_method(name, options)


def merge(deltas: list[Tensor], name: str, **options: object) -> tuple[Tensor, MergeStats]:
    return method_of(name, **options).merge(MemoryDeltas(deltas))


def judged(deltas: list[Tensor], name: str, common_fraction: float = 0.8) -> oracle.Judgement:
    return oracle.judge([delta.double().numpy() for delta in deltas], name, EPS, common_fraction)


@pytest.mark.parametrize("precision", ["fast", "default"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_matrices_are_right(shape: tuple[int, int], name: str, precision: str, answers: list[bool]) -> None:
    for tasks in (1, 2, 4):
        deltas = draw(shape, tasks)
        value, stats = merge(deltas, name, precision=precision)
        assert answers.pop() is (name == "iso-c" or oracle.split_rank(min(shape), tasks, 0.8)[0] > 0)
        assert value.dtype == torch.float32
        # Rounded once, to float32.
        assert oracle.relative_error(value.numpy(), judged(deltas, name).value) <= 0.5 * EPS
        assert not stats.missed()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(32, 48), (48, 32)], ids=str)
def test_evidence_is_that_of_the_general_form(
    shape: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = draw(shape, 4)
    here = merge(deltas, name)[1].to_dict()
    monkeypatch.setattr(auto, "SMALL_SIDE", 0)
    there = merge(deltas, name)[1].to_dict()
    assert here.keys() == there.keys()
    for key in ("sigma_mean", "rank", "min_dim", "delta_norms", "gap", "k", "s", "same_directions", "unresolved"):
        if key in there:
            assert here[key] == pytest.approx(there[key], rel=1e-9), key
    if name == "iso-c":
        assert here["rounding"] == pytest.approx(there["rounding"], rel=1e-6, abs=0)
    else:  # of tall task parts less is lost here: RᵀR is made of R itself, and not of a difference
        assert (1.0 - 1e-3 if shape[0] < shape[1] else 0.1) <= here["angle"] / there["angle"] <= 1.0 + 1e-3
    assert max(here.get(key, 0.0) for key in ("orthogonality", "asymmetry", "negative", "angle", "rounding")) < 1e-10


HARD = {
    "low rank": [torch.outer(a[:, 0], a[0]) for a in draw((24, 30), 3)],
    "a zero delta": [torch.zeros(24, 30), *draw((24, 30), 3)],
    "an expert twice": [*draw((24, 30), 3), draw((24, 30), 3)[0]],
    "experts that cancel": [*draw((24, 30), 2), *(-delta for delta in draw((24, 30), 2))],
    "all zero": [torch.zeros(24, 30)] * 3,
    "κ = 1e5": [delta * torch.logspace(0, -5, 24)[:, None] for delta in draw((24, 30), 3)],
    "tall, κ = 1e5": [(delta * torch.logspace(0, -5, 24)[:, None]).mT for delta in draw((24, 30), 3)],
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", HARD)
def test_what_is_not_clear_is_left_to_the_general_form(case: str, name: str, answers: list[bool]) -> None:
    deltas = HARD[case]
    value, stats = merge(deltas, name)
    of_sum = case in ("a zero delta", "an expert twice") and name == "iso-c"  # which is as good as any other
    assert answers == [of_sum]
    assert not stats.missed()
    if case != "experts that cancel":
        assert oracle.relative_error(value.numpy(), judged(deltas, name).value) <= TOLERANCES["default"]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_left_of_experts_that_cancel_is_rounding(name: str, answers: list[bool]) -> None:
    """It is well-conditioned, and counts as zero all the same."""
    first, last = draw((24, 30), 2)
    deltas = [first, 2e-8 * last - first]
    _, stats = merge(deltas, name)
    assert answers == [False]
    assert stats.to_dict()["rank"] < 24


def test_nothing_is_common(answers: list[bool]) -> None:
    deltas = draw((16, 20), 2)
    value, _ = merge(deltas, "iso-cts", common_fraction=0.0)
    assert answers == [False]
    assert oracle.relative_error(value.numpy(), judged(deltas, "iso-cts", 0.0).value) <= TOLERANCES["default"]


def test_an_isometry_that_is_none_is_noticed(answers: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """An eigensolver that is off is judged by the result, and the general form follows, and then the SVD."""
    real = torch.linalg.eigh

    def off(x: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = real(x)
        return values * (1.0 + 1e-3 * torch.linspace(0, 1, values.shape[-1], dtype=values.dtype)), vectors

    monkeypatch.setattr(torch.linalg, "eigh", off)
    deltas = draw((24, 30), 3)
    for name in METHODS:
        value, stats = merge(deltas, name)
        assert stats.algorithm.endswith("svd-fp64")
        assert any("orthogonality" in given_up for given_up in stats.escalations)
        assert oracle.relative_error(value.numpy(), judged(deltas, name).value) <= TOLERANCES["default"]
    assert answers == [True, True]


class Calls(TorchDispatchMode):
    """Counts calls of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_in_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = draw((16, 16), 4)

    def calls() -> list[int]:
        counts = []
        for name in METHODS:
            with Calls() as found:
                merge(deltas, name)
            counts.append(found.count)
        return counts

    few = calls()
    monkeypatch.setattr(auto, "SMALL_SIDE", 0)
    many = calls()
    assert few[0] <= 60
    assert few[1] <= 130
    assert many[0] >= 4 * few[0]
    assert many[1] >= 10 * few[1]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "shape",
    [(63, 500), (500, 63), (8, 4000), (4000, 8), (40, 40), (127, 250), (250, 127), (128, 128)],
    ids=str,
)
def test_memory_is_what_was_promised(shape: tuple[int, int], name: str, answers: list[bool]) -> None:
    deltas, base = draw(shape, 8), draw(shape, 1, seed=1)[0]
    source = MemoryDeltas([base + delta for delta in deltas], base)
    method = method_of(name)
    peak, _ = peak_bytes(lambda: method.merge(source))
    assert answers == [True]
    assert peak <= method.workspace_bytes(TensorSpec("", shape, torch.float32), 8, CPU) + (1 << 16)


def test_which_matrices_are_small() -> None:
    assert small_candidate((63, 63), 8, CPU)
    assert small_candidate((63, 500), 8, CPU)
    assert small_candidate((128, 256), 8, CPU)
    large = (((129, 129), 1), ((128, 257), 1), ((63, 600), 8), ((63, 2000), 1))
    for shape, tasks in (*large, ((3, 20, 20), 1), ((0, 5), 1), ((5,), 1)):
        assert small_candidate(shape, tasks, CPU) is None
    with pretend_gpu(H100):
        assert small_candidate((20, 20), 1, CUDA) is None
    for precision, dtype in (("reference", torch.float32), ("default", torch.float64)):
        for name in METHODS:
            spec = TensorSpec("", (20, 30), dtype)
            assert method_of(name, precision=precision).explain(spec, 4, CPU).startswith("svd-fp64")
    for name in METHODS:
        reason = method_of(name).explain(TensorSpec("", (20, 30), torch.float32), 4, CPU)
        assert reason == "gram-eigh-fp64: float64 Gram matrices, in few calls: a side is 128 at most"


@pytest.mark.parametrize("name", METHODS)
def test_public_functions_take_the_same_way(name: str, answers: list[bool]) -> None:
    base = draw((24, 30), 1, seed=1)[0]
    experts = [base + delta for delta in draw((24, 30), 4)]
    deltas = [expert - base for expert in experts]
    function = imf.iso_c if name == "iso-c" else imf.iso_cts
    value = function(deltas)
    merged = imf.merge_state_dicts({"w": base}, [{"w": expert} for expert in experts], name)["w"]
    assert torch.equal(value, merge(deltas, name)[0])
    assert torch.equal(merged, base + value)
    assert answers == [True] * 3
