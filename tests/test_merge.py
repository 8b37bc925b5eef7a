"""Files to files: every method against the oracle, the rules for every kind of tensor, what is left after failures."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import isomerge_fast as imf
import oracle
from checkpoints import listing, load_folder, make_base, make_expert, make_family, save_folder
from isomerge_fast.checkpoint.output.json_files import to_json
from isomerge_fast.checkpoint.output.staging import run_folders
from isomerge_fast.errors import ConfigError, InputChangedError
from isomerge_fast.execution import engine
from isomerge_fast.execution.report import PHASES, Progress
from isomerge_fast.execution.verify import verify
from isomerge_fast.methods import MergeStats
from isomerge_fast.planning.planner import make_plan

METHODS = ["iso-c", "iso-cts", "mean", "task-arithmetic"]


def config_of(family: tuple[Path, list[Path]], out: Path, **changes: object) -> dict[str, object]:
    return {"base": family[0], "experts": family[1], "out": out, "method": "iso-cts", **changes}


@pytest.mark.parametrize("shards", [1, 3], ids=["one-file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_merge_equals_oracle(tmp_path: Path, method: str, dtype: torch.dtype, shards: int) -> None:
    family = make_family(tmp_path, dtype=dtype, shards=shards)
    imf.merge(config_of(family, tmp_path / "out", method=method, scaling=0.7))
    base, experts, merged = (
        load_folder(family[0]),
        [load_folder(folder) for folder in family[1]],
        load_folder(tmp_path / "out"),
    )
    assert merged.keys() == base.keys()
    for name, tensor in base.items():
        assert merged[name].dtype == tensor.dtype
        if not tensor.is_floating_point() or tensor.numel() == 0:
            assert torch.equal(merged[name], tensor)
            continue
        arrays = [expert[name].double().numpy() for expert in experts]
        expected = oracle.merge_tensor(name, tensor.double().numpy(), arrays, method=method, scaling=0.7)
        moved = np.linalg.norm(expected - tensor.double().numpy())
        allowed = (
            torch.finfo(dtype).eps / 2 * np.linalg.norm(expected) + (1e-5 if dtype != torch.float64 else 1e-11) * moved
        )
        assert np.linalg.norm(merged[name].double().numpy() - expected) <= 1.01 * allowed, name
    assert verify(tmp_path / "out", samples=8).tensors == len(base)


def test_output_is_a_checkpoint_of_the_same_layout(tmp_path: Path) -> None:
    family = make_family(tmp_path, shards=3)
    (family[0] / "tokenizer.json").write_text("{}")
    (family[0] / "optimizer.pt").write_text("x")
    report = imf.merge(config_of(family, tmp_path / "out", dtype="bfloat16"))
    out = tmp_path / "out"
    shards = [f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
    assert sorted(os.listdir(out)) == sorted(
        [
            *shards,
            "model.safetensors.index.json",
            "config.json",
            "tokenizer.json",
            "README.md",
            "manifest.json",
            "report.json",
        ]
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for name, shard in index["weight_map"].items():
        assert name in load_file(out / shard)
    sizes = [tensor.numel() * tensor.element_size() for tensor in load_folder(out).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_folder(out).values() if tensor.is_floating_point()} == {torch.bfloat16}
    card = (out / "README.md").read_text()
    for text in (str(family[0]), *map(str, family[1]), "iso-cts", imf.__version__):
        assert text in card
    assert report.counts() == {"copy": 3, "iso-cts": 4, "mean": 3}
    assert os.listdir(tmp_path).count(".out.isomerge") == 0


@pytest.mark.parametrize("shards", [1, 2])
def test_files_keep_their_names(tmp_path: Path, shards: int) -> None:
    """A diffusers folder has files and an index of its own name, by which it is loaded again."""
    family = make_family(tmp_path, shards=shards)
    for file in family[0].glob("model*"):
        text = file.read_bytes()
        if file.suffix == ".json":
            text = text.replace(b'"model-', b'"diffusion_pytorch_model-')
        (family[0] / f"diffusion_pytorch_{file.name}").write_bytes(text)
        file.unlink()
    imf.merge(config_of(family, tmp_path / "out"))
    names = {path.name for path in family[0].iterdir()} | {"README.md", "manifest.json", "report.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert verify(tmp_path / "out").tensors == len(make_base())


def test_an_index_of_one_shard_stays_an_index(tmp_path: Path) -> None:
    base, experts = make_family(tmp_path)
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(make_base(), "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    imf.merge(config_of((base, experts), tmp_path / "out"))
    assert json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"] == weight_map


def test_card_is_a_config(tmp_path: Path) -> None:
    """The recipe in the model card makes the same bytes again."""
    family = make_family(tmp_path)
    options = {"options": {"common_fraction": 0.6}, "exclude": ["*embed*"], "scaling": 1.25}
    options |= {"dtype": "bfloat16", "stochastic_rounding": 3, "on_extra": "ignore"}
    rewrite(family[1][0], extra=torch.ones(3))
    imf.merge(
        config_of(family, tmp_path / "out", **options, overrides=[{"match": "*down*", "method": "task-arithmetic"}])
    )
    recipe = (tmp_path / "out" / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "again.yml"
    path.write_text(recipe.replace("out: merged", f"out: {tmp_path / 'again'}"))
    imf.merge(path)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_experts_may_have_other_shards_dtypes_and_order(tmp_path: Path) -> None:
    base, folders = make_family(tmp_path)
    tensors = load_folder(folders[1])
    wide = {
        name: tensor.double() if tensor.ndim == 2 and tensor.numel() else tensor for name, tensor in tensors.items()
    }
    save_folder(tmp_path / "other", dict(reversed(wide.items())), shards=4)
    imf.merge(config_of((base, folders), tmp_path / "a"))
    imf.merge(config_of((base, [folders[0], tmp_path / "other", folders[2]]), tmp_path / "b"))
    a, b = load_folder(tmp_path / "a"), load_folder(tmp_path / "b")
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.allclose(a[name].double(), b[name].double(), rtol=1e-5, atol=1e-6)


def test_exclude_and_overrides(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    overrides = [
        {"match": "*down*", "method": "task-arithmetic"},
        {"match": "layers.1.*", "method": "iso-cts", "options": {"common_fraction": 0.5}},
    ]
    report = imf.merge(config_of(family, tmp_path / "out", method="iso-c", exclude=["embed*"], overrides=overrides))
    actions = {tensor["name"]: tensor["action"] for tensor in report.tensors}
    assert actions["embed_tokens.weight"] == "mean"
    assert actions["layers.0.down.weight"] == "task-arithmetic"
    assert actions["layers.1.up.weight"] == "iso-cts"
    assert actions["layers.0.up.weight"] == "iso-c"
    base, experts = load_folder(family[0]), [load_folder(folder) for folder in family[1]]
    merged = load_folder(tmp_path / "out")
    average = torch.stack([expert["embed_tokens.weight"] for expert in experts]).mean(0)
    assert torch.allclose(merged["embed_tokens.weight"], average, atol=1e-6)
    name = "layers.1.up.weight"
    arrays = [expert[name].numpy() for expert in experts]
    expected = oracle.merge_tensor(name, base[name].numpy(), arrays, method="iso-cts", scaling=1, common_fraction=0.5)
    assert oracle.relative_error(merged[name].numpy(), expected) <= 1e-6


def test_text_projection_is_averaged_unless_overridden(tmp_path: Path) -> None:
    base = {"text_projection.weight": torch.randn(6, 8), "w": torch.randn(6, 8)}
    experts = [make_expert(base, seed) for seed in range(2)]
    family = (
        save_folder(tmp_path / "b", base),
        [save_folder(tmp_path / f"e{i}", expert) for i, expert in enumerate(experts)],
    )
    actions = {
        t.name: t.action for t in make_plan(imf.MergeConfig(str(family[0]), [str(e) for e in family[1]])).tensors
    }
    assert actions == {"text_projection.weight": "mean", "w": "iso-cts"}
    override = imf.Override("*text_projection*", "iso-c")
    config = imf.MergeConfig(str(family[0]), [str(e) for e in family[1]], overrides=[override])
    assert {t.name: t.action for t in make_plan(config).tensors}["text_projection.weight"] == "iso-c"


def test_several_scalings_are_one_merge_each(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    report = imf.merge(config_of(family, tmp_path / "all", scaling=[0.5, 1.25]))
    assert [Path(output).name for output in report.outputs] == ["scaling-0.5", "scaling-1.25"]
    for scaling in (0.5, 1.25):
        imf.merge(config_of(family, tmp_path / "one", scaling=scaling), overwrite=True)
        one, many = tmp_path / "one", tmp_path / "all" / f"scaling-{scaling:g}"
        assert (one / "model.safetensors").read_bytes() == (many / "model.safetensors").read_bytes()
        assert (one / "config.json").read_bytes() == (many / "config.json").read_bytes()


def test_stochastic_rounding_is_seeded_and_right_on_average(tmp_path: Path) -> None:
    family = make_family(tmp_path, dtype=torch.bfloat16)
    shape = (400, 300)
    base = torch.ones(shape, dtype=torch.bfloat16)
    experts = [torch.full(shape, 1.0 + 2.0**-7, dtype=torch.bfloat16) for _ in family[1]]  # one step above 1
    for folder, tensor in zip((family[0], *family[1]), (base, *experts), strict=True):
        rewrite(folder, **{"large": tensor, "large-too": tensor.clone()})
    scaling = [0.25, 0.3]
    changes = {"method": "mean", "scaling": scaling}
    imf.merge(config_of(family, tmp_path / "nearest", **changes))
    imf.merge(config_of(family, tmp_path / "one", stochastic_rounding=1, **changes))
    imf.merge(config_of(family, tmp_path / "again", stochastic_rounding=1, **changes))
    imf.merge(config_of(family, tmp_path / "two", stochastic_rounding=2, **changes))

    def output(name: str, alpha: float) -> torch.Tensor:
        return load_folder(tmp_path / name / f"scaling-{alpha:g}")["large"].double()

    for alpha in scaling:
        assert (output("nearest", alpha) == 1.0).all()
        up = (output("one", alpha) > 1.0).double().mean().item()
        assert abs(up - alpha) <= 6 * (alpha * (1 - alpha) / base.numel()) ** 0.5
        assert torch.equal(output("one", alpha), output("again", alpha))
        assert not torch.equal(output("one", alpha), output("two", alpha))
    # An output alone is what it is among several; tensors have bits of their own.
    imf.merge(config_of(family, tmp_path / "alone", stochastic_rounding=1, method="mean", scaling=0.3))
    alone = load_folder(tmp_path / "alone")
    assert torch.equal(alone["large"].double(), output("one", 0.3))
    assert not torch.equal(alone["large"], alone["large-too"])
    assert verify(tmp_path / "one", samples=8).recomputed
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["description"]["config"]["stochastic_rounding"] == 1
    merged = imf.merge_state_dicts(
        load_folder(family[0]),
        [load_folder(expert) for expert in family[1]],
        method="mean",
        scaling=0.25,
        stochastic_rounding=1,
    )
    assert torch.equal(merged["large"].double(), output("one", 0.25))


def test_stochastic_rounding_needs_bfloat16(tmp_path: Path) -> None:
    family = make_family(tmp_path, dtype=torch.float32)
    with pytest.raises(ConfigError, match="stochastic_rounding: no merged tensor is written as bfloat16"):
        imf.merge(config_of(family, tmp_path / "out", stochastic_rounding=1))
    with pytest.raises(ConfigError, match="stochastic_rounding is -1; expected a whole number, 0 or more"):
        imf.merge(config_of(family, tmp_path / "out", stochastic_rounding=-1, dtype="bfloat16"))
    assert not (tmp_path / "out").exists()
    base, experts = load_folder(family[0]), [load_folder(expert) for expert in family[1]]
    with pytest.raises(ConfigError, match="stochastic_rounding: no merged tensor becomes bfloat16"):
        imf.merge_state_dicts(base, experts, method="mean", stochastic_rounding=1)
    with pytest.raises(ConfigError, match="stochastic_rounding is -1; expected a whole number, 0 or more"):
        imf.merge_state_dicts(base, experts, method="mean", dtype=torch.bfloat16, stochastic_rounding=-1)


@pytest.mark.parametrize("method", METHODS)
def test_state_dicts_equal_files(tmp_path: Path, method: str) -> None:
    family = make_family(tmp_path)
    imf.merge(config_of(family, tmp_path / "out", method=method, scaling=0.9, exclude=["*down*"]))
    base, experts = load_folder(family[0]), [load_folder(folder) for folder in family[1]]
    before = {name: tensor.clone() for name, tensor in base.items()}
    merged = imf.merge_state_dicts(base, experts, method=method, scaling=0.9, exclude=["*down*"])
    files = load_folder(tmp_path / "out")
    assert list(merged) == list(base)
    for name, tensor in merged.items():
        assert torch.allclose(tensor, files[name], rtol=1e-5, atol=1e-7), name
        assert torch.equal(base[name], before[name])


def test_state_dicts_keep_ties() -> None:
    base = make_base()
    base["lm_head.weight"] = base["embed_tokens.weight"]
    experts = [make_expert(base, 0), make_expert(base, 1)]
    merged = imf.merge_state_dicts(base, experts)
    assert merged["lm_head.weight"] is merged["embed_tokens.weight"]


def test_state_dict_problems() -> None:
    base = make_base()
    expert = make_expert(base, 0)
    del expert["conv.weight"]
    expert["extra"] = torch.ones(2)
    expert["logit_scale"] = torch.ones(3)
    with pytest.raises(imf.InputError) as caught:
        imf.merge_state_dicts(base, [make_expert(base, 1), expert])
    for text in ("experts[1]", "'conv.weight'", "'extra'", "'logit_scale' has shape [3], in the base []"):
        assert text in str(caught.value)
    bad = make_expert(base, 0)
    bad["layers.0.up.weight"][3, 4] = float("inf")
    with pytest.raises(imf.InputError, match=r"'layers.0.up.weight'.*NaN or Inf"):
        imf.merge_state_dicts(base, [make_expert(base, 1), bad])


def test_frozen_tensors_stay_bytes(tmp_path: Path) -> None:
    """A zero delta (a frozen layer) leaves the base as it is, for every method and in half precision."""
    base = make_base(torch.bfloat16)
    experts = [make_expert(base, seed) for seed in range(3)]
    for expert in experts:
        expert["layers.0.up.weight"] = base["layers.0.up.weight"].clone()
    family = (
        save_folder(tmp_path / "b", base),
        [save_folder(tmp_path / f"e{i}", expert) for i, expert in enumerate(experts)],
    )
    for method in METHODS:
        imf.merge(config_of(family, tmp_path / "out", method=method), overwrite=True)
        assert torch.equal(load_folder(tmp_path / "out")["layers.0.up.weight"], base["layers.0.up.weight"])


# --- what must not happen ---------------------------------------------------------------------------------------------


def damage_missing(family: tuple[Path, list[Path]]) -> None:
    shutil.rmtree(family[1][1])


def damage_truncate(family: tuple[Path, list[Path]]) -> None:
    file = family[1][1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_folder(folder), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def damage_lacking(family: tuple[Path, list[Path]]) -> None:
    rewrite(family[1][1], **{"conv.weight": None})


def damage_extra(family: tuple[Path, list[Path]]) -> None:
    rewrite(family[1][1], surplus=torch.ones(2, 3))


def damage_shape(family: tuple[Path, list[Path]]) -> None:
    rewrite(family[1][1], **{"layers.0.norm.weight": torch.ones(17)})


def damage_vocabulary(family: tuple[Path, list[Path]]) -> None:
    rewrite(family[1][1], **{"embed_tokens.weight": torch.ones(50, 16)})


def damage_kind(family: tuple[Path, list[Path]]) -> None:
    rewrite(family[1][1], **{"layers.0.norm.weight": torch.ones(16, dtype=torch.int32)})


def damage_nan(family: tuple[Path, list[Path]]) -> None:
    tensor = load_folder(family[1][1])["layers.0.up.weight"]
    tensor[1, 2] = tensor[3, 4] = float("nan")
    rewrite(family[1][1], **{"layers.0.up.weight": tensor})


def damage_inf_in_base(family: tuple[Path, list[Path]]) -> None:
    rewrite(family[0], logit_scale=torch.tensor(float("inf")))


def damage_quantized(family: tuple[Path, list[Path]]) -> None:
    (family[1][1] / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')


def damage_float8(family: tuple[Path, list[Path]]) -> None:
    for folder in (family[0], *family[1]):
        rewrite(folder, **{"layers.0.up.weight": torch.ones(40, 16).to(torch.float8_e4m3fn)})


DAMAGE = {
    "missing-folder": (damage_missing, ["expert1", "no such checkpoint"]),
    "truncated": (damage_truncate, ["expert1", "model.safetensors", "truncated"]),
    "missing-tensor": (damage_lacking, ["expert1", "'conv.weight'", "missing"]),
    "extra-tensor": (damage_extra, ["expert1", "'surplus'", "not in the base"]),
    "other-shape": (damage_shape, ["expert1", "'layers.0.norm.weight'", "[17]", "[16]"]),
    "other-vocabulary": (damage_vocabulary, ["expert1", "'embed_tokens.weight'", "[50, 16]", "[48, 16]", "vocabulary"]),
    "other-kind": (damage_kind, ["expert1", "'layers.0.norm.weight'", "I32", "F32"]),
    "nan": (damage_nan, ["expert1", "'layers.0.up.weight'", "holds 2 NaN or Inf"]),
    "inf-in-base": (damage_inf_in_base, ["base", "'logit_scale'", "holds 1 NaN or Inf"]),
    "quantized": (damage_quantized, ["expert1", "gptq", "dequantize"]),
    "float8": (damage_float8, ["'layers.0.up.weight'", "F8_E4M3"]),
}


@pytest.mark.parametrize("method", ["iso-cts", "mean"])
@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_bad_input_leaves_nothing(tmp_path: Path, damage, words: list[str], method: str) -> None:
    family = make_family(tmp_path)
    damage(family)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(imf.InputError) as caught:
        imf.merge(config_of(family, tmp_path / "out", method=method))
    for word in words:
        assert word in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_every_problem_is_found_at_once(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    damage_lacking(family)
    rewrite(family[1][2], **{"layers.0.norm.weight": torch.ones(17), "surplus": torch.ones(1)})
    with pytest.raises(imf.InputError) as caught:
        make_plan(imf.MergeConfig(str(family[0]), [str(expert) for expert in family[1]]))
    assert len(caught.value.problems) == 3


def test_integer_buffers_may_be_missing_from_an_expert(tmp_path: Path) -> None:
    """Older releases of transformers saved position_ids, newer ones do not; the base's is taken either way."""
    family = make_family(tmp_path)
    rewrite(family[1][1], position_ids=None, mask=None)
    imf.merge(config_of(family, tmp_path / "out"))
    assert load_folder(tmp_path / "out").keys() == make_base().keys()
    base, experts = load_folder(family[0]), [load_folder(folder) for folder in family[1]]
    assert torch.equal(imf.merge_state_dicts(base, experts)["position_ids"], base["position_ids"])


