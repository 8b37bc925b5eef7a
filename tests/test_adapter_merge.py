"""LoRA adapters from files to files: a checkpoint out, an adapter out, what is refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import isomerge_fast as imf
import oracle
from adapters import ADAPTED, PREFIX, SHAPES, delta_of, draw_factors, make_adapters, make_base, save_adapter
from checkpoints import listing, load_folder, save_folder
from isomerge_fast.cli.commands import app
from isomerge_fast.config import load_config
from isomerge_fast.execution.report import Progress
from isomerge_fast.execution.verify import verify
from isomerge_fast.planning.planner import make_plan

RANK_TOLERANCE = 1e-6


def expected_delta(method: str, deltas: list[torch.Tensor]) -> np.ndarray:
    arrays = [delta.numpy() for delta in deltas]
    if method == "iso-c":
        return oracle.iso_c(arrays, rank_tolerance=RANK_TOLERANCE)
    if method == "iso-cts":
        return oracle.iso_cts(arrays, rank_tolerance=RANK_TOLERANCE)
    return np.sum(arrays, axis=0) / (len(arrays) if method == "mean" else 1)


def assert_close(found: torch.Tensor, base: torch.Tensor, delta: np.ndarray, name: str) -> None:
    judge = base.double().numpy() + delta
    allowed = torch.finfo(found.dtype).eps * np.linalg.norm(judge) / 2 + 1e-5 * np.linalg.norm(delta)
    assert np.linalg.norm(found.double().numpy() - judge) <= 1.01 * allowed, name


@pytest.mark.parametrize("task", [["SEQ_CLS"], {"a": 1}, 3])
def test_a_task_that_is_no_word(tmp_path: Path, task: Any) -> None:
    base, adapters = make_adapters(tmp_path, task_type=task)
    plan = make_plan(load_config({"base": base, "experts": adapters, "method": "mean", "adapter_rank": 2}))
    assert plan.adapter_settings is not None
    assert plan.adapter_settings["task_type"] == task


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["iso-c", "iso-cts", "mean", "task-arithmetic"])
def test_checkpoint_out(tmp_path: Path, method: str, dtype: str) -> None:
    base_folder, adapters = make_adapters(tmp_path)
    out = tmp_path / "out"
    weights = [1.0, 0.5, -0.75]
    config = {"base": base_folder, "experts": adapters, "method": method, "scaling": [0.7, 1.4], "out": out}
    report = imf.merge({**config, "weights": weights, "dtype": dtype})
    assert {tensor["name"] for tensor in report.tensors if tensor["route"] == "factors"} == set(ADAPTED)
    assert report.counts() == {"copy": len(SHAPES) + 1 - len(ADAPTED), method: len(ADAPTED)}
    base = load_folder(base_folder)
    for scaling in (0.7, 1.4):
        merged = load_folder(out / f"scaling-{scaling:g}")
        assert merged.keys() == base.keys()
        for name, tensor in base.items():
            if name not in ADAPTED:
                kept = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
                assert torch.equal(merged[name], kept), name
                continue
            deltas = [weight * delta_of(folder, name) for weight, folder in zip(weights, adapters, strict=True)]
            assert_close(merged[name], tensor, scaling * expected_delta(method, deltas), name)
        assert (out / f"scaling-{scaling:g}" / "tokenizer.json").exists()
    found = verify(out, samples=20)
    assert len(found.recomputed) == 2 * len(ADAPTED)
    assert not found.remarks


@pytest.mark.parametrize("rank", [3, 15, 20])
@pytest.mark.parametrize("method", ["iso-c", "iso-cts", "mean"])
def test_adapter_out(tmp_path: Path, method: str, rank: int) -> None:
    _, adapters = make_adapters(tmp_path)
    base_folder = make_base(tmp_path / "sharded", shards=2)
    out = tmp_path / "out"
    config = {"base": base_folder, "experts": adapters, "method": method, "scaling": 1.5, "adapter_rank": rank}
    report = imf.merge({**config, "out": out})
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "report.json"}
    assert {path.name for path in out.iterdir()} == names
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", rank, rank)
    assert settings["target_modules"] == sorted(name.removesuffix(".weight") for name in ADAPTED)
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(ADAPTED)
    reported = {tensor["name"]: tensor["truncation"] for tensor in report.tensors}
    assert reported.keys() == set(ADAPTED)
    for name in ADAPTED:
        judge = 1.5 * expected_delta(method, [delta_of(folder, name) for folder in adapters])
        error = oracle.relative_error(delta_of(out, name).numpy(), judge)
        assert error == pytest.approx(reported[name], abs=1e-6), name
        if rank >= 15:  # the ranks of all tasks together
            assert error <= 1e-6
        else:
            sigma = np.linalg.svd(judge, compute_uv=False)
            assert error == pytest.approx(np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma), rel=1e-4)
    assert len(verify(out, samples=20).recomputed) == len(ADAPTED)
    # Merged again as an adapter of the same base, it is what it was.
    imf.merge({**config, "method": "task-arithmetic", "experts": [out], "scaling": 1.0, "out": tmp_path / "again"})
    for name in ADAPTED:
        assert oracle.relative_error(delta_of(tmp_path / "again", name).numpy(), delta_of(out, name).numpy()) <= 1e-6


def test_base_and_factors_are_all_that_is_read(tmp_path: Path) -> None:
    base, adapters = make_adapters(tmp_path)
    plan = make_plan(load_config({"base": base, "experts": adapters, "method": "iso-c"}))
    factor_bytes = sum(
        sum(t.nbytes for t in load_file(path / "adapter_model.safetensors").values()) for path in adapters
    )
    assert plan.read_bytes == sum(tensor.nbytes for tensor in load_folder(base).values()) + factor_bytes
    plan = make_plan(load_config({"base": base, "experts": adapters, "method": "iso-c", "adapter_rank": 4}))
    assert plan.read_bytes == factor_bytes
    report = imf.merge({"base": base, "experts": adapters, "method": "iso-c", "out": tmp_path / "out"})
    assert report.read_bytes == sum(tensor.nbytes for tensor in load_folder(base).values()) + factor_bytes


def with_head(root: Path) -> tuple[Path, list[Path]]:
    """Adapters of which the first two also hold a trained lm_head, and the second a LoRA of fewer modules."""
    base = make_base(root / "base")
    head = load_folder(base)["lm_head.weight"]
    generator = torch.Generator().manual_seed(7)
    heads = [head + 0.1 * torch.randn(head.shape, generator=generator) for _ in range(2)]
    return base, [
        save_adapter(root / "a0", draw_factors(0), {"lm_head.weight": heads[0]}, modules_to_save=["lm_head"]),
        save_adapter(
            root / "a1", draw_factors(1, names=ADAPTED[:2]), {"lm_head.weight": heads[1]}, modules_to_save=["lm_head"]
        ),
        save_adapter(root / "a2", draw_factors(2)),
    ]


@pytest.mark.parametrize("adapter_rank", [None, 12])
def test_whole_tensors_and_missing_modules(tmp_path: Path, adapter_rank: int | None) -> None:
    base_folder, adapters = with_head(tmp_path)
    config = {"base": base_folder, "experts": adapters, "method": "iso-c", "out": tmp_path / "out"}
    with pytest.raises(
        imf.InputError, match=r"a1: leaves 2 tensor\(s\) alone .* 'model.layers.0.down_proj.weight'"
    ) as e:
        imf.merge(config)
    assert "a2: leaves 1 tensor(s) alone that other adapters adapt, such as 'lm_head.weight'" in str(e.value)
    assert not (tmp_path / "out").exists()
    imf.merge({**config, "on_missing": "zero", "adapter_rank": adapter_rank})
    base = load_folder(base_folder)
    head = [load_file(path / "adapter_model.safetensors").get(PREFIX + "lm_head.weight") for path in adapters]
    moved = [0.0 * base["lm_head.weight"] if each is None else each - base["lm_head.weight"] for each in head]
    judge = expected_delta("iso-c", [each.double() for each in moved])
    if adapter_rank is None:
        merged = load_folder(tmp_path / "out")
        assert_close(merged["lm_head.weight"], base["lm_head.weight"], judge, "lm_head.weight")
        for name in ADAPTED:
            judge = expected_delta("iso-c", [delta_of(folder, name) for folder in adapters])
            assert_close(merged[name], base[name], judge, name)
    else:
        written = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert_close(written[PREFIX + "lm_head.weight"], base["lm_head.weight"], judge, "lm_head.weight")
        settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert settings["modules_to_save"] == ["lm_head"]
        for name in ADAPTED:
            judge = expected_delta("iso-c", [delta_of(folder, name) for folder in adapters])
            assert oracle.relative_error(delta_of(tmp_path / "out", name).numpy(), judge) <= 1e-6
    assert len(verify(tmp_path / "out", samples=20).recomputed) == len(ADAPTED) + 1


@pytest.mark.parametrize("adapter_rank", [None, 6])
def test_resumed_to_the_same_bytes(tmp_path: Path, adapter_rank: int | None) -> None:
    base, adapters = make_adapters(tmp_path)
    config = {"base": base, "experts": adapters, "scaling": [0.5, 1.0], "adapter_rank": adapter_rank}
    imf.merge({**config, "out": tmp_path / "whole"})

    def interrupt(progress: Progress) -> None:
        if progress.done_tensors == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imf.merge({**config, "out": tmp_path / "out"}, observer=interrupt)
    assert not (tmp_path / "out").exists()
    imf.merge({**config, "out": tmp_path / "out"}, resume=True)
    for folder in ("scaling-0.5", "scaling-1"):
        whole, resumed = (
            {name: data for name, data in listing(tmp_path / each / folder).items() if name != "README.md"}
            for each in ("whole", "out")
        )
        assert whole == resumed
    # The same weights under another alpha are another merge.
    settings = json.loads((adapters[0] / "adapter_config.json").read_text())
    (adapters[0] / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 1}))
    with pytest.raises(imf.ConfigError, match="holds another merge"):
        imf.merge({**config, "out": tmp_path / "out"}, resume=True)
    assert "adapter_config.json" in verify(tmp_path / "out").inputs_changed[0]


def test_a_damaged_adapter_is_found(tmp_path: Path) -> None:
    base, adapters = make_adapters(tmp_path)
    imf.merge({"base": base, "experts": adapters, "adapter_rank": 6, "out": tmp_path / "out"})
    file = tmp_path / "out" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
    with pytest.raises(imf.VerificationError, match=r"lora_B.weight' is not what was written"):
        verify(tmp_path / "out")


def test_verify_judges_factors_by_the_float64_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that are off by a part in a hundred, written and recorded as they are."""
    from isomerge_fast.methods.factors import LowRank, merge_factors
    from isomerge_fast.planning import factor_routes

    def spoiled(*given: Any) -> Any:
        merged, stats = merge_factors(*given)
        return LowRank(merged.left_basis, merged.core * 1.01, merged.right_basis, merged.sum), stats

    base, adapters = make_adapters(tmp_path)
    monkeypatch.setattr(factor_routes, "merge_factors", spoiled)
    for name, rank in (("checkpoint", None), ("adapter", 15)):
        imf.merge({"base": base, "experts": adapters, "adapter_rank": rank, "out": tmp_path / name})
        with pytest.raises(imf.VerificationError, match=r"differs from its float64 recomputation by 1\.0e-02"):
            verify(tmp_path / name)


