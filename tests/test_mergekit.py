"""Inside mergekit: our methods by its command line and its functions, and its recipes on our engine."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.fused_passes import fused_passes
from torch import Tensor

import isomerge_fast as imf
import oracle
from checkpoints import listing, load_folder
from isomerge_fast.config import load_config
from isomerge_fast.errors import ConfigError, InputError
from isomerge_fast.integrations.mergekit import main, register_all
from peers import need

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here may ask a network
need("mergekit", "mergekit")
need("transformers", "test")

kit, kit_config, kit_merge, kit_options, kit_registry, transformers = map(
    import_module,
    (
        "mergekit.merge_methods",
        "mergekit.config",
        "mergekit.merge",
        "mergekit.options",
        "mergekit.merge_methods.registry",
        "transformers",
    ),
)

pytestmark = pytest.mark.peer

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/mergekit/make_and_merge.py"
OPTIONS = kit_options.MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
# A model's own weights by name, a number, and the default.
WEIGHTS: list[Any] = [[{"filter": "mlp", "value": 0.5}, {"value": 1.25}], 0.75, None]


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("mergekit_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(example: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], list[Path]]:
    """The base and three experts of the example, made once in every dtype."""
    made: dict[torch.dtype, list[Path]] = {}

    def make(dtype: torch.dtype) -> list[Path]:
        if dtype not in made:
            folder = tmp_path_factory.mktemp("models")
            example.make_models(folder, dtype)
            made[dtype] = [folder / "base", *(folder / f"expert{index}" for index in range(3))]
        return made[dtype]

    return make


def recipe(method: str, folders: list[Path], weights: list[Any], *, with_base: bool = True, **more: Any) -> Any:
    listed = folders[1:] if with_base else folders
    entries = [
        {"model": str(folder)} | ({} if weight is None else {"parameters": {"weight": weight}})
        for folder, weight in zip(listed, weights, strict=True)
    ]
    return {"merge_method": method, "models": entries} | ({"base_model": str(folders[0])} if with_base else {}) | more


def both_ways(raw: Any, folder: Path, options: Any = OPTIONS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What mergekit and what our engine make of a recipe."""
    register_all()
    kit_merge.run_merge(kit_config.MergeConfiguration.model_validate(raw), str(folder / "mergekit"), options)
    imf.merge(load_config(raw, out=str(folder / "ours")))
    return load_folder(folder / "mergekit"), load_folder(folder / "ours")


def close(value: Tensor, expected: Any, base: Tensor, bound: float = 1e-5) -> bool:
    """Whether the merged Δ is right to ``bound``, beside the rounding of θ itself to float32."""
    start = base.double().numpy()
    target = np.asarray(expected, dtype=np.float64)
    rounding = 2.0**-24 * float(np.linalg.norm(target))
    error = float(np.linalg.norm(value.double().numpy() - target))
    return error <= bound * float(np.linalg.norm(target - start)) + rounding


