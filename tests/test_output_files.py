"""Settings, headers and the card of an output: true of its weights, and enough to load it by."""

from __future__ import annotations

import json
import struct
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import isomerge_fast as imf
from checkpoints import load_folder, make_base, make_expert, make_family, save_folder
from isomerge_fast.checkpoint import header_metadata
from isomerge_fast.checkpoint.output.model_card import MAX_NOTES, model_card
from isomerge_fast.config import load_config
from isomerge_fast.execution.finalize import read_report
from isomerge_fast.execution.verify import verify

RECIPE = {"base": "b", "experts": ["e"], "scaling": 1.0, "method": "mean"}


def settings_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


# --- config.json of copied heads --------------------------------------------------------------------------------------


def with_head(root: Path, *, donors: int = 1, **settings: Any) -> dict[str, Any]:
    """A tied base of two settings, and experts with a head each."""
    base = make_base()
    config = {"model_type": "llama", "architectures": ["LM"], "problem_type": "x", "tie_word_embeddings": True}
    config["text_config"] = {"tie_word_embeddings": True, "hidden_size": 3}
    folders = [save_folder(root / "base", base, config=config)]
    for donor in range(donors):
        own = {"model_type": "llama", "architectures": ["Cls"], "id2label": {"0": "a", "1": "b"}, "hidden_size": 7}
        own |= {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}, "pad_token_id": 5}
        own |= settings.get(f"e{donor}", {})
        expert = {**make_expert(base, donor), f"score.{donor}.weight": torch.ones(2, 4)}
        folders.append(save_folder(root / f"e{donor}", expert, config=own))
    return {"base": folders[0], "experts": folders[1:], "method": "mean", "on_extra": "copy"}


def test_a_copied_head_brings_its_settings(tmp_path: Path) -> None:
    """Those that it lacks have their defaults; all else is the base's."""
    imf.merge({**with_head(tmp_path), "out": tmp_path / "out"})
    assert settings_of(tmp_path / "out") == {
        "model_type": "llama",
        "architectures": ["Cls"],
        "id2label": {"0": "a", "1": "b"},
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False, "hidden_size": 3},
        "pad_token_id": 5,
    }


def test_heads_of_several_experts(tmp_path: Path) -> None:
    report = imf.merge({**with_head(tmp_path, donors=2, e1={"id2label": {"0": "c"}}), "out": tmp_path / "out"})
    config = settings_of(tmp_path / "out")
    assert (config["architectures"], config.get("id2label")) == (["Cls"], None)
    note = (
        f"config.json keeps the base's id2label: {tmp_path / 'e0'} and {tmp_path / 'e1'}, "
        "of which tensors are copied, differ in that"
    )
    assert note in report.notes


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"model_type": "bert"}, "is another kind of model"), (None, "has no config.json; set them where it is a head")],
    ids=["another-model", "no-config"],
)
def test_heads_whose_settings_are_not_taken(tmp_path: Path, settings: Any, reason: str) -> None:
    given = with_head(tmp_path, e0=settings or {})
    if settings is None:
        (tmp_path / "e0/config.json").unlink()
    report = imf.merge({**given, "out": tmp_path / "out"})
    note = (
        "config.json keeps the base's architectures, labels and tying: "
        f"{tmp_path / 'e0'}, of which tensors are copied, {reason}"
    )
    assert note in report.notes
    assert settings_of(tmp_path / "out") == settings_of(tmp_path / "base")


