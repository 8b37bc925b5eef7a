"""Configurations of strangers and of people in a hurry: one short message each, at once."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from isomerge_fast.cli.commands import app
from isomerge_fast.cli.options import parse_options
from isomerge_fast.config import MergeConfig, Override, WeightRule, load_config, recorded_config
from isomerge_fast.errors import ConfigError
from isomerge_fast.methods import make_method

FITS = "base: b\nexperts: [e]\n"
# Ten times ten times …: 10^9 values in 400 characters.
LISTS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
MAPS = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{{', '.join(f'k{m}: *a{n - 1}' for m in range(10))}}}\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 10))
WEIGHTS = "an entry for each expert, a number or rules: [0.5, [{match: '*mlp*', weight: 2.0}]]"
RECIPE = "merge_method: iso_c\nbase_model: b\n"
HOSTILE = {
    "alias-bomb": (LISTS + "base: *a9\nexperts: [e]", "more than 100000 values, aliases written out"),
    "alias-bomb-of-maps": (MAPS + FITS + "options: *a9", "more than 100000 values"),
    "merge-key-bomb": (MERGES + FITS + "options: *a9", "more than 100000 values"),
    "deep-aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 900)) + FITS,
        "nested too deeply",
    ),
    "alias-of-itself": ("base: &a [*a]\nexperts: [e]", "an alias inside what it stands for"),
    "many-keys": (FITS + "".join(f"k{n}: 1\n" for n in range(50_000)), "more than 1000 keys in one mapping"),
    "many-options": (FITS + f"options: {{{','.join(f'k{n}: 1' for n in range(2_000))}}}", "more than 1000 keys"),
    "nested-lists": (FITS + "exclude: " + "[" * 100_000, "nested too deeply"),
    "nested-mappings": (FITS + "options: " + "{a: " * 5_000 + "1" + "}" * 5_000, "nested too deeply"),
    "nested-blocks": (FITS + "options:\n" + "".join(" " * n + "a:\n" for n in range(1, 300)), "nested too deeply"),
    "too-large": (FITS + "#" * 9_000_000, "9000021 bytes; refused above 8000000"),
    "too-long": (FITS + "#" * 2_100_000, "2100021 characters; refused above 2000000"),
    "digits": (FITS + "scaling: " + "9" * 5_000, "a number of 5000 characters"),
    "hexadecimal": (FITS + "scaling: 0x" + "f" * 20_000, "a number of 20002 characters"),
    "sexagesimal": (FITS + "scaling: 1" + ":59" * 20_000, "a number of 60001 characters"),
    "large-integer": (FITS + "stochastic_rounding: " + "9" * 90, "expected a whole number, 0 or more, 92233720"),
    "huge-exponent": (FITS + "scaling: 1.0e+400", "scaling is inf; expected a finite number"),
    "huge-exponent-as-text": (FITS + "weights: [1e400]", "weights[0] is '1e400'; expected a finite number"),
    "infinity": (FITS + "scaling: [.inf]", "scaling[0] is inf; expected a finite number"),
    "not-a-number": (FITS + "weights: [[{match: x, weight: .nan}]]", "weights[0][0].weight is nan; expected a finite"),
    "flag-for-a-number": (FITS + "scaling: yes", "scaling is True; expected a number, not true or false"),
    "flag-for-a-rank": (FITS + "adapter_rank: on", "adapter_rank is True; expected a whole number, 1 or more, not"),
    "flag-for-a-weight": (
        FITS + "weights: [[{match: x, weight: true}]]",
        "weights[0][0].weight is True; expected a number",
    ),
    "date-for-a-precision": (FITS + "options: {precision: 2024-01-01}", "'2024-01-01'"),
    "date-for-a-dtype": (FITS + "dtype: 2024-01-01 10:00:00", "dtype '2024-01-01 10:00:00' is unknown"),
    "nul-in-base": ('base: "b\\0"\nexperts: [e]', r"base is 'b\x00', not a path"),
    "nul-in-expert": ('base: b\nexperts: ["e\\0"]', r"experts is 'e\x00', not a path"),
    "nul-in-out": (FITS + 'out: "o\\0"', r"out is 'o\x00', not a path"),
    "half-a-pair": ('base: "\\uD800"\nexperts: [e]', r"base is '\ud800', not a path that a file can have"),
    "half-a-pair-in-out": (FITS + 'out: "x/\\uD800"', r"out is 'x/\ud800', not a path that a file can have"),
    "half-a-pair-in-a-pattern": (FITS + 'exclude: ["\\uD800"]', "which cannot be written down"),
    "long-path": (f"base: {'b' * 5_000}\nexperts: [e]", "not a path that a file can have"),
    "empty-path": ("base: ''\nexperts: [e]", "base has an empty path"),
    "solver-by-name": (FITS + "options: {solver: x}", "option 'solver' of method 'iso-cts' is 'x'"),
    "solver-by-number": (FITS + "options: {solver: 5}", "option 'solver' of method 'iso-cts' is 5"),
    "solver-list": (FITS + "options: {solver: [1]}", "option 'solver' is [1]; expected a word or a number"),
    "solver-in-an-override": (FITS + "overrides: [{match: x, method: iso-c, options: {solver: x}}]", "'solver'"),
    "memory-as-text": (FITS + "options: {memory_bytes: x}", "expected a whole number"),
    "null-option": (FITS + "options: {precision: null}", "option 'precision' of method 'iso-cts' is None"),
    "fraction-not-a-number": (FITS + "options: {common_fraction: .nan}", "nan"),
    "weights-number": (FITS + "weights: 0.5", "weights is 0.5; expected " + WEIGHTS),
    "weights-mapping": (FITS + "weights: {a: 1}", "weights is {'a': 1}; expected " + WEIGHTS),
    "overrides-number": (FITS + "overrides: 5", "overrides is 5; expected a list: [{match: '*norm*', method: mean}]"),
    "many-wrong-values": (
        f"base: b\nexperts: [{'1,' * 500}]",
        ". ".join(f"experts[{n}] is 1; expected the path of a checkpoint" for n in range(5)) + ". … and 495 more",
    ),
    "long-wrong-values": (
        FITS + f"overrides: [{{{'x' * 100}: 1}}]\n{'y' * 100}: 1\n",
        "overrides[0] has no 'match'; expected {match: '*norm*', method: mean}. "
        "overrides[0] has no 'method'; expected {match: '*norm*', method: mean}. "
        f"overrides[0]: unknown key '{'x' * 78}… (known: match, method, options). … and 1 more",
    ),
    "several-wrong-values": (
        "bass: b\nexperts: e\nadapter_rank: 1e3x\nsave_delta: 2\nweights: [[{match: '', weight: x}], x]",
        "base is missing. experts is 'e'; expected a list of paths: [path/a, path/b]. weights[0][0].match is ''; "
        "expected a pattern of tensor names, such as '*lm_head*'. weights[0][0].weight is 'x'; expected a number. "
        "weights[1] is 'x'; expected a number. … and 3 more",
    ),
    "rule-number": (FITS + "weights: [[5]]", "weights[0][0] is 5; expected {match: '*mlp*', weight: 0.5}"),
    "a-key-like-pydantic's": (FITS + "'list[x]': 1\n", "unknown key 'list[x]' (known: adapter_rank, base,"),
    "half-a-pair-in-a-key": (FITS + 'overrides: [{"\\uD800": 1}]', r"overrides[0]: '\ud800' is not text"),
    "long-method": (FITS + "method: " + "x" * 100_000, "method 'xxx"),
    "long-choice": (FITS + "on_extra: " + "x" * 100_000, "on_extra 'xxx"),
    "object": (FITS + "options: !!python/object:os.system {}", "the tag 'python/object:os.system' is not read"),
    "set": (FITS + "exclude: !!set {a}", "the tag 'set' is not read"),
    "bytes": ("base: !!binary aGVsbG8=\nexperts: [e]", "the tag 'binary' is not read"),
    "false-flag": (FITS + "save_delta: !!bool maybe", "not YAML ('maybe')"),
    "false-integer": (FITS + "scaling: !!int ''", "not YAML"),
    "integer-key": (FITS + "1: x", "the key '1' is not text"),
    "flag-key": (FITS + "on: x", "the key 'on' is not text"),
    "list-key": (FITS + "? [a]\n: x", "line 3: the key … is not text"),
    "alias-key": ("&a base: b\n*a : c\nexperts: [e]", "key 'base' is given twice"),
    "long-key": (FITS + f"? {'k' * 100_000}\n: 1", "unknown key 'kkk"),
    "empty": ("", "not a mapping"),
    "comment": ("# x", "not a mapping"),
    "list": ("- a", "not a mapping"),
    "two-documents": (FITS + "---\n" + FITS, "not YAML (line 3, column 1: but found another document)"),
    "tab": (FITS + "\tout: x", "not YAML"),
    "control-character": ("base: \x01", "not YAML (character 7: special characters are not allowed)"),
    "unknown-alias": ("base: *" + "z" * 5_000, "not YAML (line 1, column 7: found undefined alias"),
    "recipe-bomb": (LISTS + RECIPE + "models: *a9", "more than 100000 values"),
    "recipe-model": (RECIPE + "models: [[[[x]]]]", "models[0] is [[['x']]]; expected"),
    "recipe-nul": ('merge_method: iso_c\nbase_model: "b\\0"\nmodels: []', "not a path"),
    "recipe-key": (RECIPE + f"{'k' * 500}: 1", "unknown key 'kkk"),
    "recipe-infinity": (RECIPE + "models: [{model: e}]\nparameters: {lambda: 1e400}", "expected a finite number"),
    "recipe-dtype": (RECIPE + "models: [{model: e}]\ndtype: [1]", "dtype [1] is unknown"),
    "recipe-method": ("merge_method: [a]", "merge_method ['a'] is not honoured"),
}


def checked(source: Any) -> MergeConfig:
    """As a merge reads it before it opens anything."""
    config = load_config(source)
    for name, options in [(config.method, config.options), *((each.method, each.options) for each in config.overrides)]:
        make_method(name, options)
    return config


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.yml").write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path / "m.yml")
    assert time.process_time() - started < 1.5  # 0.2 at most on an idle core
    said = str(caught.value).removeprefix(f"{tmp_path / 'm.yml'}: ")
    assert message in said
    assert len(said) < 400
    assert "\n" not in said


def test_what_people_write_is_read(tmp_path: Path) -> None:
    """Anchors, merge keys, numbers as text, names that look like dates and times, a byte-order mark."""
    text = (
        "base: 2024-01-01\nexperts: [&e 2024-01-01 10:00:00, e]\nout: '=='\nscaling: 1e-1\n"
        "weights: [&w [{match: 'a*', weight: 5e-1}], *w]\noverrides: [{match: x, method: mean}]\n"
        "options: {common_fraction: 8e-1, precision: fast}\n"
    )
    (tmp_path / "m.yml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    config = checked(tmp_path / "m.yml")
    assert (config.base, config.experts, config.out) == ("2024-01-01", ["2024-01-01 10:00:00", "e"], "==")
    assert config.scaling == 0.1
    assert config.weights_of("abc") == (0.5, 0.5)
    (tmp_path / "n.yml").write_text("x: &x {precision: fast}\n".replace("x: ", "options: ", 1) + FITS)
    assert checked(tmp_path / "n.yml").options == {"precision": "fast"}
    (tmp_path / "o.yml").write_text(FITS + "options: {<<: {precision: fast}, rank_policy: range}\n")
    assert checked(tmp_path / "o.yml").options == {"precision": "fast", "rank_policy": "range"}


def test_what_python_has_for_what_yaml_has() -> None:
    """Other lists, numbers, paths and names, and dataclasses, which are checked as well."""
    config = load_config(
        {
            "base": Path("b"),
            "experts": (Path(name) for name in "cd"),
            "scaling": iter(["8e-1", np.float32(2)]),
            "weights": (np.float64(0.5), [WeightRule("*", "5e-1")]),  # type: ignore[arg-type]  # what a caller gives, not what is declared
            "overrides": [{"match": "*", "method": "mean", "options": None}],
            "dtype": torch.bfloat16,
            "stochastic_rounding": "1e3",
            "save_delta": "no",
        }
    )
    assert config == MergeConfig(
        base="b",
        experts=["c", "d"],
        scaling=[0.8, 2.0],
        weights=[0.5, [WeightRule("*", 0.5)]],
        overrides=[Override("*", "mean")],
        dtype="bfloat16",
        stochastic_rounding=1000,
    )
    with pytest.raises(ConfigError, match=r"config: overrides\[0\].match is 3; expected a pattern"):
        load_config(MergeConfig("b", ["e"], overrides=[Override(3, "mean")]))  # type: ignore[arg-type]  # what a caller gives, not what is declared


def test_what_a_manifest_says_is_read_without_pydantic(monkeypatch: pytest.MonkeyPatch) -> None:
    """As strictly: verify and the engine run where it is not installed."""
    monkeypatch.setitem(sys.modules, "pydantic", None)
    rules = [WeightRule("*up*", 2.0)]
    config = MergeConfig("b", ["e"], weights=[rules], overrides=[Override("*", "mean")], out=None)
    inputs = [{"path": "b"}, {"path": "e"}]
    assert recorded_config({"inputs": inputs, "config": config.described}) == replace(config, scaling=1.0)
    for change, message in (
        ({"adapter_rank": 0}, "config.adapter_rank is 0; expected a whole number, 1 or more"),
        ({"dtype": "int8"}, "config.dtype 'int8' is unknown"),
        ({"scaling": "1"}, 'config.scaling is "1", not a number'),
        ({"exclude": [""]}, "config.exclude[0] is ''; expected a pattern"),
        ({"overrides": [{"match": "*"}]}, "config.overrides[0] has no 'method'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            recorded_config({"inputs": inputs, "config": {**config.described, **change}})


def bomb(levels: int = 12) -> dict[str, Any]:
    value: dict[str, Any] = {"x": 1}
    for _ in range(levels):
        value = {f"k{index}": value for index in range(10)}
    return value


ITSELF: list[Any] = []
ITSELF.append(ITSELF)
FIT = {"base": "b", "experts": ["e"]}


@pytest.mark.parametrize(
    "raw",
    [
        {**FIT, "base": bomb()},
        {**FIT, "options": bomb()},
        {**FIT, "options": {"precision": bomb()}},
        {**FIT, "options": {"solver": ITSELF}},
        {**FIT, "options": {"precision": 10**5_000}},
        {**FIT, "experts": ITSELF},
        {**FIT, "exclude": ITSELF},
        {**FIT, "scaling": 10**5_000},
        {**FIT, "stochastic_rounding": 10**5_000},
        {**FIT, "weights": [10**5_000]},
        {**FIT, 5: 1},
        {**FIT, 10**5_000: 1},
        {**FIT, "overrides": [{10**5_000: 1}]},
        {"merge_method": bomb()},
        {"merge_method": "iso_c", "base_model": bomb(), "models": ITSELF},
        {"merge_method": "iso_c", "base_model": "b", "models": [{"model": "e", "parameters": {"weight": 10**5_000}}]},
        {"merge_method": "iso_c", "base_model": "b", "models": [{"model": "e", 10**5_000: 1}]},
        MergeConfig(base="b", experts=["e"], scaling="lots"),  # type: ignore[arg-type]  # as a caller may
        MergeConfig(base="b\0", experts=["e"]),
        MergeConfig(base="b", experts=["e"], options={"solver": object()}),
    ],
    ids=lambda raw: None,
)
def test_hostile_dicts(raw: Any) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        checked(raw)
    assert time.process_time() - started < 1.0
    assert len(str(caught.value)) < 400


def test_hostile_options_of_the_command_line() -> None:
    assert parse_options(["a=1", "b=2024-01-01", "c = x"]) == {"a": 1, "b": "2024-01-01", "c": "x"}
    for pairs in (["a=1", "a=2"], ["a"], ["a=!!python/name:os.system"], ["a=" + "[" * 5_000], ["a=" + "9" * 5_000]):
        with pytest.raises(ConfigError, match="--option") as caught:
            parse_options(pairs)
        assert len(str(caught.value)) < 200
    merge = ["plan", "--base", "b", "--expert", "e", "--option"]
    for option in ("solver=x", "precision=[1]", "common_fraction=yes", "precision={a: 1}", "memory_bytes=1.5"):
        result = CliRunner().invoke(app, [*merge, option])
        assert result.exit_code == 2, result.stderr
        assert option.split("=")[0] in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_config_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.yml")
    for path in (tmp_path / "m.yml", tmp_path, "/dev/null", "m\0.yml"):
        with pytest.raises(ConfigError, match=r"cannot be read .*not a"):
            load_config(path)
