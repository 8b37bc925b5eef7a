"""FusionBench's algorithms on isomerge-fast: the same models as its own classes make, from pools of every kind."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import runpy
import subprocess
import sys
import time
import weakref
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fused_passes import fused_passes
from torch import Tensor, nn

import isomerge_fast as imf
import peers
from benchmarks.harness import peers as harness
from isomerge_fast.checkpoint.io.reader import Reader

peers.need("fusion_bench", "fusion-bench")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub is imported: nothing here may ask a network

import transformers  # noqa: E402  # the hub's
from fusion_bench import BaseModelPool, instantiate  # noqa: E402  # after the skip
from fusion_bench.method import ISO_C_Merge, ISO_CTS_Merge  # noqa: E402  # after the skip
from fusion_bench.modelpool import CausalLMPool, CLIPVisionModelPool  # noqa: E402  # after the skip

from isomerge_fast.integrations import fusion_bench as integration  # noqa: E402  # after the skip
from isomerge_fast.integrations.fusion_bench import IsoCFast, IsoCTSFast  # noqa: E402  # after the skip

pytestmark = pytest.mark.peer
ROOT = Path(__file__).resolve().parents[1]
TASKS = 3
PAIRS = {"iso-c": (IsoCFast, ISO_C_Merge), "iso-cts": (IsoCTSFast, ISO_CTS_Merge)}
transformers.utils.logging.disable_progress_bar()


class Net(nn.Module):
    """Square, wide and tall matrices, a convolution, vectors; and a counter, at which FusionBench's classes stop."""

    def __init__(self, counter: bool = False) -> None:
        super().__init__()
        self.square, self.wide, self.tall = nn.Linear(24, 24), nn.Linear(40, 24), nn.Linear(24, 40, bias=False)
        self.text_projection, self.conv = nn.Linear(24, 16, bias=False), nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm1d(8, track_running_stats=counter)


