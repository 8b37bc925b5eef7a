"""LoRA adapters by hand: names, scales and orientations as PEFT means them, everything else refused by its name."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import save_folder
from isomerge_fast.checkpoint.io.reader import Reader, files_of, whole
from isomerge_fast.checkpoint.layout import Checkpoint, open_checkpoint
from isomerge_fast.checkpoint.lora.adapter import (
    Adapter,
    LoraPair,
    base_name,
    incompatibilities,
    is_adapter,
    open_adapter,
)
from isomerge_fast.checkpoint.lora.settings import ModulePatterns
from isomerge_fast.errors import InputError
from isomerge_fast.parsing.linear_regex import NamePattern, PatternError, is_plain_name

Q, K, SQUARE, TOKENS = "model.layers.0.q", "model.layers.0.k", "model.layers.1.square", "model.embed_tokens"
HEAD = "lm_head"
BASE = {
    f"{Q}.weight": (8, 6),
    f"{Q}.bias": (8,),
    f"{K}.weight": (4, 6),
    f"{SQUARE}.weight": (6, 6),
    f"{TOKENS}.weight": (10, 6),
    f"{HEAD}.weight": (10, 6),
}
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return make_base(tmp_path / "base", BASE)


def make_base(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    return open_checkpoint(save_folder(folder, {name: torch.zeros(shape) for name, shape in shapes.items()}))


def linear(
    module: str, rows: int, columns: int, rank: int = 2, *, prefix: str = "base_model.model."
) -> dict[str, Tensor]:
    """The factors of one linear layer, with entries that are all different."""
    a = torch.arange(rank * columns, dtype=torch.float32).reshape(rank, columns)
    b = torch.arange(rows * rank, dtype=torch.float32).reshape(rows, rank) - 3
    return {f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b}


def embedding(module: str, tokens: int, width: int, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"base_model.model.{module}.lora_embedding_A": torch.ones(rank, tokens),
        f"base_model.model.{module}.lora_embedding_B": torch.ones(width, rank),
    }


def write(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """An adapter folder; a setting that is `...` is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    kept = {key: value for key, value in {**SETTINGS, **changes}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    return folder


def read(tmp_path: Path, base: Checkpoint, tensors: dict[str, Tensor], **changes: Any) -> Adapter:
    return open_adapter(write(tmp_path / "adapter", tensors, **changes), base)


def test_what_is_read(tmp_path: Path, base: Checkpoint) -> None:
    tensors = {**linear(Q, 8, 6), **embedding(TOKENS, 10, 6), f"base_model.model.{HEAD}.weight": torch.ones(10, 6)}
    adapter = read(
        tmp_path, base, tensors, base_model_name_or_path="some/base", bias="none", modules_to_save=["lm_head"]
    )
    assert is_adapter(adapter.path)
    assert not is_adapter(base.path)
    assert base_name(adapter) == "some/base"
    assert adapter.settings["modules_to_save"] == ["lm_head"]
    assert list(incompatibilities(base, adapter)) == []

    pair = adapter.pairs[f"{Q}.weight"]
    assert (pair.name, pair.rank, pair.scale, pair.transposed, pair.shape) == (f"{Q}.weight", 2, 3.0, False, (8, 6))
    tokens = adapter.pairs[f"{TOKENS}.weight"]
    assert (tokens.transposed, tokens.shape) == (True, (10, 6))
    assert adapter.tensors.keys() == {f"{HEAD}.weight"}
    with Reader(files_of(adapter)) as reader:
        assert torch.equal(reader.read(whole(pair.a)), tensors[pair.a.name])
        assert torch.equal(reader.read(whole(pair.b)), tensors[pair.b.name])

    file = adapter.path / "adapter_config.json"
    assert adapter.files.keys() == {file, adapter.path / "adapter_model.safetensors"}
    assert adapter.files[file].header_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert adapter.files[file].size == file.stat().st_size


SCALES = {
    "plain": ({}, 6 / 2),
    "rslora": ({"use_rslora": True}, 6 / math.sqrt(2)),
    "fractional-alpha": ({"lora_alpha": 0.5}, 0.25),
    "negative-alpha": ({"lora_alpha": -1}, -0.5),
    "by-suffix": ({"alpha_pattern": {"q": 1}}, 0.5),
    "by-path": ({"alpha_pattern": {"layers.0.q": 1}}, 0.5),
    "by-full-name": ({"alpha_pattern": {"model.layers.0.q": 1}}, 0.5),
    "by-expression": ({"alpha_pattern": {r"layers\.\d+\.(q|k)": 1}}, 0.5),
    "alternatives-are-grouped": ({"alpha_pattern": {"k|q": 1}}, 0.5),
    "anchored": ({"alpha_pattern": {"^model.layers.0.q": 1}}, 0.5),
    "not-inside-a-word": ({"alpha_pattern": {"0q": 1, "ayers.0.q": 1, "layers": 1, "layers.0": 1}}, 3.0),
    "first-of-several": ({"alpha_pattern": {"layers.*": 1, "q": 2}}, 0.5),
    "rank-by-pattern": ({"r": 5, "rank_pattern": {"q": 2}}, 3.0),
    "rank-and-rslora": ({"r": 5, "rank_pattern": {"q": 2}, "use_rslora": True}, 6 / math.sqrt(2)),
    "null-patterns": ({"rank_pattern": None, "alpha_pattern": None}, 3.0),
}


@pytest.mark.parametrize(("changes", "scale"), SCALES.values(), ids=SCALES)
def test_scale(tmp_path: Path, base: Checkpoint, changes: dict[str, Any], scale: float) -> None:
    assert read(tmp_path, base, linear(Q, 8, 6), **changes).pairs[f"{Q}.weight"].scale == pytest.approx(
        scale, rel=1e-15
    )


def test_a_pattern_names_the_adapters_module(tmp_path: Path) -> None:
    """Not the base's, which has another prefix here."""
    base = make_base(tmp_path / "base", {"layers.0.q.weight": (8, 6)})
    adapter = read(tmp_path, base, linear(Q, 8, 6), alpha_pattern={"^model.layers.0.q": 1})
    assert adapter.pairs["layers.0.q.weight"].scale == 0.5


HEAD_PAIR = {f"base_model.model.{HEAD}.weight": torch.ones(10, 6)}
NAMES = {
    "as-they-are": (linear(Q, 8, 6), "", ""),
    "without-the-wrapper": (linear(Q, 8, 6, prefix=""), "", ""),
    "prefix-missing-in-adapter": (linear("layers.0.q", 8, 6), "", ""),
    "prefix-missing-in-base": (linear(Q, 8, 6), "model.", ""),
    "longer-prefix": (linear(f"wrapped.bert.{Q}", 8, 6), "", ""),
    "adapters-name-inside": (
        {name.replace(".weight", ".task.weight"): tensor for name, tensor in linear(Q, 8, 6).items()},
        "",
        "",
    ),
}


@pytest.mark.parametrize(("tensors", "removed", "added"), NAMES.values(), ids=NAMES)
def test_names(tmp_path: Path, tensors: dict[str, Tensor], removed: str, added: str) -> None:
    base = make_base(tmp_path / "base", {added + name.removeprefix(removed): shape for name, shape in BASE.items()})
    adapter = read(tmp_path, base, {**tensors, **HEAD_PAIR})
    assert list(adapter.pairs) == [f"{Q.removeprefix(removed)}.weight"]
    assert list(adapter.tensors) == [f"{HEAD}.weight"]  # which lies outside the prefix, and keeps its name
    assert list(incompatibilities(base, adapter)) == []


def test_a_prefix_has_to_fit_all_pairs(tmp_path: Path, base: Checkpoint) -> None:
    adapter = read(tmp_path, base, {**linear("layers.0.q", 8, 6), **linear("layers.0.w", 8, 6)})
    assert list(adapter.pairs) == ["layers.0.q.weight", "layers.0.w.weight"]
    assert list(incompatibilities(base, adapter)) == [
        f"2 tensors that it changes are not in the base {base.path}, such as 'layers.0.q.weight'"
    ]


def test_a_prefix_that_could_be_two(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {"text.q.weight": (8, 6), "vision.q.weight": (8, 6)})
    with pytest.raises(InputError, match=r"'q\.weight' may be 'text\.q\.weight' or 'vision\.q\.weight'"):
        read(tmp_path, base, linear("q", 8, 6))


def test_whole_tensors_as_peft_has_written_them(tmp_path: Path, base: Checkpoint) -> None:
    """The layer under an adapter, copies with the adapter's name, and the base's own beside what was trained."""
    tensors = {
        **linear(Q, 8, 6),
        f"base_model.model.{Q}.base_layer.bias": torch.ones(8),
        f"base_model.model.{HEAD}.modules_to_save.default.weight": torch.ones(10, 6),
        f"base_model.model.{HEAD}.original_module.weight": torch.zeros(10, 6),
    }
    adapter = read(tmp_path, base, tensors, bias="lora_only")
    assert {name: stored.name for name, stored in adapter.tensors.items()} == {
        f"{Q}.bias": f"base_model.model.{Q}.base_layer.bias",
        f"{HEAD}.weight": f"base_model.model.{HEAD}.modules_to_save.default.weight",
    }
    tensors[f"base_model.model.{HEAD}.weight"] = torch.ones(10, 6)
    tensors[f"base_model.model.{HEAD}.modules_to_save.weight"] = torch.ones(10, 6)
    adapter = read(tmp_path, base, tensors, bias="all")
    assert adapter.tensors[f"{HEAD}.weight"].name == f"base_model.model.{HEAD}.weight"


ORIENTATIONS = {
    # (shapes of the base, fan_in_fan_out, transposed)
    "linear": ({Q: (8, 6)}, False, {Q: False}),
    "conv1d": ({Q: (6, 8)}, True, {Q: True}),
    "shape-against-setting": ({Q: (6, 8)}, False, {Q: True}),
    "shape-against-setting-again": ({Q: (8, 6)}, True, {Q: False}),
    "square-by-setting": ({Q: (6, 8), SQUARE: (6, 6)}, True, {Q: True, SQUARE: True}),
    "square-alone": ({SQUARE: (6, 6)}, True, {SQUARE: True}),
    "misfit-by-setting": ({Q: (7, 9)}, True, {Q: True}),
}


@pytest.mark.parametrize(("shapes", "setting", "expected"), ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_orientation(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], setting: bool, expected: dict[str, bool]
) -> None:
    base = make_base(tmp_path / "base", {f"{module}.weight": shape for module, shape in shapes.items()})
    tensors = {**(linear(Q, 8, 6) if Q in shapes else {}), **(linear(SQUARE, 6, 6) if SQUARE in shapes else {})}
    adapter = read(tmp_path, base, tensors, fan_in_fan_out=setting)
    assert {name.removesuffix(".weight"): pair.transposed for name, pair in adapter.pairs.items()} == expected


def test_a_square_layer_among_both_kinds_cannot_be_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {f"{Q}.weight": (6, 8), f"{K}.weight": (4, 6), f"{SQUARE}.weight": (6, 6)})
    with pytest.raises(InputError, match=r"'model\.layers\.1\.square\.weight' \[6, 6\] is stored transposed cannot be"):
        read(tmp_path, base, {**linear(Q, 8, 6), **linear(K, 4, 6), **linear(SQUARE, 6, 6)}, fan_in_fan_out=False)