def test_extra_tensors_may_be_ignored(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    damage_extra(family)
    imf.merge(config_of(family, tmp_path / "out", on_extra="ignore"))
    assert load_folder(tmp_path / "out").keys() == make_base().keys()


@pytest.mark.parametrize("shards", [1, 3])
def test_extra_tensors_of_one_expert_may_be_copied(tmp_path: Path, shards: int) -> None:
    """Into the last shard, in the output's dtype, with the index telling of them."""
    base, experts = make_family(tmp_path, shards=shards)
    surplus = {"surplus": torch.randn(2, 3), "count": torch.arange(4), "nothing": torch.zeros(0, 2)}
    save_folder(tmp_path / "richer", {**load_folder(experts[1]), **surplus}, shards=2)
    family = base, [experts[0], tmp_path / "richer"]
    report = imf.merge(config_of(family, tmp_path / "out", on_extra="copy", dtype="bfloat16"))
    merged = load_folder(tmp_path / "out")
    assert merged.keys() == make_base().keys() | surplus.keys()
    assert torch.equal(merged["surplus"], surplus["surplus"].bfloat16())
    assert torch.equal(merged["count"], surplus["count"])
    assert verify(tmp_path / "out").tensors == len(merged)
    assert any(re.search(r"3 tensor\(s\) that only \S+ has are copied: ", note) for note in report.notes)
    if shards > 1:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["weight_map"]["surplus"] == "model-00003-of-00003.safetensors"
    plain = imf.merge(config_of(family, tmp_path / "plain", on_extra="ignore", dtype="bfloat16"))
    for name, tensor in load_folder(tmp_path / "plain").items():
        assert torch.equal(merged[name], tensor), name
    assert plain.counts()["copy"] + 3 == report.counts()["copy"]


def test_extra_tensors_of_several_experts_are_not_chosen_from(tmp_path: Path) -> None:
    base, experts = make_family(tmp_path)
    for index in (0, 2):
        rewrite(experts[index], surplus=torch.ones(2 + index))
    with pytest.raises(imf.InputError, match=r"'surplus'.*F32\[2\] in .*expert0.*F32\[4\] in .*expert2"):
        imf.merge(config_of((base, experts), tmp_path / "out", on_extra="copy"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "expert1.*'surplus' holds 1 NaN"), (1e30, "overflow")])
