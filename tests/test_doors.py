"""Every door in: what people give by mistake is one line and an exit code of the contract, from a shell and in Python.

``fuzz_doors.py`` does a hundred times as many of the draws (``make fuzz-doors``).
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fuzz_doors
import isomerge_fast as imf
from checkpoints import listing, make_base, make_expert, make_family, save_folder
from command_lines import flags, invoke
from isomerge_fast import functional
from isomerge_fast.checkpoint.output.json_files import write_with_digest
from isomerge_fast.config import load_config
from isomerge_fast.errors import nearest
from isomerge_fast.execution.finalize import read_report
from isomerge_fast.execution.verify import verify
from isomerge_fast.planning.routes import Rowwise

DRAWS = 2_000


# --- the property -----------------------------------------------------------------------------------------------------


def test_whatever_is_given_and_damaged_is_an_answer_or_an_error_of_ours() -> None:
    tally = fuzz_doors.fuzz(DRAWS, seed=0)
    assert tally.wrong == []
    assert tally.draws == DRAWS
    assert tally.doors.keys() == fuzz_doors.DOORS.keys()
    # All ends come about: none of them hides behind another.
    for end in ("exit 0", "exit 2", "exit 3", "exit 4", "exit 5", "ConfigError", "InputError", "returned"):
        assert tally.ends[end] >= DRAWS / 400, tally.ends


@pytest.mark.parametrize("seen", ["another exception", "a traceback", "half an output", "an input that was changed"])
def test_the_fuzz_sees(seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_it(*arguments: Any, **named: Any) -> Any:
        raise KeyError("x")

    def write_it(*arguments: Any, **named: Any) -> Any:
        path = {"half an output": "out/model.safetensors", "an input that was changed": "base/config.json"}[seen]
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("x")
        raise imf.ConfigError("x")

    broken = raise_it if seen in ("another exception", "a traceback") else write_it
    if seen == "another exception":
        monkeypatch.setattr(functional, "make_method", broken)
    else:
        monkeypatch.setattr("isomerge_fast.planning.planner.make_plan", broken)
    wrong = "\n".join(fuzz_doors.fuzz(80, seed=0).wrong)
    expected = {
        "another exception": "KeyError: 'x'",
        "a traceback": "exit code 1",
        "half an output": "out is no whole output",
        "an input that was changed": "base/config.json was changed",
    }
    assert expected[seen] in wrong
    assert "python tests/support/fuzz_doors.py --seed 0 --first" in wrong


# --- a shell ----------------------------------------------------------------------------------------------------------

USAGE = {
    "a number": (
        ["verify", "x", "--samples", "-1"],
        "Invalid value for '--samples': '-1'; expected a whole number, 0 or more",
    ),
    "no number": (["run", "--threads", "x"], "Invalid value for '--threads': 'x'; expected a whole number, 1 or more"),
    "not finite": (["plan", "--scaling", "nan"], "Invalid value for '--scaling': 'nan'; expected a finite number"),
    "too few tasks": (
        ["bench", "--tasks", "0"],
        "Invalid value for '--tasks': '0'; expected a whole number, 1 or more",
    ),
    "budget": (["bench", "--budget", "-1"], "Invalid value for '--budget': '-1'; expected a number, 0 or more"),
    "unknown": (["plan", "--exlude", "x"], "No such option: --exlude (did you mean '--exclude'?)"),
    "another name": (["plan", "--alpha", "1"], "No such option: --alpha (did you mean '--scaling'?)"),
    "unlike any": (["verify", "--zzz"], "No such option: --zzz (known: --format, --samples, --seed)"),
    "verb": (["merge", "m.yml"], "No such command 'merge' (did you mean 'run'?) (isomerge --help)"),
    "no verb": (["m.yml"], "No such command 'm.yml' (known: apply, bench, demo, doctor, plan, report, run, verify)"),
    "several in one": (
        ["plan", "--scaling", "1,2"],
        "Invalid value for '--scaling': '1,2'; expected a number; several are given one by one, each after the option",
    ),
    "a space": (
        ["plan", "--base", "b", "--expert", "e", "--max-ram", "600", "MB"],
        "MB: no such config file; every value of an option needs the option before it (--scaling 1.0 --scaling 1.3), "
        "and quotes around spaces (--max-ram '600 MB')",
    ),
    "escapes": (["plan", "--\x1b[31m"], r"No such option: --\x1b[31m"),
    "no value": (["plan", "--base"], "Option '--base' requires an argument."),
    "override": (["plan", "--base", "b", "--expert", "e", "--override", "x"], "--override 'x' is not PATTERN=METHOD"),
    "option": (
        ["plan", "--base", "b", "--expert", "e", "--option", "common_fraction=[1"],
        "--option 'common_fraction': not YAML (line 1, column 3: expected ',' or ']', but got '<stream end>')",
    ),
    "exclude": (
        ["plan", "--base", "b", "--expert", "e", "--exclude", ""],
        "config: exclude[0] is ''; expected a pattern of tensor names, such as '*lm_head*'",
    ),
    "override of nothing": (
        ["plan", "--base", "b", "--expert", "e", "--override", "=mean"],
        "config: overrides[0].match is ''; expected a pattern of tensor names",
    ),
    "out": (["run", "--base", "b", "--expert", "e", "--out", ""], "config: out has an empty path"),
    "no out": (["run", "--base", "b", "--expert", "e"], "out is not given: the folder that the merge is written into"),
    "demo's out": (["demo", "--out", ""], "out is an empty path"),
    "demo's seed": (["demo", "--seed", "-1"], "Invalid value for '--seed': '-1'; expected a whole number, 0 or more"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_slips_of_the_hand_are_one_line(arguments: list[str], message: str) -> None:
    code, stdout, stderr = invoke(*arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"isomerge: {message}")
    assert stderr.count("\n") == 1


def test_a_demo_that_cannot_write_says_so_before_any_work() -> None:
    code, stdout, stderr = invoke("demo", "--out", "/proc/x")
    assert (code, stdout, stderr) == (4, "", "isomerge: /proc/x: cannot be written to (No such file or directory)\n")


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_a_demo_without_its_extra_says_what_to_install(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, stderr = invoke("demo", "--out", tmp_path / "out")
    assert (code, stderr) == (4, f"isomerge: the demo needs {missing}: pip install 'isomerge-fast[demo]'\n")
    assert not (tmp_path / "out").exists()


def test_no_temporary_folder_is_one_line(tmp_path: Path) -> None:
    """torch imports dill where it is installed, and dill asks for one."""
    (tmp_path / "sitecustomize.py").write_text(
        "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/proc/nowhere']\n"
    )
    (tmp_path / "dill.py").write_text("import tempfile\ntempfile.gettempdir()\n")
    family = make_family(tmp_path, tasks=1)
    script = Path(sys.executable).parent / "isomerge"
    told = subprocess.run(
        [script, "plan", *map(str, flags(family))],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 4
    assert told.stderr == (
        "isomerge: No usable temporary directory found in ['/proc/nowhere']; TMPDIR names one that can be written to\n"
    )


def test_every_setting_has_its_option(tmp_path: Path) -> None:
    """Those that errors advise among them."""
    family = make_family(tmp_path, tasks=2)
    more = [
        "--override",
        "*up*=task-arithmetic",
        "--normalize-weights",
        "--experts-are-deltas",
    ]
    code, stdout, stderr = invoke("plan", *flags(family, *more, "--weight", 1, "--weight", "3e0", "--format", "json"))
    assert code == 0, stderr
    actions = {tensor["name"]: tensor["action"] for tensor in json.loads(stdout)["tensors"]}
    assert actions["layers.0.up.weight"] == "task-arithmetic"
    assert invoke("plan", *flags(family, "--override", "a=b*=mean"))[2] == (
        "isomerge: overrides: 'a=b*' matches no tensor (nearest: 'mask')\n"
    )
    assert invoke("plan", *flags(family, "--on-other-base", "ignore"))[2] == (
        "isomerge: on_other_base is for experts that are LoRA adapters, and these are checkpoints\n"
    )
    documented = invoke("run", "--help")[1]
    for each in (field.name for field in dataclasses.fields(imf.MergeConfig)):
        option = {"experts": "expert", "weights": "weight", "overrides": "override", "options": "option"}.get(
            each, each
        )
        assert f"--{option.replace('_', '-')}" in documented


@pytest.mark.parametrize("name", ["report.json", "manifest.json"])
def test_a_report_that_only_an_enemy_writes_is_no_traceback(name: str, tmp_path: Path) -> None:
    """With a digest that fits: whatever the printer then finds in it."""
    family = make_family(tmp_path, tasks=1)
    assert invoke("run", *flags(family, "--out", tmp_path / "out"))[0] == 0
    sound = json.loads((tmp_path / "out" / name).read_text())
    del sound["digest"]
    for change in ({"tensors": 5}, {"seconds": {"read": "x"}}, {"method": 3}, {"scaling": None}, {"outputs": [[]]}):
        write_with_digest(tmp_path / "out" / name, [(json.dumps({**sound, **change}, indent=1) + "\n").encode()])
        for verb in ("report", "verify"):
            code, _, stderr = invoke(verb, tmp_path / "out")
            assert code in (0, 5), stderr
            assert code == 5 or name == "manifest.json"


# --- Python -----------------------------------------------------------------------------------------------------------

W = {"w": torch.ones(3, 2)}
LINEAR = torch.nn.Linear(2, 2)
STATE_DICTS = {
    "modules": (LINEAR, [W], {}, "base is a Linear; give its state dict: base.state_dict()"),
    "a module among the experts": (
        W,
        [W, LINEAR],
        {},
        "experts[1] is a Linear; give its state dict: experts[1].state_dict()",
    ),
    "a path": (
        "base",
        ["a"],
        {},
        "base is 'base'; open_state_dict(path) opens a checkpoint, and merge(config) merges",
    ),
    "one state dict": (W, W, {}, "experts is one state dict; expected a list of them: [expert]"),
    "one module": (W, LINEAR, {}, "experts is a Linear; expected a list of state dicts"),
    "no experts": (W, iter(()), {}, "experts is empty; at least one is needed"),
    "Lightning": (
        {"state_dict": W, "epoch": 3},
        [W],
        {},
        "base['state_dict'] is itself a mapping; where a checkpoint keeps its tensors under 'state_dict', give base[",
    ),
    "a trainer's": (
        W,
        [{"model": W}],
        {},
        "experts[0]['model'] is itself a mapping; where a checkpoint keeps its tensors",
    ),
    "extra state": (
        {**W, "a._extra_state": None},
        [W],
        {},
        "base: 'a._extra_state' is None, a module's extra state and no",
    ),
    "an int": (
        W,
        [{**W, "n": 4}],
        {},
        "experts[0]: tensor 'n' is 4; expected a tensor or a numpy array (leave out what",
    ),
    "a name that is none": ({3: W["w"]}, [W], {}, "base has the key 3; names of tensors are texts"),
    "DataParallel": (
        W,
        [{"module.w": W["w"]}],
        {},
        "experts[0]: all names begin with 'module.', as a wrapped module saves them, and in the base they do not: "
        "{name.removeprefix('module.'): tensor for name, tensor in expert.items()}",
    ),
    "a compiled base": (
        {"_orig_mod.w": W["w"]},
        [W],
        {},
        "base: all names begin with '_orig_mod.', as a wrapped module",
    ),
    "scalings": (W, [W], {"scaling": [1.0, 1.3]}, "scaling is [1.0, 1.3]; expected a number"),
    "a flag": (W, [W], {"scaling": True}, "scaling is True; expected a number, not true or false"),
    "nothing": (W, [W], {"scaling": None}, "scaling is None; expected a number"),
    "one pattern": (
        W,
        [W],
        {"exclude": "*n*"},
        "exclude is '*n*'; expected a list of patterns: ['*lm_head*', '*norm*']",
    ),
    "an empty pattern": (W, [W], {"exclude": [""]}, "exclude[0] is ''; expected a pattern of tensor names, such as"),
    "a dtype": (W, [W], {"dtype": "bf16"}, "dtype 'bf16' is unknown (did you mean 'bfloat16'?)"),
    "a dtype of integers": (
        W,
        [W],
        {"dtype": torch.int8},
        "dtype torch.int8 is unknown (known: bfloat16, float16, float32",
    ),
    "a method's class": (
        W,
        [W],
        {"method": imf.IsoC},
        "method is <class 'isomerge_fast.methods.iso_c.IsoC'>; expected a name",
    ),
    "a method's name": (W, [W], {"method": "Iso-CTS"}, "method 'Iso-CTS' is unknown (did you mean 'iso-cts'?)"),
    "options of a method": (
        W,
        [W],
        {"method": imf.Mean(), "x": 1},
        "option 'x': options belong to a method given by name",
    ),
    "a seed": (W, [W], {"stochastic_rounding": -1}, "stochastic_rounding is -1; expected a whole number, 0 or more"),
}


@pytest.mark.parametrize(("base", "experts", "named", "message"), STATE_DICTS.values(), ids=STATE_DICTS)
def test_what_is_no_state_dict_is_called_by_its_name(base: Any, experts: Any, named: Any, message: str) -> None:
    with pytest.raises((imf.ConfigError, imf.InputError)) as caught:
        imf.merge_state_dicts(base, experts, **named)
    assert message in str(caught.value)


def test_what_is_meant_is_taken() -> None:
    """An iterator of experts, numpy's numbers, a dtype by its name."""
    base = make_base()
    experts = [make_expert(base, seed) for seed in range(2)]
    named: dict[str, Any] = {"scaling": np.float32(0.5), "dtype": "torch.bfloat16", "weights": np.ones(2)}
    once = imf.merge_state_dicts(base, iter(experts), **named)
    plain = imf.merge_state_dicts(base, experts, scaling=0.5, dtype=torch.bfloat16)
    assert all(torch.equal(once[name], plain[name]) for name in plain)
    named_experts = dict(zip("ab", experts, strict=True))
    again = imf.merge_state_dicts(base, named_experts.values(), scaling=0.5, dtype=torch.bfloat16)  # type: ignore[arg-type]  # what a caller gives, not what is declared
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    assert torch.equal(imf.iso_c({"a": torch.eye(3)}.values()), imf.iso_c([torch.eye(3)]))  # type: ignore[arg-type]  # what a caller gives, not what is declared
    assert torch.equal(imf.iso_cts([torch.eye(3)], "8e-1"), imf.iso_cts([torch.eye(3)], 0.8))  # type: ignore[arg-type]  # what a caller gives, not what is declared


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        (
            [torch.randn(4, 3, 3, 3)] * 2,
            "deltas[0] has shape [4, 3, 3, 3]; expected a matrix [M, N] or a batch of them [B, M, N] "
            "(of a convolution's kernels: delta.flatten(1), and result.reshape([4, 3, 3, 3]))",
        ),
        (torch.randn(4, 4), "deltas has shape [4, 4]; expected a list of T tensors [M, N] or [B, M, N], or one stack"),
        (torch.randn(2, 2, 2, 2, 2), "deltas has shape [2, 2, 2, 2, 2]; expected a list of T tensors"),
        ([torch.randn(4)] * 2, "deltas[0] has shape [4]; expected a matrix [M, N] or a batch of them [B, M, N]"),
        ([[1.0, 2.0]], "deltas[0] is a list; expected a tensor or a numpy array"),
        (W, "deltas is a dict; expected a list of T tensors"),
        (LINEAR, "deltas is a Linear; expected a list of T tensors"),
        (None, "deltas is None; expected a list of T tensors"),
        ([], "deltas is empty: at least one task is needed"),
        ([torch.full((2, 2), float("nan"))], "deltas[0] holds NaN or Inf"),
    ],
)
def test_what_are_no_deltas(deltas: Any, message: str) -> None:
    for call in (imf.iso_c, imf.iso_cts):
        with pytest.raises(imf.InputError) as caught:
            call(deltas)
        assert str(caught.value).startswith(message)


