"""``save_delta`` and ``apply``: another scaling without another decomposition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import isomerge_fast as imf
import oracle
from checkpoints import load_folder, save_folder
from isomerge_fast.checkpoint.output.manifest import MANIFEST_FILE
from isomerge_fast.cli.commands import app
from isomerge_fast.execution.verify import verify


def tensors_of(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "square.weight": random(24, 24),
        "tall.weight": random(40, 16),
        "wide.weight": random(16, 40),
        "norm.weight": random(24),
        "scalar": random(),
        "empty": random(0, 3),
        "positions": torch.arange(5),
    }


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    """A base and three experts, each in two shards."""
    config = {"model_type": "test", "dtype": "bfloat16"}
    base, *experts = [
        save_folder(tmp_path / f"m{seed}", tensors_of(seed), shards=2, config=config) for seed in range(4)
    ]
    return {"base": base, "experts": experts}


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "iso-cts"},
        {"method": "iso-c", "dtype": "float32"},
        {"method": "mean", "stochastic_rounding": 7},
        {"method": "iso-c", "overrides": [{"match": "tall*", "method": "task-arithmetic"}]},
    ],
    ids=["bf16", "other-dtype", "stochastic", "overrides"],
)
def test_applying_gives_the_bytes_of_a_merge_with_that_scaling(
    family: dict[str, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    imf.merge({**family, **options, "scaling": 0.3, "save_delta": True, "out": tmp_path / "merged"})
    imf.apply(tmp_path / "merged", 1.7, tmp_path / "applied")
    imf.merge({**family, **options, "scaling": 1.7, "out": tmp_path / "direct"})
    assert weights_of(tmp_path / "applied") == weights_of(tmp_path / "direct")
    assert (tmp_path / "applied" / "config.json").read_bytes() == (tmp_path / "direct" / "config.json").read_bytes()


def test_outputs_beside_a_kept_delta_are_made_of_it_as_it_is_kept(family: dict[str, Any], tmp_path: Path) -> None:
    """Of a method whose own result is float64."""
    options = {"method": "iso-c", "options": {"precision": "reference"}, "dtype": "float64"}
    imf.merge({**family, **options, "scaling": 1.7, "save_delta": True, "out": tmp_path / "merged"})
    imf.apply(tmp_path / "merged", 1.7, tmp_path / "applied")
    assert weights_of(tmp_path / "applied") == weights_of(tmp_path / "merged")


def test_the_delta_is_what_the_oracle_says_and_the_outputs_are_made_of_it(
    family: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    report = imf.merge({**family, "method": "iso-c", "scaling": [0.5, 2.0], "save_delta": True, "out": out})
    assert [Path(folder).name for folder in report.outputs] == ["scaling-0.5", "scaling-2", "delta"]
    base = load_folder(family["base"])
    experts = [load_folder(expert) for expert in family["experts"]]
    delta = load_folder(out / "delta")
    assert delta.keys() == base.keys() - {"positions"}
    for name, value in delta.items():
        assert value.dtype == torch.float32
        if name.endswith("e.weight") or name == "tall.weight":
            deltas = [(expert[name].double() - base[name].double()).numpy() for expert in experts]
            exact = torch.from_numpy(oracle.iso_c(deltas))
            torch.testing.assert_close(value.double(), exact, rtol=0, atol=1e-5 * exact.norm().item())
    for scaling in (0.5, 2.0):
        for name, value in load_folder(out / f"scaling-{scaling:g}").items():
            if name in delta:
                expected = (base[name].float() + scaling * delta[name]).bfloat16()
                assert torch.equal(value, expected), name
    assert report.write_bytes == sum(path.stat().st_size for path in out.rglob("*.safetensors")) - sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in out.rglob("*.safetensors")
    )


def test_verify_judges_the_delta_and_what_was_applied(family: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    imf.merge({**family, "method": "iso-cts", "save_delta": True, "out": out})
    imf.apply(out, [0.2, 0.4], tmp_path / "applied")
    found = verify(out, samples=100)
    assert {entry["scaling"] for entry in found.recomputed} == {1.0, None}
    assert not found.remarks
    assert {entry["scaling"] for entry in verify(tmp_path / "applied", samples=100).recomputed} == {0.2, 0.4}

    shard = next(path for path in (out / "delta").glob("*.safetensors") if "square.weight" in load_file(path))
    data = bytearray(shard.read_bytes())
    value = load_file(shard)["square.weight"]
    data[data.index(value.numpy().tobytes()) + 5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(imf.VerificationError, match=r"delta.*square\.weight"):
        verify(out)


def test_a_moved_base_is_found_by_its_contents(family: dict[str, Any], tmp_path: Path) -> None:
    imf.merge({**family, "method": "mean", "save_delta": True, "out": tmp_path / "merged"})
    moved = family["base"].rename(tmp_path / "moved")
    with pytest.raises(imf.InputError, match="m0"):
        imf.apply(tmp_path / "merged", 1.0, tmp_path / "applied")
    imf.apply(tmp_path / "merged", 1.0, tmp_path / "applied", base=moved)
    assert weights_of(tmp_path / "applied") == weights_of(tmp_path / "merged")


def test_what_cannot_be_applied_is_refused_before_anything_is_written(family: dict[str, Any], tmp_path: Path) -> None:
    imf.merge({**family, "method": "mean", "out": tmp_path / "plain"})
    with pytest.raises(imf.InputError, match="save_delta"):
        imf.apply(tmp_path / "plain", 1.0, tmp_path / "applied")
    with pytest.raises(imf.InputError, match=MANIFEST_FILE):
        imf.apply(family["base"], 1.0, tmp_path / "applied")
    imf.merge({**family, "method": "mean", "save_delta": True, "out": tmp_path / "merged"})
    other = save_folder(tmp_path / "other", tensors_of(0, torch.float32), shards=2)
    with pytest.raises(imf.InputError, match="not the base that the delta"):
        imf.apply(tmp_path / "merged", 1.0, tmp_path / "applied", base=other)
    for key in ("save_delta", "experts_are_deltas"):
        with pytest.raises(imf.ConfigError, match=f"on_extra: copy and {key}"):
            imf.merge({**family, key: True, "on_extra": "copy", "out": tmp_path / "applied"})
    with pytest.raises(imf.ConfigError, match="scaling"):
        imf.apply(tmp_path / "merged", float("nan"), tmp_path / "applied")
    assert not list(tmp_path.glob("*applied*"))


def test_a_saved_delta_with_nan_is_refused(family: dict[str, Any], tmp_path: Path) -> None:
    delta = {name: value.float() for name, value in tensors_of(9).items() if value.is_floating_point()}
    delta["norm.weight"][3] = torch.nan
    vector = save_folder(tmp_path / "vector", delta)
    config = {"base": family["base"], "experts": [vector], "experts_are_deltas": True, "method": "task-arithmetic"}
    with pytest.raises(imf.InputError, match=r"vector.*norm\.weight.*1 NaN"):
        imf.merge({**config, "out": tmp_path / "out"})


def test_task_vectors_are_experts_of_every_method(family: dict[str, Any], tmp_path: Path) -> None:
    base = load_folder(family["base"])
    vectors = []
    for index, expert in enumerate(family["experts"]):
        weights = load_folder(expert)
        delta = {name: weights[name].float() - base[name].float() for name in base if name != "positions"}
        vectors.append(save_folder(tmp_path / f"v{index}", delta))
    for method in ("iso-cts", "iso-c", "mean", "task-arithmetic"):
        imf.merge({**family, "method": method, "out": tmp_path / method})
        imf.merge(
            {
                "base": family["base"],
                "experts": vectors,
                "experts_are_deltas": True,
                "method": method,
                "out": tmp_path / f"{method}-of-deltas",
            }
        )
        assert weights_of(tmp_path / method) == weights_of(tmp_path / f"{method}-of-deltas")
    assert "experts_are_deltas: true" in (tmp_path / "mean-of-deltas" / "README.md").read_text()


def test_the_command_line_keeps_and_applies(family: dict[str, Any], tmp_path: Path) -> None:
    runner = CliRunner()
    inputs = ["--base", str(family["base"]), *(word for path in family["experts"] for word in ("--expert", str(path)))]
    merged, applied = tmp_path / "merged", tmp_path / "applied"
    run = runner.invoke(app, ["run", *inputs, "--method", "iso-c", "--save-delta", "--out", str(merged)])
    assert run.exit_code == 0, run.output
    assert str(merged / "delta") in run.output
    result = runner.invoke(app, ["apply", str(merged), "--scaling", "0.5", "--scaling", "1", "--out", str(applied)])
    assert result.exit_code == 0, result.output
    assert weights_of(applied / "scaling-1") == weights_of(merged)
    assert runner.invoke(app, ["verify", str(applied)]).exit_code == 0
