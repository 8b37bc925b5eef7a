"""Make up to sixteen classification tasks of the same handwritten digits, each with its own frozen class head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

N_CLASSES = 10
N_PIXELS = 64

# Each maps images [n, 8, 8] with intensities in [-1, 1] to images of the same shape. A task keeps the digit's label, so
# what an expert learns is to read digits in its own orientation; what a digit looks like is shared, so the experts'
# updates overlap, and their sum is dominated by a few directions. Together they are the eight symmetries of the square,
# each as it is and inverted. The first eight are the demo's: new ones go behind them.
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda images: images,
    "rotated-90": lambda images: images.rot90(1, (1, 2)),
    "rotated-180": lambda images: images.rot90(2, (1, 2)),
    "rotated-270": lambda images: images.rot90(3, (1, 2)),
    "mirrored": lambda images: images.flip(2),
    "upside-down": lambda images: images.flip(1),
    "transposed": lambda images: images.transpose(1, 2),
    "inverted": lambda images: -images,
    "anti-transposed": lambda images: images.rot90(2, (1, 2)).transpose(1, 2),
    "inverted-rotated-90": lambda images: -images.rot90(1, (1, 2)),
    "inverted-rotated-180": lambda images: -images.rot90(2, (1, 2)),
    "inverted-rotated-270": lambda images: -images.rot90(3, (1, 2)),
    "inverted-mirrored": lambda images: -images.flip(2),
    "inverted-upside-down": lambda images: -images.flip(1),
    "inverted-transposed": lambda images: -images.transpose(1, 2),
    "inverted-anti-transposed": lambda images: -images.rot90(2, (1, 2)).transpose(1, 2),
}


@dataclass(frozen=True)
class Split:
    """Hold one part of the digits, as seen by every task."""

    pixels: Tensor  # fp32 [T, n, 64], the same n digits under each of the T transforms
    labels: Tensor  # int64 [n], the digit's class, shared by the tasks


@dataclass(frozen=True)
class TaskSuite:
    """Hold the tasks' names, their frozen heads `[T, 10, width]`, and the three parts of the data."""

    names: tuple[str, ...]
    heads: Tensor
    train: Split
    validation: Split
    test: Split


def load_tasks(n_tasks: int, width: int, seed: int, n_train: int = 1000, n_validation: int = 397) -> TaskSuite:
    """Return the first `n_tasks` transforms of scikit-learn's 1797 digits, split by `seed` into 1000, 397 and 400."""
    if not 2 <= n_tasks <= len(TRANSFORMS):
        raise ConfigError(f"n_tasks must lie within 2 … {len(TRANSFORMS)}, got {n_tasks}")
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels).float().reshape(-1, 8, 8) / 8 - 1  # 0 … 16 to -1 … 1: inversion is then a sign
    labels = torch.as_tensor(digits).long()
    names = tuple(TRANSFORMS)[:n_tasks]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)

    def split(part: Tensor) -> Split:
        views = [TRANSFORMS[name](images[part]).reshape(-1, N_PIXELS) for name in names]
        return Split(torch.stack(views), labels[part])

    train, validation, test = order.tensor_split((n_train, n_train + n_validation))
    return TaskSuite(names, orthonormal_heads(n_tasks, width, generator), split(train), split(validation), split(test))


def orthonormal_heads(n_tasks: int, width: int, generator: torch.Generator) -> Tensor:
    """Return T random fp32 heads H_t `[10, width]` with H_t H_tᵀ = I; like CLIP's, they are never trained."""
    gaussian = torch.randn(n_tasks, width, N_CLASSES, generator=generator)
    return torch.linalg.qr(gaussian).Q.mT.contiguous()
