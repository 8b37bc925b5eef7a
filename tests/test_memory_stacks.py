"""State dicts whose matrices a GPU merges in stacks: the results, in their order, and whose errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
from checkpoints import make_expert, save_folder
from isomerge_fast.execution import memory_stacks, state_dicts
from isomerge_fast.execution.memory_stacks import Stackable, stacks_of
from isomerge_fast.execution.state_dicts import StateDictMerge
from isomerge_fast.methods import Method, TensorSpec
from isomerge_fast.methods.source import DeltaSource
from pretend_gpu import CUDA, pretend_gpu
from stacked_methods import PLACES, InStacks, ManyLaunches

LAYERS, TASKS = 12, 3


@pytest.fixture(autouse=True)
def _unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InStacks, "seen", [])


def states(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    base = {"embed": torch.randn(48, 16, generator=generator).to(dtype), "steps": torch.arange(3)}
    for layer in range(LAYERS):
        base[f"{layer}.up"] = torch.randn(24, 16, generator=generator).to(dtype)
        base[f"{layer}.bias"] = torch.randn(24, generator=generator).to(dtype)
        base[f"{layer}.down"] = torch.randn(16, 24, generator=generator).to(dtype)
    return base, [make_expert(base, task) for task in range(TASKS)]


def merged(
    method: Method, base: dict[str, Tensor], experts: list[dict[str, Tensor]], **options: Any
) -> list[tuple[str, Tensor]]:
    return list(StateDictMerge(method, device=CUDA, **options).merge(base, experts))


def is_alike(found: list[tuple[str, Tensor]], other: list[tuple[str, Tensor]]) -> bool:
    return [name for name, _ in found] == [name for name, _ in other] and all(
        torch.equal(value, same) and value.dtype == same.dtype
        for (_, value), (_, same) in zip(found, other, strict=True)
    )


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"stochastic_rounding": 3, "scaling": 0.4}),
        (torch.float16, {"weights": [0.5, 1.0, -2.0], "dtype": "float32", "exclude": ["3.*"]}),
    ],
    ids=["plain", "rounded at random", "weights"],
)
def test_state_dicts_have_the_results_of_one_by_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    base, experts = states(dtype)
    with pretend_gpu():
        together = merged(InStacks(), base, experts, **options)
        found = [*InStacks.seen]
        monkeypatch.setattr(state_dicts, "stacks_of", lambda _: ())
        alone = merged(InStacks(), base, experts, **options)
    count = LAYERS - ("exclude" in options)
    assert sorted(found) == sorted([PLACES, PLACES, count % PLACES] * 2)
    assert found == InStacks.seen
    assert is_alike(together, alone)
    assert [name for name, _ in together] == [*base]


def test_a_stack_takes_the_launches_of_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states()
    with pretend_gpu() as gpu:
        together = merged(ManyLaunches(), base, experts)
        few = gpu.launches["aten.mul_"]
        gpu.reset()
        monkeypatch.setattr(state_dicts, "stacks_of", lambda _: ())
        alone = merged(ManyLaunches(), base, experts)
        assert gpu.launches["aten.mul_"] - few == 100 * 2 * (LAYERS - 3)
    assert is_alike(together, alone)


def test_tied_weights_are_merged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states()
    base["tied"] = base["11.up"]
    for expert in experts:
        expert["tied"] = expert["11.up"]
    with pretend_gpu():
        found = dict(merged(InStacks(), base, experts))
    assert found["tied"] is found["11.up"]
    assert sum(InStacks.seen) == 2 * LAYERS


def test_state_dicts_in_files_are_read_in_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FusionBench gives them: no more is read at once than a stack."""
    base, experts = states()
    folders = [save_folder(tmp_path / str(index), state) for index, state in enumerate((base, *experts))]
    opened = [imf.open_state_dict(folder) for folder in folders]
    for each in opened:  # what is on the meta device the pretended GPU takes for its own
        known = each.meta()
        monkeypatch.setattr(each, "meta", lambda known=known: known)
    with pretend_gpu():
        results = StateDictMerge(InStacks(), device=CUDA).merge(opened[0], opened[1:])
        found = dict(results)
        expected = dict(merged(InStacks(), base, experts))
    assert sum(InStacks.seen) == 4 * LAYERS
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_cpu_merges_each_by_itself() -> None:
    base, experts = states()
    imf.merge_state_dicts(base, experts, method=InStacks())
    assert not InStacks.seen


