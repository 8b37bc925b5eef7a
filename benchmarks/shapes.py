"""The matrices of real models, from the numbers in their configs: what benchmarks take their shapes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """A weight of ``rows`` x ``columns``, ``count`` times in the model."""

    name: str
    rows: int
    columns: int
    count: int


@dataclass(frozen=True)
class Model:
    name: str
    matrices: tuple[Matrix, ...]

    @property
    def parameters(self) -> int:
        """Of the matrices."""
        return sum(matrix.rows * matrix.columns * matrix.count for matrix in self.matrices)

    def shape(self, name: str) -> tuple[int, int]:
        """(rows, columns) of a matrix."""
        matrix = next(matrix for matrix in self.matrices if matrix.name == name)
        return matrix.rows, matrix.columns


def clip_vision_tower(name: str, *, width: int, layers: int) -> Model:
    """Of CLIP as Hugging Face stores it: four projections of attention, two matrices of the MLP."""
    return Model(
        name,
        (
            Matrix("q_proj", width, width, 4 * layers),
            Matrix("fc1", 4 * width, width, layers),
            Matrix("fc2", width, 4 * width, layers),
        ),
    )


def llama(name: str, *, width: int, inner: int, layers: int, kv: int, vocabulary: int, tied: bool) -> Model:
    """Of a Llama with grouped queries; ``kv`` columns of keys and of values."""
    return Model(
        name,
        (
            Matrix("q_proj", width, width, 2 * layers),
            Matrix("k_proj", kv, width, 2 * layers),
            Matrix("gate_proj", inner, width, 2 * layers),
            Matrix("down_proj", width, inner, layers),
            Matrix("embed_tokens", vocabulary, width, 1 if tied else 2),
        ),
    )


VIT_B_32 = clip_vision_tower("ViT-B/32", width=768, layers=12)
VIT_L_14 = clip_vision_tower("ViT-L/14", width=1024, layers=24)
LLAMA_1B = llama("Llama-3.2-1B", width=2048, inner=8192, layers=16, kv=512, vocabulary=128_256, tied=True)
LLAMA_8B = llama("Llama-3-8B", width=4096, inner=14_336, layers=32, kv=1024, vocabulary=128_256, tied=False)
LLAMA_70B = llama("Llama-3-70B", width=8192, inner=28_672, layers=80, kv=1024, vocabulary=128_256, tied=False)
QWEN_MOE = Model(
    "Qwen3-30B-A3B",
    (
        Matrix("q_proj", 4096, 2048, 48),
        Matrix("o_proj", 2048, 4096, 48),
        Matrix("k_proj", 512, 2048, 2 * 48),
        Matrix("gate", 128, 2048, 48),
        Matrix("experts.gate_proj", 768, 2048, 2 * 128 * 48),
        Matrix("experts.down_proj", 2048, 768, 128 * 48),
        Matrix("embed_tokens", 151_936, 2048, 2),
    ),
)
MODELS = (VIT_B_32, VIT_L_14, LLAMA_1B, LLAMA_8B, LLAMA_70B, QWEN_MOE)
