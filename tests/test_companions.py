"""What of the base's folder reaches the output: every small file, weights of unchanged parts; the rest is listed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import isomerge_fast as imf
from checkpoints import listing, make_base, make_expert, save_folder
from isomerge_fast.checkpoint import submodules
from isomerge_fast.checkpoint.output import companions
from isomerge_fast.checkpoint.output.companions import LeftBehind, sort_folder
from isomerge_fast.cli import render
from isomerge_fast.cli.commands import app
from isomerge_fast.cli.screen import Screen
from isomerge_fast.config import load_config
from isomerge_fast.execution.verify import verify
from isomerge_fast.planning.planner import make_plan

# Names of real checkpoints, of which no list is complete.
SMALL = (
    *("spm.model", "source.spm", "target.spm", "normalizer.json", "tekken.json", "tokenizer.model.v3", "bpe.codes"),
    *("sentencepiece.bpe.model", "dict.txt", "entity_vocab.json", "emoji.json", "open_clip_config.json", "params.json"),
    *("chat_template_no_think.jinja", "audio_tokenizer_config.json", "adapter.en.safetensors.txt", "merges.codes"),
    *("custom_generate/generate.py", "additional_chat_templates/rag.jinja", "tokenizer/vocab.json", "a/b/c/d.json"),
    *("1_Pooling/config.json", "10_Dense/config.json", "assets/README.md", "assets/logo.png", "LICENSES/MIT.txt"),
    *("qwen.tiktoken", "vocab.bpe", "vocab", "Modelfile", "mergekit_config.yml", "README_zh.md", "scripts/train.py"),
)
LEFT = {
    **dict.fromkeys(("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state_0.pth"), "training state"),
    **dict.fromkeys(("trainer_state.json", "training_args.bin", "latest", "zero_to_fp32.py"), "training state"),
    **dict.fromkeys(("checkpoint-500/", "global_step12/"), "training state"),
    **dict.fromkeys(("train.log", "trainer_log.jsonl", "all_results.json", "eval_results.json"), "logs"),
    **dict.fromkeys(("events.out.tfevents.17.host", "runs/", "wandb/", "training_loss.png"), "logs"),
    **dict.fromkeys(("__pycache__/", "code/__pycache__/"), "caches"),
    **dict.fromkeys(("onnx/", "openvino/", "original/", "metal/", "gguf/", "x.mlpackage/"), "other formats"),
    **dict.fromkeys(
        ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "m.ckpt.index"), "other weights"
    ),
    **dict.fromkeys(("flax_model.msgpack", "x-Q4.gguf", "model.onnx_data", "adapter.de.safetensors"), "other weights"),
    **dict.fromkeys(("voices/", "code/weights/", "2_Dense/", "rust_model.ot", "x.npz"), "other weights"),
    **dict.fromkeys(("README.md", "manifest.json", "report.json", "delta/"), "the output has its own"),
}
INSIDE = {"voices/": "af.pt", "code/weights/": "w.safetensors", "2_Dense/": "pytorch_model.bin", "onnx/": "model.onnx"}


def fill(folder: Path, names: Any) -> None:
    for name in names:
        path = folder / (name + INSIDE.get(name, "x.json") if name.endswith("/") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"of {name}")


def left_of(folder: Path) -> dict[str, str]:
    return {left.name: left.why for left in sort_folder(folder).left_behind}


def family(root: Path, *, experts: int = 2) -> dict[str, Any]:
    base = make_base()
    names = [save_folder(root / "base", base, config={"model_type": "test"})]
    names += [save_folder(root / f"e{seed}", make_expert(base, seed), config={}) for seed in range(experts)]
    return {"base": names[0], "experts": names[1:], "method": "mean"}


def test_every_small_file_is_copied_and_what_is_left_behind_is_listed(tmp_path: Path) -> None:
    given = family(tmp_path)
    fill(given["base"], [*SMALL, *LEFT, ".gitattributes", ".cache/x.json", ".git/config"])
    out = tmp_path / "out"
    report = imf.merge({**given, "out": out})
    written = listing(out)
    for name in SMALL:
        assert written[name] == f"of {name}".encode()
    own = {"README.md", "config.json", "manifest.json", "report.json", "model.safetensors"}
    assert written.keys() == {*SMALL, *own}
    assert {left["name"]: left["why"] for left in report.left_behind} == LEFT
    assert json.loads((out / "report.json").read_text())["left_behind"] == report.left_behind
    assert verify(out).files == len(SMALL) + 5
    (out / "a/b/c/d.json").write_text("changed")
    with pytest.raises(imf.VerificationError, match=r"a/b/c/d\.json: has 7 bytes"):
        verify(out)


def test_plan_lists_what_is_left_behind(tmp_path: Path) -> None:
    given = family(tmp_path)
    (given["base"] / "onnx").mkdir()
    for name, count in (("optimizer.pt", 3), ("onnx/model.onnx", 2_000), ("onnx/config.json", 5), ("rng_state.pth", 1)):
        (given["base"] / name).write_bytes(b"x" * count)
    arguments = ["plan", "--base", str(given["base"]), "--expert", str(given["experts"][0]), "--method", "mean"]
    shown = CliRunner().invoke(app, arguments).stdout
    assert "left behind: onnx/ (2 file(s), 2.0 kB): other formats\n" in shown
    assert "left behind: optimizer.pt (3 B), rng_state.pth (1 B): training state\n" in shown
    told = json.loads(CliRunner().invoke(app, [*arguments, "--format", "json"]).stdout)
    assert told["left_behind"][0] == {"name": "onnx/", "why": "other formats", "files": 2, "bytes": 2005}


def test_what_is_not_essential_and_cannot_be_copied_is_left_behind(tmp_path: Path) -> None:
    """It did not keep a merge from being made while it was on no list, and does not now."""
    folder = save_folder(tmp_path / "base", make_base())
    os.mkfifo(folder / "pipe")
    (tmp_path / "secret").write_text("hf_SECRET")
    (folder / "out.txt").symlink_to("../secret")
    (folder / "nowhere.txt").symlink_to("missing")
    (folder / "loop").symlink_to(".")
    (folder / "a\x1b[31m.txt").touch()
    (folder / os.fsdecode(b"\xff.txt")).touch()
    (folder / "Report.json").touch()
    (folder / "x.txt").touch()
    (folder / "X.txt").touch()
    found = sort_folder(folder, ["model.safetensors"])
    assert found.companions == ("X.txt",)
    assert {left.name: left.why for left in found.left_behind} == {
        "pipe": "cannot be read (a FIFO, not a regular file)",
        "out.txt": "a link out of its folder",
        "nowhere.txt": "cannot be read (No such file or directory)",
        "loop/": "a link to a folder",
        "a\x1b[31m.txt": "control characters in its name",
        os.fsdecode(b"\xff.txt"): "control characters in its name",
        "Report.json": "the output has its own",
        "x.txt": "one file with 'X.txt' where case is not told",
    }


def test_names_that_are_no_text_are_written_down(tmp_path: Path) -> None:
    """In the report and in notes; a merge that is done does not fail at the last moment for one."""
    given = family(tmp_path)
    for name in (b"x\xff.txt", b"head\xff.pkl", b"y\xff.bin"):
        (given["base"] / os.fsdecode(name)).write_text("x")
    report = imf.merge({**given, "out": tmp_path / "out"})
    assert [left["name"] for left in report.left_behind] == [r"head\xff.pkl", r"x\xff.txt", r"y\xff.bin"]
    assert any(r"head\udcff.pkl" in note for note in report.notes)
    verify(tmp_path / "out")


def test_code_is_copied_whatever_its_name_begins_with(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "base", make_base())
    names = ("optimizer_utils.py", "training_args.py", "checkpoint-utils.py", "modeling_x.py")
    fill(folder, [*names, "zero_to_fp32.py"])
    found = sort_folder(folder, ["model.safetensors"])
    assert found.companions == tuple(sorted(names))
    assert [left.name for left in found.left_behind] == ["zero_to_fp32.py"]


def test_folders_elsewhere_are_not_looked_into(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "base", make_base())
    fill(tmp_path, ["elsewhere/private.json", "elsewhere/more/config.json"])
    (folder / "1_x").symlink_to("../elsewhere")
    (folder / "plain").symlink_to("../elsewhere")
    fill(folder, ["Delta/x.json"])
    found = sort_folder(folder, ["model.safetensors"])
    assert found.companions == ()
    assert found.left_behind == (
        LeftBehind("1_x/", "a link to a folder", 0, 0),
        LeftBehind("Delta/", "the output has its own", 1, 15),
        LeftBehind("plain/", "a link to a folder", 0, 0),
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 9085657\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "spm.model", "source.spm", "tekken.json"])
def test_a_pointer_in_place_of_a_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    """What a clone without git lfs has: a hundred bytes that no tokenizer is made of."""
    given = family(tmp_path)
    (given["base"] / name).write_bytes(POINTER)
    with pytest.raises(imf.InputError) as caught:
        imf.merge({**given, "out": tmp_path / "out"})
    where = given["base"] / name
    assert str(caught.value) == f"{where}: a Git LFS pointer, not the file itself; run git lfs pull in its folder"
    assert not (tmp_path / "out").exists()


def test_pointers_to_what_is_not_essential_are_left_behind(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "base", make_base())
    (folder / "logo.png").write_bytes(POINTER)
    assert left_of(folder)["logo.png"] == "a Git LFS pointer"


def test_a_pointer_in_place_of_a_module_is_refused(tmp_path: Path) -> None:
    given = family(tmp_path)
    add_dense(given["base"], 0)
    (given["base"] / "2_Dense/model.safetensors").write_bytes(POINTER)
    with pytest.raises(imf.InputError, match=r"2_Dense/model\.safetensors: a Git LFS pointer, not the file itself"):
        imf.merge({**given, "out": tmp_path / "out"})


def test_weights_that_may_belong_to_the_model_are_told_of(tmp_path: Path) -> None:
    """A head in a file of its own, as SetFit and BGE-M3 have; not what is the merged weights once more."""
    given = family(tmp_path)
    copies = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5", "model.onnx", "x-Q4.gguf")
    others = ("consolidated.00.pth", "model.ckpt", "training_args.bin", "optimizer.pt", "flax_model.msgpack")
    for folder, name in ((given["base"], "colbert_linear.pt"), (given["experts"][0], "model_head.pkl")):
        fill(folder, [*copies, *others, name])
    fill(given["base"], ["voices/"])
    report = imf.merge({**given, "out": tmp_path / "out"})
    told = "weights beside the merged ones, which may belong to the model, are left behind"
    notes = [note for note in report.notes if "left behind" in note]
    assert notes == [
        f"{given['base']}: {told}: colbert_linear.pt, voices/; copy what does into the output",
        f"{given['experts'][0]}: {told}: model_head.pkl; copy what does into the output",
    ]
    assert all(f"- {note}\n" in (tmp_path / "out/README.md").read_text().replace("\\", "") for note in notes)


def test_bounds_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "MAX_FOLDER_NAMES", 3)
    monkeypatch.setattr(companions, "MAX_WALKED_NAMES", 9)
    monkeypatch.setattr(companions, "MAX_DEPTH", 1)
    fill(tmp_path, ["a/1", "a/2", "a/3", "a/4", "b/1/2", "b/2", "c/1", "c/2", "d/1", "d/2"])
    with open(tmp_path / "large.dat", "wb") as file:
        file.truncate(100_000_001)
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(100_000_001)
    for name in "mnopq":
        with open(tmp_path / f"{name}.dat", "wb") as file:
            file.truncate(99_999_990)
    (tmp_path / "z.txt").write_bytes(b"z" * 51)
    found = sort_folder(tmp_path)
    assert found.companions == ("b/2", "c/1", "c/2", *(f"{name}.dat" for name in "mnopq"), "tokenizer.json")
    assert {left.name: left.why for left in found.left_behind} == {
        "a/": "holds more than 3 names",
        "b/1/": "more than 1 folders deep",
        "d/": "not looked through, after 9 names of other folders",
        "large.dat": "larger than 100 MB",
        "z.txt": "beyond 500 MB of other files",
    }
    fill(tmp_path / "onnx", [f"{number}" for number in range(12)])
    counted = {left.name: (left.why, left.files) for left in sort_folder(tmp_path).left_behind}
    assert counted["onnx/"] == ("other formats, counted up to 2 files", 2)


# --- sub-folders with weights -----------------------------------------------------------------------------------------


def add_dense(folder: Path, seed: int, name: str = "2_Dense", file: str = "model.safetensors") -> None:
    (folder / name).mkdir()
    (folder / name / "config.json").write_text('{"in_features": 4, "out_features": 3}')
    generator = torch.Generator().manual_seed(seed)
    save_file({"linear.weight": torch.randn(3, 4, generator=generator)}, folder / name / file)
    modules = (
        json.loads((folder / "modules.json").read_text()) if (folder / "modules.json").exists() else [{"path": ""}]
    )
    (folder / "modules.json").write_text(json.dumps([*modules, {"path": name, "type": "x.Dense"}]))


def test_modules_with_other_weights_are_refused_with_commands_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = family(tmp_path)
    for seed, folder in enumerate((given["base"], *given["experts"])):
        add_dense(folder, seed)
        add_dense(folder, seed + 9, "3_Dense")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(imf.InputError) as caught:
        imf.merge({"base": "base", "experts": ["e0", "e1"], "method": "mean", "out": "merged"})
    assert str(caught.value).splitlines() == [
        "base/2_Dense: belongs to the model (modules.json), and model.safetensors is not the same in e0/2_Dense; "
        "base/3_Dense: belongs to the model (modules.json), and model.safetensors is not the same in e0/3_Dense. "
        "Sub-folders are not merged with the rest; merge them apart, and the rest with a base without their weights "
        "(verify each before the last step):",
        "  - cp -rL base base-rest",
        "  - rm base-rest/2_Dense/model.safetensors base-rest/3_Dense/model.safetensors",
        "  - isomerge run --base base-rest --expert e0 --expert e1 --method mean --out merged",
        *(
            f"  - isomerge run --base base/{name} --expert e0/{name} --expert e1/{name} --method mean "
            f"--out merged-{name}"
            for name in ("2_Dense", "3_Dense")
        ),
        "  - cp merged-2_Dense/*.safetensors* merged/2_Dense/",
        "  - cp merged-3_Dense/*.safetensors* merged/3_Dense/",
    ]
    for command in caught.value.problems:
        if command.startswith("isomerge"):
            assert CliRunner().invoke(app, shlex.split(command)[1:]).exit_code == 0
        else:
            subprocess.run(command, shell=True, check=True)
    weight = "linear.weight"
    dense = [load_file(tmp_path / name / "3_Dense/model.safetensors")[weight] for name in ("e0", "e1", "merged")]
    torch.testing.assert_close(dense[2], (dense[0] + dense[1]) / 2)
    notes = json.loads((tmp_path / "merged/report.json").read_text())["notes"]
    lost = "2_Dense/model.safetensors, 3_Dense/model.safetensors"
    assert f"e0: left out, as the base has none there: {lost}" in notes
    assert f"e0: left out, as the base has none there: {lost}" in (tmp_path / "merged/README.md").read_text().replace(
        "\\", ""
    )


def test_pickled_modules_are_converted_before_they_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = family(tmp_path, experts=1)
    monkeypatch.chdir(tmp_path)
    for seed, folder in enumerate((given["base"], *given["experts"])):
        add_dense(folder, seed)
        (folder / "2_Dense/model.safetensors").unlink()
        torch.save({"linear.weight": torch.full((3, 4), float(seed))}, folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(imf.InputError) as caught:
        imf.merge({"base": "base", "experts": ["e0"], "method": "mean", "out": "merged"})
    commands = [command.replace("python -c", f"{sys.executable} -c") for command in caught.value.problems]
    assert [command[: command.find("python")] for command in caught.value.problems if "python" in command] == [
        "(cd base/2_Dense && ",
        "(cd e0/2_Dense && ",
    ]
    for command in commands:
        if command.startswith("isomerge"):
            assert CliRunner().invoke(app, shlex.split(command)[1:]).exit_code == 0
        else:
            subprocess.run(command, shell=True, check=True)
    assert torch.equal(load_file("merged/2_Dense/model.safetensors")["linear.weight"], torch.ones(3, 4))


def test_modules_with_the_same_weights_are_copied(tmp_path: Path) -> None:
    """Of an expert that has none there too. Other weights of a module's folder stay behind."""
    given = family(tmp_path)
    for folder in (given["base"], given["experts"][0]):
        add_dense(folder, 5)
    (given["base"] / "2_Dense/pytorch_model.bin").write_bytes(b"stale")
    out = tmp_path / "out"
    report = imf.merge({**given, "out": out})
    assert listing(out / "2_Dense") == {
        name: (given["base"] / "2_Dense" / name).read_bytes() for name in ("config.json", "model.safetensors")
    }
    assert [left["name"] for left in report.left_behind] == ["2_Dense/pytorch_model.bin"]
    assert report.notes == [
        "integer and boolean tensors come from the base",
        "copied as the base has it, byte for byte: 2_Dense/model.safetensors (no expert has another one)",
    ]
    assert verify(out).files == 8


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "holds model.safetensors, {}/2_Dense pytorch_model.bin",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
            "model.safetensors is not the same in {}/2_Dense",
        ),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 200),
            "model.safetensors has 200 bytes, too many to see that {}/2_Dense/model.safetensors is the same",
        ),
    ],
    ids=["another-format", "other-bytes", "too-large"],
)
def test_modules_that_may_differ_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, flaw: str
) -> None:
    given = family(tmp_path, experts=1)
    for folder in (given["base"], given["experts"][0]):
        add_dense(folder, 5)
    if "too many" in flaw:
        monkeypatch.setattr(submodules, "MAX_COMPARED_BYTES", 100)
        change(given["base"] / "2_Dense")
    change(given["experts"][0] / "2_Dense")
    with pytest.raises(imf.InputError) as caught:
        make_plan(load_config(given))
    expected = f"{given['base']}/2_Dense: belongs to the model (modules.json), and {flaw.format(given['experts'][0])}. "
    assert caught.value.message.startswith(expected)


