"""Paths that hold no checkpoint: the message says what they are instead, and names the path that would do."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import isomerge_fast as imf
from checkpoints import save_folder
from isomerge_fast.checkpoint.layout import open_checkpoint
from isomerge_fast.config import load_config

WEIGHTS = {"w.weight": torch.ones(4, 4)}
SOME = "no such checkpoint folder or .safetensors file"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with two models, and a home without a cache."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a"):
        save_folder(tmp_path / "models" / name, WEIGHTS)
    save_file(WEIGHTS, tmp_path / "models" / "b.safetensors")


def message(path: str | Path) -> str:
    with pytest.raises(imf.InputError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def cached(cache: Path, *revisions: str, main: str | None = None) -> Path:
    """What the hub's client leaves of org/name."""
    repository = cache / "models--org--name"
    for revision in revisions:
        save_folder(repository / "snapshots" / revision, WEIGHTS)
    if main is not None:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return repository


MISSING = {
    "typo": ("models/bse", " (did you mean models/base?)"),
    "nothing-near": ("models/other", ""),
    "commas": ("models/base,models/a", "; experts are given one by one: --expert models/base --expert models/a"),
    "pattern": ("models/*", "; patterns are not expanded: --expert models/a --expert models/b.safetensors --expert"),
    "pattern-of-nothing": ("models/x*", "; patterns are not expanded"),
    "variable": ("$HOME/models/base", "; variables are not expanded"),
    "hub-id": (
        "org/name",
        "; a model of the Hub is downloaded first: hf download org/name prints the folder to give",
    ),
    "hub-address": (
        "https://huggingface.co/org/name",
        "; a model of the Hub is downloaded first: hf download org/name prints the folder to give",
    ),
    **{
        f"hub-{kind}": (given, f"; a model of the Hub is downloaded first: hf download org/name{revision} prints")
        for kind, given, revision in (
            ("scheme", "hf://org/name", ""),
            ("bare-address", "huggingface.co/org/name/", ""),
            ("main", "org/name@main", ""),
            ("revision", "org/name@v1.0", " --revision v1.0"),
            ("tree", "https://huggingface.co/org/name/tree/v1.0", " --revision v1.0"),
            ("file", "https://hf.co/org/name/resolve/main/model.safetensors", ""),
        )
    },
    "hub-name-without-owner": ("gpt2", "; if it is a model of the Hub: hf download gpt2 prints the folder to give"),
    "bucket": ("s3://bucket/x", "; an address, and only paths are read: give the folder that it is downloaded to"),
    "file-address": ("file:///data/x", "; an address, and only paths are read: give /data/x"),
    "backslashes": ("models\\base", " (did you mean models/base?)"),
    "spaces": ("models/base models/a", "; experts are given one by one: --expert models/base --expert models/a"),
    "semicolons": ("models/base;models/x", "; experts are given one by one: --expert models/base --expert models/x"),
    "absolute": ("/nowhere/at/all", ""),
}


@pytest.mark.parametrize(("path", "hint"), MISSING.values(), ids=MISSING)
def test_paths_that_are_not_there(path: str, hint: str) -> None:
    said = message(path)
    assert said.startswith(f"{Path(path)}: {SOME}{hint}")
    assert hint or said.endswith(SOME)


def test_a_link_to_nowhere_says_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    assert message("link") == "link: a link to gone, which is not there"


def test_a_variable_names_the_folder(tmp_path: Path) -> None:
    save_folder(tmp_path / "home" / "base", WEIGHTS)
    assert message("$HOME/base").endswith(f"; variables are not expanded: give {tmp_path}/home/base")


@pytest.mark.parametrize(
    ("variable", "below"),
    [
        ("HF_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
        (None, "home/.cache/huggingface/hub"),
    ],
)
def test_hub_ids_that_are_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, below: str
) -> None:
    root = tmp_path if variable is None else tmp_path / "elsewhere"
    if variable is not None:
        monkeypatch.setenv(variable, str(root))
    repository = cached(root / below, "0123abc", "4567def", main="4567def\n")
    give = f"; the hub's cache has a model of this name: give {repository}/snapshots/4567def"
    assert message("org/name") == f"org/name: {SOME}{give}"
    assert message("hf://org/name@0123abc").endswith(f"give {repository}/snapshots/0123abc")


def test_a_cache_root_names_its_snapshots(tmp_path: Path) -> None:
    nothing = "no .safetensors file in it: it is the hub cache's folder of a model; give its snapshot"
    one = cached(tmp_path / "one", "0123abc", main="0123abc")
    assert message(one) == f"{one}: {nothing}, {one}/snapshots/0123abc"
    two = cached(tmp_path / "two", "0123abc", "4567def", main="../../../models/base")
    assert message(two) == f"{two}: {nothing}, {two}/snapshots/0123abc or {two}/snapshots/4567def"


def trainer(folder: Path) -> str:
    for step in (500, 1000, 90):
        save_folder(folder / f"checkpoint-{step}", WEIGHTS)
    (folder / "checkpoint-2000").mkdir()
    (folder / "training_args.bin").touch()
    return f"{folder}: no .safetensors file in it; the newest checkpoint in it is {folder}/checkpoint-1000"


def pipeline(folder: Path) -> str:
    for name in ("text_encoder", "unet"):
        save_folder(folder / name, WEIGHTS)
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text("{}")
    return (
        f"{folder}: a pipeline, whose components are merged one by one: "
        f"give {folder}/text_encoder or {folder}/unet, and the same component of all others"
    )