GOOD = linear(Q, 8, 6)
A, B = GOOD
MALFORMED_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no-B": ({A: GOOD[A]}, r"'model\.layers\.0\.q' has .*lora_A\.weight', but no B"),
    "no-A": ({B: GOOD[B]}, r"'model\.layers\.0\.q' has .*lora_B\.weight', but no A"),
    "none": (HEAD_PAIR, "no LoRA factors"),
    "rank-not-as-said": (linear(Q, 8, 6, rank=3), r"\[3, 6\].*\[8, 3\] are not of rank 2"),
    "ranks-differ": ({A: GOOD[A], B: torch.ones(8, 3)}, r"\[2, 6\].*\[8, 3\] have different ranks"),
    "convolution": ({A: torch.ones(2, 6, 3, 3), B: torch.ones(8, 2, 1, 1)}, "convolution is not read; merge it"),
    "not-gathered": ({A: torch.ones(0), B: GOOD[B]}, "before its shards were gathered"),
    "empty": ({A: torch.ones(2, 0), B: GOOD[B]}, "before its shards were gathered"),
    "integers": ({A: GOOD[A].to(torch.int8), B: GOOD[B]}, "is I8: quantized factors"),
    "float8": ({A: GOOD[A], B: GOOD[B].to(torch.float8_e4m3fn)}, "is F8_E4M3: quantized factors"),
    "dora": ({**GOOD, f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(8)}, "DoRA.*save_as_lora"),
    "lora-bias": ({**GOOD, f"base_model.model.{Q}.lora_B.bias": torch.ones(8)}, "B has a bias of its own"),
    "tokens": ({**GOOD, f"{TOKENS}.token_adapter.trainable_tokens_delta": torch.ones(1, 6)}, "single rows"),
    "kasa": ({**GOOD, f"base_model.model.{Q}.lora_diag": torch.ones(2)}, "lora_diag' is no tensor of a plain LoRA"),
    "adalora": ({**GOOD, f"base_model.model.{Q}.lora_E": torch.ones(2, 1)}, "lora_E' is no tensor of a plain LoRA"),
    "nested": (linear(f"{Q}.base_layer", 8, 6), "inside another adapted layer"),
    "twice": ({**GOOD, **linear(Q, 8, 6, prefix="")}, "factors of one module"),
    "linear-and-embedding": ({**GOOD, **embedding(Q, 6, 8)}, "factors of one module"),
    "two-adapters": (
        {**GOOD, **{n.replace(".weight", ".b.weight"): t for n, t in linear(K, 4, 6).items()}},
        "belong to different adapters",
    ),
    "whole-twice": ({**GOOD, **HEAD_PAIR, f"{HEAD}.weight": torch.ones(10, 6)}, r"are both 'lm_head\.weight'"),
    "whole-after-renaming": (
        {**linear("x.model.layers.0.q", 8, 6), "x.lm_head.weight": torch.ones(1), "lm_head.weight": torch.ones(1)},
        r"are both 'lm_head\.weight' of the base",
    ),
    "copies-differ": (
        {**GOOD, **HEAD_PAIR, f"{HEAD}.modules_to_save.default.weight": torch.ones(11, 6)},
        r"are both 'lm_head\.weight'",
    ),
    "two-copies": (
        {**GOOD, f"{HEAD}.modules_to_save.a.bias": torch.ones(6), f"{HEAD}.modules_to_save.bias": torch.ones(6)},
        "are both 'lm_head.bias'|belong to different adapters",
    ),
    "original-only": ({**GOOD, f"{HEAD}.original_module.weight": torch.ones(10, 6)}, "the base's own"),
    "resized-vocabulary": (
        {**embedding(TOKENS, 11, 6), f"base_model.model.{TOKENS}.base_layer.weight": torch.ones(11, 6)},
        r"'model\.embed_tokens\.weight' is there whole .* of another vocabulary",
    ),
    "factors-and-whole": (
        {**embedding(TOKENS, 10, 6), f"base_model.model.{TOKENS}.weight": torch.ones(10, 6)},
        r"'model\.embed_tokens\.weight' is there whole .* and as factors .*save_embedding_layers=False",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), MALFORMED_TENSORS.values(), ids=MALFORMED_TENSORS)
