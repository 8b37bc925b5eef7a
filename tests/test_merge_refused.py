"""What a merge refuses, and what it notes: inputs that do not fit, weights that overflow or swallow the others."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import isomerge_fast as imf
import oracle
from checkpoints import config_of, damage_nan, load_folder, make_base, make_family, rewrite, save_folder
from isomerge_fast.checkpoint.output.json_files import to_json
from isomerge_fast.errors import ConfigError
from isomerge_fast.execution.verify import verify
from isomerge_fast.methods import MergeStats
from isomerge_fast.planning.planner import make_plan

# --- what must not happen ---------------------------------------------------------------------------------------------


def damage_missing(family: tuple[Path, list[Path]]) -> None:
    shutil.rmtree(family[1][1])


def damage_truncate(family: tuple[Path, list[Path]]) -> None:
    file = family[1][1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


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
