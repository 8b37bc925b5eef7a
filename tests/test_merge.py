"""Files to files: every method against the oracle, the rules for every kind of tensor, what is left after failures."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import isomerge_fast as imf
import oracle
from checkpoints import config_of, listing, load_folder, make_base, make_expert, make_family, rewrite, save_folder
from isomerge_fast.errors import ConfigError
from isomerge_fast.execution.verify import verify
from isomerge_fast.planning.planner import make_plan

METHODS = ["iso-c", "iso-cts", "mean", "task-arithmetic"]


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
