"""Define a small residual network on 8×8 images; train networks, and score them."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import torch_threads
from .tasks import N_PIXELS, Split, TaskSuite

Network = TypeVar("Network", bound=nn.Module)

# Features and head rows are both of unit length, as in CLIP: the logits are cosines times this. CLIP's own 100 makes
# ten classes of so few images overconfident within an epoch.
LOGIT_SCALE = 20.0


class ResidualBlock(nn.Module):
    """Return x + down(gelu(up(norm(x)))) of x `[n, width]`."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class DigitsNetwork(nn.Module):
    """Map pixels `[n, 64]` to unit features `[n, width]`: a linear stem, residual blocks, a final norm, no head."""

    def __init__(self, width: int, depth: int, expansion: int = 2) -> None:
        super().__init__()
        self.config: dict[str, str | int | list[str]] = {
            "model_type": "isomerge-digits",
            "architectures": ["DigitsNetwork"],
            "dtype": "float32",
            "width": width,
            "depth": depth,
            "expansion": expansion,
        }
        self.stem = nn.Linear(N_PIXELS, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, expansion) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.norm(x), dim=-1)

    def save(self, folder: Path) -> None:
        """Write `model.safetensors` and `config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "DigitsNetwork":
        """Load the network of a checkpoint folder, of one shard or several; every name and shape has to match."""
        config = json.loads((folder / "config.json").read_text())
        with torch.device("meta"):  # no initial values: they would cost time and the caller's random state
            model = cls(config["width"], config["depth"], config["expansion"])
        model.load_state_dict(load_state(folder), assign=True)
        return model


def load_state(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint folder's safetensors files."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def initial(make: Callable[[], Network], seed: int) -> Network:
    """Return an untrained network whose weights depend on `seed` alone; the caller's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread inside, and the caller's number after.

    These matrices are too small to share: two threads gain nothing on two idle cores and take 12 times as long when
    another process has one of the cores. And sums no longer depend on the number of cores.
    """
    with torch_threads(1):
        yield


@one_thread()
def train(
    model: nn.Module,
    data: Split,
    heads: Tensor,
    tasks: Iterable[int],
    *,
    n_steps: int,
    learning_rate: float,
    seed: int,
    batch_size: int = 128,
) -> None:
    """Train in place: AdamW on the cross-entropy of `LOGIT_SCALE` · features · headᵀ, images drawn from `tasks` alike.

    `model` maps pixels `[..., 64]` to unit features `[..., width]`; the fp32 heads `[T, 10, width]` are constants.
    `tasks` are all indices for the base, and one for an expert. The peak is `learning_rate`: it falls to zero along a
    cosine, so that luck does not decide where an expert stops.
    """
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor(list(tasks))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        image = torch.randint(len(data.labels), (batch_size,), generator=generator)
        task = choices[torch.randint(len(choices), (batch_size,), generator=generator)]
        features = model(data.pixels[task, image])
        logits = LOGIT_SCALE * torch.einsum("nw,ncw->nc", features, heads[task])
        loss = F.cross_entropy(logits, data.labels[image])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class Training:
    """Hold the steps and peak learning rates of a base and of its experts."""

    base_steps: int
    base_learning_rate: float
    expert_steps: int
    expert_learning_rate: float
    batch_size: int = 128


def train_family(base: Network, suite: TaskSuite, training: Training, seed: int) -> Iterator[Network]:
    """Yield the base, trained in place on all tasks at once, then one copy of it a task, fine-tuned on that task."""
    fit = partial(train, data=suite.train, heads=suite.heads, batch_size=training.batch_size)
    tasks = range(len(suite.names))
    fit(base, tasks=tasks, n_steps=training.base_steps, learning_rate=training.base_learning_rate, seed=seed)
    yield base
    steps, rate = training.expert_steps, training.expert_learning_rate
    for task in tasks:
        expert = copy.deepcopy(base)
        fit(expert, tasks=[task], n_steps=steps, learning_rate=rate, seed=seed + 1 + task)
        yield expert


@one_thread()
@torch.inference_mode()
def accuracies(model: nn.Module, data: Split, heads: Tensor) -> tuple[float, ...]:
    """Return for each of the T tasks the share of `data` whose nearest head row is its class."""
    logits = torch.einsum("tnw,tcw->tnc", model(data.pixels), heads)
    return tuple((logits.argmax(-1) == data.labels).double().mean(-1).tolist())


def own_accuracies(experts: Sequence[nn.Module], data: Split, heads: Tensor) -> tuple[float, ...]:
    """Return the accuracy of each expert on its own task, against which a merge is measured."""
    return tuple(
        accuracies(expert, Split(data.pixels[task : task + 1], data.labels), heads[task : task + 1])[0]
        for task, expert in enumerate(experts)
    )


def normalised(scores: Sequence[float], own: Sequence[float]) -> float:
    """Return the mean over the tasks of (accuracy / the expert's accuracy)."""
    return fmean(score / best for score, best in zip(scores, own, strict=True))
