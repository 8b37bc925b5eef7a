"""Eigenvectors by numpy's OpenBLAS: right, for those alone whom it serves, and its threads are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isomerge_fast.bench.problems import deltas_like_fine_tuning, relative_error
from isomerge_fast.execution.threads import ComputeThreads
from isomerge_fast.linalg import cusolver, openblas
from isomerge_fast.linalg.gram_spectrum import spectrum_in_place
from isomerge_fast.linalg.openblas import OpenBlas
from isomerge_fast.machine import cpu_maker
from isomerge_fast.methods import IsoC, IsoCTS, MemoryDeltas
from isomerge_fast.methods.certified import exact_products

CPU = torch.device("cpu")


@pytest.fixture
def blas(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenBlas]:
    """The library, as on a CPU where it is the faster one, and torch at one thread."""
    found = openblas.numpys()
    if found is None:
        pytest.skip("numpy brings no OpenBLAS here")
    monkeypatch.setattr(openblas, "library", lambda: found)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(before)


def gram(side: int, seed: int = 0) -> Tensor:
    x = torch.randn(side, side + 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT


def check_vectors(x: Tensor, values: Tensor, vectors: Tensor) -> None:
    """As many ε as LAPACK's bounds allow."""
    side = len(x)
    assert (values.diff() >= 0).all()
    assert torch.linalg.matrix_norm(x @ vectors - vectors * values) <= 1e-14 * side * values[-1]
    assert torch.linalg.matrix_norm(vectors.mT @ vectors - torch.eye(side, dtype=x.dtype)) <= 1e-14 * side


@pytest.mark.parametrize("side", [144, 145, 256, 515])
def test_eigenvectors_are_right(blas: OpenBlas, side: int) -> None:
    x = gram(side)
    with openblas.held(1):
        found = openblas.eigh(x)
        rows = x.clone()
        in_place = openblas.eigh_in_place(rows)
    assert found is not None
    assert in_place is not None
    check_vectors(x, *found)
    check_vectors(x, in_place, rows.mT)
    assert torch.equal(in_place, found[0])
    assert (found[0] - torch.linalg.eigvalsh(x)).abs().max() <= 1e-13 * found[0][-1]


def test_only_the_lower_triangle_is_read_and_the_matrix_is_left_as_it_is(blas: OpenBlas) -> None:
    x = gram(150)
    given = x.tril() + torch.full_like(x, 7.0).triu(1)
    kept = given.clone()
    with openblas.held(1):
        check_vectors(x, *cusolver.eigh(given))
        check_vectors(x, *cusolver.eigh(given.mT.contiguous().mT))
    assert torch.equal(given, kept)


def test_who_is_left_to_torch(blas: OpenBlas) -> None:
    x = gram(160)
    not_a_number = x.clone()
    not_a_number[3, 3] = torch.nan
    assert openblas.eigh(x) is None, "nobody holds it"
    with openblas.held(2):
        assert openblas.eigh(x) is None, "held at another number of threads"
    with openblas.held(1):
        others = [x.float(), x[:143, :143], x.expand(2, -1, -1), x * 1e-140, x * 1e140, x * 0.0, not_a_number]
        assert [openblas.eigh(each) for each in others] == [None] * len(others)
        assert openblas.eigh_in_place(x[:150, :150]) is None, "not contiguous"
        assert openblas.eigh(x) is not None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_gives_no_numbers(blas: OpenBlas, value: float) -> None:
    x = gram(150)
    x[3, 2] = x[2, 3] = value
    with openblas.held(1), contextlib.suppress(torch.linalg.LinAlgError):
        assert not all(part.isfinite().all() for part in cusolver.eigh(x))