def test_output_embeddings_without_settings_untie(tmp_path: Path) -> None:
    given = with_head(tmp_path)
    (tmp_path / "e0/config.json").unlink()
    tensors = load_file(tmp_path / "e0/model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.ones(3, 4)}, tmp_path / "e0/model.safetensors")
    report = imf.merge({**given, "out": tmp_path / "out"})
    config = settings_of(tmp_path / "out")
    assert config["architectures"] == ["LM"]
    assert any(note.startswith("config.json keeps the base's architectures and labels: ") for note in report.notes)
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", ["llama", "bert-tokens", "vit", "untied"])
def test_a_copied_head_loads(tmp_path: Path, small: dict[str, Any], kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    labels = {index: f"name{index}" for index in range(5)}
    if kind in ("llama", "untied"):
        config = transformers.LlamaConfig(vocab_size=16, **small, pad_token_id=0, tie_word_embeddings=True)
        base = transformers.LlamaForCausalLM(config)
        own, auto = transformers.LlamaForSequenceClassification, transformers.AutoModelForSequenceClassification
    elif kind == "bert-tokens":
        config = transformers.BertConfig(vocab_size=16, max_position_embeddings=8, **small)
        base, own = transformers.BertForTokenClassification(config), transformers.BertForTokenClassification
        auto = transformers.AutoModelForTokenClassification
    else:
        config = transformers.ViTConfig(image_size=8, patch_size=4, **small)
        base, own = transformers.ViTForImageClassification(config), transformers.ViTForImageClassification
        auto = transformers.AutoModelForImageClassification
    base.save_pretrained(tmp_path / "base")
    if kind == "untied":
        own = auto = transformers.LlamaForCausalLM
        config.tie_word_embeddings = False
        moved(own(config)).save_pretrained(tmp_path / "e")
    else:
        model = moved(own.from_pretrained(tmp_path / "base", id2label=labels, ignore_mismatched_sizes=True))
        model.save_pretrained(tmp_path / "e")
    if kind in ("bert-tokens", "vit"):  # a base without a head whose names have the prefix
        tensors = load_folder(tmp_path / "base")
        kept = {name: value for name, value in tensors.items() if not name.startswith("classifier")}
        save_file(kept, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    imf.merge(
        {"base": tmp_path / "base", "experts": [tmp_path / "e"], "method": "mean", "on_extra": "copy"}
        | {"out": tmp_path / "out"}
    )
    loaded, found = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = own.from_pretrained(tmp_path / "e")
    name = {"llama": "score", "untied": "lm_head"}.get(kind, "classifier")
    assert torch.equal(getattr(loaded, name).weight, getattr(expected, name).weight)
    assert kind == "untied" or loaded.config.id2label == expected.config.id2label == labels


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM"])
@pytest.mark.parametrize("extra", ["ignore", "copy"])
def test_a_merged_adapter_loads_in_peft(tmp_path: Path, small: dict[str, Any], task: str, extra: str) -> None:
    """With its head, or into a model that has one, which stays as it is."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    heads = {"SEQ_CLS": "score", "TOKEN_CLS": "score", "QUESTION_ANS": "qa_outputs", "CAUSAL_LM": "lm_head"}
    kinds = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "CAUSAL_LM": "CausalLM"}
    kind = getattr(transformers, f"LlamaFor{kinds.get(task, 'QuestionAnswering')}")
    base = transformers.LlamaConfig(vocab_size=16, **small, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.LlamaModel(base)
    prefix = "transformer" if task == "QUESTION_ANS" else "model"
    names = {f"{prefix}.{name}": value for name, value in model.state_dict().items()}
    save_folder(tmp_path / "base", names, config={**base.to_dict(), "model_type": "llama"})
    experts = [tmp_path / f"a{seed}" for seed in range(1 if extra == "copy" else 2)]
    for seed, expert in enumerate(experts):
        torch.manual_seed(seed)
        saved = [heads[task]] if task == "CAUSAL_LM" else None
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task, modules_to_save=saved)
        moved(peft.get_peft_model(kind(base), settings)).save_pretrained(expert)
        changed = settings_of(expert, "adapter_config.json") | {"base_model_name_or_path": "base"}
        (expert / "adapter_config.json").write_text(json.dumps(changed))
    given = {"base": tmp_path / "base", "experts": experts, "method": "mean", "on_extra": extra}
    report = imf.merge({**given, "adapter_rank": 4, "out": tmp_path / "out"})
    written = settings_of(tmp_path / "out", "adapter_config.json")
    torch.manual_seed(9)
    fresh = kind(base)
    before = getattr(fresh, heads[task]).weight.clone()
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "out")
    after = next(
        v for n, v in loaded.state_dict().items() if heads[task] in n and n.endswith("weight") and "original" not in n
    )
    adapted = load_file(tmp_path / "out/adapter_model.safetensors")
    note = [note for note in report.notes if "task_type is null" in note]
    if extra == "copy":
        assert (written["task_type"], written["modules_to_save"], note) == (task, [heads[task]], [])
        assert torch.equal(after, adapted[f"base_model.model.{heads[task]}.weight"])
        return
    assert torch.equal(after, before)
    assert not any(heads[task] in name for name in adapted)
    assert written["modules_to_save"] is None
    if task == "CAUSAL_LM":
        assert (written["task_type"], note) == (task, [])
        return
    assert written["task_type"] is None
    without = "qa_outputs" if task == "QUESTION_ANS" else "classifier or score"
    assert note == [
        f"the merged adapter has no {without}, so its task_type is null: PEFT then takes the head of the model that it "
        "is loaded into as it is"
    ]


def test_the_head_of_an_adapter_brings_as_many_labels_as_it_has_rows(tmp_path: Path) -> None:
    """An adapter has no config.json; with the two classes of the default the output would not load."""
    base = save_folder(tmp_path / "base", {"q.weight": torch.ones(4, 4)}, config={"model_type": "llama"})
    head = {f"base_model.model.{name}": torch.ones(3, 4) for name in ("score.weight",)}
    factors = {f"base_model.model.q.lora_{side}.weight": torch.ones(shape) for side, shape in SIDES.items()}
    expert = tmp_path / "expert"
    expert.mkdir()
    save_file({**head, **factors}, expert / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 2, "lora_alpha": 2}
    (expert / "adapter_config.json").write_text(json.dumps(settings))
    given = {"base": base, "experts": [expert], "method": "mean", "on_extra": "copy"}
    report = imf.merge({**given, "out": tmp_path / "out"})
    assert settings_of(tmp_path / "out") == {
        "model_type": "llama",
        "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    }
    assert (
        f"config.json keeps the base's architectures and tying: {expert}, of which tensors are copied, has no "
        "config.json; set them where it is a head"
    ) in report.notes
    assert f"config.json has 3 labels without names, as the head of {expert} has 3 rows" in report.notes


SIDES = {"A": (2, 4), "B": (4, 2)}

# --- headers ----------------------------------------------------------------------------------------------------------


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_metadata_of_a_single_file_is_kept(tmp_path: Path) -> None:
    """But for what the merge makes untrue. The delta is no model, and has none of it."""
    said = {"modelspec.prediction_type": "v", "format": "pt", "ss_tag_frequency": '{"ä": 1}', "modelspec.title": "x"}
    untrue = {"modelspec.hash_sha256": "0xab", "sshs_model_hash": "1", "sshs_legacy_hash": "2", "total_size": "3"}
    base = make_base()
    save_file(base, tmp_path / "base.safetensors", metadata={**said, **untrue})
    save_file(make_expert(base, 1), tmp_path / "e.safetensors", metadata={"modelspec.title": "other"})
    given = {"base": tmp_path / "base.safetensors", "experts": [tmp_path / "e.safetensors"], "method": "mean"}
    imf.merge({**given, "save_delta": True, "scaling": 0.5, "out": tmp_path / "out"})
    assert metadata_of(tmp_path / "out/model.safetensors") == said
    assert metadata_of(tmp_path / "out/delta/model.safetensors") == {"format": "pt"}
    assert verify(tmp_path / "out").tensors == 18
    imf.apply(tmp_path / "out", 2.0, tmp_path / "applied")
    imf.merge({**given, "scaling": 2.0, "out": tmp_path / "direct"})
    applied, direct = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("applied", "direct"))
    assert applied == direct
    loaded = load_file(tmp_path / "direct/model.safetensors")
    save_file(loaded, tmp_path / "saved.safetensors", metadata=said)
    data = [path.read_bytes() for path in (tmp_path / "direct/model.safetensors", tmp_path / "saved.safetensors")]
    ends = [bytes_[8 + struct.unpack("<Q", bytes_[:8])[0] :] for bytes_ in data]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("said", [None, {"format": "pt"}, {"format": "mlx"}], ids=["none", "plain", "mlx"])
def test_headers_of_ordinary_files_are_as_safetensors_writes_them(tmp_path: Path, said: Any) -> None:
    base = make_base()
    for name, tensors in (("base", base), ("e", make_expert(base, 1))):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata=said)
    given = {"base": tmp_path / "base.safetensors", "experts": [tmp_path / "e.safetensors"], "method": "mean"}
    imf.merge({**given, "out": tmp_path / "out"})
    merged = tmp_path / "out/model.safetensors"
    save_file(load_file(merged), tmp_path / "plain.safetensors", metadata={"format": "pt"})
    assert merged.read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_metadata_of_shards_goes_with_them_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_metadata, "MAX_METADATA_BYTES", 100)
    family = make_family(tmp_path, shards=2)
    first, second = sorted(family[0].glob("*.safetensors"))
    save_file(load_file(first), first, metadata={"format": "pt", "thumbnail": "x" * 99, "note": "first"})
    given = {"base": family[0], "experts": family[1], "method": "mean"}
    report = imf.merge({**given, "out": tmp_path / "out"})
    assert metadata_of(tmp_path / "out" / first.name) == {"format": "pt", "note": "first"}
    assert metadata_of(tmp_path / "out" / second.name) == {"format": "pt"}
    assert f"{first}: too large to be kept of its metadata: 'thumbnail'" in report.notes


def test_a_resumed_merge_writes_the_same_headers(tmp_path: Path) -> None:
    family = make_family(tmp_path, shards=2)
    for shard in family[0].glob("*.safetensors"):
        save_file(load_file(shard), shard, metadata={"format": "pt", "from": shard.name})
    given = {"base": family[0], "experts": family[1], "method": "iso-c"}
    imf.merge({**given, "out": tmp_path / "whole"})

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.done_tensors == 4:
            raise Stop

    with pytest.raises(Stop):
        imf.merge({**given, "out": tmp_path / "resumed"}, observer=stop)
    imf.merge({**given, "out": tmp_path / "resumed"}, resume=True)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "resumed" / shard.name).read_bytes()
        assert metadata_of(shard) == {"format": "pt", "from": shard.name}


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_of_what_was_applied_says_what_was_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = make_family(tmp_path, tasks=2)
    more = {"options": {"common_fraction": 0.7}, "weights": [1.0, 0.5], "exclude": ["*norm*"]}
    imf.merge(
        {"base": base, "experts": experts, "method": "iso-cts", **more, "save_delta": True, "out": tmp_path / "m"}
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    imf.apply("../m", [0.3, 0.6], "applied", dtype="bfloat16")
    card = (elsewhere / "applied/scaling-0.3/README.md").read_text()
    assert card.split("tags: [merge, isomerge-fast]\n---\n")[1].split("- Made with")[0] == (
        "\n# Merge of 2 checkpoints with iso-cts\n\n"
        f"- Base: `{base}`\n- Expert: `{experts[0]}`\n- Expert: `{experts[1]}`\n"
        "- Method: iso-cts (arXiv 2502.04959), scaling α = 0.3\n"
    )
    (elsewhere / "card.yml").write_text(card.split("```yaml\n")[1].split("```")[0])
    imf.merge(load_config(elsewhere / "card.yml", out=elsewhere / "again"))
    for name, tensor in load_folder(elsewhere / "again").items():
        assert torch.equal(tensor, load_folder(elsewhere / "applied/scaling-0.3")[name])
    assert verify("applied", samples=9).recomputed
    assert read_report(Path("applied"))[0].scaling == [0.3, 0.6]


def test_a_part_of_an_output_names_the_whole(tmp_path: Path) -> None:
    base, experts = make_family(tmp_path, tasks=1)
    imf.merge({"base": base, "experts": experts, "method": "mean", "scaling": [0.5, 1.0], "out": tmp_path / "m"})
    parts = [tmp_path / "m" / name for name in ("scaling-0.5", "manifest.json", "report.json")]
    for part, (verb, name) in product(parts, ((verify, "manifest.json"), (read_report, "report.json"))):
        with pytest.raises(imf.InputError) as caught:
            verb(part)
        expected = f"{part}: no {name}; a part of the output in {tmp_path / 'm'}, which has it: give that folder"
        assert str(caught.value) == expected


def test_the_card_has_the_notes(tmp_path: Path) -> None:
    report = imf.merge({**with_head(tmp_path), "out": tmp_path / "out"})
    notes = (tmp_path / "out/README.md").read_text().split("## Notes\n\n")[1]
    notes = notes.replace("\\", "")
    assert notes.splitlines() == [f"- {note}" for note in report.notes]
    assert f"- 1 tensor(s) that only {tmp_path / 'e0'} has are copied: 'score.0.weight' [2, 4]\n" in notes


def test_notes_are_shown_and_not_obeyed() -> None:
    told = ["<img src=x> [a](b) `c` *d* # e\n- f\x1b[0m", "g" * 2_000, *("h" for _ in range(MAX_NOTES))]
    card = model_card(RECIPE, kind="checkpoints", citation="x", version="1", library=None, notes=told)
    lines = card.split("## Notes\n\n")[1].splitlines()
    assert lines[0] == r"- \<img src=x> \[a\](b) \`c\` \*d\* \# e\\n- f\\x1b\[0m".replace("x>", r"x\>")
    assert lines[1] == f"- {'g' * 999}…"
    assert lines[MAX_NOTES] == "- … and 2 more, in report.json"
    assert len(lines) == MAX_NOTES + 1
    plain = model_card(RECIPE, kind="checkpoints", citation="x", version="1", library=None)
    assert plain == card.split("## Notes")[0].rstrip("\n") + "\n"
