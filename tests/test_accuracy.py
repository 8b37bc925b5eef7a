"""The study of accuracy on real tasks: its measures against known answers, its networks, and all of it in small."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import isomerge_fast as imf
from benchmarks.accuracy import scores, settings
from benchmarks.accuracy.alignment import (
    accuracy_improvement,
    align,
    alignment_ratio,
    correlate,
    kept_rank,
    range_basis,
    without_group_means,
)
from benchmarks.accuracy.networks import DigitsTransformer, patches
from benchmarks.accuracy.scores import score_merges
from benchmarks.accuracy.settings import METHODS, Setting, candidates, full_settings, quick_settings
from benchmarks.accuracy.study import run_study
from isomerge_fast.demo.model import accuracies, initial, one_thread
from isomerge_fast.demo.tasks import N_PIXELS, TRANSFORMS, Split, load_tasks

SETTINGS = [Setting("residual", 3, 12, 15), Setting("transformer", 2, 12, 8)]


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    """One thread, and every third α: the grids' full length is a matter of time only."""
    short = {key: replace(candidate, scalings=candidate.scalings[::3]) for key, candidate in METHODS.items()}
    with one_thread(), pytest.MonkeyPatch.context() as patched:
        for key, candidate in short.items():
            patched.setitem(METHODS, key, candidate)
        patched.setattr(settings, "FLAT_SCALINGS", short["iso-c"].scalings)
        yield


# --- SAR


@pytest.mark.parametrize(
    ("values", "tail", "k"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.5, 3),  # exactly the tail: allowed
        ([1.0, 1.0, 1.0, 1.0], 0.4999999, 4),
        ([3.0, 2.0, 0.0, 0.0], 0.0, 2),
        ([0.0, 0.0], 0.05, 0),
        ([1.0] * 399, 0.05, 399),  # a flat spectrum keeps all of fewer than 1 / 0.05² directions
        ([1.0] * 401, 0.05, 400),
        ([1.0, 0.04, 0.02, 0.02], 0.05, 1),  # 0.049 left, where their sum would be 0.08
        ([1.0, 0.05, 0.02, 0.02], 0.05, 2),
    ],
    ids=["at-the-tail", "below-it", "exact-rank", "zero", "flat-399", "flat-401", "tail-in-norm", "one-more"],
)
def test_kept_rank(values: list[float], tail: float, k: int) -> None:
    assert kept_rank(torch.tensor(values), tail) == k


def _orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


@pytest.fixture
def plane() -> tuple[Tensor, Tensor]:
    """A rotation [5, 5], and a merged update [5, 4] whose range is the rotation's first two columns, all but 1 %."""
    rotation = _orthogonal(5, 0)
    return rotation, rotation[:, :3] @ torch.diag(torch.tensor([3.0, 2.0, 0.03]).double()) @ _orthogonal(4, 1)[:3]


