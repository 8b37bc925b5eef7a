"""What a plan says that might surprise: tables, routers and heads by what they are, what is left out, α."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import isomerge_fast as imf
from checkpoints import make_family, save_folder
from isomerge_fast.checkpoint.layout import open_checkpoint
from isomerge_fast.config import load_config
from isomerge_fast.errors import MAX_CHARACTERS, MAX_REMARKS, bounded
from isomerge_fast.planning.planner import make_plan
from isomerge_fast.planning.tensor_roles import HEADS, POSITIONS, ROUTERS, SEGMENTS, TOKENS, Roles

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def plan_of(base: Path, experts: list[Path], **changes: Any) -> Any:
    return make_plan(load_config({"base": base, "experts": experts, "method": "iso-c", "scaling": 1.2, **changes}))


def notes_about(plan: Any, word: str) -> list[str]:
    return [note for note in plan.notes if word in note]


def roles_of(folder: Path) -> dict[str, list[str]]:
    checkpoint = open_checkpoint(folder)
    roles, found = Roles(checkpoint), {}
    for name, stored in checkpoint.tensors.items():
        if (role := roles.of(name, stored.shape)) is not None:
            found.setdefault(role, []).append(name)
    return found


def build(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "gpt2-classifier": (transformers.GPT2Config, transformers.GPT2ForSequenceClassification),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "bert-classifier": (transformers.BertConfig, transformers.BertForSequenceClassification),
        "bert-pairs": (transformers.BertConfig, transformers.BertForQuestionAnswering),
        "roberta-classifier": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
        "vit-classifier": (transformers.ViTConfig, transformers.ViTForImageClassification),
        "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
    }[name]
    return model(config(**settings))


GPT2 = {
    "vocab_size": 96,
    "n_positions": 40,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BART = {
    **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in [("layers", 1), ("ffn_dim", 48)]},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    "d_model": 32,
    "vocab_size": 96,
    "max_position_embeddings": 40,
}
REAL = {
    "llama": (SMALL, {TOKENS: ["lm_head.weight", "model.embed_tokens.weight"]}),
    "gpt2": (GPT2, {POSITIONS: ["transformer.wpe.weight"], TOKENS: ["transformer.wte.weight"]}),
    "gpt2-classifier": (
        {**GPT2, "num_labels": 3, "pad_token_id": 0},
        {HEADS: ["score.weight"], POSITIONS: ["transformer.wpe.weight"], TOKENS: ["transformer.wte.weight"]},
    ),
    "mixtral": (
        {**SMALL, **EXPERTS, "num_key_value_heads": 2},
        {
            TOKENS: ["lm_head.weight", "model.embed_tokens.weight"],
            ROUTERS: [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)],
        },
    ),
    "bert-classifier": (
        {**SMALL, "max_position_embeddings": 40},
        {
            POSITIONS: ["bert.embeddings.position_embeddings.weight"],
            SEGMENTS: ["bert.embeddings.token_type_embeddings.weight"],
            TOKENS: ["bert.embeddings.word_embeddings.weight"],
            HEADS: ["classifier.weight"],
        },
    ),
    "bert-pairs": (
        {**SMALL, "max_position_embeddings": 40},
        {
            POSITIONS: ["bert.embeddings.position_embeddings.weight"],
            SEGMENTS: ["bert.embeddings.token_type_embeddings.weight"],
            TOKENS: ["bert.embeddings.word_embeddings.weight"],
            HEADS: ["qa_outputs.weight"],
        },
    ),
    "roberta-classifier": (
        {**SMALL, "max_position_embeddings": 40, "num_labels": 5},
        {
            HEADS: ["classifier.dense.weight", "classifier.out_proj.weight"],
            POSITIONS: ["roberta.embeddings.position_embeddings.weight"],
            SEGMENTS: ["roberta.embeddings.token_type_embeddings.weight"],
            TOKENS: ["roberta.embeddings.word_embeddings.weight"],
        },
    ),
    "vit-classifier": (
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 32,
        },
        {HEADS: ["classifier.weight"]},
    ),
    "bart": (
        BART,
        {
            POSITIONS: ["model.decoder.embed_positions.weight", "model.encoder.embed_positions.weight"],
            TOKENS: ["model.shared.weight"],
        },
    ),
    "clip": (
        {
            "text_config": {**SMALL, "max_position_embeddings": 12, "projection_dim": 16},
            "vision_config": {**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 16},
            "projection_dim": 16,
        },
        {
            TOKENS: ["text_model.embeddings.token_embedding.weight"],
            POSITIONS: [f"{side}_model.embeddings.position_embedding.weight" for side in ("text", "vision")],
        },
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_roles_of_real_models(tmp_path: Path, name: str) -> None:
    settings, expected = REAL[name]
    build(name, **settings).save_pretrained(tmp_path)
    assert {role: sorted(names) for role, names in roles_of(tmp_path).items()} == expected


NAMED = {
    # What a Stable Diffusion UNet has, whose config tells of no vocabulary.
    "unet": (
        {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 32},
        {
            "time_embedding.linear_1.weight": (128, 32),
            "time_embedding.linear_2.weight": (128, 128),
            "class_embedding.weight": (10, 128),
            "label_emb.0.0.weight": (128, 64),
            "add_embedding.linear_1.weight": (128, 64),
            "mid_block.attentions.0.proj_in.weight": (32, 32),
        },
        {},
    ),
    "gemma": (
        {"model_type": "gemma3n", "text_config": {"vocab_size": 262_400, "vocab_size_per_layer_input": 262_144}},
        {
            "model.language_model.embed_tokens.weight": (262_400, 8),
            "model.language_model.embed_tokens_per_layer.weight": (262_144, 16),
            "model.embed_vision.embedding_projection.weight": (64, 8),
            "model.vision_tower.patch_embed.proj.weight": (64, 8),
        },
        {TOKENS: ["model.language_model.embed_tokens.weight"]},
    ),
    # Padded to a multiple of 64; the head of a prediction of several tokens, under a name of its own.
    "padded": (
        {"model_type": "deepseek_v3", "vocab_size": 50_254, "hidden_size": 8, "n_routed_experts": 6},
        {
            "gpt_neox.embed_in.weight": (50_304, 8),
            "model.layers.61.shared_head.head.weight": (50_254, 8),
            "model.layers.3.mlp.gate.weight": (6, 8),
            "model.layers.3.mlp.experts.0.gate_proj.weight": (6, 8),
            "model.layers.0.mlp.gate.weight": (24, 8),
        },
        {
            TOKENS: ["gpt_neox.embed_in.weight", "model.layers.61.shared_head.head.weight"],
            ROUTERS: ["model.layers.3.mlp.gate.weight"],
        },
    ),
    "timm": (
        {"architecture": "vit_base_patch16_224", "num_classes": 10, "pretrained_cfg": {"num_classes": 10}},
        {"head.weight": (10, 32), "blocks.0.attn.qkv.weight": (96, 32), "fc_norm.weight": (32,)},
        {HEADS: ["head.weight"]},
    ),
    "without-a-config": (
        None,
        {
            "lm_head.weight": (96, 32),
            "output.weight": (96, 32),
            "layers.0.attention.output.weight": (64, 32),
            "classifier.1.weight": (10, 32),
            "layers.0.router.weight": (4, 32),
            "layers.0.mlp.gate.weight": (4, 32),
            "layers.1.mlp.gate.weight": (96, 32),
            "text_projection.weight": (96, 32),
        },
        {
            TOKENS: ["lm_head.weight", "output.weight"],
            HEADS: ["classifier.1.weight"],
            ROUTERS: ["layers.0.mlp.gate.weight", "layers.0.router.weight"],
        },
    ),
}


@pytest.mark.parametrize(("config", "shapes", "expected"), NAMED.values(), ids=NAMED)
def test_roles_by_name_and_shape(
    tmp_path: Path, config: dict[str, Any] | None, shapes: dict[str, tuple[int, ...]], expected: dict[str, list[str]]
) -> None:
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    found = roles_of(save_folder(tmp_path, tensors, config=config))
    assert {role: sorted(names) for role, names in found.items()} == expected


def test_the_line_in_the_note_is_one_that_a_config_takes(tmp_path: Path) -> None:
    """Patterns that match, one for all layers; with it the note is gone."""
    build("mixtral", **REAL["mixtral"][0]).save_pretrained(tmp_path / "base")
    plan = plan_of(tmp_path / "base", [tmp_path / "base"])
    line = 'overrides: [{match: "model.layers.*.block_sparse_moe.gate.weight", method: mean}]'
    (note,) = notes_about(plan, "routers")
    assert note == f"routers are matrices and are merged by iso-c, as published; to average them: {line}"
    (note,) = notes_about(plan, "token tables")
    assert note == (
        "token tables are matrices and are merged by iso-c, as published; to average them: overrides: "
        '[{match: "lm_head.weight", method: mean}, {match: "model.embed_tokens.weight", method: mean}]'
    )
    overrides = [{"match": "model.layers.*.block_sparse_moe.gate.weight", "method": "mean"}]
    assert not notes_about(plan_of(tmp_path / "base", [tmp_path / "base"], overrides=overrides), "routers")
    assert not notes_about(plan_of(tmp_path / "base", [tmp_path / "base"], method="mean"), "published")


def test_the_tables_of_a_model_share_a_note(tmp_path: Path) -> None:
    build("gpt2", **REAL["gpt2"][0]).save_pretrained(tmp_path / "base")
    (note,) = notes_about(plan_of(tmp_path / "base", [tmp_path / "base"]), "as published")
    assert note == (
        "token tables and position tables are matrices and are merged by iso-c, as published; to average them: "
        'overrides: [{match: "transformer.wte.weight", method: mean}, {match: "transformer.wpe.weight", method: mean}]'
    )


class TestHeads:
    """Of equal size, trained on different tasks."""

    def family(self, root: Path, *labels: list[str] | None) -> tuple[Path, list[Path]]:
        folders = []
        for index, names in enumerate((None, *labels)):
            settings = {} if names is None else {"id2label": dict(enumerate(names))}
            folder = root / f"m{index}"
            build("bert-classifier", **SMALL, max_position_embeddings=40, **settings).save_pretrained(folder)
            folders.append(folder)
        return folders[0], folders[1:]

    def note(self, base: Path, experts: list[Path]) -> str:
        (note,) = notes_about(plan_of(base, experts), "classifier heads")
        return note

    def test_unnamed_classes(self, tmp_path: Path) -> None:
        assert self.note(*self.family(tmp_path, None, None)) == (
            "classifier heads (classifier.weight) are merged by iso-c like any other matrix, which blends the classes "
            "of different tasks into one head; whether these are the same classes cannot be told, as not every "
            "config.json names them (id2label); to average them: overrides: "
            '[{match: "classifier.weight", method: mean}]; where the tasks differ, each expert\'s own head is the '
            "right one"
        )

    def test_other_classes(self, tmp_path: Path) -> None:
        base, experts = self.family(tmp_path, ["negative", "positive"], ["different", "duplicate"])
        assert (
            f"their labels (id2label) differ ({experts[0]}: ['negative', 'positive']; {experts[1]}: "
            "['different', 'duplicate']); to average them"
        ) in self.note(base, experts)

    def test_the_same_classes(self, tmp_path: Path) -> None:
        names = ["negative", "positive"]
        assert "; their labels (id2label) are the same; to average" in self.note(*self.family(tmp_path, names, names))


class TestLeftOut:
    """What an expert has and the output has not."""

    def family(self, root: Path) -> tuple[Path, list[Path]]:
        base = {"model.a.weight": torch.ones(8, 8), "model.b.weight": torch.ones(8)}
        heads = [(5, ["a", "b", "c", "d", "e"]), (3, None), (3, None)]
        experts = []
        for index, (rows, names) in enumerate(heads):
            config = {"model_type": "test", **({"id2label": dict(enumerate(names))} if names else {})}
            head = {"score.weight": torch.ones(rows, 8)}
            experts.append(save_folder(root / f"cls{index}", {**base, **head}, config=config))
        return save_folder(root / "base", base, config={"model_type": "test"}), experts

    def test_is_named_in_plan_and_report(self, tmp_path: Path) -> None:
        base, experts = self.family(tmp_path)
        plan = plan_of(base, experts, on_extra="ignore")
        expected = [
            {"expert": str(expert), "tensors": {"score.weight": [rows, 8]}}
            for expert, rows in zip(experts, (5, 3, 3), strict=True)
        ]
        assert plan.to_dict()["left_out"] == expected
        assert notes_about(plan, "left out") == [
            f"1 tensor(s) of {experts[0]} are left out, as the base has none: 'score.weight' [5, 8]; score.weight: a "
            "trained head, by its name, which is lost with its labels (['a', 'b', 'c', 'd', 'e'])",
            f"1 tensor(s) of {experts[1]}, {experts[2]} are left out, as the base has none: 'score.weight' [3, 8]; "
            "score.weight: a trained head, by its name, which is lost",
        ]
        config = {"base": base, "experts": experts, "on_extra": "ignore", "method": "mean", "out": tmp_path / "out"}
        report = imf.merge(config)
        assert report.left_out == expected
        written = json.loads((tmp_path / "out" / "report.json").read_text())
        assert (written["left_out"], written["notes"]) == (expected, report.notes)
        assert imf.Report.from_dict(written).left_out == expected

    def test_many_are_counted(self, tmp_path: Path) -> None:
        base, experts = self.family(tmp_path)
        from safetensors.torch import load_file, save_file

        extras = {f"extra.{number}": torch.ones(2) for number in range(100)}
        save_file({**load_file(experts[0] / "model.safetensors"), **extras}, experts[0] / "model.safetensors")
        plan = plan_of(base, experts[:1], on_extra="ignore")
        (note,) = notes_about(plan, "left out")
        assert note.startswith(f"101 tensor(s) of {experts[0]} are left out, as the base has none: 'extra.0' [2], ")
        assert " and 95 more; score.weight: a trained head" in note
        assert len(plan.to_dict()["left_out"][0]["tensors"]) == 101

    def test_nothing_is_left_out_of_what_fits(self, tmp_path: Path) -> None:
        plan = plan_of(*make_family(tmp_path), on_extra="ignore")
        assert plan.to_dict()["left_out"] == []
        assert not notes_about(plan, "left out")


def test_factors_inside_checkpoints_are_told_of(tmp_path: Path) -> None:
    """Of a model that was saved before its adapter was merged into it."""
    layer = {"model.q_proj.weight": torch.ones(8, 8)}
    factors = {f"model.q_proj.lora_{side}.default.weight": torch.ones(shape) for side, shape in SIDES.items()}
    folders = [save_folder(tmp_path / "plain", layer)]
    folders += [save_folder(tmp_path / name, {**layer, **factors}) for name in ("a", "b")]
    end = "which is no merge of the changes that they make; merge them into their weights first"
    start = "2 LoRA factor(s) inside checkpoints, such as 'model.q_proj.lora_A.default.weight': each is"
    for base, expert, what in ((1, 2, "merged as a tensor of its own"), (0, 2, "left out")):
        (note,) = notes_about(plan_of(folders[base], [folders[expert]], on_extra="ignore"), "LoRA factor")
        assert note == f"{start} {what}, {end} (PEFT: merge_and_unload)"
    assert not notes_about(plan_of(folders[0], [folders[0]]), "LoRA factor")


SIDES = {"A": (2, 8), "B": (8, 2)}
DEFAULT = (
    "scaling is not given, so α = 1; the best α is found on validation data: several --scaling share one "
    "decomposition, or --save-delta and isomerge apply"
)
SCALINGS = {
    "not-given": ({"scaling": None}, [DEFAULT]),
    "given": ({"scaling": 1.0}, []),
    "mean": ({"scaling": None, "method": "mean"}, []),
    "sum": ({"scaling": None, "method": "task-arithmetic"}, [DEFAULT]),
    "large": ({"scaling": [1.0, 5, -40.0]}, [
        "scaling 5, -40: published values of α lie between 0.9 and 1.9; is it meant?",
        "scaling -40: a negative α moves the base away from its experts",
    ]),
    "zero": ({"scaling": 0}, ["scaling 0: nothing of the experts is in the output, which is the base"]),
    "four": ({"scaling": 4.0}, []),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), SCALINGS.values(), ids=SCALINGS)
def test_scalings_that_nobody_chose(tmp_path: Path, changes: dict[str, Any], expected: list[str]) -> None:
    assert notes_about(plan_of(*make_family(tmp_path), **changes), "scaling") == expected


def test_scaling_by_default_is_the_same_merge(tmp_path: Path) -> None:
    """The same bytes and the same recipe, and either goes on where the other stopped."""
    base, experts = make_family(tmp_path)
    config = {"base": base, "experts": experts, "method": "iso-c"}
    imf.merge({**config, "out": tmp_path / "default"})
    imf.merge({**config, "out": tmp_path / "given", "scaling": 1.0})
    default, given = ((tmp_path / name) for name in ("default", "given"))
    assert (default / "model.safetensors").read_bytes() == (given / "model.safetensors").read_bytes()
    cards = [(folder / "README.md").read_text().partition("## Notes") for folder in (default, given)]
    assert cards[0][0].rstrip() == cards[1][0].rstrip()
    assert ["scaling is not given" in notes for _, _, notes in cards] == [True, False]
    told = [json.loads((folder / "manifest.json").read_text())["description"] for folder in (default, given)]
    assert told[0] == told[1]
    again = imf.merge({**config, "out": tmp_path / "default", "scaling": 1.0}, resume=True)
    assert DEFAULT in again.notes  # it was finished, and is left as it is


def test_a_recipe_without_lambda(tmp_path: Path) -> None:
    """mergekit's own methods have λ = 1 by their rules; that of Iso-C is to be found."""
    base, experts = make_family(tmp_path)
    recipe = {"base_model": str(base), "models": [{"model": str(expert)} for expert in experts]}
    weighed = {"parameters": {"weight": 0.3}}
    for kind, more, expected in (
        ("iso_c", {}, [DEFAULT]),
        ("iso_c", {"parameters": {"lambda": 1}}, []),
        ("task_arithmetic", weighed, []),
        ("linear", weighed, []),
    ):
        plan = make_plan(load_config({"merge_method": kind, **recipe, **more}))
        assert notes_about(plan, "scaling") == expected, kind


