"""docs/new-method.md, run: methods and solvers from outside the package, by name in every process that needs them."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import isomerge_fast as imf
from adapters import make_adapters
from checkpoints import listing, make_base, make_expert, save_folder
from isomerge_fast.checkpoint.output.manifest import MANIFEST_FILE
from isomerge_fast.config import load_config
from isomerge_fast.errors import ConfigError, VerificationError
from isomerge_fast.execution.verify import verify
from isomerge_fast.methods import IsoC, IsoCTS, MemoryDeltas, Method, as_deltas, make_method
from isomerge_fast.planning.planner import make_plan

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/new-method.md").read_text(), flags=re.M | re.S)
MEDIAN, SETUP, POWER, *SOLVERS, USE = BLOCKS
# In the place of `os.pwrite` one that kills the process when it is called for the n-th time.
KILLER = """
import os, signal
left, pwrite = int(os.environ.get("KILLED_AT_WRITE", "0")), os.pwrite
def counted(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(*arguments)
if left:
    os.pwrite = counted
"""


def entry_points_of(setup: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a setup.py hands to setuptools."""
    given: dict[str, Any] = {}
    fake = types.ModuleType("setuptools")
    fake.setup = given.update  # type: ignore[attr-defined]  # a module of one function
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    exec(setup, {})
    monkeypatch.delitem(sys.modules, "setuptools")
    return given


def install(folder: Path, name: str, version: str, entries: Sequence[str], modules: Mapping[str, str] = {}) -> Path:
    """A package as pip leaves it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("\n".join(["[isomerge_fast.methods]", *entries, ""]))
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    return folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package of the document, importable in this process."""
    given = entry_points_of(SETUP, monkeypatch)
    (module,) = given["py_modules"]
    entries = given["entry_points"]["isomerge_fast.methods"]
    folder = install(tmp_path / "site", given["name"], given["version"], entries, {module: MEDIAN + POWER})
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop(module, None)


def isomerge(*arguments: object, path: Path, killed_at: int = 0) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    environment = os.environ | {"PYTHONPATH": str(path), "KILLED_AT_WRITE": str(killed_at), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from isomerge_fast.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def draw(*shape: int, tasks: int = 3) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(task)) for task in range(tasks)]


def test_a_method_of_a_package_merges_files_is_resumed_and_verified_in_new_processes(
    package: Path, tmp_path: Path
) -> None:
    base = make_base()
    experts = [make_expert(base, seed) for seed in range(3)]
    given = ["--base", save_folder(tmp_path / "base", base)]
    for seed, expert in enumerate(experts):
        given += ["--expert", save_folder(tmp_path / f"expert{seed}", expert)]
    given += ["--method", "median", "--out"]

    config = {"base": given[1], "experts": given[3:8:2], "method": "median", "out": tmp_path / "whole"}
    report = imf.merge(config, threads=1)
    assert {tensor["algorithm"] for tensor in report.tensors if tensor["action"] == "median"} == {"median"}
    merged = load_file(tmp_path / "whole/model.safetensors")
    for name, tensor in base.items():
        if tensor.is_floating_point():
            stack = np.stack([(expert[name].double() - tensor.double()).numpy() for expert in experts])
            expected = tensor.double().numpy() + np.median(stack, 0)
            np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=0, atol=1e-6)

    (package / "sitecustomize.py").write_text(KILLER)
    out = tmp_path / "merged"
    assert isomerge("run", *given, out, path=package, killed_at=4).returncode == -signal.SIGKILL
    assert not out.exists()
    (journal,) = tmp_path.rglob("journal-*.jsonl")
    assert "conv.weight" in journal.read_text()
    assert not all(name in journal.read_text() for name in base)  # some tensors are done, others not
    resumed = isomerge("run", *given, out, "--resume", path=package)
    assert resumed.returncode == 0, resumed.stderr
    whole, found = listing(tmp_path / "whole"), listing(out)
    shards = [name for name in whole if name.endswith(".safetensors")]
    assert shards
    assert {name: found[name] for name in shards} == {name: whole[name] for name in shards}

    checked = isomerge("verify", out, path=package)
    assert checked.returncode == 0, checked.stderr
    description = json.loads((out / MANIFEST_FILE).read_text())["description"]
    assert description["methods"] == {"median": "my-merging 1.0"}


def test_adapters_are_refused_where_coordinates_matter(package: Path, tmp_path: Path) -> None:
    base, adapters = make_adapters(tmp_path)
    config = {"base": base, "experts": adapters, "method": "median"}
    with pytest.raises(ConfigError, match=r"tensor .*_proj.*: method 'median' takes no adapters.*into its base first"):
        make_plan(load_config(config))
    make_plan(load_config({**config, "method": "iso-power"}))
    # Where none of the median's tensors is in an adapter.
    make_plan(load_config({**config, "overrides": [{"match": "*_proj*", "method": "iso-c"}]}))