PATHS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "open_state_dict": (imf.open_state_dict, {"path": W}, "path is {'w': tensor("),
    "verify": (verify, {"folder": None}, "folder is None; expected the output of a merge"),
    "samples": (verify, {"folder": "x", "samples": -1}, "samples is -1; expected a whole number, 0 or more"),
    "apply": (imf.apply, {"merged": 3, "scaling": 1, "out": "o"}, "merged is 3; expected the output of a merge"),
    "merge": (imf.merge, {"config": 3}, "config is 3; expected the path of a YAML file, a dict or a MergeConfig"),
    "no out": (
        imf.merge,
        {"config": {"base": "b", "experts": ["e"]}},
        "out is not given: the folder that the merge is",
    ),
    "max_ram": (imf.merge, {"max_ram": "4G"}, "max_ram '4G' is not a size such as 8GiB or 600MB"),
    "max_vram": (imf.merge, {"max_vram": -1}, "max_vram -1 is not a size such as 8GiB or 600MB"),
    "device": (imf.merge, {"device": 0}, "device is 0; expected auto, cpu, cuda or cuda:N"),
    "ray": (imf.merge, {"ray": 5}, "ray is 5; expected true, false, or an address such as host:6379"),
}


@pytest.mark.parametrize(("call", "named", "message"), PATHS.values(), ids=PATHS)
def test_arguments_are_called_by_their_names(call: Callable[..., Any], named: dict[str, Any], message: str) -> None:
    if call is imf.merge:
        named = {"config": {"base": "b", "experts": ["e"], "out": "o"}, **named}
    with pytest.raises(imf.ConfigError) as caught:
        call(**named)
    assert str(caught.value).startswith(message)


