"""Small models of transformers, saved as base and experts, and what their merged weights must be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import oracle

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here may ask a network
transformers = pytest.importorskip("transformers", reason="the models merged here are made by transformers")
transformers.utils.logging.disable_progress_bar()

N_TASKS = 3
SEED = 11
SCALINGS = {"iso-c": 1.3, "iso-cts": 1.5, "mean": 0.7, "task-arithmetic": 0.4}
METHODS = tuple(SCALINGS)
SPECTRAL = ("iso-c", "iso-cts")

DELTA_BOUND = 1e-5  # promised: relative Frobenius error of a full-rank merged delta; measured at most 1.6e-7 here
BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}  # of the significand
OTHER_DTYPE = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}


# ----------------------------------------------------------------------------------------------------- models and cases


def make_llama(tied: bool) -> Any:
    # initializer_range is large enough for attention to be uneven: at 0.02 a net this narrow hardly uses it.
    config = transformers.LlamaConfig(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.15,
    )
    return transformers.LlamaForCausalLM(config)


def make_clip_vision() -> Any:
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(projection_dim=24, **VISION))


def make_clip() -> Any:
    text = {**TEXT, "bos_token_id": 98, "eos_token_id": 99}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    return transformers.CLIPModel(config)


def make_bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=120,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        initializer_range=0.15,
    )
    return transformers.BertForMaskedLM(config)


CLIP_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.15}
VISION = {"hidden_size": 48, "intermediate_size": 96, "image_size": 32, "patch_size": 8, **CLIP_LAYERS}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 16, **CLIP_LAYERS}
MAKERS: dict[str, Callable[[], Any]] = {
    "llama-tied": lambda: make_llama(True),
    "llama-untied": lambda: make_llama(False),
    "clip-vision": make_clip_vision,
    "clip": make_clip,
    "bert": make_bert,
}


def outputs(family: str, model: Any) -> torch.Tensor:
    """What the model answers to fixed inputs, in one vector, computed in float64 so that only the weights matter."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, 98, (2, 12), generator=generator)
    tokens[:, -1] = 99  # CLIP pools at the end token
    pixels = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    inputs: dict[str, torch.Tensor] = {}
    if family != "clip-vision":
        inputs["input_ids"] = tokens
    if family.startswith("clip"):
        inputs["pixel_values"] = pixels
    with torch.no_grad():
        result = model.eval().double()(**inputs)
    wanted = {"clip-vision": "image_embeds", "clip": "logits_per_image"}.get(family, "logits")
    return result[wanted].flatten()


@dataclass(frozen=True)
class Case:
    """A base checkpoint: which model, its float dtype, one file or shards."""

    family: str
    dtype: torch.dtype
    sharded: bool

    def __str__(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        return f"{self.family}-{short}-{'sharded' if self.sharded else 'single'}"


CASES = (
    Case("llama-tied", torch.bfloat16, True),
    Case("llama-tied", torch.float32, False),
    Case("llama-untied", torch.float32, True),
    Case("llama-untied", torch.bfloat16, False),
    Case("clip-vision", torch.bfloat16, True),
    Case("clip-vision", torch.float32, False),
    Case("clip", torch.float32, True),
    Case("bert", torch.float32, True),
    Case("bert", torch.bfloat16, False),
    Case("bert", torch.float16, True),
)
LLAMA_FP32, LLAMA_BF16, CLIP, BERT = CASES[2], CASES[0], CASES[6], CASES[7]


@dataclass(frozen=True)
class Saved:
    """A base and its experts on disk, and the tensors that are in those files, read by safetensors alone."""

    case: Case
    base: Path
    experts: tuple[Path, ...]

    def config(self, out: Path, method: str = "iso-cts", **more: Any) -> dict[str, Any]:
        return {
            "base": self.base,
            "experts": list(self.experts),
            "method": method,
            "scaling": SCALINGS[method],
            "out": out,
            **more,
        }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def perturb(model: Any, scale: float, random: np.random.Generator) -> None:
    """Adds noise of full rank to every weight: no bias or norm stays at 0 or 1, no expert at its base."""
    with torch.no_grad():
        for parameter in model.parameters():
            # numpy's, which are the same on every CPU: see ``assert_well_posed``.
            parameter += scale * torch.from_numpy(np.asarray(random.standard_normal(parameter.shape), np.float32))


def save(model: Any, folder: Path, dtype: torch.dtype, shards: int) -> None:
    model = model.to(dtype)
    bytes_in_all = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=bytes_in_all // shards if shards > 1 else "1GB")
    assert (folder / "model.safetensors.index.json").is_file() == (shards > 1)


def make_saved(case: Case, folder: Path) -> Saved:
    """Base and experts; the middle expert has another float dtype and another shard layout than the base."""
    torch.manual_seed(0)
    random = np.random.default_rng(SEED)
    model = MAKERS[case.family]()
    perturb(model, 0.05, random)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save(model, folder / "base", case.dtype, 4 if case.sharded else 1)
    for index in range(N_TASKS):
        model.float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name])
        perturb(model, 0.03, random)
        other = index == 1
        shards = (1 if case.sharded else 3) if other else (4 if case.sharded else 1)
        save(model, folder / f"expert-{index}", OTHER_DTYPE[case.dtype] if other else case.dtype, shards)
    return Saved(case, folder / "base", tuple(folder / f"expert-{index}" for index in range(N_TASKS)))


