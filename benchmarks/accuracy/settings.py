"""List what is compared: networks, numbers of tasks, strengths of the base; methods and their scalings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from benchmarks.accuracy.networks import DigitsTransformer
from isomerge_fast.demo import run as demo
from isomerge_fast.demo.model import DigitsNetwork, Training


@dataclass(frozen=True)
class Candidate:
    """Hold a method's name in the table, the scalings to choose from, and its options."""

    name: str
    method: str
    scalings: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)


# The ends of each range are past the optimum; a choice at an end is marked in the table. The mean is the plain average
# of the weights: with an α to choose it would be task arithmetic.
FLAT_SCALINGS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5)
SUM_SCALINGS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
SCALINGS = {"mean": (1.0,), "task-arithmetic": SUM_SCALINGS, "iso-c": FLAT_SCALINGS, "iso-cts": FLAT_SCALINGS}
METHODS = {method: Candidate(name, method, SCALINGS[method]) for method, (name, _) in demo.METHODS.items()}


@dataclass(frozen=True)
class Recipe:
    """Say how a network is made from a seed, and how it is trained."""

    title: str
    width: int
    make: Callable[[], nn.Module]
    training: Training


RECIPES = {
    "residual": Recipe("residual network", demo.WIDTH, partial(DigitsNetwork, demo.WIDTH, demo.DEPTH), demo.TRAINING),
    # Rates and steps by validation accuracy of seed 0; 64 images a step, since a token costs what an image costs above.
    "transformer": Recipe(
        "vision transformer", 64, partial(DigitsTransformer, 64, 2, 4), Training(250, 4e-3, 200, 1e-3, 64)
    ),
}


@dataclass(frozen=True)
class Setting:
    """Hold a recipe, the number of tasks, and the steps of training."""

    recipe: str
    n_tasks: int
    base_steps: int
    expert_steps: int

    @property
    def title(self) -> str:
        return f"{RECIPES[self.recipe].title}, {self.n_tasks} tasks, base of {self.base_steps} steps"


def candidates(common_fractions: Sequence[float] = ()) -> dict[str, Candidate]:
    """Return ``METHODS``, and Iso-CTS with each of the fractions."""
    extra = {
        f"iso-cts-{fraction:g}": Candidate(
            f"Iso-CTS, f = {fraction:g}", "iso-cts", FLAT_SCALINGS, {"common_fraction": fraction}
        )
        for fraction in common_fractions
    }
    return METHODS | extra


def full_settings() -> list[Setting]:
    """Return settings of weak, medium and strong bases; the demo's is the second."""
    bases = [("residual", 8, (18, 36, 120)), ("residual", 16, (18, 36, 120)), ("transformer", 8, (150, 250, 500))]
    return [
        Setting(recipe, tasks, steps, RECIPES[recipe].training.expert_steps)
        for recipe, tasks, strengths in bases
        for steps in strengths
    ]


def quick_settings() -> list[Setting]:
    return [Setting("residual", 8, 36, 100), Setting("residual", 16, 36, 100), Setting("transformer", 8, 150, 60)]
