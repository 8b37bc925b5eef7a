"""Eigenvectors by numpy's OpenBLAS: right, for those alone whom it serves, and its threads are put back."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
from checkpoints import save_folder
from isomerge_fast.bench.problems import deltas_like_fine_tuning, relative_error
from isomerge_fast.linalg import cusolver, openblas
from isomerge_fast.linalg.gram_spectrum import spectrum_in_place
from isomerge_fast.linalg.openblas import OpenBlas
from isomerge_fast.machine import cpu_maker
from isomerge_fast.methods import IsoC, IsoCTS, MemoryDeltas

CPU = torch.device("cpu")


@pytest.fixture
def blas(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenBlas]:
    """The library, as on a CPU where it is the faster one, and torch at one thread."""
    found = openblas.numpys()
    if found is None:
        pytest.skip("numpy brings no OpenBLAS here")
    monkeypatch.setattr(openblas, "_found", [found])
    before, of_torch = found.get_threads(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(of_torch)
    found.set_threads(before)


def gram(side: int, seed: int = 0) -> Tensor:
    x = torch.randn(side, side + 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT


def check_vectors(x: Tensor, values: Tensor, vectors: Tensor) -> None:
    """As many ε as LAPACK's bounds allow."""
    side = len(x)
    assert (values.diff() >= 0).all()
    assert torch.linalg.matrix_norm(x @ vectors - vectors * values) <= 1e-14 * side * values[-1]
    assert torch.linalg.matrix_norm(vectors.mT @ vectors - torch.eye(side, dtype=x.dtype)) <= 1e-14 * side


@pytest.mark.parametrize("side", [192, 193, 256, 515])
def test_eigenvectors_are_right(blas: OpenBlas, side: int) -> None:
    x = gram(side)
    rows = x.clone()
    found, in_place = openblas.eigh(x), openblas.eigh_in_place(rows)
    assert found is not None
    assert in_place is not None
    check_vectors(x, *found)
    check_vectors(x, in_place, rows.mT)
    assert torch.equal(in_place, found[0])
    assert (found[0] - torch.linalg.eigvalsh(x)).abs().max() <= 1e-13 * found[0][-1]


def test_only_the_lower_triangle_is_read_and_the_matrix_is_left_as_it_is(blas: OpenBlas) -> None:
    x = gram(200)
    given = x.tril() + torch.full_like(x, 7.0).triu(1)
    kept = given.clone()
    check_vectors(x, *cusolver.eigh(given))
    check_vectors(x, *cusolver.eigh(given.mT.contiguous().mT))
    assert torch.equal(given, kept)


def test_who_is_left_to_torch(blas: OpenBlas) -> None:
    x = gram(200)
    not_a_number = x.clone()
    not_a_number[3, 3] = torch.nan
    of_a_graph = x.clone().requires_grad_()
    others = [x.float(), x[:191, :191], x.expand(2, -1, -1), x * 1e-140, x * 1e140, x * 0.0, not_a_number, of_a_graph]
    assert [openblas.eigh(each) for each in others] == [None] * len(others)
    assert openblas.eigh_in_place(x[:195, :195]) is None, "not contiguous"
    assert openblas.eigh(x) is not None
    torch.set_num_threads(2)
    assert openblas.eigh(x) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_gives_no_numbers(blas: OpenBlas, value: float) -> None:
    x = gram(200)
    x[3, 2] = x[2, 3] = value
    with contextlib.suppress(torch.linalg.LinAlgError):
        assert not all(part.isfinite().all() for part in cusolver.eigh(x))


def test_it_solves_with_one_thread_and_then_has_its_own_number_again(
    blas: OpenBlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, solve, x = [], blas.dsytrd, gram(200)

    def counting(*arguments: object) -> None:
        seen.append(blas.get_threads())
        solve(*arguments)

    monkeypatch.setattr(blas, "dsytrd", counting)
    blas.set_threads(2)
    expected = openblas.eigh(x)
    assert seen == [1]
    assert blas.get_threads() == 2
    with blas:  # as beside another thread that solves
        with blas:
            pass
        assert blas.get_threads() == 1
    assert blas.get_threads() == 2
    blas.set_threads(1)
    found = openblas.eigh(x)
    assert expected is not None
    assert found is not None
    assert torch.equal(found[1], expected[1])


def test_threads_solve_at_once_to_the_same_bytes(blas: OpenBlas) -> None:
    matrices = [gram(200 + 10 * index, index) for index in range(4)]
    blas.set_threads(2)

    def solve(x: Tensor) -> Tensor:
        torch.set_num_threads(1)
        found = openblas.eigh(x)
        assert found is not None
        return found[1]

    expected = [solve(x) for x in matrices]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            assert all(map(torch.equal, threads.map(solve, matrices), expected))
    assert blas.get_threads() == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_beside_a_thread_that_solves(blas: OpenBlas) -> None:
    """The child has no such thread: its number is put back, and its lock is free."""
    blas.set_threads(2)
    with warnings.catch_warnings(), blas, blas._lock:
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
        if child == 0:
            is_right = blas.get_threads() == 2 and not blas._lock.locked()
            os._exit(0 if is_right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert blas.get_threads() == 2


def test_a_failure_is_an_error(blas: OpenBlas, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        arguments[-2]._obj.value = 5  # type: ignore[attr-defined]  # what byref refers to

    monkeypatch.setattr(blas, "dstedc", failing)
    with pytest.raises(torch.linalg.LinAlgError, match="side 200"):
        openblas.eigh(gram(200))
    assert not blas._users


@pytest.mark.parametrize("method", [IsoC(), IsoCTS()], ids=lambda method: method.name)
@pytest.mark.parametrize("shape", [(200, 200), (400, 200), (200, 400)], ids=str)
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
    monkeypatch.setattr(openblas, "_found", [None])
    other = method.merge(deltas)[0]
    assert relative_error(mine, exact) <= max(1e-6, 2 * relative_error(other, exact))


def test_a_spectrum_in_place(blas: OpenBlas) -> None:
    x = gram(200)
    found = spectrum_in_place(x.clone(), torch.tensor(0.0, dtype=torch.float64), 1e-15)
    check_vectors(x, found.sigma.flip(0).square(), found.vectors)


def test_a_resume_by_another_library_tells(
    blas: OpenBlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {f"layers.{index}.weight": torch.randn(40, 30) for index in range(3)}
    base, expert = (save_folder(tmp_path / name, tensors) for name in ("base", "expert"))
    for method, tells in (("iso-c", True), ("mean", False)):
        config = {"base": str(base), "experts": [str(expert)], "method": method, "out": str(tmp_path / method)}
        monkeypatch.setattr(openblas, "_found", [blas])
        with monkeypatch.context() as patch:
            patch.setattr(
                "isomerge_fast.execution.engine.write_metadata", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
            )
            with pytest.raises(imf.ResourceError, match="full"):
                imf.merge(config)
        monkeypatch.setattr(openblas, "_found", [None])
        caplog.clear()
        report = imf.merge(config, resume=True)
        expected = f"eigenvectors were computed by openblas {blas.version} of numpy | torch when the merge began"
        assert any(expected in note for note in report.notes) is tells
        assert (expected in caplog.text) is tells


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
        monkeypatch.setattr(openblas, "_found", [])
        assert openblas.library() is expected
        monkeypatch.setattr(openblas, "cpu_maker", lambda: pytest.fail("asked twice"))
        assert openblas.library() is expected


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
    monkeypatch.setattr(openblas, "_found", [None])
    assert cusolver.describe_eigensolvers(CPU) == "torch"