def test_tensors_are_refused_by_name(
    tmp_path: Path, base: Checkpoint, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, base, tensors)
    assert "adapter_model.safetensors" in str(caught.value)


REFUSED_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no-type": ({"peft_type": ...}, "no peft_type"),
    "type-of-a-number": ({"peft_type": 3}, "peft_type 3 is not read"),
    **{
        kind: ({"peft_type": kind}, f"peft_type '{kind}' is not read.*merge_and_unload")
        for kind in ("ADALORA", "LOHA", "LOKR", "IA3", "VERA", "OFT", "PROMPT_TUNING", "XLORA", "lora")
    },
    **{
        str(start): ({"init_lora_weights": start}, f"init_lora_weights is '{start}'.*{hint}")
        for start, hint in {
            "pissa": "path_initial_model_for_weight_conversion",
            "pissa_niter_16": "path_initial_model_for_weight_conversion",
            "olora": "path_initial_model_for_weight_conversion",
            "corda": "path_initial_model_for_weight_conversion",
            "lora_ga": "path_initial_model_for_weight_conversion",
            "loftq": "quantized base",
            "of-tomorrow": "not known here",
        }.items()
    },
    "dora": ({"use_dora": True}, "use_dora is True.*save_as_lora"),
    "qalora": ({"use_qalora": True}, "use_qalora.*quantized base"),
    "lora-bias": ({"lora_bias": True}, "lora_bias is True.*B has a bias"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication.*more layers"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens.*not applied to every token"),
    "token-indices": ({"trainable_token_indices": [1]}, "trainable_token_indices.*single rows"),
    "parameters": ({"target_parameters": ["w"]}, "target_parameters"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "monteclora": ({"monteclora_config": {"num_samples": 8}}, "monteclora_config.*at random"),
    "bdlora": ({"use_bdlora": {"nblocks": 1}}, "use_bdlora.*block-diagonal"),
    "velora": ({"velora_config": {"scale": 1.0}}, "velora_config"),
    "megatron": ({"megatron_config": {"x": 1}}, "megatron_config.*shards"),
    "old-merged-linear": ({"enable_lora": [True, False]}, "enable_lora"),
    "unknown": ({"use_moon_phase": "waxing"}, "use_moon_phase is 'waxing', a setting that is not known"),
    "unknown-number": ({"moon": 0}, "moon is 0, a setting that is not known"),
    "no-rank": ({"r": ...}, "r is None, expected a whole number"),
    "zero-rank": ({"r": 0}, "r is 0, expected"),
    "boolean-rank": ({"r": True}, "r is True, expected"),
    "fractional-rank": ({"r": 2.0}, r"r is 2\.0, expected"),
    "no-alpha": ({"lora_alpha": ...}, "lora_alpha is None, expected a finite number"),
    "alpha-as-text": ({"lora_alpha": "6"}, "lora_alpha is '6'"),
    "huge-alpha": ({"lora_alpha": 10**400}, "lora_alpha is 1000.*…, expected a finite number"),
    "rslora-as-text": ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
    "transposed-as-number": ({"fan_in_fan_out": 1}, "fan_in_fan_out is 1, expected true or false"),
    "bias": ({"bias": "some"}, "bias is 'some'"),
    "base-as-number": ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7"),
    "rank-pattern-list": ({"rank_pattern": [["q", 2]]}, "rank_pattern is .*expected names with numbers"),
    "rank-pattern-value": ({"rank_pattern": {"q": "2"}}, "rank_pattern of 'q' is '2', expected a whole number"),
    "alpha-pattern-value": ({"alpha_pattern": {"q": None}}, "alpha_pattern of 'q' is None, expected a finite"),
    "pattern": ({"alpha_pattern": {"q(": 1}}, r"alpha_pattern: 'q\(' is no regular expression"),
    "huge-pattern": ({"alpha_pattern": {"q{99999999999}": 1}}, "is no regular expression"),
    "long-pattern": ({"alpha_pattern": {"(" + "q" * 2000 + ")": 1}}, "has 2002 characters; refused above 1000"),
    "nested-pattern": ({"alpha_pattern": {"(" * 100 + "q" + ")" * 100: 1}}, "is nested too deeply"),
    "repeating-pattern": ({"alpha_pattern": {"((q{99}){99}){99}": 1}}, "repeats more than is matched"),
    "back-reference": ({"alpha_pattern": {r"(q)\1": 1}}, r"is no regular expression that is matched \(at '\\\\1'\)"),
    "look-ahead": ({"alpha_pattern": {"(?=q)q": 1}}, r"has a group that begins with \(\?, which is not matched"),
    "many-patterns": ({"alpha_pattern": {f"q+{n}": 1 for n in range(1001)}}, "more than 1000 regular expressions"),
    "a-megabyte": ({"alpha_pattern": "q" * 1_000_000}, "alpha_pattern is 'q+…, expected names"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_SETTINGS.values(), ids=REFUSED_SETTINGS)
def test_settings_are_refused_by_name(tmp_path: Path, base: Checkpoint, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, base, GOOD, **changes)
    assert "adapter_config.json" in str(caught.value)


def test_patterns_that_take_python_hours(tmp_path: Path, base: Checkpoint) -> None:
    """Of a few characters each: ``re`` tries 2^n or n^10 ways before it finds that none leads to the end."""
    slow = ["(.*)*x", "(.+)+x", "(.|.)*x", ".*.*.*.*.*.*.*.*.*.*x", "(.?){40}x", "((([a-z.0-9]+)+)+)+x", "(a|a?)+x"]
    started = time.perf_counter()
    adapter = read(tmp_path, base, linear(Q, 8, 6), alpha_pattern={**dict.fromkeys(slow, 1), "q": 12})
    assert time.perf_counter() - started < 2.0
    assert adapter.pairs[f"{Q}.weight"].scale == 6.0
    long = "a." * 400 + "b"
    for pattern in (*slow, "(a*)*x", "(.*a){12}x"):
        assert not NamePattern(pattern).matches(long), pattern
    assert time.perf_counter() - started < 5.0


def test_a_pattern_for_every_module(tmp_path: Path) -> None:
    """4,000 of each: tried one after the other these would be 16 million matches."""
    names = [f"m.{layer}.e.{expert}.w" for layer in range(40) for expert in range(100)]
    file = tmp_path / "adapter_config.json"
    patterns = ModulePatterns(file, "alpha_pattern", {"alpha_pattern": {name: at for at, name in enumerate(names)}})
    started = time.perf_counter()
    assert [patterns.find(name, -1.0) for name in names] == list(range(len(names)))
    assert patterns.find("m.0.e.0.v", -1.0) == -1.0
    assert time.perf_counter() - started < 1.0


PIECES = [
    "a",
    "b",
    ".",
    r"\.",
    r"\d",
    "[ab]",
    "[^a]",
    "1",
    "(?:",
    "(",
    ")",
    "|",
    "*",
    "+",
    "?",
    "{2}",
    "{1,}",
    "^",
    "$",
    "*?",
]


@settings(max_examples=400, deadline=None)
@given(
    pattern=st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join),
    names=st.lists(st.text("ab1.", max_size=7), min_size=1, max_size=6),
)
def test_patterns_match_what_python_matches(pattern: str, names: list[str]) -> None:
    """By PEFT's rule, ``(.*\\.)?(pattern)$``. What one does not compile the other refuses, and may refuse more."""
    if is_plain_name(pattern):
        return
    try:
        ours = NamePattern(pattern)
    except PatternError:
        return
    theirs = re.compile(rf"(.*\.)?({pattern})$")
    for name in names:
        assert ours.matches(name) == (theirs.match(name) is not None), name