def test_alignment_is_the_share_within_the_range(plane: tuple[Tensor, Tensor]) -> None:
    rotation, merged = plane
    basis = range_basis(merged)
    assert basis.shape == (5, 2)
    columns = torch.tensor([[0.0, 3.0], [3.0, 0.0], [0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    assert alignment_ratio(rotation @ columns, basis) == pytest.approx(3 / 5)
    within = rotation[:, :2] @ torch.randn(2, 7, dtype=torch.float64)
    assert alignment_ratio(within, basis) == pytest.approx(1)
    assert alignment_ratio(rotation[:, 2:3], basis) == pytest.approx(0, abs=1e-6)  # 1 % of the merged, and left out
    # The range of columns, not of rows, counts: the merged update's own rows in other columns are outside.
    assert alignment_ratio(rotation[:, 3:] @ merged[:2], basis) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-6, -3.0, 1e6])
def test_alignment_does_not_depend_on_scale(plane: tuple[Tensor, Tensor], scale: float) -> None:
    _, merged = plane
    delta = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    once = alignment_ratio(delta, range_basis(merged))
    assert alignment_ratio(scale * delta, range_basis(merged)) == pytest.approx(once)
    assert alignment_ratio(delta, range_basis(scale * merged)) == pytest.approx(once)


def test_zero_delta_has_no_alignment(plane: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"\[5, 4\] is zero"):
        alignment_ratio(torch.zeros(5, 4), range_basis(plane[1]))


def test_align_is_the_mean_over_matrices_in_numpys_words() -> None:
    rng = np.random.default_rng(0)
    shapes = {"tall": (12, 5), "wide": (5, 12), "norm": (12,)}
    deltas = [{name: rng.standard_normal(shape) for name, shape in shapes.items()} for _ in range(3)]
    merged = {name: np.sum([delta[name] for delta in deltas], axis=0) for name in shapes}
    merged["tall"] = merged["tall"][:, :2] @ rng.standard_normal((2, 5))  # rank 2
    found = align(
        [{name: torch.tensor(value) for name, value in delta.items()} for delta in deltas],
        {name: torch.tensor(value) for name, value in merged.items()},
    )
    for delta, ratio in zip(deltas, found.by_task, strict=True):
        left = np.linalg.svd(merged["tall"])[0][:, :2]
        tall = np.linalg.norm(left @ left.T @ delta["tall"]) / np.linalg.norm(delta["tall"])
        assert ratio == pytest.approx((tall + 1) / 2, abs=1e-5)  # the wide one's columns span everything
    assert found.chance == pytest.approx((math.sqrt(2 / 12) + 1) / 2)
    assert found.rank_share == pytest.approx((2 / 5 + 1) / 2)


# --- NAI and correlations


@pytest.mark.parametrize(
    ("base", "expert", "merged", "improvement"),
    [
        (0.5, 0.9, 0.7, 0.5),
        (0.5, 0.9, 0.4, -0.25),
        (0.5, 0.9, 0.9, 1.0),
        (0.9, 0.92, 0.91, 0.5),  # the smallest gain that counts
        (0.9, 0.915, 0.91, None),
        (0.9, 0.9, 0.95, None),
        (0.9, 0.8, 0.95, None),
    ],
    ids=["half", "worse-than-base", "all", "smallest-gain", "too-small", "none", "loss"],
)
def test_accuracy_improvement(base: float, expert: float, merged: float, improvement: float | None) -> None:
    assert accuracy_improvement(base, expert, merged) == (improvement and pytest.approx(improvement))


def test_correlations() -> None:
    tied = correlate([*zip((1.0, 2.0, 3.0, 4.0), (10.0, 30.0, 20.0, 20.0), strict=True)])
    assert tied.spearman == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 4, 2.5, 2.5])[0, 1])
    cubes = correlate([(x, x**3) for x in (-3.0, -2.0, 0.0, 5.0)])
    assert cubes.spearman == pytest.approx(1)
    assert cubes.pearson == pytest.approx(np.corrcoef([-3, -2, 0, 5], [-27, -8, 0, 125])[0, 1])
    assert correlate([(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)]).pearson is None
    assert correlate([(1.0, 2.0), (2.0, 3.0)]).spearman is None
    falling = [[(0.0, 1.0), (1.0, 0.0)], [(10.0, 11.0), (11.0, 10.0)], []]  # groups rise, and fall within
    pooled = correlate([point for group in falling for point in group]).pearson
    assert pooled is not None
    assert pooled > 0.9
    assert correlate(without_group_means(falling)).pearson == pytest.approx(-1)


# --- the tasks and the transformer


def test_sixteen_tasks_are_the_square_s_symmetries_twice() -> None:
    suite = load_tasks(16, 32, 0)
    assert suite.names[:8] == (  # the demo's
        "upright",
        "rotated-90",
        "rotated-180",
        "rotated-270",
        "mirrored",
        "upside-down",
        "transposed",
        "inverted",
    )
    gram = suite.heads @ suite.heads.mT
    torch.testing.assert_close(gram, torch.eye(10).expand(16, 10, 10), rtol=0, atol=1e-5)
    image = torch.arange(1.0, 65.0).reshape(1, 8, 8)
    views = {tuple(TRANSFORMS[name](image).flatten().tolist()) for name in suite.names}
    symmetries = [turned.rot90(k, (1, 2)) for turned in (image, image.flip(2)) for k in range(4)]
    assert views == {tuple((sign * view).flatten().tolist()) for view in symmetries for sign in (1, -1)}
    assert len(views) == 16