def test_its_threads_are_put_back(blas: OpenBlas) -> None:
    blas.set_threads(2)
    with openblas.held(1):
        assert blas.get_threads() == 1
        with openblas.held(3), openblas.held(3):
            assert (blas.held, blas.get_threads()) == (1, 1), "the fewest that anybody wants"
    assert (blas.held, blas.get_threads()) == (None, 2)
    one, more = openblas.held(1), openblas.held(3)
    one.__enter__()
    more.__enter__()
    one.__exit__(None, None, None)
    assert blas.held == 3, "others go on"
    more.__exit__(None, None, None)
    assert (blas.held, blas.get_threads()) == (None, 2)
    blas.set_threads(1)


def test_jobs_of_one_core_have_it_and_those_of_several_have_not(blas: OpenBlas) -> None:
    x, found = gram(160), []

    def job(threads: int) -> None:
        torch.set_num_threads(threads)
        with exact_products(CPU):
            found.append(openblas.eigh(x) is not None)
        torch.set_num_threads(1)

    with ComputeThreads(1) as threads:
        for count in (1, 2, 1):
            threads.start(lambda count=count: job(count))
    assert found == [True, False, True]
    assert blas.held is None


def test_a_failure_is_an_error(blas: OpenBlas, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        arguments[-2]._obj.value = 5  # type: ignore[attr-defined]  # what byref refers to

    monkeypatch.setattr(blas, "dstedc", failing)
    with openblas.held(1), pytest.raises(torch.linalg.LinAlgError, match="side 150"):
        openblas.eigh(gram(150))


@pytest.mark.parametrize("method", [IsoC(), IsoCTS()], ids=lambda method: method.name)
@pytest.mark.parametrize("shape", [(160, 160), (400, 150), (150, 400)], ids=str)
def test_merges_are_as_exact_by_either_library(
    blas: OpenBlas, monkeypatch: pytest.MonkeyPatch, method: IsoC | IsoCTS, shape: tuple[int, int]
) -> None:
    deltas = MemoryDeltas(deltas_like_fine_tuning(*shape, 4, "noise"))
    calls = []
    solved = openblas._solved
    monkeypatch.setattr(openblas, "_solved", lambda *given: calls.append(1) or solved(*given))
    exact = method.exact().merge(deltas)[0]
    mine, stats = method.merge(deltas)
    assert calls
    assert not stats.missed()
    monkeypatch.setattr(openblas, "library", lambda: None)
    other = method.merge(deltas)[0]
    assert relative_error(mine, exact) <= max(1e-6, 2 * relative_error(other, exact))


def test_a_spectrum_in_place(blas: OpenBlas) -> None:
    x = gram(150)
    with openblas.held(1):
        found = spectrum_in_place(x.clone(), torch.tensor(0.0, dtype=torch.float64), 1e-15)
    check_vectors(x, found.sigma.flip(0).square(), found.vectors)


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    there = object()
    monkeypatch.setattr(openblas, "numpys", lambda: there)
    for maker, has_mkl, expected in (
        ("AuthenticAMD", True, there),
        ("HygonGenuine", True, there),
        ("AuthenticAMD", False, None),
        ("GenuineIntel", True, None),
        ("", True, None),
    ):
        monkeypatch.setattr(openblas, "cpu_maker", lambda maker=maker: maker)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda has_mkl=has_mkl: has_mkl)
        assert openblas.library.__wrapped__() is expected


def test_a_numpy_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "numpy.libs").mkdir()
    monkeypatch.setattr(openblas.numpy, "__file__", str(tmp_path / "numpy" / "__init__.py"))
    assert openblas.numpys() is None
    (tmp_path / "numpy.libs" / "libscipy_openblas64_-1.so").write_bytes(b"no library")
    assert openblas.numpys() is None


def test_the_maker_of_a_cpu(tmp_path: Path) -> None:
    assert cpu_maker(tmp_path) == ""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nvendor_id\t: Other\n")
    assert cpu_maker(tmp_path) == "AuthenticAMD"


def test_eigensolvers_are_described(blas: OpenBlas, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cusolver.describe_eigensolvers(CPU) == f"openblas {blas.version} of numpy | torch"
    assert blas.version.startswith("0.")
    monkeypatch.setattr(openblas, "library", lambda: None)
    assert cusolver.describe_eigensolvers(CPU) == "torch"
