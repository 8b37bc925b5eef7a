"""Shell patterns of a merge against its tensor names: what matches nothing is refused with the nearest name."""

from __future__ import annotations

import fnmatch
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import isomerge_fast as imf
from adapters import make_adapters
from checkpoints import load_folder, make_base, make_expert, make_family, save_folder
from isomerge_fast.config import MergeConfig, WeightRule, load_config
from isomerge_fast.methods import IsoC, Mean, Method, TensorSpec, method_for
from isomerge_fast.parsing.shell_patterns import first_match, globs_of
from isomerge_fast.planning.drafts import choose_method
from isomerge_fast.planning.pattern_checks import idle_patterns, require_matches
from isomerge_fast.planning.planner import make_plan

Family = tuple[Path, list[Path]]


def plan_of(family: Family, **changes: Any) -> Any:
    return make_plan(
        load_config({"base": family[0], "experts": family[1], "method": "iso-c", "scaling": 1.2, **changes})
    )


NOTHING = {
    "exclude": (
        {"exclude": ["*.up_proj.*"]},
        "exclude: '*.up_proj.*' matches no tensor (nearest: 'layers.0.up.weight')",
    ),
    "exact": ({"exclude": ["embed_token.weight"]}, "(nearest: 'embed_tokens.weight')"),
    "override": (
        {"overrides": [{"match": "*.embed_tokens.*", "method": "mean"}]},
        "overrides: '*.embed_tokens.*' matches no tensor (nearest: 'embed_tokens.weight')",
    ),
    "empty": ({"exclude": [""]}, "exclude[0] is ''; expected a pattern of tensor names, such as '*lm_head*'"),
    "case": ({"exclude": ["*CONV*"]}, "(nearest: 'conv.weight'; '*conv*' would match)"),
    "number": ({"exclude": ["layers.7.*"]}, "(nearest: 'layers.0.up.weight')"),
}


MENDED = {
    ".*up.*": "*up*",
    r"layers\.\d+\.up": "layers.*.up*",
    "^conv": "conv*",
    "layers.[0-9]+.up.*": "layers.*.up*",
    "conv.weight ": "conv.weight",
    "'*conv*'": "*conv*",
    "*CONV*": "*conv*",
    "*.up": "*.up*",
    "up.weight": "*up.weight",
}


@pytest.mark.parametrize(("pattern", "mended"), MENDED.items())
def test_a_pattern_of_another_kind_is_told_in_ours(tmp_path: Path, pattern: str, mended: str) -> None:
    with pytest.raises(imf.ConfigError) as raised:
        plan_of(make_family(tmp_path), exclude=[pattern])
    assert str(raised.value).endswith(f"; {mended!r} would match)")
    plan_of(make_family(tmp_path / "again"), exclude=[mended])


@pytest.mark.parametrize(("changes", "message"), NOTHING.values(), ids=NOTHING)
def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(imf.ConfigError) as raised:
        plan_of(make_family(tmp_path), **changes)
    assert message in str(raised.value)


def test_all_of_them_are_in_one_message_and_what_several_share_once(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    rules = [{"match": "*mpl*", "weight": 0.5}, {"match": "*", "weight": 2.0}]
    with pytest.raises(imf.ConfigError) as raised:
        plan_of(family, weights=[rules, 1.0, rules], exclude=["*emb*", "nope"])
    assert str(raised.value).splitlines() == [
        "2 patterns match no tensor:",
        "  - exclude: 'nope' matches no tensor (nearest: 'layers.0.norm.weight')",
        f"  - weights of {family[1][0]} and weights of {family[1][2]}: '*mpl*' matches no tensor (nearest: 'empty')",
    ]


def test_a_filter_of_a_recipe_is_named_as_it_was_written(tmp_path: Path) -> None:
    base, (first, second, _) = make_family(tmp_path)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [
            {"model": str(first), "parameters": {"weight": [{"filter": "self_attn", "value": 0.5}, {"value": 1}]}},
            {"model": str(second), "parameters": {"weight": 1}},
        ],
    }
    with pytest.raises(imf.ConfigError, match=rf"weights of {first}: '\*self_attn\*' matches no tensor \(nearest: "):
        make_plan(load_config(yaml.safe_load(yaml.safe_dump(recipe))))


def test_adapters_are_matched_by_all_names_of_their_base(tmp_path: Path) -> None:
    family = make_adapters(tmp_path)
    plan = plan_of(family, exclude=["lm_head*"])  # which no adapter changes
    assert "exclude: 'lm_head*' matches only tensors that are not merged, such as 'lm_head.weight'" in plan.notes
    with pytest.raises(imf.ConfigError, match=r"exclude: '\*lora_A\*' matches no tensor"):
        plan_of(family, exclude=["*lora_A*"])


def test_what_an_expert_adds_can_be_matched(tmp_path: Path) -> None:
    base = make_base()
    family = save_folder(tmp_path / "base", base), [save_folder(tmp_path / "a", {**base, "head.w": torch.ones(2, 2)})]
    with pytest.raises(imf.InputError):
        plan_of(family, exclude=["head*"])
    for choice in ("copy", "ignore"):
        notes = plan_of(family, exclude=["head*"], on_extra=choice).notes
        assert "exclude: 'head*' matches only tensors that are not merged, such as 'head.w'" in notes