class TestCommandLine:
    @pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
    def test_fp32_equals_the_engine_and_the_oracle(
        self, models: Callable[[torch.dtype], list[Path]], tmp_path: Path, method: str
    ) -> None:
        folders = models(torch.float32)
        theirs, ours = both_ways(recipe(method, folders, WEIGHTS, parameters={"lambda": 1.3}), tmp_path)
        base, *experts = map(load_folder, folders)
        assert theirs.keys() == ours.keys() == base.keys()
        for name, start in base.items():
            weights = (0.5 if "mlp" in name else 1.25, 0.75, 1.0)
            origin = start.double().numpy()
            moved = [origin + w * (e[name].double().numpy() - origin) for w, e in zip(weights, experts, strict=True)]
            target = oracle.merge_tensor(name, origin, moved, method=method.replace("_", "-"), scaling=1.3)
            assert theirs[name].dtype == torch.float32
            assert close(theirs[name], target, start), name
            assert close(ours[name], target, start), name

    def test_bf16_equals_the_engine_and_loads(
        self, models: Callable[[torch.dtype], list[Path]], tmp_path: Path
    ) -> None:
        """No dtype is asked for: computed in float32, rounded once to the base's dtype."""
        theirs, ours = both_ways(recipe("iso_cts", models(torch.bfloat16), WEIGHTS), tmp_path)
        for name, tensor in theirs.items():
            assert tensor.dtype == torch.bfloat16
            # An error of 1e-6 before rounding changes a share of 1e-6 · 2⁸ of the numbers, by a unit in the last place.
            assert (tensor != ours[name]).float().mean() <= 1e-3, name
            assert torch.allclose(tensor.float(), ours[name].float(), rtol=2**-7, atol=1e-6), name
        load = transformers.LlamaForCausalLM.from_pretrained
        loaded = [load(tmp_path / folder).float() for folder in ("mergekit", "ours")]
        with torch.no_grad():
            logits = [model(torch.arange(12)[None]).logits for model in loaded]
        assert logits[0].isfinite().all()
        assert torch.allclose(*logits, rtol=1e-2, atol=1e-2 * logits[0].abs().max().item())

    def test_the_example(self, example: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """Both commands as a user starts them; they round to the same numbers."""
        example.main(tmp_path / "example")
        (line,) = [line for line in capfd.readouterr().out.splitlines() if "are the same" in line]
        same, _, total = line.split()[:3]
        assert int(same) >= 0.999 * int(total)
        assert "mergekit" not in load_config(example.RECIPE).experts[0]

    def test_help_is_mergekits(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["isomerge-mergekit-yaml", "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert "--lora-merge-cache" in capsys.readouterr().out

    @pytest.mark.parametrize("found", ["0.1.4", None])
    def test_another_mergekit_is_one_line_and_code_4(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        found: str | None,
    ) -> None:
        def version(package: str) -> str:
            if found is None:
                raise metadata.PackageNotFoundError(package)
            return found

        monkeypatch.setattr(metadata, "version", version)
        (tmp_path / "recipe.yml").write_text("merge_method: iso_c")
        before = listing(tmp_path)
        monkeypatch.setattr(sys, "argv", ["isomerge-mergekit-yaml", str(tmp_path / "recipe.yml"), str(tmp_path / "o")])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 4
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert (found or "not installed") in error
        assert "pip install 'isomerge-fast[mergekit]'" in error
        assert listing(tmp_path) == before

    def test_what_does_not_fit_is_one_line_that_names_the_tensor(
        self,
        models: Callable[[torch.dtype], list[Path]],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        """Nine experts of a matrix of 32 rows leave a negative number of common directions."""
        folders = models(torch.float32)
        copies = [tmp_path / f"copy{index}" for index in range(9)]
        for copy in copies:
            copy.symlink_to(folders[1])
        raw = recipe("iso_cts", [folders[0], *copies], [None] * 9, parameters={"common_fraction": 0.0})
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(raw))
        arguments = [str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--quiet"]
        monkeypatch.setattr(sys, "argv", ["isomerge-mergekit-yaml", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("isomerge-mergekit-yaml: tensor 'model.")
        assert "common directions" in error
        assert not list(tmp_path.glob("out/*.safetensors"))


TENSORS = {
    "a.weight": (24, 16),
    "text_projection.weight": (24, 16),
    "b.weight": (24, 16),
    "c.weight": (16, 24),
    "d.weight": (24, 16),
    "norm": (16,),
    "conv": (3, 2, 2, 2),
    "scale": (),
    "empty": (0, 4),
}


def states(dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in TENSORS.items()} for _ in range(4)
    ]


def merge_states(given: list[dict[str, Tensor]], method: str, **more: Any) -> dict[str, Tensor]:
    register_all()
    return kit.merge_state_dicts(given, method, base=0, **more)


class TestInMemory:
    @pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
    def test_a_batch_equals_its_members_and_the_oracle(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        """Matrices of one shape are one batch, without what is averaged for its name; each has weights of its own."""
        shapes: list[tuple[int, ...]] = []
        cls = {"iso_c": imf.IsoC, "iso_cts": imf.IsoCTS}[method]
        real = cls.merge

        def merge(self: Any, deltas: Any) -> Any:
            shapes.append(tuple(deltas.shape))
            return real(self, deltas)

        monkeypatch.setattr(cls, "merge", merge)
        given, before = states(), states()
        weights = [[1.0 + 0.1 * index, 0.5, 2.0 - 0.1 * index] for index in range(len(TENSORS))]
        parameters = {"weight": kit.PerGroupValues(weights), "lambda": 0.7}
        batched = merge_states(given, method, parameters=parameters)
        assert sorted(shapes) == [(16, 24), *[(24, 16)] * 3]  # on a CPU each by itself
        single = merge_states(given, method, parameters=parameters, batch_options=kit.BatchOptions(max_groups=1))
        for index, (name, start) in enumerate(before[0].items()):
            origin = start.double().numpy()
            moved = [
                origin + weight * (state[name].double().numpy() - origin)
                for weight, state in zip(weights[index], before[1:], strict=True)
            ]
            target = oracle.merge_tensor(name, origin, moved, method=method.replace("_", "-"), scaling=0.7)
            assert batched[name].dtype == torch.float32
            assert close(batched[name], target, start), name
            assert close(batched[name], single[name].double(), start, 1e-6), name
        for state, untouched in zip(given, before, strict=True):
            assert all(torch.equal(state[name], tensor) for name, tensor in untouched.items())

    def test_every_sum_is_one_pass_over_base_and_experts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """T deltas are made nowhere; members of a batch whose weights are equal are summed at once."""
        seen = fused_passes(monkeypatch)
        merge_states(states(), "iso_c", parameters={"weight": 0.5})
        # One of the matrices is averaged for its name.
        averaged = [(1, 24, 16), (1, 16), (1, 3, 2, 2, 2), (1,)]
        assert sorted(seen) == sorted((shape, 3) for shape in [*[(24, 16)] * 3, (16, 24), *averaged])

    def test_options_reach_the_method(self) -> None:
        base, *experts = [state["a.weight"] for state in states()]
        register_all()
        deltas = torch.stack([expert - base for expert in experts])
        options = {"common_fraction": 0.3, "rank_policy": "min-dim", "precision": "reference"}
        merged = kit.merge_tensors([base, *experts], "iso_cts", base_index=0, parameters=options)
        assert close(merged, base.double() + imf.iso_cts(deltas, **options), base, 1e-7)
        assert not close(merged, base.double() + imf.iso_cts(deltas), base, 1e-2)

    def test_rounded_once_to_what_is_asked_for(self) -> None:
        """bf16 in and float32 out: what was computed, and not its rounding to bf16; base's dtype when not asked."""
        given = states(torch.bfloat16)
        exact = merge_states(given, "iso_c", out_dtype=torch.float32)
        asis = merge_states(given, "iso_c")
        for name in ("a.weight", "norm"):
            origin, *moved = [state[name].double().numpy() for state in given]
            target = oracle.merge_tensor(name, origin, moved, method="iso-c", scaling=1.0)
            assert close(exact[name], target, given[0][name])
            assert torch.equal(asis[name], exact[name].bfloat16())

    def test_float64_stays_float64(self) -> None:
        given = states(torch.float64)
        merged = merge_states(given, "iso_cts")["c.weight"]
        origin, *moved = [state["c.weight"].numpy() for state in given]
        target = oracle.merge_tensor("c.weight", origin, moved, method="iso-cts", scaling=1.0)
        assert oracle.relative_error(merged.numpy() - origin, target - origin) <= 1e-12

    def test_not_finite_names_tensor_and_model(self) -> None:
        given = states()
        given[2]["b.weight"][3, 4] = float("nan")
        with pytest.raises(InputError, match=r"^tensor 'b.weight' \[24, 16\]: NaN or Inf in 2$"):
            merge_states(given, "iso_cts")
        given = states()
        given[0]["norm"][3] = float("inf")
        with pytest.raises(InputError, match=r"^tensor 'norm' \[16\]: NaN or Inf in 0$"):
            merge_states(given, "iso_c")
        with pytest.raises(InputError, match="out of the range of float32 arithmetic"):
            merge_states(states(), "iso_c", parameters={"weight": 1e38})
        with pytest.raises(InputError, match=r"^tensor .* merged weights overflow torch.float32 at lambda"):
            merge_states(states(), "iso_c", parameters={"lambda": 3e38})
        with pytest.raises(ConfigError, match=r"^tensor '.*' \[.*\]: lambda 1e\+300 is no finite number in float32"):
            merge_states(states(), "iso_c", parameters={"lambda": 1e300})

    @pytest.mark.parametrize(
        ("parameter", "value"),
        [
            ("rank_policy", "rnage"),
            ("precision", "best"),
            ("common_fraction", 1.5),
            ("weight", float("nan")),
            ("weight", "much"),
            ("lambda", float("inf")),
        ],
    )
    def test_bad_parameters_are_named(self, parameter: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"^parameter {parameter} is {value!r}: Input should be"):
            merge_states(states(), "iso_cts", parameters={parameter: value})

    def test_what_mergekit_checks_for_us(self) -> None:
        register_all()
        with pytest.raises(ValueError, match="requires a base input"):
            kit.merge_state_dicts(states(), "iso_c")
        with pytest.raises(ValueError, match="requires at least 1 non-base inputs"):
            merge_states(states()[:1], "iso_c")
        with pytest.raises(TypeError, match="common_fraction"):
            merge_states(states(), "iso_c", parameters={"common_fraction": 0.5})

    def test_registered_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        register_all()
        before = kit.registered_methods()
        register_all()
        assert kit.registered_methods() == before
        foreign = type(kit.get("iso_c"))("iso-c", "Another", ())
        monkeypatch.setitem(kit_registry._METHODS, "iso_c", foreign)
        with pytest.raises(ValueError, match="'iso_c' is already registered"):
            register_all()


PEER_RECIPES = {
    "task-arithmetic": ("task_arithmetic", [*WEIGHTS[:2], -0.5], {"parameters": {"lambda": 0.6}}),
    "task-arithmetic-normalized": ("task_arithmetic", [*WEIGHTS[:2], 2], {"parameters": {"normalize": True}}),
    # The base is added to the models, with the recipe's weight.
    "linear": ("linear", [0.3, None, 0.9], {"parameters": {"weight": 0.4}}),
    "linear-with-filters": ("linear", WEIGHTS, {"parameters": {"weight": {"filter": "*", "value": 0.4}}}),
}


@pytest.mark.parametrize(("method", "weights", "more"), PEER_RECIPES.values(), ids=PEER_RECIPES)
def test_mergekits_own_methods_on_our_engine(
    models: Callable[[torch.dtype], list[Path]], tmp_path: Path, method: str, weights: list[Any], more: dict[str, Any]
) -> None:
    """Both in float32: they differ by roundings of the numbers that are added up, a dozen of 2⁻²⁴ at most."""
    folders = models(torch.float32)
    theirs, ours = both_ways(recipe(method, folders, weights, **more), tmp_path)
    sizes = [load_folder(folder) for folder in folders]
    for name, tensor in theirs.items():
        scale = sum(state[name].abs() for state in sizes)
        assert ((tensor - ours[name]).abs() <= 12 * 2.0**-24 * scale).all(), name
        assert not torch.allclose(tensor, sizes[0][name], rtol=1e-3)


def test_linear_without_a_base(models: Callable[[torch.dtype], list[Path]], tmp_path: Path) -> None:
    folders = models(torch.float32)
    theirs, ours = both_ways(recipe("linear", folders, [0.1, 0.2, 0.3, 0.9], with_base=False), tmp_path)
    sizes = [load_folder(folder) for folder in folders]
    for name, tensor in theirs.items():
        scale = sum(state[name].abs() for state in sizes)
        assert ((tensor - ours[name]).abs() <= 12 * 2.0**-24 * scale).all(), name


def test_adapters_on_the_base(models: Callable[[torch.dtype], list[Path]], tmp_path: Path) -> None:
    """``base+adapter``: mergekit merges each into a copy of the base first, our engine takes the factors."""
    peft = import_module("peft")  # which mergekit brings
    base, *_ = models(torch.float32)
    entries = []
    for index, weight in enumerate((0.5, 1.5)):
        torch.manual_seed(index)
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / f"adapter{index}")
        entries.append({"model": f"{base}+{tmp_path / f'adapter{index}'}", "parameters": {"weight": weight}})
    raw = {"merge_method": "task_arithmetic", "base_model": str(base), "models": entries}
    options = OPTIONS.model_copy(update={"lora_merge_cache": str(tmp_path / "cache")})
    theirs, ours = both_ways(raw, tmp_path, options)
    start = load_folder(base)
    for name, tensor in theirs.items():
        assert torch.allclose(tensor, ours[name], rtol=0, atol=1e-6), name
        assert torch.equal(tensor, start[name]) != ("q_proj" in name or "up_proj" in name), name
