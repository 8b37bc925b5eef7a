"""What beside the experts' weights would give them another function: each difference from the base is noted."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import isomerge_fast as imf
from adapters import make_adapters
from checkpoints import save_folder
from isomerge_fast.config import load_config
from isomerge_fast.planning.drift.config import _flat, config_differences
from isomerge_fast.planning.drift.tokenizer import TOKENIZER, TokenSettings, tokenizer_differences
from isomerge_fast.planning.planner import make_plan

WEIGHTS = {"a.weight": torch.ones(4, 4)}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "transformers_version": "4.46.0"}
OTHER_RELEASE = {**LLAMA, "transformers_version": "5.1.0"}
CONFIG, BESIDE = (
    "config.json differs from the base's, which the output has",
    "tokens, chat or generation settings differ from the base's, which the output has",
)


def notes_of(base: Path, *experts: Path) -> list[str]:
    config = {"base": base, "experts": list(experts), "method": "mean", "scaling": 1.0}
    return [note for note in make_plan(load_config(config)).notes if str(base.parent) in note]


def folder(root: Path, name: str, **files: Any) -> Path:
    """A checkpoint with files beside it: ``tokenizer_config={…}``, ``chat_template="…"``."""
    made = save_folder(root / name, WEIGHTS, config=files.pop("config", LLAMA))
    for stem, content in files.items():
        if isinstance(content, str):
            (made / f"{stem}.jinja").write_text(content)
        else:
            (made / f"{stem}.json").write_text(json.dumps(content))
    return made


def rope(**parameters: Any) -> dict[str, Any]:
    return {**LLAMA, **parameters}


DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "heads": (LLAMA, {**LLAMA, "num_attention_heads": 8}, ["num_attention_heads 8 (base 4)"]),
    "one-has-it": (
        LLAMA,
        {**LLAMA, "attention_multiplier": 0.1},
        ["attention_multiplier 0.1 (the base's config has none)"],
    ),
    "the-base-has-it": ({**LLAMA, "sliding_window": 4096}, LLAMA, ["no sliding_window (base 4096)"]),
    "nested": (
        {"text_config": {"rms_norm_eps": 1e-6}, "vision_config": {"hidden_act": "gelu"}},
        {"text_config": {"rms_norm_eps": 1e-5}, "vision_config": {"hidden_act": "quick_gelu"}},
        [
            "text_config.rms_norm_eps 1e-05 (base 1e-06)",
            'vision_config.hidden_act "quick_gelu" (base "gelu")',
        ],
    ),
    "rope-in-two-spellings": (
        rope(rope_theta=10_000.0, rope_scaling=None),
        {**OTHER_RELEASE, "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}},
        [],
    ),
    "scaled-rope-in-two-spellings": (
        rope(rope_theta=500_000, rope_scaling={"type": "yarn", "factor": 4}),
        {**OTHER_RELEASE, "rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}},
        [],
    ),
    "rope-of-two-spellings-differs": (
        rope(rope_theta=10_000.0),
        {**OTHER_RELEASE, "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}},
        [
            "rope_parameters.factor 2.0 (the base's config has none)",
            "rope_parameters.rope_theta 1000000.0 (base 10000.0)",
            'rope_parameters.rope_type "linear" (base "default")',
        ],
    ),
    "rope-that-nobody-wrote-down": (
        LLAMA,
        {**OTHER_RELEASE, "rope_parameters": {"rope_theta": 10_000, "rope_type": "default"}},
        [],
    ),
    "rope-of-two-kinds-of-layers": (
        rope(rope_theta=1e6, rope_local_base_freq=10_000.0, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        {
            **OTHER_RELEASE,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1_000_000.0, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 20_000.0, "rope_type": "default"},
            },
        },
        ["rope_parameters.sliding_attention.rope_theta 20000.0 (base 10000.0)"],
    ),
    "rope-of-gpt-neox": (
        {"rotary_emb_base": 10_000, "rotary_pct": 0.25},
        {"rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25, "rope_type": "default"}},
        [],
    ),
    "numbers-in-other-spellings": (
        {"eps": 1e-05, "width": 4096, "theta": 10_000, "scale": "1e-3", "eos_token_id": 2},
        {"eps": 0.00001, "width": 4096.0, "theta": 10_000.0, "scale": 0.001, "eos_token_id": [2]},
        [],
    ),
    "lists": ({"eos_token_id": [2, 3]}, {"eos_token_id": [2, 63]}, ["eos_token_id [2, 63] (base [2, 3])"]),
    "not-a-number-in-a-list": (
        {"limit": [0, {"a": float("nan")}]},
        {"limit": [0.0, {"a": float("nan")}]},
        [],
    ),
    "true-is-not-one": ({"use_mlp": 1}, {"use_mlp": True}, ["use_mlp true (base 1)"]),
    "what-is-off-is-off": (
        {**LLAMA, "attention_bias": False, "sliding_window": None, "logit_softcap": 0.0},
        {**LLAMA, "quantize": None, "residual_multiplier": 1.0},
        [],
    ),
    "what-changes-no-function": (
        {
            **LLAMA,
            "_name_or_path": "x",
            "torch_dtype": "float16",
            "use_cache": True,
            "attention_dropout": 0.1,
            "initializer_range": 0.02,
            "architectures": ["A"],
            "id2label": {"0": "a"},
        },
        {
            **OTHER_RELEASE,
            "dtype": "bfloat16",
            "use_cache": False,
            "resid_pdrop": 0.2,
            "unsloth_version": "2025",
            "id2label": {"0": "b"},
            "text_config": {"torch_dtype": "float16"},
        },
        [],
    ),
    "what-another-release-writes-down": (
        LLAMA,
        {**OTHER_RELEASE, "head_dim": 8, "tie_word_embeddings": True, "layer_types": ["full_attention"]},
        [],
    ),
    "a-head-of-another-size": (
        LLAMA,
        {**OTHER_RELEASE, "head_dim": 16},
        ["head_dim 16 (the base's config has none)"],
    ),
    "a-window-that-is-not-used": (
        {**LLAMA, "sliding_window": 32_768, "max_window_layers": 28, "use_sliding_window": False},
        {**OTHER_RELEASE, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 28},
        [],
    ),
    "odd": ({"rope_scaling": "x", "a": {"b": []}}, {"rope_scaling": {"type": 5}, "a": 3, "": {}}, [
        'a 3 (the base\'s config has none)',
        "rope_parameters.rope_type 5 (the base's config has none)",
        'no rope_scaling (base "x")',
    ]),
    "no-config": ({}, {}, []),
}  # fmt: skip


@pytest.mark.parametrize(("base", "expert", "expected"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_configs(base: dict[str, Any], expert: dict[str, Any], expected: list[str]) -> None:
    assert list(config_differences(base, expert)) == expected
    assert not list(config_differences(expert, expert))


@pytest.mark.parametrize("missing", [(None, LLAMA), (LLAMA, None), (None, None)])
def test_a_config_that_is_not_there_is_not_compared(missing: tuple[Any, Any]) -> None:
    assert not list(config_differences(*missing))


REAL = {
    "llama": transformers.LlamaConfig,
    "gpt2": transformers.GPT2Config,
    "bert": transformers.BertConfig,
    "gemma": transformers.Gemma3TextConfig,
    "modernbert": transformers.ModernBertConfig,
    "clip": transformers.CLIPConfig,
}


@pytest.mark.parametrize("name", REAL)
def test_what_transformers_saves_differs_in_what_was_changed_alone(name: str) -> None:
    def saved(**changes: Any) -> dict[str, Any]:
        return json.loads(REAL[name](**changes).to_json_string())

    assert not list(config_differences(saved(), saved()))
    key = {"gpt2": "layer_norm_epsilon", "modernbert": "norm_eps", "clip": "logit_scale_init_value"}.get(name)
    key = key or ("layer_norm_eps" if name == "bert" else "rms_norm_eps")
    changed = config_differences(saved(), saved(**{key: 0.5, "initializer_range": 0.5}))
    assert list(changed) == [f"{key} 0.5 (base {json.dumps(saved()[key])})"]


def test_a_config_of_the_release_before_is_the_same_model() -> None:
    """As it lies on the Hub, beside what transformers 5 makes of it."""
    old = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    }
    new = json.loads(transformers.LlamaConfig(**old).to_json_string())
    assert new["transformers_version"] != old["transformers_version"]
    assert not list(config_differences(old, new))
    assert not list(config_differences(new, old))


OTHER_RELEASES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "vit": (transformers.ViTConfig, {"hidden_size": 64, "num_attention_heads": 4, "qkv_bias": True}),
    "t5": (transformers.T5Config, {"d_model": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "gpt-neox": (transformers.GPTNeoXConfig, {"rotary_emb_base": 10_000, "rotary_pct": 0.25}),
    "gemma": (transformers.GemmaConfig, {"hidden_act": "gelu", "head_dim": 256, "rope_theta": 10_000.0}),
    "deberta": (transformers.DebertaV2Config, {"pos_att_type": "p2c|c2p", "relative_attention": True}),
    "bloom": (transformers.BloomConfig, {"n_embed": 64, "num_attention_heads": 4}),
    "mamba": (transformers.MambaConfig, {"time_step_rank": "auto"}),
    # What some releases wrote of a part: its class's defaults are not in it.
    "llava": (
        transformers.LlavaConfig,
        {
            "image_token_index": 32_000,
            "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32_064},
            "vision_config": {"model_type": "clip_vision_model", "hidden_size": 768, "vocab_size": 32_000},
        },
    ),
    # The text model's keys at the top, where transformers 5 has a part for them.
    "qwen2-vl": (
        transformers.Qwen2VLConfig,
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "rope_theta": 1_000_000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "vision_config": {"depth": 2},
        },
    ),
}


@pytest.mark.parametrize("name", OTHER_RELEASES)
def test_what_other_releases_wrote_is_the_same_model(name: str) -> None:
    kind, settings = OTHER_RELEASES[name]
    old = {**settings, "model_type": kind.model_type, "transformers_version": "4.41.2"}
    new = json.loads(kind(**json.loads(json.dumps(settings))).to_json_string())
    assert not list(config_differences(old, new))
    assert not list(config_differences(new, old))


def test_what_another_release_cannot_have_meant_is_a_difference() -> None:
    scaled = {**OTHER_RELEASE, "attention_multiplier": 0.1, "sliding_window": 64, "pooler_act": "tanh"}
    assert list(config_differences(LLAMA, scaled)) == [
        "attention_multiplier 0.1 (the base's config has none)",
        "sliding_window 64 (the base's config has none)",
    ]
    parts = {"text_config": {"rms_norm_eps": 1e-6}}, {"text_config": {"rms_norm_eps": 1e-5, "hidden_size": 64}}
    old, new = (
        {**part, "transformers_version": release} for part, release in zip(parts, ("4.41.2", "5.1.0"), strict=True)
    )
    assert list(config_differences(old, new)) == ["text_config.rms_norm_eps 1e-05 (base 1e-06)"]


def test_experts_with_the_same_differences_share_a_note(tmp_path: Path) -> None:
    base = folder(tmp_path, "base")
    long = {**LLAMA, **{f"key{number:02}": "x" * 500 for number in range(30)}}
    experts = [
        folder(tmp_path, name, config=config)
        for name, config in {"a": long, "same": LLAMA, "b": {**LLAMA, "hidden_act": "gelu"}, "c": long}.items()
    ]
    first, second = notes_of(base, *experts)
    assert first.startswith(f"{experts[0]}, {experts[3]}: {CONFIG}: key00 ")
    assert first.endswith("… (the base's config has none), and 16 more")
    assert len(first) < 14 * 150 + 200
    assert second == f'{experts[2]}: {CONFIG}: hidden_act "gelu" (the base\'s config has none)'
    many = [folder(tmp_path, f"m{number}", config=long) for number in range(9)]
    (note,) = notes_of(base, *many)
    assert note.startswith(f"{', '.join(map(str, many[:6]))} and 3 more: ")


CHAT = "{{ messages }}"
TOKENS = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": CHAT, "tokenizer_class": "LlamaTokenizer"}
FILES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "eos": (
        {"tokenizer_config": TOKENS},
        {"tokenizer_config": {**TOKENS, "eos_token": {"content": "<|im_end|>", "lstrip": False}}},
        ['eos_token "<|im_end|>" (base "</s>")'],
    ),
    "eos-in-the-map": (
        {"tokenizer_config": {"chat_template": CHAT}, "special_tokens_map": {"eos_token": "</s>"}},
        {"tokenizer_config": {**TOKENS, "eos_token": "<end>"}},
        ['eos_token "<end>" (base "</s>")'],
    ),
    "pad-is-new": (
        {"tokenizer_config": {**TOKENS, "pad_token": None}},
        {"tokenizer_config": {**TOKENS, "pad_token": "<|finetune_pad|>"}},
        ['pad_token "<|finetune_pad|>" (the base has none)'],
    ),
    "pad-is-gone": (
        {"tokenizer_config": {**TOKENS, "pad_token": "<|pad|>"}},
        {"tokenizer_config": TOKENS},
        ['no pad_token (base "<|pad|>")'],
    ),
    "usual-tokens-that-one-release-writes-down": (
        {"tokenizer_config": {"do_lower_case": True}},
        {"tokenizer_config": {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]"}},
        [],
    ),
    "template-in-a-file-of-its-own": (
        {"tokenizer_config": TOKENS},
        {"tokenizer_config": {**TOKENS, "chat_template": None}, "chat_template": CHAT + "\n"},
        [],
    ),
    "another-template": (
        {"tokenizer_config": TOKENS},
        {"tokenizer_config": TOKENS, "chat_template": "{{ other }}"},
        ["chat template"],
    ),
    "template-is-new": (
        {"tokenizer_config": {"eos_token": "</s>"}},
        {"tokenizer_config": {"eos_token": "</s>"}, "chat_template": CHAT},
        ["chat template (the base has none)"],
    ),
    "no-template": (
        {"tokenizer_config": TOKENS},
        {"tokenizer_config": {**TOKENS, "chat_template": None}},
        ["no chat template"],
    ),
    "no-files": ({"tokenizer_config": TOKENS, "generation_config": {"eos_token_id": 2}}, {}, []),
    "generation": (
        {"generation_config": {"eos_token_id": 2, "pad_token_id": 0, "temperature": 0.6, "transformers_version": "4"}},
        {"generation_config": {"eos_token_id": [2, 63], "temperature": 1.0, "top_p": 0.9, "transformers_version": "5"}},
        ["eos_token_id of generation_config.json [2, 63] (base 2)", "sampling defaults (temperature, top_p)"],
    ),
    "generation-beside-a-config": (
        {"config": {**LLAMA, "eos_token_id": 2}},
        {"config": {**LLAMA, "eos_token_id": 2}, "generation_config": {"eos_token_id": [2]}},
        [],
    ),
    "added": (
        {"added_tokens": {"<a>": 10, "<b>": 11}, "tokenizer_config": {}},
        {"added_tokens": {"<a>": 12, "<b>": 11}, "tokenizer_config": {
            "added_tokens_decoder": {"13": {"content": "<think>", "special": False}}}},
        [
            '1 added token(s) that the base\'s files do not name, such as "<think>" 13',
            '1 added token(s) of other numbers, such as "<a>" 12 (base 10)',
        ],
    ),
    "odd": (
        {"tokenizer_config": {"eos_token": [], "added_tokens_decoder": [1]}, "added_tokens": {"a": []}},
        {"tokenizer_config": {"eos_token": {"content": 5}, "chat_template": [{"name": "x"}]}, "generation_config": {}},
        ["eos_token 5 (base [])", "chat template (the base has none)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("base", "expert", "expected"), FILES.values(), ids=FILES)
def test_files_beside_the_weights(
    tmp_path: Path, base: dict[str, Any], expert: dict[str, Any], expected: list[str]
) -> None:
    found = folder(tmp_path, "base", **base), folder(tmp_path, "expert", **expert)
    note = f"{found[1]}: {BESIDE}: {', '.join(expected)}"
    assert notes_of(*found) == ([note] if expected else [])


def test_adapters_bring_files_too(tmp_path: Path) -> None:
    base, adapters = make_adapters(tmp_path)
    (adapters[1] / "chat_template.jinja").write_text(CHAT)
    (adapters[1] / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    notes = make_plan(load_config({"base": base, "experts": adapters, "scaling": 1.0})).notes
    assert (
        f'{adapters[1]}: {BESIDE}: eos_token "<|im_end|>" (the base has none), chat template (the base has none)'
        in notes
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not JSON (Expecting property name enclosed in double quotes"),
        (b"[]", "not a JSON object"),
        (b"\xff{}", "not UTF-8"),
        (b"[" * 5_000, "nested too deeply"),
        (b" " * 8_000_001, "8000001 bytes; refused above 8000000"),
    ],
    ids=["torn", "list", "bytes", "deep", "large"],
)
def test_what_cannot_be_read_is_noted_and_merged_all_the_same(tmp_path: Path, content: bytes, reason: str) -> None:
    base, expert = folder(tmp_path, "base", tokenizer_config=TOKENS), folder(tmp_path, "expert")
    (expert / "tokenizer_config.json").write_bytes(content)
    config = {"base": base, "experts": [expert], "method": "mean", "scaling": 1.0, "out": tmp_path / "out"}
    notes = [note for note in imf.merge(config).notes if "not compared" in note]
    assert len(notes) == 1
    assert notes[0].startswith(f"{expert / 'tokenizer_config.json'}: ")
    assert reason in notes[0]
    assert notes[0].endswith(": not compared with what the output has")


def test_what_is_no_regular_file_or_leads_elsewhere_is_noted(tmp_path: Path) -> None:
    base, expert = folder(tmp_path, "base"), folder(tmp_path, "expert")
    (tmp_path / "secret.json").write_text('{"eos_token": "secret"}')
    (expert / "tokenizer_config.json").symlink_to(tmp_path / "secret.json")
    os.mkfifo(expert / "generation_config.json")
    (expert / "chat_template.jinja").mkdir()
    notes = notes_of(base, expert)
    assert len(notes) == 3
    assert all(note.endswith(": not compared with what the output has") for note in notes)
    assert not any("secret" in note.replace("secret.json", "") for note in notes)


def test_keys_of_any_length_are_compared_and_shown_cut(tmp_path: Path) -> None:
    long = "k" * 30_000
    ours = {**LLAMA, f"{long}a": 1.5, f"{long}_dropout": 2, long: {f"{number}": number for number in range(2_000)}}
    theirs = {**ours, f"{long}a": 2.5, long: {**ours[long], "7": 9}, f"{long}b": "v" * 30_000}
    assert not list(config_differences(ours, copy.deepcopy(ours)))
    flat = dict(_flat(ours))
    assert len(flat) == len(LLAMA) - 2 + 2_002
    assert max(map(len, flat)) < 200
    new, nested, changed = sorted(config_differences(ours, theirs), key=lambda found: found[-6:])
    cut = r"k{80}… \(30001 characters, [0-9a-f]{8}\) "
    assert re.fullmatch(rf"{cut}2\.5 \(base 1\.5\)", changed)
    assert re.fullmatch(r"k{80}… \(30000 characters, [0-9a-f]{8}\)\.7 9 \(base 7\)", nested)
    assert re.fullmatch(rf'{cut}"v{{78}}… \(the base\'s config has none\)', new)
    base = folder(tmp_path, "base", generation_config={})
    (note,) = notes_of(base, folder(tmp_path, "e", generation_config={f"{long}_token_id": 3}))
    assert len(note) < 600


def test_many_tokens_are_looked_up_and_not_compared_one_by_one() -> None:
    compared = 0

    class Number(int):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return super().__eq__(other)

        __hash__ = int.__hash__

    ours = TokenSettings({f"{number}_token_id": Number(number) for number in range(100)}, {"a": 0}, {TOKENIZER})
    ours.items["eos_token"] = "<e>"
    theirs = TokenSettings(dict(ours.items), {**{f"t{number}": number for number in range(100)}, "<e>": 5, "a": 0})
    theirs.files = {TOKENIZER}
    (found,) = tokenizer_differences(ours, theirs)
    assert found == '100 added token(s) that the base\'s files do not name, such as "t0" 0'
    assert compared < 1_000