def test_arguments_of_a_run(tmp_path: Path) -> None:
    """Ceilings as the command line has them; what else is no such thing is refused, and nothing is written."""
    base, experts = make_family(tmp_path, tasks=1)
    config = {"base": base, "experts": (experts[0],), "out": tmp_path / "out"}
    before = listing(tmp_path)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"threads": "x"}, "threads is 'x'; expected a whole number, 1 or more"),
        ({"threads": 1e9}, "threads is 1000000000.0; expected a whole number, 1 or more, 4096 at most"),
        ({"resume": 3}, "resume is 3; expected true or false"),
        ({"observer": 3}, "observer is 3; expected a function of the progress, or None"),
        ({"io": None}, "io None is unknown (known: auto, buffered)"),
    ]
    for named, message in wrong:
        with pytest.raises(imf.ConfigError) as caught:
            imf.merge(config, **named)
        assert str(caught.value) == message
    assert listing(tmp_path) == before
    with pytest.raises(imf.ResourceError, match="max_ram is 1000000 bytes"):
        imf.merge(config, max_ram="1MB")
    for again, ceiling in enumerate(["8GiB", np.int64(8 << 30), 0.5 * 2**34]):
        named = {"max_ram": ceiling, "threads": np.int64(1), "ray": None, "overwrite": np.bool_(again > 0), "resume": 0}
        assert imf.merge(config, **named).outputs == [str(tmp_path / "out")]