def test_classes_of_any_length_cost_nothing(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "a", {"fc.weight": torch.ones(4, 4)}, config={"architectures": ["For" * 10_000]})
    checkpoint = open_checkpoint(folder)
    started = time.process_time()
    assert Roles(checkpoint).of("fc.weight", (4, 4)) is None
    assert time.process_time() - started < 0.5


def test_notes_are_bounded_whatever_the_files_say(tmp_path: Path) -> None:
    long = "x" * 30_000
    base = save_folder(tmp_path / "base", {"a.weight": torch.ones(4, 4)}, config={"model_type": long, "a": 1})
    for number in range(30):
        (base / f"code{number:02}.py").write_text("")
    config = {"model_type": "y" + long, long: 2, "b": {long: {long: 3}}, "c": {"d": long}}
    expert = save_folder(tmp_path / "e", {"a.weight": torch.ones(4, 4)}, config=config)
    plan = plan_of(base, [expert])
    (code,) = notes_about(plan, "trust_remote_code")
    assert code.endswith(": code00.py, code01.py, code02.py, code03.py, code04.py, code05.py and 24 more")
    (kind,) = notes_about(plan, "their tensors fit all the same")
    assert max(map(len, plan.notes)) < 1_500
    assert kind.count("…") == 2


def test_no_note_is_longer_or_one_of_more_than_anybody_reads() -> None:
    notes = list(bounded(["x" * 100_000, *map(str, range(10_000))]))
    assert (len(notes), len(notes[0]), notes[0][-1]) == (MAX_REMARKS + 1, MAX_CHARACTERS, "…")
    assert notes[-1] == f"… and {10_001 - MAX_REMARKS} more"
    assert list(bounded(["a", "b"])) == ["a", "b"]
