"""The command line: verbs, exit codes, messages, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import isomerge_fast as imf
from cases import Case
from checkpoints import load_folder, make_family, save_folder
from command_lines import flags, invoke
from isomerge_fast import machine
from isomerge_fast.cli.options import parse_bytes
from isomerge_fast.cli.render import group_tensors
from isomerge_fast.errors import ConfigError
from isomerge_fast.execution import engine
from isomerge_fast.planning.planner import make_plan


def isomerge(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the installed console script, in a process of its own."""
    script = Path(sys.executable).parent / "isomerge"
    return subprocess.run([script, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_help_is_fast_and_light() -> None:
    """Under half a second of processor time (the least of three: machines are noisy), and no torch on that path."""
    result = isomerge("--help")
    assert result.returncode == 0
    seconds = []
    for _ in range(3):
        before = os.times()
        isomerge("--help")
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    for verb in ("run", "plan", "verify", "doctor", "demo", "report"):
        assert verb in result.stdout
    assert 0 < min(seconds) < 0.5
    code = "import sys, isomerge_fast.cli; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_run_from_a_file_and_from_flags(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    experts = ", ".join(str(expert) for expert in family[1])
    text = (
        f"method: iso-cts\nbase: {family[0]}\nexperts: [{experts}]\nscaling: 0.9\noptions: {{common_fraction: 0.7}}\n"
    )
    (tmp_path / "merge.yml").write_text(text + f"out: {tmp_path / 'a'}\n")
    result = isomerge("run", tmp_path / "merge.yml")
    assert result.returncode == 0, result.stderr
    assert "10 tensors (3 copy, 3 mean, 4 iso-cts)" in result.stdout
    assert f"written: {tmp_path / 'a'}" in result.stdout
    arguments = flags(family, "--method", "iso-cts", "--scaling", 0.9, "--option", "common_fraction=0.7")
    code, stdout, _ = invoke("run", *arguments, "--out", tmp_path / "b", "--format", "json")
    assert code == 0
    report = json.loads(stdout)
    assert report["outputs"] == [str(tmp_path / "b")]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    # An option on the command line goes before the file's.
    code, _, _ = invoke("run", tmp_path / "merge.yml", "--scaling", 0.5, "--scaling", 0.9, "--out", tmp_path / "c")
    assert code == 0
    many = (tmp_path / "c/scaling-0.9/model.safetensors").read_bytes()
    assert many == (tmp_path / "a/model.safetensors").read_bytes()


def test_paths_are_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_family(tmp_path, tasks=2)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/m.yml").write_text("base: base\nexperts: [expert0, expert1]\nmethod: mean\nout: merged/\n")
    monkeypatch.chdir(tmp_path)
    assert invoke("run", "configs/m.yml")[0] == 0
    assert (tmp_path / "merged/model.safetensors").exists()
    assert invoke("verify", "merged")[0] == 0


def test_plan_writes_nothing_and_tells_every_fate(tmp_path: Path) -> None:
    family = make_family(tmp_path, shards=2)
    before = sorted(tmp_path.rglob("*"))
    code, stdout, _ = invoke("plan", *flags(family, "--method", "iso-c", "--out", tmp_path / "out"))
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    for text in ("layers.{0..1}.up.weight", "embed_tokens.weight", "copy", "averaged, as published"):
        assert text in stdout
    assert 'overrides: [{match: "embed_tokens.weight", method: mean}]' in stdout
    code, stdout, _ = invoke("plan", *flags(family), "--format", "json")
    plan = json.loads(stdout)
    assert {tensor["name"] for tensor in plan["tensors"]} == load_folder(family[0]).keys()
    assert plan["write_bytes"] == sum(t.numel() * t.element_size() for t in load_folder(family[0]).values())
    assert plan["peak_ram_bytes"] > 0
    assert plan["estimated_seconds"]["compute"] >= 0


def test_tensors_are_grouped_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    base = {f"h.{layer}.e.{expert}.w": torch.ones(2, 3) for layer in range(3) for expert in range(2)}
    base["h.0.other2"] = torch.ones(4)
    folders = [save_folder(tmp_path / name, base) for name in ("a", "b")]
    plan = make_plan(imf.MergeConfig(str(folders[0]), [str(folders[1])]))
    assert [(name, len(members)) for name, members in group_tensors(plan.tensors)] == [
        ("h.{0..2}.e.{0..1}.w", 6),
        ("h.0.other2", 1),
    ]


class TestExitCodes:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("sclaing: 1.0", "unknown key 'sclaing' (did you mean 'scaling'?)"),
            ("method: iso-ctx", "did you mean 'iso-cts'"),
            ("options: {comon_fraction: 0.5}", "did you mean 'common_fraction'"),
            ("dtype: bf16", "did you mean 'bfloat16'"),
            ("scaling: lots", "scaling"),
            ("scaling: [1.0, 1.0]", "twice"),
            ("scaling: .nan", "scaling is nan; expected a finite number"),
            ("experts: one", "experts"),
            ("overrides: [{match: x}]", "overrides[0] has no 'method'"),
            ("base: again", "key 'base' is given twice"),
            ("a: [", "not YAML"),
            ("on_extra: keep", "on_extra"),
        ],
    )
    def test_config(self, tmp_path: Path, line: str, message: str) -> None:
        family = make_family(tmp_path, tasks=1)
        keys = {"base": str(family[0]), "experts": f"[{family[1][0]}]", "out": str(tmp_path / "out")}
        text = "".join(f"{key}: {value}\n" for key, value in keys.items() if key == "base" or not line.startswith(key))
        (tmp_path / "m.yml").write_text(text + line + "\n")
        code, stdout, stderr = invoke("run", tmp_path / "m.yml")
        assert (code, stdout) == (2, "")
        assert message in stderr
        assert stderr.count("\n") == 1 or "not YAML" in stderr
        assert not (tmp_path / "out").exists()

    def test_usage(self, tmp_path: Path) -> None:
        assert invoke("run")[0] == 2
        assert invoke("run", "--bogus")[0] == 2
        assert invoke("run", tmp_path / "missing.yml")[0] == 2
        family = make_family(tmp_path, tasks=9)
        assert invoke("run", *flags(family))[0] == 2  # no --out
        code, _, stderr = invoke("run", *flags(family, "--out", tmp_path / "o", "--option", "common_fraction=0.0"))
        assert code == 2
        assert "k = -2" in stderr
        assert invoke("run", *flags(family, "--out", family[0]))[0] == 2
        assert invoke("run", *flags(family, "--out", tmp_path / "o", "--max-ram", "lots"))[0] == 2
        assert invoke("run", *flags(family, "--out", tmp_path / "o", "--device", "tpu"))[0] == 2

    def test_input(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        arguments = flags(family, "--out", tmp_path / "out")
        (family[1][0] / "model.safetensors").write_bytes(b"short")
        code, stdout, _ = invoke("run", *arguments, "--format", "json")
        assert code == 3
        error = json.loads(stdout)["error"]
        assert error["kind"] == "input"
        assert error["exit_code"] == 3
        assert str(family[1][0]) in error["message"]
        assert invoke("plan", *arguments)[0] == 3
        assert invoke("verify", tmp_path)[0] == 3
        assert invoke("report", tmp_path)[0] == 3

    def test_resources(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        arguments = flags(family, "--out", tmp_path / "out")
        assert invoke("run", *arguments, "--max-ram", "1MiB")[0] == 4
        if not torch.cuda.is_available():
            code, _, stderr = invoke("run", *arguments, "--device", "cuda")
            assert code == 4
            assert "0 CUDA device(s)" in stderr

    def test_verification(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        assert invoke("run", *flags(family, "--out", tmp_path / "out"))[0] == 0
        code, stdout, _ = invoke("verify", tmp_path / "out", "--format", "json")
        assert code == 0
        assert json.loads(stdout)["tensors"] == 10
        assert "every checksum is right" in invoke("verify", tmp_path / "out")[1]
        assert "iso-cts/gram-eigh-fp64" in invoke("report", tmp_path / "out")[1]
        file = tmp_path / "out/model.safetensors"
        content = bytearray(file.read_bytes())
        content[-4] ^= 1
        file.write_bytes(bytes(content))
        code, _, stderr = invoke("verify", tmp_path / "out")
        assert code == 5
        assert "checksum differs" in stderr


def test_doctor() -> None:
    code, stdout, _ = invoke("doctor", "--format", "json")
    assert code == 0
    findings = json.loads(stdout)
    assert findings["healthy"]
    assert {check["method"] for check in findings["checks"]} == {"iso-c", "iso-cts", "mean", "task-arithmetic"}
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["machine"]["usable cpus"] == machine.describe_cpus()
    assert findings["machine"]["memory"] == machine.describe_memory()
    assert "ok: error" in invoke("doctor")[1]


def test_doctor_finds_wrong_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    real = imf.IsoCTS.merge

    def wrong(self: imf.IsoCTS, deltas):
        value, stats = real(self, deltas)
        return value * (1.0 if self.precision == "reference" else 1.01), stats

    monkeypatch.setattr(imf.IsoCTS, "merge", wrong)
    code, stdout, stderr = invoke("doctor")
    assert code == 5
    assert "WRONG: error 1.0e-02" in stdout
    assert "not what float64 gives" in stderr


def test_version() -> None:
    assert invoke("--version")[1].startswith("isomerge-fast 0.")


@pytest.mark.parametrize(
    ("text", "count"), [("8GiB", 8 << 30), ("600MB", 600_000_000), ("1.5 GiB", 3 << 29), ("1024", 1024), ("7b", 7)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text, "--max-ram") == count


@pytest.mark.parametrize("text", ["", "GiB", "8 gigs", "-1GB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-ram"):
        parse_bytes(text, "--max-ram")


def test_progress_is_drawn_where_a_person_watches(tmp_path: Path) -> None:
    """On a terminal the progress line shows phase, tensors, bytes and rate; into a pipe there is none."""
    import pty

    family = make_family(tmp_path)
    script = Path(sys.executable).parent / "isomerge"
    arguments = [str(part) for part in flags(family, "--out", tmp_path / "out")]
    parent, child = pty.openpty()
    process = subprocess.Popen([script, "run", *arguments], stderr=child, stdout=subprocess.PIPE, close_fds=True)
    os.close(child)
    drawn = b""
    while True:
        try:
            block = os.read(parent, 4096)
        except OSError:
            break
        if not block:
            break
        drawn += block
    assert process.wait() == 0
    os.close(parent)
    assert b"10/10 tensors" in drawn
    assert b"GB/s" in drawn
    assert invoke("run", *arguments, "--overwrite")[2] == ""


def test_certificates_are_reported(tmp_path: Path) -> None:
    """An ill-conditioned sum in the fast tier: what was given up, what was taken, and that the result is certified."""
    deltas = {"hard.weight": Case(0, 136, 1088, 1e6, 3).deltas(), "easy.weight": Case(1, 136, 1088, 2.0, 3).deltas()}
    folders = [save_folder(tmp_path / "base", {name: torch.zeros(136, 1088) for name in deltas})]
    folders += [
        save_folder(tmp_path / f"expert-{task}", {name: parts[task] for name, parts in deltas.items()})
        for task in range(3)
    ]
    arguments = ["--base", folders[0], *(part for folder in folders[1:] for part in ("--expert", folder))]
    arguments += ["--method", "iso-c", "--option", "precision=fast"]
    plan = json.loads(invoke("plan", *arguments, "--format", "json")[1])
    assert {tensor["reason"] for tensor in plan["tensors"]} == {
        "gram-eigh-fp32: float32 Gram matrix: 136 x 1088 is tall or wide, and such sums are well-conditioned"
    }
    code, stdout, stderr = invoke("run", *arguments, "--out", tmp_path / "out")
    assert code == 0, stderr
    assert "certified: 2 of 2; 1 took another solver than the first" in stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    entries = {entry["name"]: entry for entry in report["tensors"]}
    assert entries["hard.weight"]["algorithm"] == "iso-c/gram-eigh-fp64"
    assert all(remark.startswith("iso-c/gram-eigh-fp") for remark in entries["hard.weight"]["escalations"])
    assert entries["easy.weight"]["algorithm"] == "iso-c/gram-eigh-fp32"
    for entry in entries.values():
        assert entry["certified"]
        assert entry["orthogonality"] <= 1e-2
        assert entry["asymmetry"] <= 1e-2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("expandable_segments:True", "10000")),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "OMP_WAIT_POLICY": "passive"}, (None, None)),
        ({"PYTORCH_ALLOC_CONF": "backend:native", "GOMP_SPINCOUNT": "1"}, ("backend:native", "1")),
    ],
    ids=["nothing is set", "by other names", "by these names"],
)
def test_what_torch_is_told_before_it_is_loaded(given: dict[str, str], expected: tuple[str | None, str | None]) -> None:
    code = (
        "import os, sys, isomerge_fast.cli.application as cli\n"
        "assert 'torch' not in sys.modules\n"
        "cli._exit_code = lambda: print(os.environ.get('PYTORCH_ALLOC_CONF'), os.environ.get('GOMP_SPINCOUNT')) or 0\n"
        "cli.main()"
    )
    ours = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [str(value) for value in expected]


def test_what_cannot_wait_is_said_on_standard_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume that keeps to its threads: before the report, and beside JSON on standard output."""
    base, experts = make_family(tmp_path, tasks=1)
    config = {"base": str(base), "experts": [str(experts[0])], "method": "iso-c", "out": str(tmp_path / "out")}

    def stop(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(engine, "merge_item", stop)
        with pytest.raises(SystemExit):
            imf.merge(config, threads=1)
    # As if all matrices were so large that several cores compute them.
    code = """if True:
        from isomerge_fast.planning import schedule
        schedule.LEAST_OPERATIONS, schedule.cores_of = 0.0, lambda flops, share, cores: cores
        from isomerge_fast.cli.application import main
        main()
    """
    arguments = flags((base, experts), "--method", "iso-c", "--out", tmp_path / "out", "--resume")
    command = [sys.executable, "-c", code, "run", *map(str, arguments), "--threads", "2", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.startswith(f"{tmp_path / 'out'}: 4 tensor(s) are computed by as many cores as when")
    assert json.loads(done.stdout)["method"] == "iso-c"