def moved(model: Any, seed: int) -> Any:
    """A copy with every weight moved: deltas of full rank."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for tensor in dict.fromkeys(model.state_dict(keep_vars=True).values()):  # tied weights once
        if tensor.is_floating_point():
            tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        else:
            tensor.data += seed
    return model


def make(method: str, **options: Any) -> tuple[Any, Any]:
    """(ours, theirs)."""
    options |= {"common_space_fraction": 0.6} if method == "iso-cts" else {}
    ours, theirs = PAIRS[method]
    return ours(**options), theirs(**options)


def assert_same(ours: Any, theirs: Any, base: dict[str, Tensor]) -> None:
    """Every tensor, and what it moved by to 1e-4; rounded to its dtype."""
    mine, other = ours.state_dict(), theirs.state_dict()
    assert [(name, tensor.dtype) for name, tensor in mine.items()] == [(n, t.dtype) for n, t in other.items()]
    for name, start in base.items():
        apart = (mine[name].double() - other[name].double()).norm()
        step = (other[name].double() - start.double()).norm()
        assert step > 0 or not start.is_floating_point(), name
        rounding = torch.finfo(start.dtype).eps * start.double().norm() if start.is_floating_point() else 0.0
        assert apart <= 1e-4 * step + rounding, (name, apart, step)


def vision_config() -> Any:
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.15}
    return transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=72, image_size=32, patch_size=8, **layers)


def llama(tied: bool) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def save_family(root: Path, base: Any) -> Any:
    """{name in the pool: folder}."""
    models = {"_pretrained_": base} | {f"task{task}": moved(base, task + 1) for task in range(TASKS)}
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often ``from_pretrained`` of transformers loaded weights of each folder."""
    seen: Counter[str] = Counter()
    real = transformers.PreTrainedModel.from_pretrained.__func__

    def counted(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        seen[Path(pretrained_model_name_or_path).name] += 1
        return real(cls, pretrained_model_name_or_path, *args, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(counted))
    return seen


@pytest.fixture
def clip(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    return save_family(tmp_path, transformers.CLIPVisionModel(vision_config()))


@pytest.mark.parametrize("method", PAIRS)
def test_modules_in_memory(method: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    base: Any = Net()
    models = {"_pretrained_": base} | {f"task{task}": moved(base, task + 1) for task in range(TASKS)}
    theirs_pool, start = BaseModelPool(copy.deepcopy(models)), copy.deepcopy(base.state_dict())
    ours, theirs = make(method, scaling_factor=0.9, exclude_keys=["square.weight", "wide"])
    merged = ours.run(BaseModelPool(models))
    assert merged is base  # written to, as theirs
    assert (
        "exclude_keys: 'wide' matches no tensor (nearest: 'wide.bias'; 'wide*' would match)" in caplog.messages
    )  # theirs say nothing
    assert_same(merged, theirs.run(theirs_pool), start)
    mean = sum(models[f"task{task}"].square.weight for task in range(TASKS)) / TASKS
    expected = start["square.weight"] + 0.9 * (mean - start["square.weight"])
    assert torch.allclose(merged.square.weight, expected, atol=1e-6)


@pytest.mark.parametrize("method", PAIRS)
def test_every_sum_is_one_pass_over_base_and_experts(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = Net()
    models = {"_pretrained_": base} | {f"task{task}": moved(base, task + 1) for task in range(TASKS)}
    seen = fused_passes(monkeypatch)
    make(method, scaling_factor=0.9)[0].run(BaseModelPool(models))
    assert sorted(seen) == sorted((tuple(tensor.shape), TASKS) for tensor in base.state_dict().values())


def test_counters_stay_the_pretrained_models() -> None:
    base: Any = Net(counter=True)
    models = {"_pretrained_": base} | {f"task{task}": moved(base, task + 1) for task in range(TASKS)}
    expected = base.norm.running_var + sum(models[f"task{task}"].norm.running_var - 1 for task in range(TASKS)) / TASKS
    merged = IsoCFast(1.0).run(BaseModelPool(models))
    assert merged.norm.num_batches_tracked == 0  # 1, 2 and 3 in the experts
    assert torch.allclose(merged.norm.running_var, expected)


def test_nothing_is_written_to_a_model_in_memory_before_all_is_merged() -> None:
    base: Any = Net(counter=True)
    models = {"_pretrained_": base} | {f"task{task}": moved(base, task + 1) for task in range(TASKS)}
    list(models["task1"].state_dict().values())[-2][0] = torch.nan
    start = copy.deepcopy(base.state_dict())
    with pytest.raises(imf.InputError, match=r"'norm.running_var'.*experts\[1\]"):
        IsoCFast(1.0).run(BaseModelPool(models))
    assert all(torch.equal(tensor, start[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("names", ["new-names", "old-names"])
@pytest.mark.parametrize("method", PAIRS)
def test_clip_folders_are_read_tensor_by_tensor(
    clip: Any, method: str, names: str, loads: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    if names == "old-names":  # files from before transformers 5, whose names it changes when it loads them
        for folder in clip.values():
            file = f"{folder}/model.safetensors"
            old = {f"vision_model.{name}": tensor for name, tensor in load_file(file).items()}
            save_file(old, file, metadata={"format": "pt"})
    ours, theirs = make(method, scaling_factor=0.8, exclude_keys=["encoder.layers.0.mlp.fc1.weight"])
    caplog.set_level(logging.INFO, "isomerge_fast")
    merged = ours.run(CLIPVisionModelPool(clip))
    assert loads == {"_pretrained_": 1}
    said = [message.partition(" from ")[0] for message in caplog.messages if "read tensor by tensor" in message]
    assert said == [f"isomerge-fast: expert 'task{task}' is read tensor by tensor" for task in range(TASKS)]
    base = CLIPVisionModelPool(clip).load_pretrained_model().state_dict()
    assert_same(merged, theirs.run(CLIPVisionModelPool(clip)), base)


def test_a_hub_id_in_the_cache(clip: Any, tmp_path: Path, loads: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as the hub's cache is; there is no network that could be asked."""
    snapshot = tmp_path / "cache" / "models--someone--task1" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    Path(clip["task1"]).rename(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    clip["task1"] = str(snapshot)
    expected = IsoCFast(1.0).run(CLIPVisionModelPool(clip)).state_dict()
    clip["task1"] = "someone/task1"
    merged = IsoCFast(1.0).run(CLIPVisionModelPool(clip)).state_dict()
    assert loads == {"_pretrained_": 2}  # in two merges
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_one_tensor_of_each_expert_is_alive(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most, read = 0, 0, Reader.read

    def freed(size: int) -> None:
        nonlocal alive
        alive -= size

    def counted(self: Reader, piece: Any) -> Tensor:
        nonlocal alive, most
        tensor = read(self, piece)
        alive += tensor.nbytes
        most = max(most, alive)
        weakref.finalize(tensor, freed, tensor.nbytes)
        return tensor

    monkeypatch.setattr(Reader, "read", counted)
    model = IsoCFast(1.0).run(CLIPVisionModelPool(clip))
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert largest <= most <= TASKS * largest
    assert alive == 0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_llama_folders(tmp_path: Path, tied: bool, loads: Counter[str]) -> None:
    torch.manual_seed(2)
    paths = save_family(tmp_path, llama(tied))
    entry = {"_target_": "transformers.LlamaForCausalLM.from_pretrained"}
    models = {name: {**entry, "pretrained_model_name_or_path": path} for name, path in paths.items()}
    options = {"tokenizer": None, "model_kwargs": {"torch_dtype": "float64"}}
    ours, theirs = make("iso-cts", scaling_factor=1.1)
    merged = ours.run(CausalLMPool(models, **options))
    assert loads == {"_pretrained_": 1}
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert merged.dtype == torch.float64
    base = CausalLMPool(models, **options).load_pretrained_model().state_dict()
    assert_same(merged, theirs.run(CausalLMPool(models, **options)), base)


def test_experts_of_another_dtype_are_cast_as_they_would_be_loaded(tmp_path: Path, loads: Counter[str]) -> None:
    """Their kind is another one than the pretrained model's, so that one of them is loaded to be compared."""
    base = llama(False)
    paths = save_family(tmp_path, base)
    for task in range(TASKS):
        moved(base, task + 1).to(torch.bfloat16).save_pretrained(paths[f"task{task}"])
    pool = CausalLMPool(paths, tokenizer=None)
    merged = IsoCFast(1.0).run(pool).state_dict()
    assert loads == {"_pretrained_": 1, "task0": 1}
    whole: Any = {name: pool.load_model(name) for name in pool.all_model_names}  # FusionBench's own takes no two dtypes
    assert whole["task2"].dtype == torch.bfloat16
    expected = IsoCFast(1.0).run(BaseModelPool(whole)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


def test_a_pool_that_reads_lazily_itself(tmp_path: Path) -> None:
    base = llama(False)
    paths = save_family(tmp_path, base)
    merged, theirs = (
        algorithm.run(CausalLMPool(paths, tokenizer=None, enable_lazy_loading=True))
        for algorithm in make("iso-c", scaling_factor=0.9)
    )
    assert type(merged) is type(theirs)
    assert_same(merged, theirs, base.state_dict())


class Doubled(CLIPVisionModelPool):
    """A pool whose models are not those of its files."""

    def load_model(self, *args: Any, **options: Any) -> Any:
        model = super().load_model(*args, **options)
        model.post_layernorm.weight.data *= 2
        return model


def tamper(clip: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Any]:
    models: dict[str, Any] = dict(clip)
    file, pool = Path(clip["task1"], "model.safetensors"), CLIPVisionModelPool
    entry = {"_target_": "transformers.CLIPVisionModel.from_pretrained", "pretrained_model_name_or_path": clip["task1"]}
    if how == "other pool":
        pool = Doubled
    elif how == "other key":
        models["task1"] = {**entry, "ignore_mismatched_sizes": True}
    elif how == "other maker":
        models["task1"] = {**entry, "_target_": "isomerge_fast_tests.make"}
        make_it = type(sys)("isomerge_fast_tests")
        make_it.make = lambda pretrained_model_name_or_path: moved(  # type: ignore[attr-defined]  # made here
            transformers.CLIPVisionModel.from_pretrained(pretrained_model_name_or_path), 9
        )
        monkeypatch.setitem(sys.modules, "isomerge_fast_tests", make_it)
    elif how == "pickled":
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    elif how == "missing":
        tensors = load_file(file)
        del tensors["post_layernorm.weight"]  # which the model then makes anew, as ones
        save_file(tensors, file, metadata={"format": "pt"})
    elif how == "changed by loading":
        real = transformers.CLIPVisionModel.from_pretrained.__func__

        def changing(cls: Any, *args: Any, **options: Any) -> Any:
            model = real(cls, *args, **options)
            model.post_layernorm.weight.data *= 2
            return model

        monkeypatch.setattr(transformers.CLIPVisionModel, "from_pretrained", classmethod(changing))
    return models, pool


@pytest.mark.parametrize(
    ("how", "loaded", "reason"),
    [
        ("other pool", TASKS, "Doubled loads models in a way of its own"),
        ("other key", 1, "its entry has ignore_mismatched_sizes"),
        ("other maker", 1, "made by isomerge_fast_tests.make"),
        ("pickled", 1, "only pickled weights"),
        ("missing", 1, "no tensor 'post_layernorm.weight' in its files"),
        ("changed by loading", TASKS, "'post_layernorm.weight' is not loaded as its file holds it"),
    ],
)
def test_what_is_not_sure_is_loaded_by_the_pool(
    clip: Any,
    how: str,
    loaded: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    models, pool = tamper(clip, how, monkeypatch)
    base = pool(models).load_pretrained_model().state_dict()
    merged = IsoCFast(0.8).run(pool(models))
    said = [message for message in caplog.messages if "is loaded whole" in message]
    assert len(said) == loaded
    assert all(reason in message for message in said)
    assert_same(merged, ISO_C_Merge(0.8).run(pool(models)), base)


def test_other_shapes_are_an_error_with_their_names(clip: Any) -> None:
    config = vision_config()
    config.intermediate_size = 64
    transformers.CLIPVisionModel(config).save_pretrained(clip["task1"])
    with pytest.raises(imf.InputError, match=r"experts\[1\]: tensor .*fc1.weight' has shape \[64, 32\], .*\[72, 32\]"):
        IsoCFast(1.0).run(CLIPVisionModelPool(clip))


def test_yaml(clip: Any, tmp_path: Path) -> None:
    """Through FusionBench's own instantiate, and back."""
    yaml = tmp_path / "method.yaml"
    yaml.write_text(
        "_target_: isomerge_fast.integrations.fusion_bench.IsoCTSFast\n"
        "scaling_factor: 0.7\ncommon_space_fraction: 0.5\nexclude_keys: [pre_layrnorm.weight, post.weight]\n"
    )
    method: Any = IsoCTSFast.from_yaml(yaml)
    assert (method.scaling_factor, method.common_space_fraction) == (0.7, 0.5)
    method.to_yaml(tmp_path / "again.yaml")
    again = instantiate(IsoCTSFast.from_yaml(tmp_path / "again.yaml").config)
    assert isinstance(again, IsoCTSFast)
    assert "_target_: isomerge_fast.integrations.fusion_bench.IsoCTSFast\n" in (tmp_path / "again.yaml").read_text()
    assert list(again.exclude_keys or ()) == ["pre_layrnorm.weight", "post.weight"]
    with pytest.raises(imf.ConfigError, match=r"key 'exclude_key' is unknown \(did you mean 'exclude_keys'"):
        instantiate({"_target_": method.config._target_, "scaling_factor": 1.0, "exclude_key": []})
    merged = again.run(CLIPVisionModelPool(clip)).state_dict()
    expected = IsoCTSFast(0.7, 0.5).run(CLIPVisionModelPool(clip)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


def test_command_line(clip: Any, tmp_path: Path) -> None:
    """The example's method file, given to ``fusion_bench`` itself."""
    models = ",".join(f"{name}:{path}" for name, path in clip.items())
    command = [
        Path(sys.executable).parent / "fusion_bench",
        f"--config-dir={ROOT / 'examples' / 'fusion_bench'}",
        "method=iso_c_fast",
        "modelpool=CLIPVisionModelPool/_template",
        f"modelpool.models={{{models}}}",
        "taskpool=dummy",
        f"merged_model_save_path={tmp_path / 'merged'}",
        "print_config=false",
        "report_save_path=null",
        f"path.log_dir={tmp_path}",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    wide = {**os.environ, "COLUMNS": "400"}  # of the log's lines
    done = subprocess.run(command, cwd=tmp_path, env=wide, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'task0' is read tensor by tensor" in done.stdout + done.stderr
    expected = IsoCFast(1.0).run(CLIPVisionModelPool(clip)).state_dict()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in expected.items())


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: "0.3.0")
    spec = importlib.util.spec_from_file_location("isomerge_fast.integrations.again", integration.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(imf.errors.MissingPackageError, match=r"fusion-bench 0.3.0 is installed; .* 0.2.33 only"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.slow
@pytest.mark.parametrize("method", PAIRS)
def test_time(method: str) -> None:
    """Printed with -s, not asserted: 12 matrices, 8 tasks."""
    shapes = [(512, 512)] * 4 + [(512, 1024), (1024, 512), (512, 2048), (2048, 512)] * 2
    base: Any = nn.ParameterList([torch.randn(shape) * 0.02 for shape in shapes])
    models = {"_pretrained_": base} | {f"task{task}": moved(base, task + 1) for task in range(8)}
    pools = [BaseModelPool(copy.deepcopy(models)) for _ in range(2)]
    seconds, merged = [], []
    for algorithm, pool in zip(make(method, scaling_factor=1.0), pools, strict=True):
        start = time.perf_counter()
        merged.append(algorithm.run(pool))
        seconds.append(time.perf_counter() - start)
    print(f"{method}: ours {seconds[0]:.2f} s, FusionBench {seconds[1]:.2f} s, {seconds[1] / seconds[0]:.1f} times")
    assert_same(merged[0], merged[1], base.state_dict())


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "fusion_bench" / "merge.py"), run_name="__main__")
    assert "at most 1e-4: True" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints two figures; what is asserted of memory is asserted by counting, above."""
    monkeypatch.setattr(sys, "argv", ["memory.py", "--experts", "2", "--megabytes", "10"])
    runpy.run_path(str(ROOT / "examples" / "fusion_bench" / "memory.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if " MB before the pool" in line] == [
        "FusionBench",
        "isomerge-fast",
    ]


@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_its_functions_are_the_same_from_their_file_by_itself(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``make gpu`` runs where the package does not import, and has no part of it on the path."""
    generator = torch.Generator().manual_seed(0)
    deltas = [{"w": torch.randn(40, 24, generator=generator)} for _ in range(TASKS)]
    module, how = harness.iso_utils()
    assert how == "the package"
    expected = harness.fusion_bench(method, deltas)["w"]
    alone = harness.executed_by_itself(Path(module.__file__))
    assert alone.iso_c is not module.iso_c
    monkeypatch.setattr(harness, "iso_utils", lambda: (alone, "by itself"))
    assert torch.equal(harness.fusion_bench(method, deltas)["w"], expected)