def judge(checkpoints: Saved, method: str, scaling: float, **options: float) -> dict[str, np.ndarray]:
    base, experts = tensors(checkpoints.base), [tensors(path) for path in checkpoints.experts]
    expected = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            continue
        values = [float64(expert[name]) for expert in experts]
        assert_well_posed(name, np.sum([value - float64(tensor) for value in values], axis=0))
        value = oracle.merge_tensor(name, float64(tensor), values, method=method, scaling=scaling, **options)
        expected[name] = np.asarray(value)  # numpy makes a bare float of a 0-D result
    return expected


def assert_well_posed(name: str, total: np.ndarray) -> None:
    """On a deficient sum, or one without a gap at the cut, the published formula is not a function: nothing to compare.

    Square random matrices come near that by chance; SEED is one where none of these does.
    """
    if total.ndim != 2:
        return
    sigma = np.linalg.svd(total, compute_uv=False)
    k, _ = oracle.split_rank(len(sigma), N_TASKS, 0.8)
    assert sigma[-1] > 1e-4 * sigma[0], (name, sigma)
    assert k == len(sigma) or sigma[k - 1] - sigma[k] > 1e-4 * sigma[k], (name, sigma)


# ------------------------------------------------------------------------------------------------------------ comparing


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def ulp(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance of neighbours in ``dtype`` at each value."""
    smallest = np.log2(torch.finfo(dtype).tiny)
    exponents = np.floor(np.log2(np.maximum(np.abs(values), torch.finfo(dtype).tiny)))
    return np.exp2(np.maximum(exponents, smallest) - (BITS[dtype] - 1))


def rounded_once(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """float64 to ``dtype`` in one step, ties to even; torch goes to bf16 by way of float32, which rounds twice."""
    step = ulp(values, dtype)
    return torch.from_numpy(np.asarray(np.rint(values / step) * step)).to(dtype)


def is_spectral(name: str, shape: tuple[int, ...], method: str) -> bool:
    return method in SPECTRAL and len(shape) == 2 and "text_projection" not in name


def tolerance(
    name: str, base: np.ndarray, experts: list[np.ndarray], expected: np.ndarray, method: str, scaling: float
) -> np.ndarray:
    """What a merged weight may be off before it is rounded to the output's dtype, entry by entry.

    Spectral: the root mean square of an error of DELTA_BOUND in the merged delta. Linear, θ₀ + α·(Σ or mean of Δ_t) in
    float32: each Δ_t, each of T additions, the division by T, α itself and the product with it round once, T + 4
    roundings of at most u·Σ|Δ_t| (for the mean, u·mean|Δ_t|), and the last addition one of u·|θ|.
    """
    if is_spectral(name, base.shape, method):
        return np.full_like(base, DELTA_BOUND * np.linalg.norm(expected - base) / np.sqrt(base.size))
    moved = scaling * np.sum([np.abs(expert - base) for expert in experts], axis=0)
    moved = moved if method == "task-arithmetic" else moved / len(experts)
    return 2.0**-24 * ((len(experts) + 4) * moved + np.abs(base) + moved)


def assert_weights_equal_oracle(
    stored: dict[str, torch.Tensor], checkpoints: Saved, expected: dict[str, np.ndarray], method: str, scaling: float
) -> None:
    """Every float tensor, to the rounding of its dtype; what is in none of ``expected`` equals the base.

    float32: the relative error promised for the merged delta of a matrix; the roundings of ``tolerance`` for the rest.
    Narrower: each weight is within one unit in the last place of the oracle's rounded once (and the tolerance, which is
    more than that unit where θ₀ and Δ cancel), and nearly all are equal: an error e before rounding changes a share
    e / ulp of the weights, at most 1e-5 · 2^bits where delta and weight are of one size: 0.3 % in bf16, 2 % in fp16.
    """
    base, experts = tensors(checkpoints.base), [tensors(path) for path in checkpoints.experts]
    assert stored.keys() == base.keys()
    differing = total = allowed = 0
    for name, target in expected.items():
        value, dtype = float64(stored[name]), stored[name].dtype
        start, ends = float64(base[name]), [float64(expert[name]) for expert in experts]
        limit = tolerance(name, start, ends, target, method, scaling)
        if dtype == torch.float32 and is_spectral(name, target.shape, method):
            assert oracle.relative_error(value - start, target - start) <= DELTA_BOUND, name
        elif dtype == torch.float32:
            assert (np.abs(value - target) <= limit).all(), name
        else:
            rounded = float64(rounded_once(target, dtype))
            assert (np.abs(value - rounded) <= ulp(rounded, dtype) + limit).all(), name
            differing += int((value != rounded).sum())
            allowed += DELTA_BOUND * 2 ** BITS[dtype] * value.size
            total += value.size
    assert differing <= allowed, f"{differing} of {total} weights differ, {allowed:.0f} may"
    for name in base.keys() - expected.keys():
        assert torch.equal(stored[name], base[name]), name


def load(case: Case, folder: Path) -> tuple[Any, dict[str, Any]]:
    return type(MAKERS[case.family]()).from_pretrained(folder, output_loading_info=True)


def with_weights(case: Case, weights: dict[str, torch.Tensor]) -> Any:
    """A model of the case in float64 with these weights; tied ones are filled in from those they are tied to."""
    model = MAKERS[case.family]().double()
    missing, unexpected = model.load_state_dict({name: value.double() for name, value in weights.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= set(model.all_tied_weights_keys), missing
    return model


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(left - right))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def each_case_and_method(function: Any) -> Any:
    function = pytest.mark.parametrize("method", METHODS)(function)
    return pytest.mark.parametrize("case", CASES, ids=str)(function)
