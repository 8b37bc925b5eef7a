"""What is compared: networks, numbers of tasks, strengths of the base; methods and the scalings to choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from benchmarks.accuracy.networks import initial_transformer
from isomerge_fast.demo.model import initial_network
from isomerge_fast.demo.run import BASE_LEARNING_RATE, DEPTH, EXPERT_LEARNING_RATE, EXPERT_STEPS, WIDTH


@dataclass(frozen=True)
class Candidate:
    """A method as it is compared: its name in the table, the scalings to choose from, and its options."""

    name: str
    method: str
    scalings: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)


# The ends of each range are past the optimum; a choice at an end is marked in the table. The mean is the plain average
# of the weights: with an α to choose it would be task arithmetic.
FLAT_SCALINGS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5)
METHODS = {
    "mean": Candidate("mean of the weights", "mean", (1.0,)),
    "task-arithmetic": Candidate(
        "task arithmetic", "task-arithmetic", (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
    ),
    "iso-c": Candidate("Iso-C", "iso-c", FLAT_SCALINGS),
    "iso-cts": Candidate("Iso-CTS", "iso-cts", FLAT_SCALINGS),
}


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained; ``initial`` makes it from a seed."""

    title: str
    width: int
    initial: Callable[[int], nn.Module]
    base_learning_rate: float
    expert_steps: int
    expert_learning_rate: float
    batch_size: int


RECIPES = {
    "residual": Recipe(
        "residual network",
        WIDTH,
        lambda seed: initial_network(WIDTH, DEPTH, seed),
        BASE_LEARNING_RATE,
        EXPERT_STEPS,
        EXPERT_LEARNING_RATE,
        128,
    ),
    # Rates and steps by validation accuracy of seed 0; 64 images a step, since a token costs what an image costs above.
    "transformer": Recipe(
        "vision transformer", 64, lambda seed: initial_transformer(64, 2, 4, seed), 4e-3, 200, 1e-3, 64
    ),
}


@dataclass(frozen=True)
class Setting:
    """A recipe, the number of tasks, and the steps of training; fewer than the recipe's for an expert on demand."""

    recipe: str
    n_tasks: int
    base_steps: int
    expert_steps: int

    @property
    def title(self) -> str:
        return f"{RECIPES[self.recipe].title}, {self.n_tasks} tasks, base of {self.base_steps} steps"


def candidates(common_fractions: Sequence[float] = ()) -> dict[str, Candidate]:
    """``METHODS``, and Iso-CTS with each of the fractions."""
    extra = {
        f"iso-cts-{fraction:g}": Candidate(
            f"Iso-CTS, f = {fraction:g}", "iso-cts", FLAT_SCALINGS, {"common_fraction": fraction}
        )
        for fraction in common_fractions
    }
    return METHODS | extra


def full_settings() -> list[Setting]:
    """Weak, medium and strong bases; the demo's is the second of the first network."""
    settings = [Setting("residual", tasks, steps, EXPERT_STEPS) for tasks in (8, 16) for steps in (18, 36, 120)]
    return settings + [
        Setting("transformer", 8, steps, RECIPES["transformer"].expert_steps) for steps in (150, 250, 500)
    ]


def quick_settings() -> list[Setting]:
    return [Setting("residual", 8, 36, 100), Setting("residual", 16, 36, 100), Setting("transformer", 8, 150, 60)]