def test_another_version_of_the_package_is_noticed(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base()
    experts = [save_folder(tmp_path / f"expert{seed}", make_expert(base, seed)) for seed in range(2)]
    config = {"base": save_folder(tmp_path / "base", base), "experts": experts, "out": tmp_path / "out"}
    config |= {"method": "mean", "overrides": [{"match": "*norm*", "method": "median"}]}
    imf.merge(config)
    assert verify(tmp_path / "out").remarks == []
    (package / "my_merging-1.0.dist-info").rename(package / "my_merging-2.0.dist-info")
    metadata = package / "my_merging-2.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "2.0"))
    importlib.invalidate_caches()
    (remark,) = verify(tmp_path / "out").remarks
    assert "my-merging 1.0" in remark
    assert "my-merging 2.0" in remark
    with pytest.raises(ConfigError, match="holds another merge"):
        imf.merge(config, resume=True)
    # Of built-in methods nothing is said.
    imf.merge({**config, "overrides": [], "out": tmp_path / "plain"})
    assert "methods" not in json.loads((tmp_path / "plain" / MANIFEST_FILE).read_text())["description"]


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (2, 30, 30)], ids=str)
@pytest.mark.parametrize("power", [0.0, 0.25, 1.0])
def test_the_spectral_method_against_numpy(package: Path, shape: tuple[int, ...], power: float) -> None:
    deltas = draw(*shape)
    method = make_method("iso-power", {"power": power})
    value, stats = method.merge(as_deltas(deltas))
    assert not stats.missed()
    assert stats.algorithm == "iso-power/gram-eigh-fp64"
    u, sigma, vh = np.linalg.svd(sum(delta.double().numpy() for delta in deltas), full_matrices=False)
    powered = sigma**power
    expected = (u * (powered * sigma.sum(-1, keepdims=True) / powered.sum(-1, keepdims=True))[..., None, :]) @ vh
    assert np.linalg.norm(value.double().numpy() - expected) <= 1e-5 * np.linalg.norm(expected)
    exact, _ = method.exact().merge(as_deltas([delta.double() for delta in deltas]))
    assert np.linalg.norm(exact.numpy() - expected) <= 1e-8 * np.linalg.norm(expected)
    if power == 0.0:
        assert (value - IsoC().merge(as_deltas(deltas))[0]).norm() <= 1e-5 * value.norm()


def test_the_spectral_method_of_deficient_sums_and_what_its_certificate_sees(package: Path) -> None:
    method = make_method("iso-power")
    low = [delta[:, :5] @ delta[:5] for delta in draw(40, 40)]
    value, stats = method.merge(as_deltas(low))
    assert (stats.to_dict()["rank"], stats.missed()) == (15, {})
    assert torch.linalg.matrix_rank(value) == 15
    zero, _ = method.merge(MemoryDeltas([torch.zeros(6, 8)] * 2))
    assert not zero.any()
    # Directions that float64 Gram matrices blur are seen by the checks, and a full SVD follows.
    u, _, vh = torch.linalg.svd(draw(30, 30)[0].double(), full_matrices=False)
    ill = (u * torch.logspace(0, -9, 30, dtype=torch.float64)) @ vh
    _, stats = method.merge(MemoryDeltas([ill.float(), ill.float() * 1e-3]))
    assert stats.to_dict()["certified"]


def solvers() -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    for block in (*SOLVERS, USE):
        exec(block, namespace)
    return namespace


def test_the_solvers_of_the_document() -> None:
    found = solvers()
    deltas = found["deltas"]
    for given, method in ((found["merged"], IsoC), (found["merged_cts"], IsoCTS)):
        expected, _ = method(precision="reference").merge(as_deltas(deltas))
        assert (given - expected).norm() <= 1e-5 * expected.norm()
    for shape in ((60, 40), (40, 60), (2, 30, 30)):
        some = as_deltas(draw(*shape))
        newton, by_qr = found["NewtonPolar"](), found["QrSvd"]()
        for method in (IsoC(solver=newton), IsoC(solver=by_qr), IsoCTS(solver=by_qr)):
            value, stats = method.merge(some)
            expected, _ = method.__class__(precision="reference").merge(some)
            assert (value - expected).norm() <= 1e-5 * expected.norm()
            assert method.solver is not None
            assert method.solver.name in stats.algorithm
            assert not stats.missed()
    with pytest.raises(ConfigError, match=r"option 'solver' of method 'iso-cts' .*: a Solver"):
        imf.iso_cts(deltas, solver=found["NewtonPolar"]())


