"""Train one seed of one setting, merge it by every method, and score the merges."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor, nn

import isomerge_fast as imf
from benchmarks.accuracy.alignment import Alignment, accuracy_improvement, align
from benchmarks.accuracy.settings import RECIPES, Candidate, Setting, candidates
from isomerge_fast.demo.model import accuracies, initial, normalised, one_thread, own_accuracies, train_family
from isomerge_fast.demo.tasks import TaskSuite, load_tasks


@dataclass(frozen=True)
class MergeScore:
    """Hold the scores of one method's merge of one seed's experts."""

    scaling: float  # the chosen α
    at_grid_end: bool  # α is the smallest or the largest of several candidates: a better one may lie beyond
    validation: float  # accuracy at that α, the mean over the tasks
    test: float  # the same on test digits
    normalised: float  # mean over the tasks of (test accuracy / the expert's test accuracy)
    test_by_task: tuple[float, ...]  # the accuracies that ``test`` is the mean of
    alignment: Alignment  # SAR of every task
    improvement_by_task: tuple[float | None, ...]  # NAI of every task, None where the expert gains too little
    validation_by_scaling: tuple[tuple[float, float], ...]  # (α, validation accuracy) of every candidate

    def points(self) -> list[tuple[float, float]]:
        """Return (SAR_t, NAI_t) of every task that has both."""
        pairs = zip(self.alignment.by_task, self.improvement_by_task, strict=True)
        return [(ratio, gain) for ratio, gain in pairs if gain is not None]


@dataclass(frozen=True)
class SeedScore:
    """Hold one seed of one setting: test accuracies of the base and of each expert on its own task, and the merges."""

    seed: int
    tasks: tuple[str, ...]
    base_by_task: tuple[float, ...]
    experts_by_task: tuple[float, ...]
    merges: dict[str, MergeScore]


def train_all(setting: Setting, suite: TaskSuite, seed: int) -> tuple[nn.Module, list[nn.Module]]:
    """Train the base and one expert a task, with seeds as in the demo."""
    recipe = RECIPES[setting.recipe]
    training = replace(recipe.training, base_steps=setting.base_steps, expert_steps=setting.expert_steps)
    base, *experts = train_family(initial(recipe.make, seed), suite, training, seed)
    return base, experts


def merged_update(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], candidate: Candidate
) -> dict[str, Tensor]:
    """Return Δ_M of every tensor in float64, from one merge for all α: θ(α) = θ₀ + α Δ_M for every tensor."""
    merged = imf.merge_state_dicts(base, experts, candidate.method, dtype=torch.float64, **candidate.options)
    return {name: tensor - base[name].double() for name, tensor in merged.items()}


def at_scaling(base: nn.Module, update: Mapping[str, Tensor], scaling: float) -> nn.Module:
    """Return a copy of the base with the weights θ₀ + α Δ_M, rounded once."""
    model = copy.deepcopy(base)
    state = base.state_dict()
    model.load_state_dict({name: (state[name] + scaling * delta).to(state[name]) for name, delta in update.items()})
    return model


def score_merges(
    suite: TaskSuite, base: nn.Module, experts: Sequence[nn.Module], seed: int, compared: Mapping[str, Candidate]
) -> SeedScore:
    """Merge by every method, choose its α on validation digits, then score it on the test digits."""
    state, states = base.state_dict(), [expert.state_dict() for expert in experts]
    deltas = [{name: tensor.double() - state[name].double() for name, tensor in other.items()} for other in states]
    before = accuracies(base, suite.test, suite.heads)
    own = own_accuracies(experts, suite.test, suite.heads)
    merges = {}
    for key, candidate in compared.items():
        update, scalings = merged_update(state, states, candidate), candidate.scalings
        models = {scaling: at_scaling(base, update, scaling) for scaling in scalings}
        curve = {s: fmean(accuracies(model, suite.validation, suite.heads)) for s, model in models.items()}
        best = max(curve, key=curve.__getitem__)  # of equals, the smallest
        test = accuracies(models[best], suite.test, suite.heads)
        merges[key] = MergeScore(
            best,
            len(scalings) > 1 and best in (min(scalings), max(scalings)),
            curve[best],
            fmean(test),
            normalised(test, own),
            test,
            align(deltas, update),
            tuple(accuracy_improvement(*scores) for scores in zip(before, own, test, strict=True)),
            tuple(curve.items()),
        )
    return SeedScore(seed, suite.names, before, own, merges)


@one_thread()
def run_seed(setting: Setting, seed: int, common_fractions: Sequence[float] = ()) -> SeedScore:
    """Train and merge one seed of one setting."""
    suite = load_tasks(setting.n_tasks, RECIPES[setting.recipe].width, seed)
    return score_merges(suite, *train_all(setting, suite, seed), seed, candidates(common_fractions))