def until_error(base: dict[str, Tensor], experts: list[dict[str, Tensor]], **options: Any) -> tuple[list[str], str]:
    """Return the names of what is handed out, and the error that ends it."""
    made: list[str] = []
    with pretend_gpu():
        results = StateDictMerge(InStacks(), device=CUDA, **options).merge(base, experts)
        try:
            made += (name for name, _ in results)
        except imf.InputError as error:
            return made, str(error)
    raise AssertionError("no error")


@pytest.mark.parametrize(
    ("damage", "said"), [(torch.nan, "experts[1] hold NaN or Inf"), (3e38, "experts[1] are too far apart for float32")]
)
def test_an_error_comes_in_the_turn_of_its_tensor(damage: float, said: str) -> None:
    """What comes before is handed out, whether merged together or not."""
    base, experts = states()
    base["3.up"][2, 5], experts[1]["3.up"][2, 5] = -3e38, damage
    experts[0]["3.up"][2, 5] = experts[2]["3.up"][2, 5] = -3e38
    made, error = until_error(base, experts)
    assert error == f"tensor '3.up': base or {said}"
    assert made == [*base][: [*base].index("3.up")]
    assert InStacks.seen[:2] == [PLACES, 1]


def test_weights_that_overflow_are_refused_in_their_turn() -> None:
    base, experts = states(torch.float16)
    base["3.up"].fill_(6e4)
    for expert in experts:
        expert["3.up"].fill_(6.1e4)
    made, error = until_error(base, experts, scaling=9.0)
    assert error.startswith("tensor '3.up': ")
    assert error.endswith("merged weights overflow float16 at scaling 9")
    assert made == [*base][: [*base].index("3.up")]


@pytest.mark.parametrize("times", [1, 2])
def test_out_of_memory_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, times: int
) -> None:
    base, experts = states()
    left, merge_stack = times, InStacks.merge_stack

    def full(method: InStacks, sources: Sequence[DeltaSource]) -> Any:
        nonlocal left
        if left and len(sources) > 1:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return merge_stack(method, sources)

    with pretend_gpu():
        whole = merged(InStacks(), base, experts)
        monkeypatch.setattr(InStacks, "merge_stack", full)
        assert is_alike(merged(InStacks(), base, experts), whole)
    said = [
        f"tensor '0.up': cuda:0 was out of memory and {PLACES} tensors are merged once more",
        f"tensor '0.up': cuda:0 was out of memory for {PLACES} tensors at once and each is merged by itself",
    ]
    assert [message.partition(": what else")[0] for message in caplog.messages] == said[:times]


def stackable(name: str, side: int, place: int, dtype: torch.dtype = torch.float32) -> Stackable:
    spec = TensorSpec(name, (side, side), torch.float32)
    return Stackable(spec, InStacks(), CUDA, (dtype,) * (1 + TASKS), 100 * place, 100 * (place + 1))


def names_of(tensors: Sequence[Stackable]) -> list[list[str]]:
    with pretend_gpu():
        return [[member.spec.name for member in members] for members, _ in stacks_of(tensors)]


def test_stacks_are_of_one_kind_of_which_there_are_three(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [stackable(f"a{index}", 8, 3 * index) for index in range(7)]
    tensors += [stackable(f"b{index}", 9, 3 * index + 1) for index in range(2)]
    tensors += [stackable(f"c{index}", 8, 3 * index + 2, torch.bfloat16) for index in range(3)]
    tensors.sort(key=lambda tensor: tensor.begin)
    assert sorted(names_of(tensors)) == [["a0", "a1", "a2", "a3", "a4"], ["a5", "a6"], ["c0", "c1", "c2"]]
    # From the first tensor to the last no more results than may wait.
    monkeypatch.setattr(memory_stacks, "WAITING_BYTES", 1000)
    assert sorted(names_of(tensors)) == [["a0", "a1", "a2", "a3"], ["a4", "a5", "a6"], ["c0", "c1", "c2"]]


def test_no_stack_takes_more_than_its_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [stackable(f"a{index}", 8, index) for index in range(3)]
    with pretend_gpu():
        room = memory_stacks.usable_memory_bytes(CUDA)
        taken = PLACES * 64 * 4 * (1 + TASKS) + InStacks().stack_bytes(tensors[0].spec, TASKS, CUDA)
    for more, expected in ((0.999, []), (1.001, [["a0", "a1", "a2"]])):
        monkeypatch.setattr(memory_stacks, "STACK_SHARE", more * taken / room)
        assert names_of(tensors) == expected