def test_what_steers_training_only_is_read(tmp_path: Path, base: Checkpoint) -> None:
    """The settings of an adapter of PEFT 0.21 that uses nothing but plain LoRA, with the switches of others off."""
    off = {"use_dora": False, "layer_replication": None, "target_parameters": [], "use_bdlora": None, "tomorrow": {}}
    training = {
        "lora_dropout": 0.1,
        "qalora_group_size": 16,
        "megatron_core": "megatron.core",
        "peft_version": "0.21.2",
    }
    training |= {
        "target_modules": ["q"],
        "layers_to_transform": [0],
        "ensure_weight_tying": True,
        "task_type": "CAUSAL_LM",
    }
    for start in (True, False, None, "gaussian", "eva", "orthogonal", "mica"):
        assert read(tmp_path, base, GOOD, **off, **training, init_lora_weights=start).pairs.keys() == {f"{Q}.weight"}


class TestFolders:
    def test_pickles_are_not_opened(self, tmp_path: Path, base: Checkpoint) -> None:
        folder = write(tmp_path / "adapter", GOOD)
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(InputError, match=r"adapter_model\.bin\), which are never opened\. Convert"):
            open_adapter(folder, base)
        (folder / "adapter_model.bin").unlink()
        with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
            open_adapter(folder, base)

    @pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
    def test_a_model_beside_the_adapter(self, tmp_path: Path, base: Checkpoint, name: str) -> None:
        folder = write(tmp_path / "adapter", GOOD)
        (folder / "training_args.bin").write_bytes(b"")  # which is no model
        assert open_adapter(folder, base).pairs
        (folder / name).write_bytes(b"")
        with pytest.raises(InputError, match=rf"holds an adapter \(adapter_config.json\) and weights.*{name}"):
            open_adapter(folder, base)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "not JSON"),
            ("[]", "not a JSON object"),
            ('{"r": NaN}', "NaN is not JSON"),
            ('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}', "lora_alpha is inf, expected a finite number"),
            ('{"r": 1, "r": 2}', "'r' occurs twice"),
            ('{"auto_mapping": ' + "[" * 500 + "]" * 500 + "}", "nested too deeply"),
        ],
    )
    def test_malformed_settings(self, tmp_path: Path, base: Checkpoint, text: str, message: str) -> None:
        folder = write(tmp_path / "adapter", GOOD)
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=rf"adapter_config\.json.*{message}"):
            open_adapter(folder, base)

    def test_no_adapter(self, tmp_path: Path, base: Checkpoint) -> None:
        for path in (tmp_path / "nowhere", base.path):
            with pytest.raises(InputError, match=r"there is no adapter_config\.json"):
                open_adapter(path, base)

    def test_truncated_weights(self, tmp_path: Path, base: Checkpoint) -> None:
        file = write(tmp_path / "adapter", GOOD) / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(InputError, match=r"adapter_model\.safetensors: truncated"):
            open_adapter(file.parent, base)