BROKEN = {
    "absent": ("absent_module:Median", r"method 'absent' of acme 3.1: absent_module:Median cannot be loaded \(Module"),
    "raises": ("acme_raises:Median", r"cannot be loaded \(RuntimeError: no licence\)"),
    "other": ("acme:Other", r"method 'other' of acme 3.1: acme:Other has the name 'median'"),
    "function": ("acme:function", "acme:function is no method: it is a subclass of isomerge_fast.methods.Method"),
    "abstract": ("acme:Abstract", "acme:Abstract does not define merge"),
    "bare": ("acme:Bare", "acme:Bare is no dataclass of its own"),
    "nameless": ("acme:Nameless", "acme:Nameless has no name"),
    "wanting": ("acme:Wanting", "acme:Wanting: its option 'level' has no default"),
}
ACME = """
from dataclasses import dataclass
from typing import ClassVar
from isomerge_fast.methods import Elementwise, Method

def function(): ...

@dataclass(frozen=True)
class Other(Elementwise):
    name: ClassVar[str] = "median"
    def combine(self, deltas): return deltas[0]

class Bare(Other):
    name = "bare"

@dataclass(frozen=True)
class Abstract(Method):
    name: ClassVar[str] = "abstract"

@dataclass(frozen=True)
class Nameless(Elementwise):
    def combine(self, deltas): return deltas[0]

@dataclass(frozen=True)
class Wanting(Other):
    level: int
"""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_entry_point_names_its_distribution(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {"acme": ACME, "acme_raises": "raise RuntimeError('no licence')"}
    entries = [f"{each} = {value}" for each, (value, _) in BROKEN.items()]
    monkeypatch.syspath_prepend(str(install(tmp_path, "acme", "3.1", entries, modules)))
    monkeypatch.delitem(sys.modules, "acme", raising=False)
    with pytest.raises(ConfigError, match=BROKEN[name][1]) as caught:
        make_method(name)
    assert "acme 3.1" in str(caught.value)
    sys.modules.pop("acme", None)
    # Built-in methods do without, and what is unknown is compared with all names.
    assert make_method("mean").name == "mean"
    with pytest.raises(ConfigError, match="did you mean 'nameless'"):
        make_method("namelesss")


def test_entry_points_that_clash(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_method("median").name == "median"
    second = install(tmp_path / "second", "acme", "3.1", ["median = acme:Other"], {"acme": ACME})
    monkeypatch.syspath_prepend(str(second))
    with pytest.raises(ConfigError, match=r"method 'median' is brought by acme 3.1 and by my-merging 1.0"):
        make_method("median")
    (second / "acme-3.1.dist-info/entry_points.txt").write_text("[isomerge_fast.methods]\niso-c = acme:Other\n")
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=r"method 'iso-c' of acme 3.1: that name is a built-in method's"):
        make_method("median")
    assert make_method("iso-c").name == "iso-c"


def test_a_method_registered_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isomerge_fast.methods.registry._registered", {})
    namespace: dict[str, Any] = {"__name__": "a_notebook"}
    monkeypatch.setitem(sys.modules, "a_notebook", types.ModuleType("a_notebook"))
    exec(MEDIAN, namespace)
    median: type[Method] = namespace["Median"]
    assert imf.register_method(median) is median
    assert imf.register_method(median) is median  # a cell that is run again
    base = make_base()
    experts = [make_expert(base, seed) for seed in range(3)]
    merged = imf.merge_state_dicts(base, experts, "median")
    paths = [save_folder(tmp_path / f"expert{seed}", expert) for seed, expert in enumerate(experts)]
    out = tmp_path / "out"
    imf.merge({"base": save_folder(tmp_path / "base", base), "experts": paths, "method": "median", "out": out})
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(merged[name], written[name]) for name in base)
    description = json.loads((out / MANIFEST_FILE).read_text())["description"]
    assert description["methods"] == {"median": "a_notebook.Median"}
    assert verify(out).recomputed

    kept, overrides = tmp_path / "kept", [{"match": "*", "method": "median"}]
    paths_of = {"base": tmp_path / "base", "experts": paths, "method": "mean"}
    imf.merge({**paths_of, "overrides": overrides, "save_delta": True, "out": kept})

    for clash in ("iso-c", "median"):
        other: Any = type("Other", (median,), {"name": clash, "__module__": "elsewhere"})
        other = dataclass(frozen=True)(other)
        with pytest.raises(ConfigError, match=f"method '{clash}' of elsewhere.Other: that name is"):
            imf.register_method(other)
    with pytest.raises(ConfigError, match="is no method"):
        imf.register_method(dict)  # type: ignore[type-var]  # what is refused
    monkeypatch.setattr("isomerge_fast.methods.registry._registered", {})
    with pytest.raises(VerificationError) as caught:
        verify(out)
    assert "method 'median' is unknown" in caught.value.problems[0]
    imf.apply(kept, 0.5, tmp_path / "applied")  # which needs Δ alone, and no method of an override