def test_a_name_that_is_too_long_for_a_file_is_no_output(tmp_path: Path) -> None:
    for call in (lambda folder: imf.apply(folder, 0.5, tmp_path / "out"), verify, read_report):
        with pytest.raises(imf.InputError, match="not the output of a finished merge"):
            call(tmp_path / ("1" * 300))


# --- what was meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["Iso-CTS", "iso_cts", "ISO_CTS", "isocts", "iso-ctss", "Iso CTS"])
def test_names_are_near_whatever_joins_their_parts(word: str) -> None:
    assert nearest(word, ["iso-c", "iso-cts", "mean", "task-arithmetic"]) == " (did you mean 'iso-cts'?)"


@pytest.mark.parametrize("word", ["ties", "x", "scale"])
def test_what_is_like_nothing_gets_the_list(word: str) -> None:
    assert nearest(word, ["iso-c", "iso-cts", "mean"]) == " (known: iso-c, iso-cts, mean)"


@pytest.mark.parametrize(
    ("word", "meant"), {"alpha": "scaling", "scaling_factor": "scaling", "models": "experts", "merge": "run"}.items()
)
def test_what_others_call_it_is_near(word: str, meant: str) -> None:
    assert nearest(word, ["run", "scaling", "experts", "lambda_max"]) == f" (did you mean {meant!r}?)"


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "FP32": "float32", "float": "float32"}


@pytest.mark.parametrize(("word", "meant"), DTYPES.items())
def test_dtypes_are_near_by_what_else_they_are_called(word: str, meant: str) -> None:
    with pytest.raises(imf.ConfigError) as caught:
        load_config({"base": "b", "experts": ["e"], "dtype": word})
    assert str(caught.value) == f"config: dtype {word!r} is unknown (did you mean {meant!r}?)"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:130] can't allocate")])
def test_a_machine_out_of_memory_names_the_tensor(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> Any:
        raise error

    for name in ("base", "expert"):
        save_folder(tmp_path / name, {"w": torch.ones(3, 2)})
    monkeypatch.setattr(Rowwise, "run", run)
    config = {"base": tmp_path / "base", "experts": [tmp_path / "expert"], "method": "mean", "out": tmp_path / "out"}
    with pytest.raises(imf.ResourceError, match=r"out of memory at tensor 'w', which was planned to take \d+ bytes"):
        imf.merge(config)
    assert not (tmp_path / "out").exists()