def test_extra_tensors_that_are_no_weights_are_not_copied(tmp_path: Path, value: float, message: str) -> None:
    base, experts = make_family(tmp_path)
    rewrite(experts[1], surplus=torch.tensor([1.0, value]))
    with pytest.raises(imf.InputError, match=message):
        imf.merge(config_of((base, experts), tmp_path / "out", on_extra="copy", dtype="float16"))
    assert not (tmp_path / "out").exists()


def test_negative_k_names_the_tensor(tmp_path: Path) -> None:
    family = make_family(tmp_path, tasks=9)
    with pytest.raises(imf.ConfigError, match=r"'embed_tokens.weight' \[48, 16\].*k = -2"):
        imf.merge(config_of(family, tmp_path / "out", options={"common_fraction": 0.0}))
    assert not (tmp_path / "out").exists()


def family_of(root: Path, base: torch.Tensor, *experts: torch.Tensor) -> tuple[Path, list[Path]]:
    """Checkpoints of one tensor, ``w``."""
    folders = [save_folder(root / f"e{index}", {"w": expert}) for index, expert in enumerate(experts)]
    return save_folder(root / "b", {"w": base}), folders


BF16_MAX, F32_MAX = torch.finfo(torch.bfloat16).max, torch.finfo(torch.float32).max
# What is made of finite weights that its dtype does not hold: (base, expert, dtype, config, message).
OVERFLOWS = {
    "float16": (6e4, 6.4e4, "float32", {"dtype": "float16", "scaling": 3.0}, "3 merged weights overflow float16"),
    "float32-mask": (-F32_MAX, -F32_MAX, "float32", {"dtype": "bfloat16"}, "3 merged weights overflow bfloat16"),
    "stochastic": (0.0, BF16_MAX * 1.003, "float32", {"dtype": "bfloat16", "stochastic_rounding": 1}, "overflow bf"),
    "scaling-1e38": (1.0, 1001.0, "float32", {"scaling": 1e38}, "3 merged weights overflow float32 at scaling 1e\\+38"),
    "second-scaling": (1.0, 2.0, "bfloat16", {"scaling": [1.0, 3.4e38]}, "overflow bfloat16 at scaling 3.4e\\+38"),
    "float64-to-float32": (1e30, 1e40, "float64", {"dtype": "float32"}, "3 merged weights overflow float32"),
    "float64": (1.0, 1001.0, "float64", {"scaling": 1e306}, "3 merged weights overflow float64 at scaling 1e\\+306"),
    "deltas": (-3e38, 3e38, "float32", {}, "the deltas overflow float32"),
    "weights": (0.0, 1e30, "float32", {"weights": [1e30]}, "3 merged weights overflow float32"),
    "norm": (0.0, 1e200, "float64", {}, "more than float64 holds the squares of"),
}  # fmt: skip


