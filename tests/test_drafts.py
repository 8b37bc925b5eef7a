"""What becomes of every tensor, and what is written of it, by headers alone."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import make_adapters
from checkpoints import make_base, make_expert, make_family, save_folder
from isomerge_fast.config import MergeConfig, load_config
from isomerge_fast.errors import ConfigError
from isomerge_fast.execution.work_item import MergeSettings
from isomerge_fast.methods import make_method
from isomerge_fast.methods.source import checked_weights
from isomerge_fast.planning.drafts import Draft, Drafter
from isomerge_fast.planning.inputs import open_inputs
from isomerge_fast.planning.planner import make_plan

Family = tuple[Path, list[Path]]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), tasks=2)


def config_of(family: Family, **changes: Any) -> MergeConfig:
    return load_config({"base": str(family[0]), "experts": [str(path) for path in family[1]], **changes})


def drafts_of(config: MergeConfig) -> dict[str, Draft]:
    inputs = open_inputs(config)
    drafter = Drafter(config, inputs.experts, make_method(config.method, config.options), ())
    drafts = {name: drafter.draft(name, stored, "file") for name, stored in inputs.base.tensors.items()}
    extras = inputs.extras.items()
    return drafts | {name: drafter.draft(name, stored, "file", is_extra=True) for name, stored in extras}


def outputs_of(draft: Draft) -> list[tuple[str, float | None, torch.dtype]]:
    return [(output.folder, output.scaling, output.dtype) for output in draft.outputs]


def test_a_tensor_owns_its_outputs(family: Family) -> None:
    """One for every α, of the very same tensors, and the merged Δ, in the dtype that is computed in."""
    drafts = drafts_of(config_of(family, scaling=[0.5, 2.0], save_delta=True, dtype="bfloat16"))
    merged = [("scaling-0.5", 0.5, torch.bfloat16), ("scaling-2", 2.0, torch.bfloat16)]
    for name, tensor in make_base().items():
        draft = drafts[name]
        if tensor.is_floating_point():
            assert outputs_of(draft) == [*merged, ("delta", None, torch.float32)], name
        else:
            assert outputs_of(draft) == [(folder, scaling, draft.base.dtype) for folder, scaling, _ in merged], name
        assert {output.names for output in draft.outputs} == {(name,)}
        assert draft.outputs[0].tensors is draft.outputs[1].tensors
        written = [each for output in draft.outputs for each in output.tensors]
        assert draft.written_tensors == len(written)
        assert draft.write_bytes == draft.traffic.written * tensor.numel() == sum(each.bytes for each in written)
        assert [draft.tensors_in(output.folder) for output in draft.outputs] == [each.tensors for each in draft.outputs]
        assert draft.tensors_in("elsewhere") == ()
    assert outputs_of(drafts_of(config_of(family, scaling=3))["logit_scale"]) == [("", 3.0, torch.float32)]


def test_what_tensors_have_in_common_is_held_once(family: Family) -> None:
    """Folders and α: nine scalings more are sent to a worker as 70 bytes each, however many tensors there are."""
    sizes = []
    for count in (1, 10):
        plan = make_plan(config_of(family, scaling=list(range(1, 1 + count)), save_delta=True))
        assert {len(tensor.outputs) for tensor in plan.tensors} == {count, count + 1}
        assert len({id(tensor.scalings) for tensor in plan.tensors}) == 2  # with Δ, and without
        sizes.append(len(pickle.dumps(plan.tensors)))
    assert sizes[1] - sizes[0] < 9 * 70


def test_a_tensor_of_an_expert_alone_has_no_delta(tmp_path: Path) -> None:
    base = make_base()
    extra = {**make_expert(base, 0), "head.weight": torch.ones(2, 16)}
    folders = save_folder(tmp_path / "base", base), [save_folder(tmp_path / "expert", extra)]
    config = MergeConfig(str(folders[0]), [str(folders[1][0])], on_extra="copy", save_delta=True)
    draft = drafts_of(config)["head.weight"]
    assert (outputs_of(draft), draft.method) == ([("", 1.0, torch.float32)], None)
    assert draft.reason.startswith("not in the base: copied from")


def test_an_adapters_tensor_is_written_as_its_two_factors(tmp_path: Path) -> None:
    base, adapters = make_adapters(tmp_path)
    config = config_of((base, adapters), adapter_rank=2, scaling=[0.5, 1.0], dtype="float16")
    plan = next(tensor for tensor in make_plan(config).tensors if tensor.name == "model.layers.0.up_proj.weight")
    assert [(output.folder, output.scaling) for output in plan.outputs] == [("scaling-0.5", 0.5), ("scaling-1", 1.0)]
    module = "base_model.model.model.layers.0.up_proj"
    for output in plan.outputs:
        assert output.names == (f"{module}.lora_A.weight", f"{module}.lora_B.weight")
        assert [(each.dtype, each.shape) for each in output.tensors] == [
            (torch.float16, (2, 24)),
            (torch.float16, (64, 2)),
        ]
    assert plan.write_bytes == 2 * 2 * (2 * 24 + 64 * 2)
    assert plan.moved_bytes == plan.write_bytes + sum(stored.bytes for stored in plan.factors)


def test_drafts_are_values(family: Family) -> None:
    config = config_of(family, method="iso-c")
    drafts = drafts_of(config)
    assert drafts == drafts_of(config)
    with pytest.raises(FrozenInstanceError):
        drafts["mask"].reason = "another"  # type: ignore[misc]  # that it is frozen is what is tested
    up = [drafts[f"layers.{layer}.up.weight"] for layer in (0, 1)]
    assert up[0] != up[1]
    assert up[0].kind == up[1].kind != drafts["layers.0.down.weight"].kind
    assert up[0].traffic is up[1].traffic


def test_the_bases_checksums_are_recorded_where_the_delta_is_kept(family: Family, tmp_path: Path) -> None:
    for keeps in (False, True):
        plan = make_plan(config_of(family, save_delta=keeps))
        settings = MergeSettings.of(plan, tmp_path, "key", device="cpu", threads=1, direct=False, max_vram=None)
        assert settings.records_base == keeps
        assert list(plan.folders) == ([""] if not keeps else ["", "delta"])


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_of_one_are_none() -> None:
    assert checked_weights(None, torch.float32) is None
    assert checked_weights([1, 1.0], torch.float32) is None
    assert checked_weights([1.0, 1e200], torch.float64) == (1.0, 1e200)


@pytest.mark.parametrize("weight", [1e200, -1e39, float("inf"), float("nan")])
def test_a_weight_that_is_no_number_in_the_dtype_is_refused(family: Family, weight: float) -> None:
    with pytest.raises(
        ConfigError, match=f"^here: weight .*{weight:g} is no finite number in float32".replace("+", ".")
    ):
        checked_weights([0.5, weight], torch.float32, "here: ")
    config = MergeConfig(str(family[0]), [str(path) for path in family[1]], weights=[1.0, weight])
    with pytest.raises(ConfigError, match=r"^tensor 'conv.weight' \[4, 3, 3, 3\]: weight .* is no finite number"):
        make_plan(config)