@pytest.mark.parametrize(
    "modules",
    ['{"path": 1}', "[1, {}]", "not JSON", '[{"path": "../e0"}, {"path": "/etc"}]', f'[{{"path": "{"x" * 5_000}"}}]'],
    ids=["object", "numbers", "text", "elsewhere", "long"],
)
def test_lists_of_modules_that_name_none(tmp_path: Path, modules: str) -> None:
    fill(tmp_path, ["2_Dense/", "3/config.json"])
    (tmp_path / "modules.json").write_text(modules)
    found = sort_folder(tmp_path)
    assert (found.submodules, found.companions) == ((), ("3/config.json", "modules.json"))
    assert left_of(tmp_path) == {"2_Dense/": "other weights"}


def test_the_sides_of_a_router_are_modules(tmp_path: Path) -> None:
    given = family(tmp_path, experts=1)
    for seed, folder in enumerate((given["base"], *given["experts"])):
        add_dense(folder, seed, "query_0_Static")
        (folder / "modules.json").write_text('[{"path": "", "type": "Router"}]')
        (folder / "router_config.json").write_text('{"types": {"query_0_Static": "x"}}')
    with pytest.raises(imf.InputError, match=r"query_0_Static: belongs to the model"):
        make_plan(load_config(given))


def test_adapters_beside_the_weights(tmp_path: Path) -> None:
    """Phi-4-multimodal's ``vision-lora``: copied where experts have it, left behind where none does, else refused."""
    given = family(tmp_path)

    def add(folder: Path, content: str) -> None:
        (folder / "vision-lora").mkdir(exist_ok=True)
        (folder / "vision-lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "vision-lora/adapter_model.safetensors").write_text(content)
        (folder / "vision-lora/notes.txt").write_text("x")

    add(given["base"], "x")
    plan = make_plan(load_config(given))
    assert plan.companions == ()
    assert plan.left_behind == (LeftBehind("vision-lora/", "a LoRA adapter beside the weights", 3, 23),)
    add(given["experts"][1], "x")
    plan = make_plan(load_config(given))
    assert plan.companions == tuple(
        f"vision-lora/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "notes.txt")
    )
    assert plan.left_behind == ()
    # Task vectors have no parts, and the base's is as it was: apply takes it, too.
    plan = make_plan(load_config({**given, "experts": given["experts"][:1], "experts_are_deltas": True}))
    assert "vision-lora/adapter_model.safetensors" in plan.companions
    add(given["experts"][1], "y")
    with pytest.raises(imf.InputError) as caught:
        make_plan(load_config(given))
    assert caught.value.message.startswith(
        f"{given['base']}/vision-lora: belongs to the model (the adapter_config.json in it), and "
        f"adapter_model.safetensors is not the same in {given['experts'][1]}/vision-lora. "
    )
    assert caught.value.problems[-1] == (f"cp -rL {given['experts'][1]}/vision-lora merged/ (or another expert's)")


def test_an_adapter_inside_one_that_no_expert_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied where an expert has it; the one around it is counted anew, whatever else lies in the folder."""
    given = family(tmp_path)

    def add(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text("x")

    add(given["base"] / "lora")
    add(given["base"] / "lora/both")
    (given["base"] / ".git").mkdir()
    monkeypatch.setattr(companions, "MAX_WALKED_NAMES", 15)
    for index in range(13):
        (given["base"] / f".git/{index}").touch()
    add(given["experts"][1] / "lora/both")
    (given["experts"][1] / "lora").joinpath("notes.txt").write_text("x")
    plan = make_plan(load_config(given))
    assert plan.companions == ("lora/both/adapter_config.json", "lora/both/adapter_model.safetensors")
    (stray,) = [each for each in plan.left_behind if each.name == "lora/"]
    assert (stray.files, stray.bytes) == (4, 6)


def test_a_merged_sentence_transformer_loads(tmp_path: Path) -> None:
    """With its dense module, merged apart, and with one that nothing has changed."""
    library = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    names = {"base": 0, "e0": 1, "e1": 2}
    for name, seed in names.items():
        torch.manual_seed(seed)
        transformers.BertModel(config).save_pretrained(tmp_path / name)
        (tmp_path / name / "modules.json").write_text(
            '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]'
        )
        add_dense(tmp_path / name, 7)
        modules = json.loads((tmp_path / name / "modules.json").read_text())
        modules[1] |= {"idx": 1, "name": "1", "type": "sentence_transformers.models.Dense"}
        (tmp_path / name / "modules.json").write_text(json.dumps(modules))
        dense = {"in_features": 4, "out_features": 3, "bias": False}
        dense["activation_function"] = "torch.nn.modules.linear.Identity"
        (tmp_path / name / "2_Dense/config.json").write_text(json.dumps(dense))
    given = {"base": tmp_path / "base", "experts": [tmp_path / "e0", tmp_path / "e1"], "method": "mean"}
    imf.merge({**given, "out": tmp_path / "out"})
    loaded = library.SentenceTransformer(str(tmp_path / "out"))
    expected = load_file(tmp_path / "base/2_Dense/model.safetensors")["linear.weight"]
    assert torch.equal(loaded[1].linear.weight, expected)


def test_what_is_left_behind_is_bounded_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """Each of thousands of files may have a reason of its own."""
    left = [{"name": f"a{number}", "why": f"why{number}", "files": 1, "bytes": 2} for number in range(3_000)]
    left += [{**each, "name": f"b{number}", "why": "why0"} for number, each in enumerate(left)]
    render._print_left_behind(Screen(), left)
    lines = capsys.readouterr().out.splitlines()
    assert (lines[1], lines[-1]) == ("left behind: a1 (2 B): why1", "left behind: 2980 more, for other reasons")
    assert lines[0].endswith(", b18 (2 B) and 2981 more: why0")
    assert len(lines) == render.LEFT_BEHIND_SHOWN + 1