@pytest.mark.parametrize(("base", "expert", "dtype", "changes", "message"), OVERFLOWS.values(), ids=OVERFLOWS)
def test_overflow_is_not_written(
    tmp_path: Path, base: float, expert: float, dtype: str, changes: dict[str, object], message: str
) -> None:
    kind = getattr(torch, dtype)
    family = family_of(tmp_path, torch.full((3,), base, dtype=kind), torch.full((3,), expert, dtype=kind))
    with pytest.raises(imf.InputError, match=f"^tensor 'w': .*{message}") as caught:
        imf.merge(config_of(family, tmp_path / "out", **changes))
    assert f"{family[1][0] / 'model.safetensors'}: the largest weight of 'w' is {abs(expert):.3g}" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["b", "e0"]


def test_a_kept_delta_that_overflows_is_not_written(tmp_path: Path) -> None:
    """Three deltas of 2e38 add up in float64 solvers, and in float32 not to a number."""
    large, zero = torch.full((3,), 2e38), torch.zeros(3)
    family = family_of(tmp_path, zero, large, large)
    with pytest.raises(imf.InputError, match="3 merged weights overflow float32"):
        imf.merge(config_of(family, tmp_path / "out", method="task-arithmetic", save_delta=True, scaling=1e-3))
    assert sorted(os.listdir(tmp_path)) == ["b", "e0", "e1"]