def test_saved_delta_can_be_applied(tmp_path: Path) -> None:
    base, adapters = make_adapters(tmp_path)
    config = {"base": base, "experts": adapters, "method": "iso-c"}
    imf.merge({**config, "save_delta": True, "out": tmp_path / "one"})
    imf.apply(tmp_path / "one", 0.25, tmp_path / "quarter")
    kept = load_folder(tmp_path / "one" / "delta")
    assert not kept["model.embed_tokens.weight"].any()
    imf.merge({**config, "save_delta": True, "scaling": 0.25, "out": tmp_path / "again"})
    assert {name: value.tolist() for name, value in load_folder(tmp_path / "quarter").items()} == {
        name: value.tolist() for name, value in load_folder(tmp_path / "again").items()
    }


def test_the_command_line_and_the_card(tmp_path: Path) -> None:
    base, adapters = make_adapters(tmp_path)
    inputs = ["--base", str(base), *(word for path in adapters for word in ("--expert", str(path)))]
    runner = CliRunner()
    given = [*inputs, "--adapter-rank", "6", "--weight", "1", "--weight", "2", "--weight", "3", "--on-missing", "zero"]
    plan = runner.invoke(app, ["plan", *given])
    assert plan.exit_code == 0, plan.output
    assert "factors of rank 15" in " ".join(plan.output.split())
    run = runner.invoke(app, ["run", *given, "--out", str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    # Three adapters of rank 4, 5 and 6; Iso-CTS, and all directions weigh alike.
    lost = 100 * (1 - 6 / 15) ** 0.5
    assert f"the adapter's rank leaves out {lost:.2g} % of a merged delta at most" in run.output
    shown = " ".join(run.output.split())
    assert "(rank 15 of 24) and 2 other tensor(s): the sum is of low rank" in shown
    report = runner.invoke(app, ["report", str(tmp_path / "out")])
    assert report.exit_code == 0
    assert f"{lost / 100:.3g}" in report.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "3 LoRA adapters" in card
    again = tmp_path / "again.yml"
    again.write_text(card.split("```yaml\n")[1].split("```")[0].replace("out: merged", f"out: {tmp_path / 'again'}"))
    assert runner.invoke(app, ["run", str(again)]).exit_code == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_nan_is_named(tmp_path: Path) -> None:
    base, adapters = make_adapters(tmp_path)
    # Cloned: what is loaded may be mapped from the file that is about to be written.
    tensors = {key: value.clone() for key, value in load_file(adapters[1] / "adapter_model.safetensors").items()}
    name = PREFIX + "model.layers.0.k_proj.lora_B.weight"
    tensors[name][2, 1] = torch.nan
    save_file(tensors, adapters[1] / "adapter_model.safetensors")
    config = {"base": base, "experts": adapters, "out": tmp_path / "out"}
    for rank in (None, 5):
        with pytest.raises(imf.InputError, match=rf"adapter1.*'{name}' holds 1 NaN"):
            imf.merge({**config, "adapter_rank": rank})
    spoiled = {key: value.clone() for key, value in load_folder(base).items()}
    spoiled["model.layers.0.k_proj.weight"][0, 0] = torch.inf
    save_folder(base, spoiled, config={"model_type": "test"})
    tensors[name][2, 1] = 0.0
    save_file(tensors, adapters[1] / "adapter_model.safetensors")
    with pytest.raises(imf.InputError, match=r"model\.safetensors: tensor 'model.layers.0.k_proj.weight' holds 1 NaN"):
        imf.merge(config)
    assert not (tmp_path / "out").exists()


def of_another_width(root: Path) -> dict[str, Any]:
    name = ADAPTED[0]
    factors = draw_factors(0)
    factors[name] = (torch.ones(4, 32), torch.ones(24, 4))
    return {"experts": [save_adapter(root / "other", factors)]}


def of_other_modules(root: Path) -> dict[str, Any]:
    factors = {"model.layers.7.q_proj.weight": (torch.ones(4, 24), torch.ones(24, 4))}
    return {"experts": [save_adapter(root / "other", factors)]}


def of_two_bases(root: Path) -> dict[str, Any]:
    names = ("org/model-1b", "org/model-1b-instruct")
    return {
        "experts": [
            save_adapter(root / f"of{index}", draw_factors(index), base_model_name_or_path=name)
            for index, name in enumerate(names)
        ]
    }


def beside_a_checkpoint(root: Path) -> dict[str, Any]:
    return {"experts": [save_adapter(root / "lora", draw_factors(0)), make_base(root / "full")]}


def whole_and_factors(root: Path) -> dict[str, Any]:
    whole = save_adapter(
        root / "whole", draw_factors(0, names=ADAPTED[1:]), {ADAPTED[0]: torch.ones(SHAPES[ADAPTED[0]])}
    )
    return {"experts": [whole, save_adapter(root / "factors", draw_factors(1))]}


def whole_of_another_vocabulary(root: Path) -> dict[str, Any]:
    return {"experts": [save_adapter(root / "resized", draw_factors(0), {"lm_head.weight": torch.ones(44, 24)})]}


def whole_that_the_base_has_not(root: Path) -> dict[str, Any]:
    return {"experts": [save_adapter(root / "scored", draw_factors(0), {"score.weight": torch.ones(2, 24)})]}


def biases(root: Path) -> dict[str, Any]:
    whole = {"model.layers.0.norm.weight": torch.ones(24)}
    return {"experts": [save_adapter(root / "biases", draw_factors(0), whole, bias="all")], "adapter_rank": 4}


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], type[Exception], str]] = {
    "another-width": (of_another_width, imf.InputError, r"other: .*\[24, 32\].*\[24, 24\]"),
    "other-modules": (of_other_modules, imf.InputError, "'model.layers.7.q_proj.weight'.*is not in the base"),
    "two-bases": (of_two_bases, imf.InputError, "adapters of different bases: .*1b-instruct.*on_other_base: ignore"),
    "adapter-and-checkpoint": (beside_a_checkpoint, imf.InputError, "lora: a LoRA adapter"),
    "whole-and-factors": (
        whole_and_factors,
        imf.InputError,
        "adapted in one adapter and trained as a whole in another",
    ),
    "whole-vocabulary": (
        whole_of_another_vocabulary,
        imf.InputError,
        r"resized: tensor 'lm_head.weight' has shape \[44, 24\].*\[40, 24\] \(another vocabulary size",
    ),
    "whole-extra": (
        whole_that_the_base_has_not,
        imf.InputError,
        r"scored: tensor 'score.weight' \[2, 24\] is not in the base .*on_extra",
    ),
    "base-is-an-adapter": (
        lambda root: {"base": root / "adapter0"},
        imf.InputError,
        "adapter0: a LoRA adapter; the base is the checkpoint",
    ),
    "biases": (biases, imf.InputError, "bias: all, trained biases"),
    "deltas": (lambda _: {"experts_are_deltas": True}, imf.ConfigError, "experts_are_deltas: LoRA adapters are that"),
    "rank": (lambda _: {"adapter_rank": 0}, imf.ConfigError, "adapter_rank is 0"),
    "rank-above-all": (lambda _: {"adapter_rank": 10**9}, imf.ConfigError, "no adapted matrix has a rank above 24"),
    "rank-and-delta": (
        lambda _: {"adapter_rank": 4, "save_delta": True},
        imf.ConfigError,
        "adapter_rank and save_delta exclude each other",
    ),
    "unknown-choice": (
        lambda _: {"on_missing": "zeros"},
        imf.ConfigError,
        r"on_missing 'zeros' is unknown \(did you mean 'zero'",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(
    tmp_path: Path, make: Callable[[Path], dict[str, Any]], kind: type[Exception], message: str
) -> None:
    base, adapters = make_adapters(tmp_path)
    with pytest.raises(kind, match=f"(?s){message}"):
        imf.merge({"base": base, "experts": adapters, "out": tmp_path / "out", **make(tmp_path)})
    assert not list(tmp_path.glob("*out*"))


def test_a_rank_above_all_is_refused_of_new_merges_only(tmp_path: Path) -> None:
    """Earlier releases took it: what they wrote is still verified."""
    base, adapters = make_adapters(tmp_path)
    config = load_config({"base": base, "experts": adapters, "adapter_rank": 25})
    assert make_plan(config, is_new=False).tensors
    with pytest.raises(imf.ConfigError, match="no adapted matrix has a rank above 24"):
        make_plan(config)


def test_what_can_be_overruled(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = {"base": base, "method": "mean", **of_two_bases(tmp_path)}
    plan = make_plan(load_config({**config, "on_other_base": "ignore"}))
    assert any("was trained on 'org/model-1b-instruct'" in note for note in plan.notes)


@pytest.mark.parametrize("key", ["adapter_rank", "on_missing", "on_other_base"])
def test_keys_for_adapters_are_refused_of_checkpoints(tmp_path: Path, key: str) -> None:
    base = make_base(tmp_path / "base")
    value = {"adapter_rank": 4, "on_missing": "zero", "on_other_base": "ignore"}[key]
    with pytest.raises(imf.ConfigError, match=f"{key} is for experts that are LoRA adapters"):
        imf.merge({"base": base, "experts": [base], key: value, "out": tmp_path / "out"})


@pytest.mark.parametrize("more", [[], ["--adapter-rank", "6"]], ids=["checkpoint", "adapter"])
def test_bench_estimates_it(tmp_path: Path, more: list[str]) -> None:
    base, adapters = make_adapters(tmp_path)
    inputs = ["--base", str(base), *(word for path in adapters for word in ("--expert", str(path)))]
    given = ["bench", *inputs, *more, "--budget", "0", "--folder", str(tmp_path), "--format", "json"]
    run = CliRunner().invoke(app, given)
    assert run.exit_code == 0, run.output
    groups = {tuple(group["shape"]): group for group in json.loads(run.output)["groups"]}
    assert groups[(64, 24)]["algorithm"].endswith("/factors")
    assert all(group["read_again_bytes"] == 0 for group in groups.values())