def test_patterns_that_change_nothing_are_noted(tmp_path: Path) -> None:
    rules = [{"match": "layers.*", "weight": 0.5}, {"match": "*up*", "weight": 2.0}, {"match": "*", "weight": 1.0}]
    family = make_family(tmp_path)
    notes = plan_of(
        family,
        exclude=["position_*", "*embed*", "*norm*"],
        overrides=[
            {"match": "layers.0.*", "method": "mean"},
            {"match": "*down*", "method": "mean"},
            {"match": "embed*", "method": "mean"},
        ],
        weights=[rules, 1.0, 1.0],
    ).notes
    taken = "changes nothing: what is tried before it takes all that it matches, such as"
    assert [note for note in notes if " matches only " in note or " changes nothing" in note] == [
        f"overrides: '*down*' {taken} 'layers.0.down.weight'",
        "exclude: 'position_*' matches only tensors that are not merged, such as 'position_ids'",
        f"exclude: '*embed*' {taken} 'embed_tokens.weight'",
        f"exclude: '*norm*' {taken} 'layers.0.norm.weight'",
        f"weights of {family[1][0]}: '*up*' {taken} 'layers.0.up.weight'",
    ]


def test_the_catch_all_always_matches(tmp_path: Path) -> None:
    only = {"ids": torch.arange(3)}
    family = save_folder(tmp_path / "base", only), [save_folder(tmp_path / "a", only)]
    assert not [note for note in plan_of(family, exclude=["*"]).notes if "exclude" in note]


def test_state_dicts() -> None:
    base = make_base()
    experts = [make_expert(base, task) for task in range(2)]
    with pytest.raises(
        imf.ConfigError, match=r"^exclude: '\*downn\*' matches no tensor \(nearest: 'layers.0.down.weight'"
    ):
        imf.merge_state_dicts(base, experts, method="iso-c", exclude=["*up*", "*downn*"])
    assert imf.merge_state_dicts(base, experts, method="iso-c", exclude=["*up*"]).keys() == base.keys()


def test_an_unmatched_pattern_leaves_no_output(tmp_path: Path) -> None:
    base, experts = make_family(tmp_path)
    config = {"base": base, "experts": experts, "out": tmp_path / "out", "method": "mean", "exclude": ["x"]}
    with pytest.raises(imf.ConfigError):
        imf.merge(config)
    assert not (tmp_path / "out").exists()
    imf.merge({**config, "exclude": ["layers.0.up.weight"]})
    assert load_folder(tmp_path / "out")


def test_the_nearest_of_many_names_is_found_at_once() -> None:
    """Names of strangers' files, which need not be a model's; patterns without number and end."""
    layers = [
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for layer in range(80) for expert in range(250)
    ]
    strange = ["".join(chr(97 + int(digit)) for digit in str(number**9)) * 9 for number in range(20_000)]
    patterns = ["*.lm_head.*", "*" + "abcdefgh." * 10_000, *(f"nothing{number}" for number in range(20))]
    started = time.process_time()
    with pytest.raises(imf.ConfigError) as raised:
        require_matches([("exclude", patterns)], [*layers, "lm_head.weight"])
    assert raised.value.problems[0] == "exclude: '*.lm_head.*' matches no tensor (nearest: 'lm_head.weight')"
    assert raised.value.problems[-1] == "… and 2 more"
    with pytest.raises(imf.ConfigError):
        require_matches([("exclude", patterns[:3])], strange)
    assert time.process_time() - started < 6


def calls_of(function: Callable[[], object]) -> int:
    """How many Python functions are called."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_many_patterns_are_tried_on_each_name_once() -> None:
    names = [f"layers.{number}.weight" for number in range(300)]
    patterns = [*names[:40], *(f"*.{number}.wei*" for number in range(40, 80)), *(f"{name}*" for name in names[:40])]
    config = MergeConfig("b", ["e"], exclude=patterns)
    assert calls_of(lambda: list(idle_patterns(config, names, []))) < len(names) * len(patterns)
    assert [note.split(" ")[1] for note in idle_patterns(config, names, [])] == [f"'{name}*'" for name in names[:40]]


def test_a_name_is_looked_up_among_many_patterns_at_once() -> None:
    rules = [WeightRule(f"layer{number}.*" if number % 2 else f"layer{number}.weight", 0.5) for number in range(300)]
    overrides: list[tuple[str, Method]] = [(f"part{number}.*", Mean()) for number in range(300)]
    config = MergeConfig("b", ["e"], weights=[rules], exclude=[rule.match for rule in rules])
    spec = TensorSpec("norm.weight", (4, 4), torch.float32)

    def choose() -> None:
        assert config.weights_of("norm.weight") == (1.0,)
        assert choose_method(spec, config, IsoC(), overrides)[0].name == "iso-c"
        assert method_for(IsoC(), spec, config.exclude).name == "iso-c"

    choose()
    assert calls_of(choose) < 100
    assert config.weights_of("layer7.weight") == config.weights_of("layer8.weight") == (0.5,)


@pytest.mark.parametrize("patterns", [["a", "*", "b"], ["b", "a"], ["?", "a"], ["a?", "[ab]", "b"], ["[", "a[0]"], []])
def test_the_first_of_several_patterns_is_that_of_fnmatch(patterns: list[str]) -> None:
    for name in ("a", "b", "A", "ab", "a[0]", "a0", "[", "", "a\nb"):
        expected = next((index for index, each in enumerate(patterns) if fnmatch.fnmatchcase(name, each)), None)
        assert globs_of(tuple(patterns)).first(name) == expected
        for pattern in patterns:
            assert (first_match(pattern, [name]) is not None) == fnmatch.fnmatchcase(name, pattern)