def test_first_eight_tasks_are_those_of_a_suite_of_eight() -> None:
    eight, sixteen = load_tasks(8, 16, 3), load_tasks(16, 16, 3)
    assert torch.equal(eight.train.pixels, sixteen.train.pixels[:8])
    assert torch.equal(eight.test.labels, sixteen.test.labels)


def test_patches_are_squares_of_neighbours() -> None:
    found = patches(torch.arange(64.0)[None])[0]
    assert found.shape == (16, 4)
    assert found[0].tolist() == [0, 1, 8, 9]
    assert found[6].tolist() == [20, 21, 28, 29]


def test_transformer_has_the_networks_interface() -> None:
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    model = initial(partial(DigitsTransformer, 16, 1, 2), 0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model.stem.weight, initial(partial(DigitsTransformer, 16, 1, 2), 0).stem.weight)
    pixels = torch.rand(3, 5, N_PIXELS)
    features = model(pixels)
    assert features.shape == (3, 5, 16)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3, 5))
    torch.testing.assert_close(features[1, 2], model(pixels[1, 2]))
    # The same patches in other places, two rows of pixels lower, are another image.
    assert not torch.allclose(model(pixels), model(pixels.roll(16, -1)), atol=1e-4)
    with pytest.raises(ValueError, match="width 16 is not a multiple of n_heads 3"):
        initial(partial(DigitsTransformer, 16, 1, 3), 0)


@pytest.mark.parametrize("method", list(METHODS))
def test_transformer_checkpoints_merge(method: str) -> None:
    base, *experts = (initial(partial(DigitsTransformer, 16, 1, 2), seed) for seed in range(4))
    merged = imf.merge_state_dicts(base.state_dict(), [expert.state_dict() for expert in experts], method)
    model = initial(partial(DigitsTransformer, 16, 1, 2), 9)
    model.load_state_dict(merged)
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())
    assert torch.isfinite(model(torch.rand(2, N_PIXELS))).all()
    matrices = {name for name, tensor in merged.items() if tensor.ndim == 2}
    attention = {f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value", "out")}
    assert matrices == {"stem.weight", "position", "blocks.0.up.weight", "blocks.0.down.weight"} | attention


@pytest.mark.parametrize("candidate", candidates([0.5]).values(), ids=lambda candidate: candidate.name)
def test_one_merge_serves_every_scaling(candidate: settings.Candidate) -> None:
    base, *experts = (initial(partial(DigitsTransformer, 16, 1, 2), seed) for seed in range(4))
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    states = [expert.state_dict() for expert in experts]
    update = scores.merged_update(state, states, candidate)
    expected = imf.merge_state_dicts(state, states, candidate.method, scaling=0.7, **candidate.options)
    found = scores.at_scaling(base, update, 0.7).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())


# --- all of it, in small


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, told: list[str]) -> Path:
    path = tmp_path_factory.mktemp("accuracy") / "study.json"
    run_study(SETTINGS, [0, 1], path, command="python -m benchmarks.accuracy", common_fractions=[0.5], say=told.append)
    return path


