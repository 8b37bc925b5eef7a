"""How experts fit a base: one line for each cause, something of every expert, and buffers that come and go."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
from checkpoints import load_folder, save_folder
from isomerge_fast.checkpoint.checks.prefixes import MOST_PREFIXES, find_prefixes
from isomerge_fast.config import load_config
from isomerge_fast.execution.verify import verify
from isomerge_fast.planning.plan import Plan
from isomerge_fast.planning.planner import make_plan
from openings import problems

N = 8


def model(prefix: str = "", layers: int = 2, **more: Tensor) -> dict[str, Tensor]:
    names = [f"layers.{index}.{part}.weight" for index in range(layers) for part in ("q_proj", "up", "down")]
    generator = torch.Generator().manual_seed(len(prefix))
    tensors = {f"{prefix}{name}": torch.randn(N, N, generator=generator) for name in names}
    return {**tensors, f"{prefix}norm.weight": torch.ones(N), **more}


def plan_of(base: Path, *experts: Path, **changes: object) -> Plan:
    return make_plan(load_config({"base": base, "experts": list(experts), "method": "iso-c", **changes}))


SAME_CLASS = "load base and expert with the same class and release of transformers, and save both again"
# (prefix in the base, prefix in the expert, what is said of it, how it is mended)
PREFIXES = {
    "torch.compile": (
        "model.",
        "_orig_mod.model.",
        "the prefix '_orig_mod.', which the base {} has not",
        "save the model that torch.compile wraps (model._orig_mod.save_pretrained)",
    ),
    "PeftModel": (
        "model.",
        "base_model.model.model.",
        "the prefix 'base_model.model.', which the base {} has not",
        "merge its adapter into it (PEFT: merge_and_unload), and save that model",
    ),
    "DDP": (
        "model.",
        "module.model.",
        "the prefix 'module.', which the base {} has not",
        "save the model inside its wrapper (model.module.save_pretrained)",
    ),
    "encoder": ("", "vit.", "the prefix 'vit.', which the base {} has not", SAME_CLASS),
    "AutoModel": ("model.", "", "the prefix 'model.', which only the base {} has", SAME_CLASS),
    "inside": (
        "model.",
        "model.language_model.",
        "their prefix, 'model.language_model.' instead of 'model.' in the base {}",
        SAME_CLASS,
    ),
    "turned-round": (
        "language_model.model.",
        "model.language_model.",
        "their prefix, 'model.language_model.' instead of 'language_model.model.' in the base {}",
        SAME_CLASS,
    ),
}


@pytest.mark.parametrize(("own", "other", "what", "mend"), PREFIXES.values(), ids=PREFIXES)
def test_a_prefix_is_told_of_in_one_sentence(tmp_path: Path, own: str, other: str, what: str, mend: str) -> None:
    base = save_folder(tmp_path / "base", model(own))
    experts = [save_folder(tmp_path / name, model(other)) for name in "ab"]
    assert problems(base, *experts) == [
        f"{experts[0]}, {experts[1]}: 7 names differ only by {what.format(base)} "
        f"('{other}layers.0.down.weight' is '{own}layers.0.down.weight' there); {mend}"
    ]


def test_a_prefix_beside_heads_and_other_vocabularies(tmp_path: Path) -> None:
    """What is left over besides the prefix is told of under the names that fit."""
    config = {"architectures": ["ViTModel"]}
    base = save_folder(tmp_path / "base", model(embed=torch.ones(6, N), pooler=torch.ones(N, N)), config=config)
    tensors = {f"vit.{name}": tensor for name, tensor in model(embed=torch.ones(7, N)).items()}
    head = {"classifier.bias": torch.ones(10), "classifier.weight": torch.ones(10, N)}
    config = {"architectures": ["ViTForImageClassification"]}
    expert = save_folder(tmp_path / "expert", {**tensors, **head}, config=config)
    assert problems(base, expert) == [
        f"{expert}: 8 names differ only by the prefix 'vit.', which the base {base} has not ('vit.embed' is 'embed' "
        "there); load it as ViTModel, the base's class, and save it again (it is a ViTForImageClassification)",
        f"{expert}: tensor 'pooler' [8, 8] of the base {base} is missing "
        "(it is a ViTForImageClassification, the base a ViTModel; load all with one class, such as AutoModel, which "
        "leaves heads out, and save them again)",
        f"{expert}: tensor 'embed' has shape [7, 8], in the base {base} [6, 8] (another vocabulary size?)",
        f"{expert}: 2 tensors are not in the base {base}: 'classifier.bias' [10]; 'classifier.weight' [10, 8] "
        "(on_extra: ignore leaves them out, copy takes them)",
    ]


def test_heads_and_layers_are_no_prefixes() -> None:
    """Names that end alike are not yet those of the same tensor: a pooler is no classifier, a layer no other one."""
    square, flat = (N, N), (N,)
    pooler = {"pooler.dense.weight": square, "pooler.dense.bias": flat}
    classifier = {"classifier.weight": square, "classifier.bias": flat}
    assert find_prefixes(pooler, classifier) == []
    norms = {"cls.transform.LayerNorm.weight": flat, "cls.transform.LayerNorm.bias": flat}
    assert find_prefixes(norms, {"head.weight": (3, N), "head.bias": (3,)}) == []
    layers = [{f"layers.{index}.{part}.weight": square for part in "abcdefghij"} for index in (3, 7)]
    assert find_prefixes(*layers) == []
    assert find_prefixes({"norm.weight": flat}, {"vit.norm.weight": (2, N)}) == []
    renamed = [{f"{name}.layers.0.{part}.weight": square for part in "abcdefghij"} for name in ("bert", "roberta")]
    (prefix,) = find_prefixes(*renamed)
    assert (prefix.removed, prefix.added, len(prefix.names)) == ("bert.", "roberta.", 10)


def test_a_wrapper_in_the_middle_of_names_is_one_line(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", model(layers=12))
    for wrapper in ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "inner."):
        inside = {re.sub(r"(layers\.\d+\.)", rf"\1{wrapper}", name): each for name, each in model(layers=12).items()}
        expert = save_folder(tmp_path / wrapper, inside)
        mend = (
            SAME_CLASS
            if wrapper == "inner."
            else (
                "strip the wrappers' part from the names before they are saved: "
                f"{{name.replace('{wrapper}', ''): tensor for name, tensor in state.items()}}"
            )
        )
        assert problems(base, expert) == [
            f"{expert}: 36 names differ only by their prefix, 'layers.#.{wrapper}' instead of 'layers.#.' in the base "
            f"{base} ('layers.0.{wrapper}down.weight' is 'layers.0.down.weight' there); {mend}"
        ]


def test_names_that_have_each_a_prefix_of_their_own_are_bounded() -> None:
    missing = {f"x{number}.weight": (N, N) for number in range(60)}
    extra = {f"p{number}.x{number}.weight": (N, N) for number in range(60)}
    assert len(find_prefixes(missing, extra)) == MOST_PREFIXES


def test_causes_are_grouped_and_experts_share_a_line(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", model(embed=torch.ones(6, N), lm_head=torch.ones(6, N), mlp=torch.ones(4, N)))
    lacking = [save_folder(tmp_path / f"lacking{index}", {"norm.weight": torch.ones(N)}) for index in range(6)]
    changes = {
        "embed": torch.ones(7, N),
        "lm_head": torch.ones(7, N),
        "mlp": torch.ones(5, 9),
        "norm.weight": torch.ones(2),
    }
    other = save_folder(tmp_path / "other", {**model(), **changes})
    kinds = {name: torch.ones(N, N, dtype=torch.bool) for name in model() if "q_proj" in name}
    kind = save_folder(
        tmp_path / "kind", {**model(embed=torch.ones(6, N), lm_head=torch.ones(6, N), mlp=torch.ones(4, N)), **kinds}
    )
    assert problems(base, *lacking, other, kind) == [
        f"{', '.join(map(str, lacking[:4]))} and 2 more: 9 tensors of the base {base} are missing, "
        "such as 'embed' [6, 8]",
        f"{other}: 2 tensors have another number of rows than in the base {base}: "
        "'embed' [7, 8], there [6, 8]; 'lm_head' [7, 8], there [6, 8] (another vocabulary size?)",
        f"{other}: 2 tensors have other shapes than in the base {base}: "
        "'mlp' [5, 9], there [4, 8]; 'norm.weight' [2], there [8]",
        f"{kind}: 2 tensors are no floats, and in the base {base} they are: "
        "'layers.0.q_proj.weight' BOOL, there F32; 'layers.1.q_proj.weight' BOOL, there F32",
    ]


def test_heads_of_other_classes_are_told_from_vocabularies(tmp_path: Path) -> None:
    way = "(a head of other classes? load all with one class, such as AutoModel, which leaves heads out, and save them "
    for name in ("classifier", "classifier.out_proj", "score", "model.classification_head.out_proj"):
        folders = [
            save_folder(
                tmp_path / f"{name}{rows}",
                {**model(), f"{name}.weight": torch.ones(rows, N), f"{name}.bias": torch.ones(rows)},
            )
            for rows in (3, 5)
        ]
        assert problems(*folders) == [
            f"{folders[1]}: 2 tensors have another number of rows than in the base {folders[0]}: '{name}.bias' [5], "
            f"there [3]; '{name}.weight' [5, 8], there [3, 8] {way}again)"
        ]


def test_heads_of_another_class_are_no_matter_of_tying(tmp_path: Path) -> None:
    """A tied masked language model has a head of layers and biases, which a classifier lacks altogether."""
    lm_head = {"lm_head.bias": torch.ones(6), "lm_head.dense.weight": torch.ones(N, N)}
    base = save_folder(tmp_path / "base", {**model(), **lm_head}, config={"architectures": ["RobertaForMaskedLM"]})
    config = {"architectures": ["RobertaForSequenceClassification"], "tie_word_embeddings": True}
    expert = save_folder(tmp_path / "expert", model(), config=config)
    assert problems(base, expert) == [
        f"{expert}: 2 tensors of the base {base} are missing: 'lm_head.bias' [6]; 'lm_head.dense.weight' [8, 8] (it is "
        "a RobertaForSequenceClassification, the base a RobertaForMaskedLM; load all with one class, such as "
        "AutoModel, which leaves heads out, and save them again)"
    ]


def test_a_long_message_has_something_of_every_expert(tmp_path: Path) -> None:
    """Of 24 experts with two problems each, 20 lines are shown: one of each of twenty, not two of each of ten."""
    base = save_folder(tmp_path / "base", model())
    experts = []
    for index in range(24):
        tensors = {name: tensor for name, tensor in model().items() if name != "norm.weight"}
        tensors |= {f"extra{index}": torch.ones(1), "norm.weight": torch.ones(index + 9)}
        experts.append(save_folder(tmp_path / f"expert{index}", tensors))
    lines = problems(base, *experts)
    assert [line.split(":")[0] for line in lines[:20]] == [str(expert) for expert in experts[:20]]
    assert lines[20:] == ["… and 28 more"]


def test_tensors_of_several_experts_are_one_line(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", model())
    head = {"score.weight": torch.ones(2, N), "score.bias": torch.ones(2)}
    experts = [save_folder(tmp_path / name, {**model(), **head}) for name in "ab"]
    assert problems(base, *experts, on_extra="copy") == [
        "2 tensors, such as 'score.bias', are not in the base, and not in one expert alone: "
        f"F32[2] in {experts[0]}/model.safetensors, F32[2] in {experts[1]}/model.safetensors "
        "(on_extra: copy takes what one expert alone has, ignore leaves all of them out)"
    ]


# --- buffers ----------------------------------------------------------------------------------------------------------

BUFFERS: dict[str, Tensor] = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
    "model.rotary_emb.original_inv_freq": torch.rand(4),
    "transformer.rotary_pos_emb.inv_freq": torch.rand(4),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.rand(1, 1, N, 4),
    "rope.freqs": torch.rand(4),
    "transformer.h.0.attn.embed_positions": torch.rand(N, 4),
    "encoder.embed_positions.weights": torch.rand(N, 4),
    "h.0.attn.bias": torch.tril(torch.ones(N, N)).view(1, 1, N, N),
    "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e4),
    "heads.0.tril": torch.tril(torch.ones(N, N)),
    "text_model.embeddings.position_ids": torch.arange(N, dtype=torch.float16)[None],
    "alphas_cumprod": torch.rand(N),
    "layers.0.attn_mask": torch.zeros(2, 4, 4),
    "encoder.relative_coords_table": torch.rand(1, 3, 3, 2),
}
COMPUTED = "buffer(s) that the model computes for itself are"


@pytest.mark.parametrize("name", BUFFERS)
def test_float_buffers_that_experts_lack_are_the_bases(tmp_path: Path, name: str) -> None:
    buffer = BUFFERS[name]
    base = save_folder(tmp_path / "base", {**model(), name: buffer})
    experts = [save_folder(tmp_path / "a", model()), save_folder(tmp_path / "b", {**model(), name: buffer + 1})]
    plan = plan_of(base, *experts)
    (tensor,) = [tensor for tensor in plan.tensors if tensor.name == name]
    assert (tensor.action, tensor.reason) == ("copy", "a buffer: copied from the base")
    kind = {torch.float16: "F16", torch.float32: "F32"}[buffer.dtype]
    assert (
        f"1 {COMPUTED} the base's, since experts lack them or have others, "
        f"such as {name!r} {kind} {list(buffer.shape)} in {base}/model.safetensors"
    ) in plan.notes


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_that_the_base_lacks_are_left_out(tmp_path: Path, name: str) -> None:
    base = save_folder(tmp_path / "base", model())
    expert = save_folder(tmp_path / "a", {**model(), name: BUFFERS[name]})
    for on_extra in ("error", "copy"):
        plan = plan_of(base, expert, expert, on_extra=on_extra)
        assert [tensor.name for tensor in plan.tensors] == sorted(model())
        (note,) = [note for note in plan.notes if COMPUTED in note]
        assert note.startswith(f"1 {COMPUTED} left out, since the base lacks them, such as {name!r} F")
        assert note.endswith(f" in {expert}/model.safetensors")


def test_a_buffer_that_one_expert_alone_has_is_copied_where_that_is_asked_for(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", model())
    expert = save_folder(tmp_path / "a", {**model(), "rope.freqs": torch.rand(4)})
    plan = plan_of(base, expert, save_folder(tmp_path / "b", model()), on_extra="copy")
    assert [tensor.name for tensor in plan.copied_extras] == ["rope.freqs"]


def test_buffers_are_told_of_in_an_order_of_their_own(tmp_path: Path) -> None:
    """Not in that of a set, which another process has otherwise: notes stand in the card."""
    base = save_folder(tmp_path / "base", model())
    names = sorted(f"layers.{index}.rotary_emb.inv_freq" for index in range(30))
    expert = save_folder(tmp_path / "a", {**model(), **{name: torch.rand(4) for name in names}})
    assert [stored.name for stored in plan_of(base, expert).buffers.left_out] == names


def test_what_is_trained_is_no_buffer(tmp_path: Path) -> None:
    """Names and shapes near those of buffers."""
    trained = {
        "h.0.attn.bias": torch.ones(N),
        "attn.relative_bias.bias": torch.ones(1, 4, N, N),
        "decoder.embed_positions.weight": torch.ones(N, N),
        "embeddings.position_embeddings": torch.ones(1, N, N),
        "rotary_emb.freqs": torch.ones(N),
        "time.betas": torch.ones(N),
    }
    base = save_folder(tmp_path / "base", {**model(), **trained}, config={"model_type": "bart"})
    expert = save_folder(tmp_path / "a", model(), config={"model_type": "bart"})
    assert problems(base, expert) == [
        f"{expert}: 6 tensors of the base {base} are missing, such as 'attn.relative_bias.bias' [1, 4, 8, 8]"
    ]


def test_position_tables_are_computed_in_some_models(tmp_path: Path) -> None:
    config = {"model_type": "marian"}
    table = {"model.encoder.embed_positions.weight": torch.ones(N, N)}
    base = save_folder(tmp_path / "base", {**model(), **table}, config=config)
    plan = plan_of(base, save_folder(tmp_path / "a", model(), config=config))
    assert [stored.name for stored in plan.buffers.from_base] == list(table)


def test_integers_are_the_bases_whatever_experts_have(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", model(position_ids=torch.arange(16)[None], mask=torch.ones(3).bool()))
    expert = save_folder(tmp_path / "a", model(position_ids=torch.arange(8.0)[None], mask=torch.ones(4).bool()))
    plan = plan_of(base, expert)
    assert (
        "2 integer or boolean tensor(s) are the base's, though experts have others, "
        f"such as 'position_ids' F32 [1, 8] in {expert}/model.safetensors"
    ) in plan.notes
    imf.merge(load_config({"base": base, "experts": [expert], "out": tmp_path / "out", "method": "mean"}), threads=1)
    merged = load_folder(tmp_path / "out")
    assert torch.equal(merged["position_ids"], torch.arange(16)[None])
    assert torch.equal(merged["mask"], torch.ones(3).bool())


@pytest.mark.parametrize("save_delta", [False, True])
def test_merged_with_buffers_that_come_and_go(tmp_path: Path, save_delta: bool) -> None:
    """Copied bit by bit, never averaged; verify recomputes it, and apply takes the same buffers."""
    inv_freq = {"rotary_emb.inv_freq": torch.rand(4)}
    base = save_folder(tmp_path / "base", {**model(), **inv_freq})
    extra = {"attn.masked_bias": torch.tensor(-1e9)}
    expert = save_folder(tmp_path / "a", {name: tensor + 0.1 for name, tensor in {**model(), **extra}.items()})
    out = tmp_path / "out"
    config = {"base": base, "experts": [expert], "out": out, "method": "mean", "save_delta": save_delta}
    imf.merge(load_config(config), threads=1)
    merged = load_folder(out)
    assert merged.keys() == {*model(), *inv_freq}
    assert torch.equal(merged["rotary_emb.inv_freq"], inv_freq["rotary_emb.inv_freq"])
    assert verify(out, samples=20).recomputed
    if save_delta:
        imf.apply(out, 0.5, tmp_path / "half")
        assert torch.equal(load_folder(tmp_path / "half")["rotary_emb.inv_freq"], inv_freq["rotary_emb.inv_freq"])


# --- numbers that JSON has not ----------------------------------------------------------------------------------------


def test_infinity_in_a_config_is_read_and_written_as_transformers_does(tmp_path: Path) -> None:
    text = '{"time_step_limit": [0.0, Infinity], "text_config": {"low": -Infinity, "none": NaN}, "dtype": "float32"}'
    for name in ("base", "a"):
        (save_folder(tmp_path / name, model()) / "config.json").write_text(text)
    config = {"base": tmp_path / "base", "experts": [tmp_path / "a"], "out": tmp_path / "out", "method": "mean"}
    imf.merge(load_config({**config, "dtype": "bfloat16"}), threads=1)
    written = (tmp_path / "out" / "config.json").read_text()
    for literal in ("    Infinity\n", '"low": -Infinity', '"none": NaN', '"dtype": "bfloat16"'):
        assert literal in written
    assert json.loads(written)["time_step_limit"] == [0.0, math.inf]


def test_infinity_stays_an_error_in_an_index(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", model(), shards=2)
    (base / "model.safetensors.index.json").write_text('{"metadata": {"total_size": Infinity}, "weight_map": {}}')
    with pytest.raises(imf.InputError, match=r"index\.json: Infinity is not JSON"):
        plan_of(base, base)