def pipeline_with_files(folder: Path) -> str:
    text = pipeline(folder)
    for name in ("sd_xl_base.safetensors", "sd_xl_vae.safetensors"):
        save_file(WEIGHTS, folder / name)
    return f"{text}; or give one of its own files (sd_xl_base.safetensors, sd_xl_vae.safetensors) by its path"


def one_below(folder: Path) -> str:
    save_folder(folder / "0_Transformer", WEIGHTS)
    (folder / "1_Pooling").mkdir()
    return f"{folder}: no .safetensors file in it; {folder}/0_Transformer has some"


def several_below(folder: Path) -> str:
    for name in ("a", "b", "c"):
        save_folder(folder / name, WEIGHTS)
    return f"{folder}: no .safetensors file in it; {folder}/a, {folder}/b or {folder}/c has some"


def gguf(folder: Path) -> str:
    (folder / "model-q4.gguf").touch()
    return f"{folder}: no .safetensors file in it, and model-q4.gguf is not read; save the model as safetensors"


def optimizer_only(folder: Path) -> str:
    (folder / "optimizer.pt").touch()
    (folder / "rng_state_0.pth").touch()
    return f"{folder}: no .safetensors file in it"


def variants(folder: Path) -> str:
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"):
        save_file(WEIGHTS, folder / name)
    return (
        f"{folder}: diffusion_pytorch_model.safetensors and diffusion_pytorch_model.fp16.safetensors are two variants "
        "of the same weights; move one out of the folder, or give one of them by its path"
    )


def no_index(folder: Path) -> str:
    for index in (1, 2):
        save_file(WEIGHTS, folder / f"model-0000{index}-of-00002.safetensors")
    return (
        f"{folder}: shards (model-00001-of-00002.safetensors, model-00002-of-00002.safetensors) without the "
        ".safetensors.index.json that lists them; copy that too"
    )


def unlike(folder: Path) -> str:
    for name in ("ae.safetensors", "flux1-dev.safetensors"):
        save_file(WEIGHTS, folder / name)
    return (
        f"{folder}: several .safetensors files and no model.safetensors.index.json (ae.safetensors, "
        "flux1-dev.safetensors); give one of them by its path, or move the others out of the folder"
    )


FOLDERS: list[Callable[[Path], str]] = [
    trainer,
    pipeline,
    pipeline_with_files,
    one_below,
    several_below,
    gguf,
    optimizer_only,
    variants,
    no_index,
    unlike,
]


@pytest.mark.parametrize("make", FOLDERS)
def test_folders_without_weights_of_their_own(tmp_path: Path, make: Callable[[Path], str]) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    expected = make(folder)
    assert message(folder) == expected


def test_consolidated_weights_beside_shards(tmp_path: Path) -> None:
    """As mistralai's repositories hold them: the index says which files are the model's."""
    folder = save_folder(tmp_path / "mistral", {"a": torch.ones(2), "b": torch.ones(2)}, shards=2)
    save_file(WEIGHTS, folder / "consolidated.safetensors")
    assert open_checkpoint(folder).tensors.keys() == {"a", "b"}


def test_home_is_expanded(tmp_path: Path) -> None:
    config = load_config({"base": "~/base", "experts": ["~", "~/a", "x/~/b"], "out": "~/out"})
    home = f"{tmp_path}/home"
    assert (config.base, config.experts, config.out) == (f"{home}/base", [home, f"{home}/a", "x/~/b"], f"{home}/out")
    assert load_config({"base": "~no-such-user/base", "experts": ["a"]}).base == "~no-such-user/base"


def test_a_config_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "m.yml").write_text("base: base\nexperts: [a]\n")
    with pytest.raises(imf.InputError) as caught:
        load_config("models/m.yml")
    assert str(caught.value) == (
        "models/m.yml: base is not there, but models/base is; paths are relative to the folder that isomerge runs in"
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_the_advice_for_pickles_keeps_all_tensors_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """What the message says is run, on tied weights, a turned matrix and what the Trainer leaves beside them."""
    embed = torch.randn(6, 4)
    tensors = {"model.embed_tokens.weight": embed, "lm_head.weight": embed, "model.turned": torch.randn(3, 5).T}
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "training_args.bin").write_bytes(b"no tensors")
    names = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)]
    for index, name in enumerate(names):
        torch.save({key: tensors[key] for key in list(tensors)[index::shards]}, folder / name)
    said = message(folder)
    assert said.startswith(
        f"{folder}: only pickled weights ({names[0]}), which are never opened. Convert in its folder: "
    )
    program, flag, code = shlex.split(said.partition("Convert in its folder: ")[2])
    assert (program, flag) == ("python", "-c")
    monkeypatch.chdir(folder)
    exec(code, {})
    checkpoint = open_checkpoint(folder)
    assert {name: stored.shape for name, stored in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


def test_advice_holds_no_names_that_would_be_obeyed(tmp_path: Path) -> None:
    (tmp_path / "x'); import os; ('.bin").touch()
    code = message(tmp_path).partition("Convert in its folder: ")[2]
    assert "import os" not in code
    assert "glob.glob('*.bin')" in code
    assert message(tmp_path / "x'); import os; ('.bin").partition("Convert")[2] == " in its folder: " + code