@pytest.mark.parametrize("save_delta", [False, True])
def test_copied_weights_that_overflow_are_not_written(tmp_path: Path, save_delta: bool) -> None:
    """What no adapter adapts, and what only an expert has, is converted too."""
    family = family_of(tmp_path, torch.ones(3), torch.ones(3))
    rewrite(family[1][0], surplus=torch.tensor([1.0, 3.4e38, -3.4e38]))
    changes = (
        {"on_extra": "copy", "dtype": "bfloat16"} if not save_delta else {"on_extra": "ignore", "save_delta": True}
    )
    if save_delta:
        rewrite(family[1][0], w=torch.full((3,), 3e38))
        rewrite(family[0], w=torch.full((3,), -1e38))
    with pytest.raises(imf.InputError, match="overflow"):
        imf.merge(config_of(family, tmp_path / "out", **changes))
    assert sorted(os.listdir(tmp_path)) == ["b", "e0"]


@pytest.mark.parametrize("key", ["scaling", "weights"])
def test_factors_are_numbers_of_the_dtype(tmp_path: Path, key: str) -> None:
    family = family_of(tmp_path, torch.ones(3), torch.ones(3))
    value: Any = 1e300 if key == "scaling" else [1e300]
    with pytest.raises(ConfigError, match=r"tensor 'w' \[3\]: (scaling|weight) 1e\+300 is no finite number in float32"):
        make_plan(imf.MergeConfig(str(family[0]), [str(family[1][0])], **{key: value}))
    double = family_of(tmp_path / "double", torch.ones(3).double(), torch.ones(3).double())
    imf.merge(config_of(double, tmp_path / "out", **{key: value}))  # zero deltas: the base


class TestOneHugeWeight:
    """One flipped bit in an exponent."""

    @staticmethod
    def family(root: Path, dtype: torch.dtype, flipped: float) -> tuple[Path, list[Path]]:
        generator = torch.Generator().manual_seed(0)
        base = 0.02 * torch.randn(64, 96, generator=generator)
        experts = [(base + 1e-3 * torch.randn(64, 96, generator=generator)).to(dtype) for _ in range(3)]
        experts[1][5, 7] = flipped
        return family_of(root, base.to(dtype), *experts)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
    def test_spectral_methods_refuse_what_swallows_the_others(
        self, tmp_path: Path, method: str, dtype: torch.dtype
    ) -> None:
        family = self.family(tmp_path, dtype, 1.3e37)
        with pytest.raises(imf.InputError) as caught:
            imf.merge(config_of(family, tmp_path / "out", method=method))
        message = str(caught.value)
        assert "tensor 'w': ‖Δ‖ of the tasks is 0.07" in message
        assert f"{family[1][1] / 'model.safetensors'}: the largest weight of 'w' is 1.3e+37" in message
        assert sorted(os.listdir(tmp_path)) == ["b", "e0", "e1", "e2"]

    @pytest.mark.parametrize(("method", "flipped"), [("mean", 1.3e37), ("iso-c", 2.5e3), ("iso-cts", -2.5e3)])
    def test_what_can_be_merged_is_right_and_noted(self, tmp_path: Path, method: str, flipped: float) -> None:
        family = self.family(tmp_path, torch.float32, flipped)
        report = imf.merge(config_of(family, tmp_path / "out", method=method))
        base, *experts = (load_folder(folder)["w"].double().numpy() for folder in (family[0], *family[1]))
        expected = oracle.merge_tensor("w", base, experts, method=method, scaling=1.0)
        merged = load_folder(tmp_path / "out")["w"].double().numpy()
        assert oracle.relative_error(merged - base, expected - base) <= 1e-5
        (entry,) = report.tensors
        file = family[1][1] / "model.safetensors"
        assert entry["remarks"].startswith(f"{file}: its largest |Δ| is {abs(flipped):.3g}, beside 0.00")
        assert "is a weight damaged?" in entry["remarks"]
        assert entry["delta_norms"][1] == pytest.approx(abs(flipped), rel=1e-4)
        assert not verify(tmp_path / "out", samples=1).remarks
        strict_json(tmp_path / "out/report.json")

    def test_of_one_expert_the_base_tells(self, tmp_path: Path) -> None:
        family = self.family(tmp_path, torch.float16, 2.5e3)
        report = imf.merge(config_of((family[0], family[1][1:2]), tmp_path / "out", method="iso-c"))
        assert "its largest |Δ| is 2.5e+03, beside 0.08" in report.tensors[0]["remarks"]

    def test_ordinary_deltas_are_not_noted(self, tmp_path: Path) -> None:
        """Frozen in all experts but one, new from zero, large in base and experts, large in all experts."""
        noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        base = {"frozen": noise, "zero": torch.zeros(8), "large": 1e4 * noise, "counts": torch.zeros(3)}
        moved = {"frozen": noise, "zero": torch.full((8,), 30.0), "large": 9e4 * noise, "counts": torch.full((3,), 7e4)}
        experts = [moved, {**moved, "frozen": noise + 0.01, "zero": base["zero"]}]
        folders = [save_folder(tmp_path / f"e{index}", expert) for index, expert in enumerate(experts)]
        family = save_folder(tmp_path / "b", base), folders
        report = imf.merge(config_of(family, tmp_path / "out", method="iso-c"))
        assert not any("remarks" in entry for entry in report.tensors)


