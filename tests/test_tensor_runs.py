"""Small tensors that are merged as one: the bytes, the evidence and the errors of each merged by itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
from checkpoints import listing, rewrite, save_folder
from isomerge_fast.checkpoint.io.reader import Piece, Reader
from isomerge_fast.errors import InputChangedError
from isomerge_fast.execution import worker
from isomerge_fast.execution.tensor_runs import TensorRun, joined
from isomerge_fast.methods import Elementwise, registry
from isomerge_fast.planning.plan import TensorPlan

TASKS = 3


@dataclass(frozen=True)
class LargestProduct(Elementwise):
    """A method whose result for one element may depend, in its last digits, on those that come with it."""

    name: ClassVar[str] = "largest-product"
    seen: ClassVar[list[int]] = []

    def combine(self, deltas: Tensor) -> Tensor:
        self.seen.append(deltas.shape[1])
        return (torch.ones(2, len(deltas), dtype=deltas.dtype) @ deltas).amax(0)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS, LargestProduct.name, LargestProduct)


def tensors_of(seed: int, dtype: torch.dtype, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"layer.{index:03}.weight": (
            size * torch.randn(1 + 7 * index % 230, generator=generator, dtype=torch.float64)
        ).to(dtype)
        for index in range(120)
    }
    return {
        **tensors,
        "layer.050.a": torch.randn((), generator=generator).to(dtype),
        "layer.060.a": torch.randn(5, 33, generator=generator).to(dtype),
        "layer.070.a": torch.zeros(0, 3, dtype=dtype),
        "layer.080.same": torch.ones(40, dtype=dtype),
        **{f"positions.{index}": torch.arange(3 + index) for index in range(4)},
        "mask": torch.tensor([True, False, True]),
    }


def family_of(folder: Path, dtype: torch.dtype, *, size: float = 1.0, **options: Any) -> dict[str, Any]:
    base, *experts = [
        save_folder(folder / f"m{seed}", tensors_of(seed, dtype, size), **options) for seed in range(1 + TASKS)
    ]
    return {"base": base, "experts": experts}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[TensorPlan]:
    """Collect what is merged at once, of all merges of a test."""
    found: list[TensorPlan] = []

    def seen(*given: Any) -> list[TensorPlan]:
        found.extend(made := list(joined(*given)))
        return made

    monkeypatch.setattr(worker, "joined", seen)
    return found


def one_by_one(tensors: list[TensorPlan], *_: object) -> list[TensorPlan]:
    return tensors


def evidence(folder: Path) -> list[Mapping[str, Any]]:
    report = json.loads((folder / "report.json").read_text())
    return [{key: value for key, value in tensor.items() if key != "seconds"} for tensor in report["tensors"]]


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in listing(folder).items() if name.endswith(".safetensors")}


def both(
    merge: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[TensorPlan]
) -> Path:
    """Merge as one and one by one, with the same result; return the folder of the first."""
    merge(tmp_path / "at-once")
    assert any(isinstance(run, TensorRun) and len(run.tensors) > 20 for run in runs)
    with monkeypatch.context() as patched:
        patched.setattr(worker, "joined", one_by_one)
        merge(tmp_path / "one-by-one")
    assert weights_of(tmp_path / "at-once") == weights_of(tmp_path / "one-by-one")
    assert evidence(tmp_path / "at-once") == evidence(tmp_path / "one-by-one")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("at-once", "one-by-one")]
    assert manifests[0]["outputs"] == manifests[1]["outputs"]
    assert manifests[0].get("base") == manifests[1].get("base")
    return tmp_path / "at-once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "mean", "scaling": 1.0},
        {"method": "mean", "scaling": [0.3, 1.7], "save_delta": True},
        {"method": "task-arithmetic", "scaling": 0.3, "weights": [0.25, 1.0, -2.5]},
        {"method": "mean", "scaling": 0.3, "dtype": "bfloat16"},
        {"method": "task-arithmetic", "scaling": 0.7, "dtype": "float32", "experts_are_deltas": True},
        {"method": "largest-product", "scaling": [0.3, 1.7], "save_delta": True},
    ],
    ids=["plain", "delta-kept", "weights", "narrower", "deltas", "apart"],
)
def test_the_same_bytes_and_evidence_as_one_by_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runs: list[TensorPlan],
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    family = family_of(tmp_path, dtype)
    both(lambda out: imf.merge({**family, **options, "out": out}), tmp_path, monkeypatch, runs)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-25), (torch.float64, 1e-170), (torch.float32, 1e25)])
def test_squares_that_are_out_of_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[TensorPlan], dtype: torch.dtype, size: float
) -> None:
    family = family_of(tmp_path, dtype, size=size)
    config = {**family, "method": "mean", "scaling": 0.5, "weights": [1.0, 0.5, 3.0]}
    out = both(lambda out: imf.merge({**config, "out": out}), tmp_path, monkeypatch, runs)
    norms = {each["name"]: each["delta_norms"] for each in evidence(out) if each["action"] == "mean"}
    assert min(norms["layer.001.weight"]) > 0
    assert norms["layer.080.same"] == [0.0] * TASKS


def test_a_kept_delta_is_applied_as_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[TensorPlan]
) -> None:
    """Here the checksums of what is read are compared."""
    family = family_of(tmp_path, torch.bfloat16)
    imf.merge({**family, "method": "mean", "scaling": 0.3, "save_delta": True, "out": tmp_path / "merged"})
    runs.clear()
    both(lambda out: imf.apply(tmp_path / "merged", 1.7, out), tmp_path, monkeypatch, runs)
    assert all(tensor.checksums for tensor in runs[0].tensors)  # type: ignore[attr-defined]  # of a run, which a plan may be


def nan(value: Tensor) -> Tensor:
    value[3] = value[5] = torch.nan
    return value


@pytest.mark.parametrize(
    ("damage", "options"),
    [
        (nan, {"method": "mean"}),
        (lambda value: value.fill_(6e4), {"method": "task-arithmetic", "scaling": 5.0}),
        (lambda value: value.fill_(6e4), {"method": "mean", "scaling": 1.0}),
        (nan, {"method": "largest-product"}),
    ],
    ids=["nan", "overflow", "absurd", "nan, apart"],
)
def test_a_damaged_tensor_is_told_of_as_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runs: list[TensorPlan],
    damage: Callable[[Tensor], Tensor],
    options: dict[str, Any],
) -> None:
    family = family_of(tmp_path, torch.float16)
    rewrite(family["experts"][1], **{"layer.017.weight": damage(torch.ones(120, dtype=torch.float16))})

    def told(out: Path) -> Any:
        try:
            imf.merge({**family, **options, "out": out})
        except imf.InputError as error:
            return str(error)
        return [each.get("remarks") for each in evidence(out)]

    at_once = told(tmp_path / "at-once")
    assert any(isinstance(run, TensorRun) for run in runs)
    monkeypatch.setattr(worker, "joined", one_by_one)
    assert at_once == told(tmp_path / "one-by-one")
    assert "layer.017.weight" in at_once if isinstance(at_once, str) else any(at_once)


def test_a_base_that_is_not_what_it_was_is_told_of_as_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[TensorPlan]
) -> None:
    family = family_of(tmp_path, torch.float32)
    imf.merge({**family, "method": "mean", "scaling": 0.3, "save_delta": True, "out": tmp_path / "merged"})
    delta = next((tmp_path / "merged" / "delta").glob("*.safetensors"))
    data = bytearray(delta.read_bytes())
    data[-1000] ^= 1
    delta.write_bytes(data)
    errors = []
    for how in (joined, one_by_one):
        monkeypatch.setattr(worker, "joined", how)
        with pytest.raises(imf.InputError, match="checksum differs") as raised:
            imf.apply(tmp_path / "merged", 1.7, tmp_path / "applied")
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_a_file_that_ends_early_is_told_of_by_the_tensor_it_ends_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[TensorPlan]
) -> None:
    family = family_of(tmp_path, torch.float32)
    read, ended = Reader.read_into, []

    def cut(self: Reader, piece: Piece, offset: int, target: memoryview) -> None:
        read(self, piece, offset, target)
        stored = next((each for each in getattr(piece.stored, "tensors", ()) if each.name == "layer.033.weight"), None)
        if stored is not None and not ended:
            ended.append(stored)
            os.truncate(stored.file, stored.start + 4)
            read(self, piece, offset, target)

    monkeypatch.setattr(Reader, "read_into", cut)
    with pytest.raises(InputChangedError, match=r"ends inside tensor 'layer\.033\.weight'"):
        imf.merge({**family, "method": "mean", "out": tmp_path / "out"}, threads=1)


def test_what_may_depend_on_its_company_is_read_as_one_and_merged_alone(
    tmp_path: Path, runs: list[TensorPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(LargestProduct, "seen", sizes)
    family = family_of(tmp_path, torch.float32)
    imf.merge({**family, "method": "largest-product", "out": tmp_path / "out"}, threads=1)
    apart = [run for run in runs if isinstance(run, TensorRun) and run.is_apart]
    assert max(len(run.tensors) for run in apart) > 20
    merged = [each for each in tensors_of(0, torch.float32).values() if each.is_floating_point() and each.numel()]
    assert sorted(sizes) == sorted(map(Tensor.numel, merged))


def names_of(runs: list[TensorPlan]) -> set[str]:
    """Return the tensors that are merged with others."""
    return {tensor.name for run in runs if isinstance(run, TensorRun) for tensor in run.tensors}


def test_only_neighbours_in_every_file_are_merged_as_one(tmp_path: Path, runs: list[TensorPlan]) -> None:
    family = family_of(tmp_path, torch.float32)
    rewrite(family["experts"][1], **{"layer.030.extra": torch.zeros(8)})  # not in the others
    imf.merge({**family, "method": "mean", "on_extra": "ignore", "out": tmp_path / "out"})
    together = [{tensor.name for tensor in run.tensors} for run in runs if isinstance(run, TensorRun)]
    assert not any({"layer.029.weight", "layer.030.weight"} <= names for names in together)
    assert any({"layer.028.weight", "layer.029.weight"} <= names for names in together)
    assert any({"layer.030.weight", "layer.031.weight"} <= names for names in together)
    assert all({"positions.0", "positions.3"} <= names or "positions.0" not in names for names in together)
    assert "layer.070.a" not in names_of(runs)  # it is empty


def test_what_depends_on_its_place_is_merged_by_itself(tmp_path: Path, runs: list[TensorPlan]) -> None:
    family = family_of(tmp_path, torch.bfloat16)
    imf.merge({**family, "method": "mean", "stochastic_rounding": 3, "out": tmp_path / "out"})
    assert not any(name.startswith("layer") for name in names_of(runs))


def test_a_run_is_small(tmp_path: Path, runs: list[TensorPlan]) -> None:
    family = [
        save_folder(tmp_path / f"large{seed}", {f"w{index:02}": torch.randn(30_000) for index in range(40)})
        for seed in range(3)
    ]
    imf.merge({"base": family[0], "experts": family[1:], "method": "mean", "out": tmp_path / "out"})
    assert 1 < len(runs) < 40
    assert all(run.read_bytes <= 2 << 20 and run.spec.elements <= 1 << 17 for run in runs)
    assert sum(run.spec.elements for run in runs) == 40 * 30_000
