"""One seed of one setting: trained, merged by every method, scored."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn

import isomerge_fast as imf
from benchmarks.accuracy.alignment import Alignment, accuracy_improvement, align
from benchmarks.accuracy.settings import RECIPES, Candidate, Setting, candidates
from isomerge_fast.demo.model import accuracies, one_thread, train
from isomerge_fast.demo.tasks import Split, TaskSuite, load_tasks


@dataclass(frozen=True)
class MergeScore:
    """One method's merge of one seed's experts.

    Args:
        scaling: the chosen α.
        at_grid_end: α is the smallest or the largest of several candidates: a better one may lie beyond.
        validation: accuracy at that α, the mean over the tasks.
        test: the same on test digits.
        normalised: mean over the tasks of (test accuracy / the expert's test accuracy).
        test_by_task: the accuracies that ``test`` is the mean of.
        alignment: SAR of every task.
        improvement_by_task: NAI of every task, None where the expert gains too little over the base.
        validation_by_scaling: (α, validation accuracy) of every candidate.
    """

    scaling: float
    at_grid_end: bool
    validation: float
    test: float
    normalised: float
    test_by_task: tuple[float, ...]
    alignment: Alignment
    improvement_by_task: tuple[float | None, ...]
    validation_by_scaling: tuple[tuple[float, float], ...]

    def points(self) -> list[tuple[float, float]]:
        """(SAR_t, NAI_t) of every task that has both."""
        pairs = zip(self.alignment.by_task, self.improvement_by_task, strict=True)
        return [(ratio, gain) for ratio, gain in pairs if gain is not None]


@dataclass(frozen=True)
class SeedScore:
    """One seed of one setting: test accuracies by task of the base and of each expert on its own, and the merges."""

    seed: int
    tasks: tuple[str, ...]
    base_by_task: tuple[float, ...]
    experts_by_task: tuple[float, ...]
    merges: dict[str, MergeScore]

    @property
    def base_normalised(self) -> float:
        return _share(self.base_by_task, self.experts_by_task)


def _share(scores: Sequence[float], of: Sequence[float]) -> float:
    return fmean(score / best for score, best in zip(scores, of, strict=True))


def train_all(setting: Setting, suite: TaskSuite, seed: int) -> tuple[nn.Module, list[nn.Module]]:
    """The base on all tasks at once, then one copy of it a task; seeds as in the demo."""
    recipe = RECIPES[setting.recipe]
    fit = partial(train, data=suite.train, heads=suite.heads, batch_size=recipe.batch_size)
    base = recipe.initial(seed)
    tasks = range(len(suite.names))
    fit(base, tasks=tasks, n_steps=setting.base_steps, learning_rate=recipe.base_learning_rate, seed=seed)
    experts = []
    for task in tasks:
        expert = copy.deepcopy(base)
        fit(
            expert,
            tasks=[task],
            n_steps=setting.expert_steps,
            learning_rate=recipe.expert_learning_rate,
            seed=seed + 1 + task,
        )
        experts.append(expert)
    return base, experts


def own_accuracy(expert: nn.Module, part: Split, heads: Tensor, task: int) -> float:
    """Of an expert on its own task."""
    return accuracies(expert, Split(part.pixels[task : task + 1], part.labels), heads[task : task + 1])[0]


def merged_update(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], candidate: Candidate
) -> dict[str, Tensor]:
    """Δ_M of every tensor in float64, from one merge for all α: θ(α) = θ₀ + α Δ_M for matrices and all else alike."""
    merged = imf.merge_state_dicts(base, experts, candidate.method, dtype=torch.float64, **candidate.options)
    return {name: tensor - base[name].double() for name, tensor in merged.items()}


def at_scaling(base: nn.Module, update: Mapping[str, Tensor], scaling: float) -> nn.Module:
    """A copy of the base with the weights θ₀ + α Δ_M, rounded once."""
    model = copy.deepcopy(base)
    state = base.state_dict()
    model.load_state_dict({name: (state[name] + scaling * delta).to(state[name]) for name, delta in update.items()})
    return model


def choose_scaling(
    base: nn.Module, update: Mapping[str, Tensor], scalings: Sequence[float], validation: Split, heads: Tensor
) -> tuple[float, dict[float, float]]:
    """The α of highest mean accuracy on ``validation``, of equals the smallest; and the accuracy of every candidate."""
    curve = {s: fmean(accuracies(at_scaling(base, update, s), validation, heads)) for s in scalings}
    return max(curve, key=curve.__getitem__), curve


def score_merges(
    suite: TaskSuite, base: nn.Module, experts: Sequence[nn.Module], seed: int, compared: Mapping[str, Candidate]
) -> SeedScore:
    """Every method's merge, its α chosen on validation digits, then scored on the test digits."""
    state, states = base.state_dict(), [expert.state_dict() for expert in experts]
    deltas = [{name: tensor.double() - state[name].double() for name, tensor in other.items()} for other in states]
    before = accuracies(base, suite.test, suite.heads)
    own = tuple(own_accuracy(expert, suite.test, suite.heads, task) for task, expert in enumerate(experts))
    merges = {}
    for key, candidate in compared.items():
        update, scalings = merged_update(state, states, candidate), candidate.scalings
        best, curve = choose_scaling(base, update, scalings, suite.validation, suite.heads)
        test = accuracies(at_scaling(base, update, best), suite.test, suite.heads)
        merges[key] = MergeScore(
            best,
            len(scalings) > 1 and best in (min(scalings), max(scalings)),
            curve[best],
            fmean(test),
            _share(test, own),
            test,
            align(deltas, update),
            tuple(accuracy_improvement(*scores) for scores in zip(before, own, test, strict=True)),
            tuple(curve.items()),
        )
    return SeedScore(seed, suite.names, before, own, merges)


@one_thread()
def run_seed(setting: Setting, seed: int, common_fractions: Sequence[float] = ()) -> SeedScore:
    """Trains and merges one seed of one setting."""
    suite = load_tasks(setting.n_tasks, RECIPES[setting.recipe].width, seed)
    return score_merges(suite, *train_all(setting, suite, seed), seed, candidates(common_fractions))