def strict_json(path: Path) -> object:
    """As it is read by those that know JSON only."""

    def refuse(literal: str) -> None:
        raise AssertionError(f"{path}: {literal}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_no_json_of_ours_holds_nan() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json({"x": [value]})


def test_evidence_that_is_not_finite_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = MergeStats.to_dict
    monkeypatch.setattr(MergeStats, "to_dict", lambda self: {**real(self), "sigma_mean": float("nan")})
    family = make_family(tmp_path)
    with pytest.raises(imf.InputError, match=r"tensor '.*': sigma_mean is nan"):
        imf.merge(config_of(family, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


class TestOutputFolder:
    def test_not_empty(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        out = tmp_path / "out"
        save_folder(out, {"old": torch.ones(3)}, shards=1)
        before = listing(tmp_path)
        with pytest.raises(imf.ConfigError, match="not empty"):
            imf.merge(config_of(family, out))
        assert listing(tmp_path) == before
        with pytest.raises(imf.ConfigError, match="not the output of a merge"):  # a checkpoint of somebody's
            imf.merge(config_of(family, out), overwrite=True)
        assert listing(tmp_path) == before

    @pytest.mark.parametrize("added", ["thesis.tex", ".git/HEAD", "data", "model-old.safetensors", "1_Pooling/x"])
    def test_overwrite_takes_only_what_a_merge_has_written(self, tmp_path: Path, added: str) -> None:
        """A file, a folder, a link to one, a stale shard: none of them is in the manifest."""
        family = make_family(tmp_path)
        out = tmp_path / "out"
        imf.merge(config_of(family, out))
        (out / added).parent.mkdir(exist_ok=True)
        if added == "data":
            (tmp_path / "elsewhere").mkdir()
            (out / added).symlink_to(tmp_path / "elsewhere")
        else:
            (out / added).write_text("years of work")
        before = listing(tmp_path)
        with pytest.raises(imf.ConfigError, match=f"holds {re.escape(added.partition('/')[0])}, which the merge"):
            imf.merge(config_of(family, out, scaling=0.5), overwrite=True)
        assert listing(tmp_path) == before
        assert not (tmp_path / ".out.isomerge").exists()

    @pytest.mark.parametrize("moment", ["before the rename", "after it"])
    def test_what_comes_into_the_output_while_it_is_replaced_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        family = make_family(tmp_path)
        config = config_of(family, tmp_path / "out")
        imf.merge({**config, "scaling": 0.5})
        old = listing(tmp_path / "out")
        real, real_rename = engine.write_metadata, os.rename

        def add(folder: Path) -> None:
            (folder / "thesis.tex").write_text("years of work")

        def finish(*given: Any) -> None:
            real(*given)
            if moment == "before the rename":
                add(tmp_path / "out")

        def rename(source: Any, target: Any, **options: Any) -> None:
            real_rename(source, target, **options)
            if moment == "after it" and source == tmp_path / "out":
                add(target)

        monkeypatch.setattr(engine, "write_metadata", finish)
        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(imf.ConfigError, match=r"holds thesis\.tex"):
            imf.merge(config, overwrite=True)
        monkeypatch.undo()
        assert (tmp_path / "out/thesis.tex").read_text() == "years of work"
        (tmp_path / "out/thesis.tex").rename(tmp_path / "thesis.tex")
        assert listing(tmp_path / "out") == old
        imf.merge(config, resume=True, overwrite=True)  # nothing of the work is lost
        assert verify(tmp_path / "out").tensors == len(make_base())

    def test_overwrite_leaves_no_stale_shard(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        imf.merge(config_of(make_family(tmp_path / "sharded", shards=3), out))
        imf.merge(config_of(make_family(tmp_path / "single"), out), overwrite=True)
        assert sorted(path.name for path in out.glob("model*")) == ["model.safetensors"]

    def test_overwrite_keeps_the_old_until_the_commit(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        imf.merge(config_of(family, tmp_path / "out"))
        before = listing(tmp_path / "out")
        damage_nan(family)
        with pytest.raises(imf.InputError):
            imf.merge(config_of(family, tmp_path / "out"), overwrite=True)
        assert listing(tmp_path / "out") == before

    def test_not_a_merge(self, tmp_path: Path) -> None:
        """--overwrite on a folder of other things (a home folder, say) is refused."""
        family = make_family(tmp_path)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("x")
        with pytest.raises(imf.ConfigError, match="not the output of a merge"):
            imf.merge(config_of(family, tmp_path / "out"), overwrite=True)
        assert (tmp_path / "out" / "thesis.tex").exists()

    @pytest.mark.parametrize("which", ["base", "expert0", ".", "link"])
    def test_is_or_holds_an_input(self, tmp_path: Path, which: str) -> None:
        family = make_family(tmp_path)
        (tmp_path / "link").symlink_to(family[0])
        before = listing(tmp_path)
        with pytest.raises(imf.ConfigError, match="is or contains the input"):
            imf.merge(config_of(family, tmp_path / which), overwrite=True)
        assert listing(tmp_path) == before

    @pytest.mark.parametrize("place", ["out", ".out.isomerge/run-0/new"])
    def test_shards_of_an_input_that_are_links_into_the_output(self, tmp_path: Path, place: str) -> None:
        """Into what is replaced, or into where it is built; by a folder of links, or by the folder itself."""
        (base, experts) = make_family(tmp_path)
        (tmp_path / place).mkdir(parents=True)
        shutil.move(base / "model.safetensors", tmp_path / place / "model.safetensors")
        (base / "model.safetensors").symlink_to(tmp_path / place / "model.safetensors")
        before = listing(tmp_path)
        for given in (base, tmp_path / place):
            for resume, overwrite in ((False, False), (True, False), (False, True)):
                config = config_of((given, experts), tmp_path / "out")
                with pytest.raises(imf.ConfigError, match="is or contains the input"):
                    imf.merge(config, resume=resume, overwrite=overwrite)
        assert listing(tmp_path) == before

    def test_empty_folder_and_missing_parents_are_fine(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        (tmp_path / "empty").mkdir()
        imf.merge(config_of(family, tmp_path / "empty"))
        imf.merge(config_of(family, tmp_path / "a" / "b" / "c"))
        assert listing(tmp_path / "empty")["model.safetensors"] == listing(tmp_path / "a/b/c")["model.safetensors"]

    def test_mount_point(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing can be renamed onto one: said before the work, not after."""
        family = make_family(tmp_path)
        (tmp_path / "out").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "out"))
        with pytest.raises(imf.ConfigError, match="mount point"):
            imf.merge(config_of(family, tmp_path / "out"))
        assert not (tmp_path / ".out.isomerge").exists()

    def test_locked_by_another_run(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        from isomerge_fast.checkpoint.output.staging import Staging

        with (
            Staging(tmp_path / "out", resume=False, overwrite=False),
            pytest.raises(imf.ConfigError, match="another merge is writing"),
        ):
            imf.merge(config_of(family, tmp_path / "out"))
        imf.merge(config_of(family, tmp_path / "out"))  # the lock went with its holder

    def test_too_large_for_the_disk_or_the_ceiling(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        family = make_family(tmp_path)
        with pytest.raises(imf.ResourceError, match=r"max_ram is 1000000 bytes; the smallest that would do is \d+"):
            imf.merge(config_of(family, tmp_path / "out"), max_ram=1_000_000)
        usage = shutil.disk_usage(tmp_path)._replace(free=100)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(imf.ResourceError, match=r"100 bytes are free, the output takes \d+"):
            imf.merge(config_of(family, tmp_path / "out"))
        assert not (tmp_path / "out").exists()


# --- interrupted ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing in the package may catch it."""


@pytest.mark.parametrize("after", range(0, 20, 2))
@pytest.mark.parametrize("shards", [1, 3])
def test_resume_is_byte_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, shards: int) -> None:
    """Stopped at the n-th positioned write; a torn tensor is in the file; --resume ends in the same bytes."""
    family = make_family(tmp_path, shards=shards)
    config = config_of(family, tmp_path / "whole", scaling=[0.5, 1.0])
    imf.merge(config)
    expected = listing(tmp_path / "whole")

    real_pwrite, count = os.pwrite, 0

    def torn(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        if count > after:
            real_pwrite(descriptor, data[: len(data) // 2], offset)
            raise Killed
        return real_pwrite(descriptor, data, offset)

    config["out"] = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", torn)
        with pytest.raises(Killed):
            imf.merge(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(imf.ConfigError, match="unfinished merge"):
        imf.merge(config)
    journal = (run_folders(tmp_path / "out")[0] / "journal.jsonl").read_bytes()
    with pytest.raises(imf.ConfigError, match="other inputs, options, devices or versions"):
        imf.merge({**config, "scaling": [0.5, 2.0]}, resume=True)
    assert (run_folders(tmp_path / "out")[0] / "journal.jsonl").read_bytes() == journal
    imf.merge(config, resume=True)
    resumed = listing(tmp_path / "out")
    assert {name: data for name, data in resumed.items() if name != "report.json"} == {
        name: data for name, data in expected.items() if name != "report.json"
    }
    assert not (tmp_path / ".out.isomerge").exists()
    imf.merge(config, resume=True)  # finished already: left as it is
    assert listing(tmp_path / "out") == resumed


def test_a_resume_that_keeps_its_threads_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once and in the report; not where no other number was asked for."""
    config = config_of(make_family(tmp_path), tmp_path / "out")

    def stopped(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(engine, "merge_item", stopped)
        with pytest.raises(Killed):
            imf.merge(config, threads=1)
        for again in (None, 1):
            with pytest.raises(Killed):
                imf.merge(config, threads=again, resume=True)
        assert not caplog.messages
        said = (
            "computed with 1 thread(s), with which the merge began, and not with 2: the last digits of spectral "
            "methods depend on it (--overwrite instead of --resume begins anew)"
        )
        with pytest.raises(Killed):
            imf.merge(config, threads=2, resume=True)
        assert caplog.messages == [f"{tmp_path / 'out'}: {said}"]
    assert said in imf.merge(config, threads=2, resume=True).notes


def test_resume_does_not_trust_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte lost after it was journaled (a power cut without fsync) is written again."""
    family = make_family(tmp_path)
    config = config_of(family, tmp_path / "out")
    monkeypatch.setattr(engine, "write_metadata", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        imf.merge(config)
    monkeypatch.undo()
    staged = run_folders(tmp_path / "out")[0] / "new/model.safetensors"
    content = bytearray(staged.read_bytes())
    content[-300:-200] = bytes(100)
    staged.write_bytes(bytes(content))
    imf.merge(config, resume=True)
    assert verify(tmp_path / "out").tensors == len(make_base())


@pytest.mark.parametrize("step", [1, 2])
def test_killed_inside_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Between the renames that replace an old output: it is put back, or the new one is complete."""
    family = make_family(tmp_path)
    config = config_of(family, tmp_path / "out")
    imf.merge({**config, "scaling": 0.5})
    old = listing(tmp_path / "out")
    real_rename, count = os.rename, 0

    def rename(source: Any, target: Any, **options: Any) -> None:
        nonlocal count
        real_rename(source, target, **options)
        count += tmp_path / "out" in (source, target)
        if count == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(Killed):
            imf.merge(config, overwrite=True)
    if step == 1:
        with pytest.raises(imf.ConfigError, match="unfinished"):
            imf.merge(config)
        assert listing(tmp_path / "out") == old
        imf.merge(config, resume=True, overwrite=True)
    else:
        imf.merge(config, resume=True)
    merged = load_folder(tmp_path / "out")
    imf.merge({**config, "out": tmp_path / "other"})
    assert (tmp_path / "other/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert merged.keys() == make_base().keys()
    assert not (tmp_path / ".out.isomerge").exists()


def test_an_input_that_changes_under_way_stops_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make_family(tmp_path)

    def observer(progress) -> None:
        if progress.tensor == "layers.1.up.weight":
            os.utime(family[1][0] / "model.safetensors", ns=(1, 1))

    with pytest.raises(imf.InputError, match=r"expert0.*changed during the merge"):
        imf.merge(config_of(family, tmp_path / "out"), observer=observer)
    assert not (tmp_path / "out").exists()


def test_an_input_swapped_after_the_plan_stops_the_merge(tmp_path: Path) -> None:
    """By a file of the same size, time and header, which differs in one weight."""
    family = make_family(tmp_path)
    plan = make_plan(imf.MergeConfig(str(family[0]), [str(path) for path in family[1]], out=str(tmp_path / "out")))
    file = family[1][0] / "model.safetensors"
    content, status = file.read_bytes(), file.stat()
    file.write_bytes(content[:-4] + b"\0\0\0\0")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputChangedError, match=r"expert0.*changed since the merge was planned"):
        engine.run(plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expert0", "expert1", "expert2"]


def test_a_resume_knows_its_inputs_by_what_may_be_copied(tmp_path: Path) -> None:
    """Copied with their times, and of another mode, the inputs are the same: the finished merge is left as it is."""
    family = make_family(tmp_path)
    imf.merge(config_of(family, tmp_path / "out", method="mean"))
    before = listing(tmp_path / "out")
    for folder in (family[0], *family[1]):
        shutil.copytree(folder, tmp_path / "copy")
        shutil.rmtree(folder)
        (tmp_path / "copy").rename(folder)
        (folder / "model.safetensors").chmod(0o600)
    imf.merge(config_of(family, tmp_path / "out", method="mean"), resume=True)
    assert listing(tmp_path / "out") == before


def test_what_of_a_base_reaches_the_output(tmp_path: Path) -> None:
    """Copied code is told of; nothing is written when a link leads out of the base."""
    family = make_family(tmp_path, tasks=1)
    (family[0] / "modeling_x.py").write_text("import os\n")
    (family[0] / "tokenizer.json").write_text("{}")
    report = imf.merge(config_of(family, tmp_path / "out", method="mean"))
    (note,) = [note for note in report.notes if "trust_remote_code" in note]
    assert note.endswith("modeling_x.py")
    assert f"code is copied from {family[0]}" in note
    assert (tmp_path / "out/modeling_x.py").read_text() == "import os\n"
    (tmp_path / "secret").write_text("hf_SECRET")
    (family[0] / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(imf.InputError, match=r"tokenizer_config\.json: leads out of its folder"):
        imf.merge(config_of(family, tmp_path / "other", method="mean"))
    assert not list(tmp_path.glob("*other*"))


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    phases: set[str] = set()
    last = Progress(0, 0)

    def observer(progress) -> None:
        nonlocal last
        phases.add(progress.phase)
        last = progress

    imf.merge(config_of(family, tmp_path / "out"), observer=observer)
    assert phases >= {"read", "compute", "write"}
    assert last.done_tensors == last.total_tensors
    assert last.done_bytes == last.total_bytes


def test_phases_leave_no_time_unnamed(tmp_path: Path) -> None:
    seconds = imf.merge(config_of(make_family(tmp_path), tmp_path / "out")).seconds
    named = sum(seconds[phase] for phase in PHASES)
    assert seconds.keys() == {*PHASES, "total"}
    assert named == pytest.approx(seconds["total"], rel=0.02, abs=2e-3)


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_names_the_tensor_of_a_flipped_bit(tmp_path: Path) -> None:
    family = make_family(tmp_path, shards=2)
    imf.merge(config_of(family, tmp_path / "out"))
    file = next((tmp_path / "out").glob("model-00002*"))
    content = bytearray(file.read_bytes())
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_bytes])
    name = "layers.0.down.weight" if "layers.0.down.weight" in header else "layers.0.up.weight"
    content[8 + header_bytes + header[name]["data_offsets"][0] + 5] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(imf.VerificationError, match=rf"'{name}' is not what was written") as caught:
        verify(tmp_path / "out")
    assert "1 problem" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_verify_recomputes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A merge whose deltas are 1 % off has right checksums; the float64 sample finds it, below bf16's rounding too."""
    family = make_family(tmp_path, dtype=dtype)
    real = imf.IsoCTS.merge

    def wrong(self, deltas):
        value, stats = real(self, deltas)
        return value * 1.01, stats

    with monkeypatch.context() as patch:
        patch.setattr(imf.IsoCTS, "merge", wrong)
        imf.merge(config_of(family, tmp_path / "out"))
    assert verify(tmp_path / "out", samples=0).recomputed == []
    with pytest.raises(imf.VerificationError, match="differs from its float64 recomputation"):
        verify(tmp_path / "out")


def test_verify_without_its_inputs(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    imf.merge(config_of(family, tmp_path / "out"))
    os.utime(family[0] / "model.safetensors", ns=(1, 1))
    assert "was written again" in verify(tmp_path / "out").inputs_changed[0]
    shutil.rmtree(family[0])
    assert "not recomputed" in verify(tmp_path / "out").remarks[0]
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(imf.VerificationError):
        verify(tmp_path / "out")
    with pytest.raises(imf.InputError, match="no manifest"):
        verify(tmp_path)


def test_deterministic(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    for out in ("a", "b"):
        imf.merge(config_of(family, tmp_path / out))
    a, b = listing(tmp_path / "a"), listing(tmp_path / "b")
    del a["report.json"], b["report.json"]
    assert a == b