MISFITS = {
    "shape": ({Q: (9, 6)}, r"'model\.layers\.0\.q\.weight'.*has shape \[8, 6\], in the base .* \[9, 6\]$"),
    "vocabulary": ({TOKENS: (11, 6)}, r"has shape \[10, 6\], in the base .* \[11, 6\] \(another vocabulary size\?\)"),
    "missing": ({K: None}, r"'model\.layers\.0\.k\.weight' \[4, 6\], the module that .* is not in the base"),
}


@pytest.mark.parametrize(("changes", "message"), MISFITS.values(), ids=MISFITS)
def test_misfits(tmp_path: Path, changes: dict[str, tuple[int, ...] | None], message: str) -> None:
    shapes = {**BASE, **{f"{module}.weight": shape for module, shape in changes.items()}}
    base = make_base(tmp_path / "base", {name: shape for name, shape in shapes.items() if shape is not None})
    adapter = read(tmp_path, base, {**GOOD, **linear(K, 4, 6), **embedding(TOKENS, 10, 6), **HEAD_PAIR})
    (line,) = incompatibilities(base, adapter)
    assert str(base.path) in line
    assert re.search(message, line), line


def test_misfits_of_a_tied_head_and_of_integers(tmp_path: Path) -> None:
    tensors = {f"{Q}.weight": torch.zeros(8, 6, dtype=torch.int8)}
    base = open_checkpoint(save_folder(tmp_path / "base", tensors, config={"tie_word_embeddings": True}))
    tied, quantized = incompatibilities(base, read(tmp_path, base, {**GOOD, **linear(HEAD, 10, 6)}))
    assert "is I8 in the base" in quantized
    assert "the base ties its word embeddings" in tied


KEYS = ["peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "bias", "rank_pattern", "alpha_pattern"]
KEYS += ["init_lora_weights", "base_model_name_or_path", "use_dora", "target_modules", "eva_config", "unknown"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.just(2),
    st.just("LORA"),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_settings_are_an_error_or_a_scale(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Whatever stands there: never another exception, never a scale that is no number."""
    if not (tmp_path / "base").exists():
        make_base(tmp_path / "base", BASE)
        write(tmp_path / "adapter", GOOD)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**SETTINGS, **changes}))
    try:
        adapter = open_adapter(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    except InputError:
        return
    (pair,) = adapter.pairs.values()
    assert isinstance(pair, LoraPair)
    assert isinstance(pair.scale, float)
    assert math.isfinite(pair.scale)
    assert isinstance(base_name(adapter), str | None)