def test_study_writes_every_method(out: Path, told: list[str]) -> None:
    written = json.loads(out.read_text())
    assert written["complete"]
    assert written["command"] == "python -m benchmarks.accuracy"
    assert str(out.parent) not in out.read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    tables = [line for line in told if "Iso-CTS" in line]
    assert len(written["settings"]) == len(tables) == len(SETTINGS)
    compared = candidates([0.5])
    for setting, found, printed in zip(SETTINGS, written["settings"], tables, strict=True):
        assert found["setting"]["n_tasks"] == setting.n_tasks
        assert [row["method"] for row in found["rows"]] == ["base", "experts", *METHODS, "iso-cts-0.5"]
        assert all(row["name"] in printed for row in found["rows"])
        assert [score["seed"] for score in found["seeds"]] == [0, 1]
        assert set(found["correlations"]) == {"all points", "within methods", "method means", "Iso-C, Iso-CTS"}
        flat = [[score["merges"][key]["test"] for score in found["seeds"]] for key in ("iso-c", "iso-cts")]
        assert found["flat_difference"]["mean"] == pytest.approx(np.mean(flat[1]) - np.mean(flat[0]))
        assert found["flat_higher"] == sum(np.greater(flat[1], flat[0]))
        for key, candidate in compared.items():
            row = next(row for row in found["rows"] if row["method"] == key)
            merges = [score["merges"][key] for score in found["seeds"]]
            assert row["scalings"] == [merge["scaling"] for merge in merges]
            assert row["test"]["mean"] == pytest.approx(np.mean([merge["test_by_task"] for merge in merges]))
            assert row["test"]["deviation"] == pytest.approx(np.std([merge["test"] for merge in merges], ddof=1))
            for score, merge in zip(found["seeds"], merges, strict=True):
                shares = np.array(merge["test_by_task"]) / np.array(score["experts_by_task"])
                assert merge["normalised"] == pytest.approx(shares.mean())
                curve = dict(merge["validation_by_scaling"])
                assert tuple(curve) == candidate.scalings
                assert merge["validation"] == curve[merge["scaling"]] == max(curve.values())
                ends = len(curve) > 1 and merge["scaling"] in (candidate.scalings[0], candidate.scalings[-1])
                assert merge["at_grid_end"] == ends
                assert len(merge["alignment"]["by_task"]) == len(merge["improvement_by_task"]) == setting.n_tasks
                assert all(0 < ratio <= 1.000001 for ratio in merge["alignment"]["by_task"])
                gains = np.array(score["experts_by_task"]) - np.array(score["base_by_task"])
                for gain, value in zip(gains, merge["improvement_by_task"], strict=True):
                    assert (value is None) == (gain < 0.02 - 1e-9)
        pairs = 2 * setting.n_tasks
        assert found["n_pairs"] == pairs
        assert found["correlations"]["all points"]["n"] == len(METHODS) * (pairs - found["left_out"])
        assert found["correlations"]["Iso-C, Iso-CTS"]["n"] == 2 * (pairs - found["left_out"])


def test_mean_and_sum_span_the_same(out: Path) -> None:
    for found in json.loads(out.read_text())["settings"]:
        for score in found["seeds"]:
            mean, summed = (score["merges"][key]["alignment"]["by_task"] for key in ("mean", "task-arithmetic"))
            assert mean == pytest.approx(summed, abs=2e-5)


def test_scalings_are_chosen_without_the_test_digits() -> None:
    setting = SETTINGS[0]
    suite = load_tasks(setting.n_tasks, settings.RECIPES[setting.recipe].width, 0)
    base, experts = scores.train_all(setting, suite, 0)
    seen = score_merges(suite, base, experts, 0, settings.METHODS)
    order = torch.randperm(len(suite.test.labels), generator=torch.Generator().manual_seed(0))
    shuffled = replace(suite, test=Split(suite.test.pixels, suite.test.labels[order]))
    blind = score_merges(shuffled, base, experts, 0, settings.METHODS)
    for key in METHODS:
        assert blind.merges[key].scaling == seen.merges[key].scaling, key
        assert blind.merges[key].validation_by_scaling == seen.merges[key].validation_by_scaling
        assert blind.merges[key].test < seen.merges[key].test - 0.1
    # And each expert is scored on its own task.
    for task, expert in enumerate(experts):
        assert seen.experts_by_task[task] == accuracies(expert, suite.test, suite.heads)[task]


def test_a_run_cut_short_keeps_what_it_had(tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def say(line: str) -> None:
        if "transformer" in line:
            raise Cut

    tiny = [replace(setting, n_tasks=2, base_steps=2, expert_steps=2) for setting in SETTINGS]
    with pytest.raises(Cut):
        run_study(tiny, [0], tmp_path / "study.json", say=say)
    written = json.loads((tmp_path / "study.json").read_text())
    assert not written["complete"]
    assert [found["setting"]["recipe"] for found in written["settings"]] == ["residual"]


def test_forms_of_the_study() -> None:
    full = full_settings()
    assert {(s.recipe, s.n_tasks) for s in full} == {("residual", 8), ("residual", 16), ("transformer", 8)}
    assert len(full) == 9
    assert len(quick_settings()) == 3
