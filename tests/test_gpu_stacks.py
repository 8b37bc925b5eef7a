"""Rows of the GPU suite about matrices merged at once, by methods that keep the bytes, and by others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import right, stacks
from benchmarks.gpu.merge import vision_layers
from benchmarks.gpu.shapes import NAMES, SMALL, STACKED, VIT_MATRICES
from benchmarks.harness.readings import Rows, read_rows
from isomerge_fast.methods import DeltaSource, IsoC, MergeStats, TensorSpec

PLACES = 9


@dataclass(frozen=True)
class InStacks(IsoC):
    """Iso-C in stacks of ``PLACES``; ``fault`` of ``which`` a stack is added to its last member."""

    name: ClassVar[str] = "in-stacks"
    asked: list[int] = field(default_factory=list)
    which: Any = None  # takes the sources of a stack

    def stack_size(self, spec: TensorSpec, tasks: int, device: torch.device) -> int:
        return PLACES

    def merge_stack(self, sources: Sequence[DeltaSource]) -> list[tuple[Tensor, MergeStats]]:
        assert len(sources) <= PLACES
        self.asked.append(len(sources))
        results = super().merge_stack(sources)
        if self.which is not None and self.which(sources):
            results[-1][0].view(-1)[0] *= 1.0 + 2.0**-22
        return results


def of_rank_one(source: DeltaSource) -> bool:
    return bool(torch.linalg.matrix_rank(source.delta(0)) == 1)


@pytest.mark.parametrize(
    ("which", "where"),
    [
        (None, None),
        (lambda sources: len(sources) == 7, "place 6 of 7, beside 3 kinds"),
        (lambda sources: len(sources) == PLACES, "place 8 of 9, beside 3 kinds"),
    ],
    ids=["right", "of seven", "of all"],
)
def test_other_bytes_in_other_company_fail_a_row(
    monkeypatch: pytest.MonkeyPatch, which: Any, where: str | None
) -> None:
    method = InStacks(which=which)
    monkeypatch.setattr(right, "make_method", lambda name: method)
    monkeypatch.setattr(stacks, "make_method", lambda name: method)
    check = partial(right._same_bytes, "in-stacks", (40, 24), torch.device("cpu"))
    if where is not None:
        with pytest.raises(AssertionError, match=f"{where}: other bytes than alone"):
            check()
        return
    assert check() == {"places": PLACES, "stacks": 8, "algorithm": "in-stacks/polar-express-fp64"}
    assert method.asked == [1, 1, 7, 7, 7, PLACES, PLACES, PLACES, PLACES]


def test_odd_neighbours_that_change_bytes_fail_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added to a stack's last member is seen where the judged one is last: here by all members."""

    class Spoiled(InStacks):
        def merge_stack(self, sources: Sequence[DeltaSource]) -> list[tuple[Tensor, MergeStats]]:
            results = super().merge_stack(sources)
            if any(map(of_rank_one, sources)):
                for value, _ in results:
                    value.view(-1)[0] *= 1.0 + 2.0**-22
            return results

    monkeypatch.setattr(right, "make_method", lambda name: Spoiled())
    monkeypatch.setattr(stacks, "make_method", lambda name: Spoiled())
    with pytest.raises(AssertionError, match="place 4 of 9, beside 4 kinds: other bytes"):
        right._same_bytes("in-stacks", (40, 24), torch.device("cpu"))


def test_stacks_are_timed_whole_and_the_last_of_a_model_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = InStacks()
    monkeypatch.setattr(stacks, "make_method", lambda name: method)
    monkeypatch.setattr(stacks, "profiled", lambda call, device: {"busy": 0.5, "launches": len(call())})
    file = tmp_path / "rows.json"
    rows = Rows("methods", file, device="cpu", small=True, seconds=60.0)
    stacks.stacks(rows, {("iso-c", SMALL[0]): 1.0, ("iso-c", SMALL[1]): 2.0})
    found = {row["name"]: row for row in read_rows(file)}
    assert not [row for row in found.values() if "failed" in row]
    row = found[f"iso-c {PLACES} x 160 x 64, stack"]
    assert (row["matrices"], row["one_by_one"], row["certified"]) == (PLACES, 2.0 * PLACES, True)
    assert found[f"iso-c {PLACES} x 160 x 64, stack, profile"]["launches"] == PLACES
    assert found["iso-c, matrices of ViT-B/32"]["one_by_one"] == 3 * 1.0 + 2 * 2.0
    assert found["iso-cts, matrices of ViT-B/32"]["one_by_one"] is None
    method.asked.clear()
    sources = {SMALL[0]: stacks.some_sources(SMALL[0], PLACES, torch.device("cpu"))}
    assert len(stacks._merge_stacks("iso-c", sources, {SMALL[0]: 2 * PLACES + 1})) == 2 * PLACES + 1
    assert method.asked == [PLACES, PLACES, 1]


def test_the_vision_transformer_has_its_matrices() -> None:
    assert dict(VIT_MATRICES) == {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}
    assert {*VIT_MATRICES} < {*STACKED}
    shapes = vision_layers(768, 12)
    assert sum(len(shape) == 2 for shape in shapes.values()) == 72
    assert sum(len(shape) == 1 for shape in shapes.values()) == 72 + 48
    assert shapes["vision_model.encoder.layers.3.mlp.fc1.bias"] == (3072,)
    assert NAMES == ("iso-c", "iso-cts")
