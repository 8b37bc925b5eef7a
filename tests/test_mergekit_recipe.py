"""mergekit's YAML read as ours: what every key becomes, and what is refused. mergekit is not needed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import isomerge_fast as imf
from checkpoints import load_folder, make_family
from isomerge_fast.config import load_config
from isomerge_fast.errors import ConfigError
from isomerge_fast.parsing.mergekit_recipe import is_recipe, read_recipe

TWO = "base_model: base\nmodels: [{model: a}, {model: b}]\n"
WEIGHED = "models: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.9}}]\n"


def read(text: str) -> dict[str, Any]:
    return read_recipe(yaml.safe_load(text), "recipe.yml")


def test_a_recipe_is_told_by_its_merge_method() -> None:
    assert is_recipe({"merge_method": "ties"})
    assert not is_recipe({"method": "iso-c", "base": "base"})


TRANSLATIONS = {
    "iso-c": (
        f"merge_method: iso_c\n{TWO}",
        {"method": "iso-c", "base": "base", "experts": ["a", "b"], "options": {}},
    ),
    "iso-cts": (
        f"merge_method: iso_cts\n{TWO}"
        "parameters: {lambda: 1.3, common_fraction: 7e-1, rank_policy: min-dim, precision: fast, weight: 2}\n"
        "dtype: float32\nout_dtype: torch.bfloat16\ntokenizer_source: base",
        {
            "method": "iso-cts",
            "base": "base",
            "experts": ["a", "b"],
            "scaling": 1.3,
            "options": {"common_fraction": 0.7, "rank_policy": "min-dim", "precision": "fast"},
            "weights": [2.0, 2.0],
            "dtype": "bfloat16",
        },
    ),
    "base-among-models": (
        "merge_method: task_arithmetic\nbase_model: base\n"
        "models: [{model: base}, {model: a, parameters: {weight: 0.5}}]\n"
        "parameters: {normalize: true, int8_mask: true, rescale: false, density: 1, lambda: [{value: 0.5}]}\n"
        "dtype: float32\ntokenizer: {source: base}",
        {
            "method": "task-arithmetic",
            "base": "base",
            "experts": ["a"],
            "scaling": 0.5,
            "options": {},
            "weights": [0.5],
            "normalize_weights": True,
            "dtype": "float32",
        },
    ),
    "adapters": (
        "merge_method: iso_c\nbase_model: ./base\nmodels: [{model: base+a}, {model: {model: {path: base}, lora: b}}]",
        {"method": "iso-c", "base": "./base", "experts": ["a", "b"], "options": {}},
    ),
    # Their weights are divided by 0.3 + 0.9; the first model is as good a base as any.
    "linear": (
        f"merge_method: linear\n{WEIGHED}",
        {
            "method": "task-arithmetic",
            "base": "a",
            "experts": ["b"],
            "scaling": 1.0,
            "options": {},
            "weights": [0.9 / (0.3 + 0.9)],
        },
    ),
    # mergekit adds a base that is not among the models, with the recipe's weight.
    "linear-with-a-base": (
        f"merge_method: linear\nbase_model: base\n{WEIGHED}parameters: {{weight: 0.8}}",
        {
            "method": "task-arithmetic",
            "base": "base",
            "experts": ["a", "b"],
            "scaling": 1.0,
            "options": {},
            "weights": [0.3 / (0.8 + 0.3 + 0.9), 0.9 / (0.8 + 0.3 + 0.9)],
        },
    ),
    # Where a weight depends on the name the base is an expert, so that its weight is part of every sum.
    "linear-with-filters": (
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n"
        "- {model: b, parameters: {weight: [{filter: mlp, value: 0.5}, {value: 2}]}}",
        {
            "method": "task-arithmetic",
            "base": "a",
            "experts": ["a", "b"],
            "scaling": 1.0,
            "options": {},
            "weights": [1.0, [{"match": "*mlp*", "weight": 0.5}, {"match": "*", "weight": 2.0}]],
            "normalize_weights": True,
        },
    ),
    # Whatever names match, 1 = 0.25 + 0.75 = 0.5 + 0.5, so nothing need be divided.
    "linear-as-it-stands": (
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
        "- {model: a, parameters: {weight: [{filter: mlp, value: 0.25}, {value: 0.5}]}}\n"
        "- {model: b, parameters: {weight: [{filter: mlp, value: 0.75}, {value: 0.5}]}}",
        {
            "method": "task-arithmetic",
            "base": "a",
            "experts": ["b"],
            "scaling": 1.0,
            "options": {},
            "weights": [[{"match": "*mlp*", "weight": 0.75}, {"match": "*", "weight": 0.5}]],
        },
    ),
}


@pytest.mark.parametrize(("text", "expected"), TRANSLATIONS.values(), ids=TRANSLATIONS)
def test_what_it_becomes(text: str, expected: dict[str, Any]) -> None:
    assert read(text) == expected
    load_config(yaml.safe_load(text))  # and these are keys and values that a merge takes


def test_the_first_filter_that_matches_counts(tmp_path: Path) -> None:
    """A model's own, then the recipe's, then the default; filters are parts of names and not patterns."""
    file = tmp_path / "recipe.yml"
    file.write_text(
        "merge_method: iso_c\nbase_model: base\nmodels:\n"
        "- {model: a, parameters: {weight: [{filter: mlp, value: 2}, {filter: 'x[1]', value: 3}]}}\n"
        "- {model: b, parameters: {weight: {filter: '*', value: 4}}}\n"
        "- {model: c}\n"
        "- {model: d, parameters: {weight: []}}\n"
        "parameters: {weight: [{filter: mlp.up, value: 5}, {filter: attn, value: 6}]}"
    )
    config = load_config(file)
    assert config.weights_of("model.0.mlp.up.weight") == (2.0, 4.0, 5.0, 5.0)
    assert config.weights_of("model.0.attn.q.weight") == (6.0, 4.0, 6.0, 6.0)
    assert config.weights_of("x[1].weight") == (3.0, 4.0, 1.0, 1.0)
    assert config.weights_of("x1.weight") == (1.0, 4.0, 1.0, 1.0)


def test_a_path_may_hold_what_mergekit_takes_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose name has + or @ is that folder; where both readings exist, neither is taken."""
    monkeypatch.chdir(tmp_path)
    for name in ("a+b", "a@1"):
        Path(name).mkdir()
    text = "merge_method: iso_c\nbase_model: base\nmodels: [{model: a+b}, {model: a@1}, {model: {model: {path: c@2}}}]"
    assert read(text)["experts"] == ["a+b", "a@1", "c@2"]
    for name in ("a", "b"):
        Path(name).mkdir()
    with pytest.raises(ConfigError, match=r"models\[0\].model: 'a\+b' is a path, and 'a' with adapter 'b'"):
        read(text)


def test_it_runs_without_mergekit(tmp_path: Path) -> None:
    """The same bytes as the merge that it is translated to."""
    base, experts = make_family(tmp_path, tasks=2)
    models = [{"model": str(experts[0])}, {"model": str(experts[1]), "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "iso_cts", "base_model": str(base), "models": models, "parameters": {"lambda": 0.7}}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    imf.merge(load_config(tmp_path / "recipe.yml", out=str(tmp_path / "a")))
    ours = {"base": base, "experts": experts, "method": "iso-cts", "scaling": 0.7, "weights": [1.0, 0.5]}
    imf.merge({**ours, "out": tmp_path / "b"})
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert load_folder(tmp_path / "a").keys() == load_folder(base).keys()


def test_the_recipe_of_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs/mergekit.md").read_text(encoding="utf-8")
    read_as = read(text.split("```yaml")[1].split("```")[0])
    assert read_as == {
        "method": "iso-cts",
        "base": "path/to/base",
        "experts": ["path/a", "path/b"],
        "scaling": 1.2,
        "options": {"common_fraction": 0.8, "rank_policy": "range", "precision": "default"},
        "weights": [1.0, [{"match": "*mlp*", "weight": 0.5}, {"match": "*", "weight": 1.25}]],
        "dtype": "bfloat16",
    }


ISO = f"merge_method: iso_c\n{TWO}"
TASK = f"merge_method: task_arithmetic\nbase_model: base\n{WEIGHED}"
LINEAR = f"merge_method: linear\n{WEIGHED}"
REFUSALS = {
    "method": (f"merge_method: ties\n{TWO}", "merge_method 'ties' is not honoured"),
    "method-misspelt": (f"merge_method: iso-ctx\n{TWO}", "did you mean 'iso_cts'"),
    "no-method": (f"merge_method:\n{TWO}", "merge_method None is not honoured"),
    "unknown-key": (f"{ISO}out_dtpye: float32", "unknown key out_dtpye (did you mean 'out_dtype'?)"),
    "unknown-empty-key": (f"{ISO}tokeniser:", "unknown key tokeniser (did you mean 'tokenizer'?)"),
    "slices": (f"{ISO}slices: [{{sources: []}}]", "slices is not honoured: whole models"),
    "modules": (f"{ISO}modules: {{text_decoder: {{}}}}", "modules is not honoured: whole models"),
    "chat-template": (f"{ISO}chat_template: auto", "chat_template is not honoured"),
    "tokenizer-union": (f"{ISO}tokenizer_source: union", "tokenizer_source is not honoured: 'union'"),
    "tokenizer-model": (f"{ISO}tokenizer_source: a", "tokenizer_source is not honoured: 'a'"),
    "tokenizer-default": (f"{ISO}tokenizer: {{}}", "tokenizer.source is not honoured: 'union'"),
    "tokenizer-of-no-base": (f"{LINEAR}tokenizer_source: base", "tokenizer_source is not honoured: without a base"),
    "tokenizer-tokens": (f"{ISO}tokenizer: {{source: base, tokens: {{x: {{}}}}}}", "tokenizer.tokens is not honoured"),
    "tokenizer-pad": (f"{ISO}tokenizer: {{source: base, pad_to_multiple_of: 8}}", "tokenizer.pad_to_multiple_of is"),
    "tokenizer-key": (f"{ISO}tokenizer: {{sorce: base}}", "unknown key tokenizer.sorce (did you mean 'source'?)"),
    "tokenizer-text": (f"{ISO}tokenizer: base", "tokenizer is 'base'; expected {source: base}"),
    "tokenizer-twice": (f"{ISO}tokenizer: {{source: base}}\ntokenizer_source: base", "exclude each other"),
    "dtype": (f"{ISO}dtype: bf16", "dtype 'bf16' is unknown (did you mean 'bfloat16'?)"),
    "out-dtype": (f"{ISO}out_dtype: auto", "out_dtype 'auto' is unknown"),
    "no-models": ("merge_method: iso_c\nbase_model: base", "models is missing"),
    "empty-models": ("merge_method: iso_c\nbase_model: base\nmodels: []", "models is missing"),
    "model-text": ("merge_method: iso_c\nbase_model: base\nmodels: [a]", "models[0] is 'a'; expected {model: "),
    "model-key": (
        "merge_method: iso_c\nbase_model: base\nmodels: [{model: a, layer_range: [0, 2]}]",
        "unknown key models[0].layer_range",
    ),
    "model-none": ("merge_method: iso_c\nbase_model: base\nmodels: [{model: {lora: b}}]", "models[0].model.model is"),
    "model-number": ("merge_method: iso_c\nbase_model: base\nmodels: [{model: 3}]", "models[0].model is 3; expected"),
    "model-twice": ("merge_method: iso_c\nbase_model: base\nmodels: [{model: a}, {model: a}]", "a is listed twice"),
    "model-alone": ("merge_method: iso_c\nbase_model: base\nmodels: [{model: base}]", "no model beside the base"),
    "architecture": (
        "merge_method: iso_c\nbase_model: base\nmodels: [{model: {model: a, override_architecture: X}}]",
        "models[0].model.override_architecture is not honoured",
    ),
    "revision": (
        "merge_method: iso_c\nbase_model: me/base@main\nmodels: [{model: a}]",
        "'me/base@main' names a revision",
    ),
    "revision-key": (
        "merge_method: iso_c\nbase_model: base\nmodels: [{model: {model: {path: a, revision: main}}}]",
        "models[0].model.model.revision is not honoured",
    ),
    "no-base": (f"merge_method: iso_c\n{WEIGHED}", "base_model is missing"),
    "base-with-adapter": (
        "merge_method: iso_c\nbase_model: base+a\nmodels: [{model: b}]",
        "base_model is not honoured",
    ),
    "adapter-elsewhere": (
        "merge_method: iso_c\nbase_model: base\nmodels: [{model: other+a}]",
        "other+a: an adapter on another model than base is not honoured",
    ),
    "two-adapters": ("merge_method: iso_c\nbase_model: base\nmodels: [{model: base+a+b}]", "has more than one +"),
    "parameters": (f"{ISO}parameters: [1]", "parameters is [1]; expected names with values"),
    "parameter": (f"{ISO}parameters: {{lamda: 2}}", "unknown key parameters.lamda (did you mean 'lambda'?)"),
    "parameter-of-another-method": (f"{ISO}parameters: {{density: 1}}", "unknown key parameters.density"),
    "parameter-of-all": (
        "merge_method: iso_c\nbase_model: base\nmodels: [{model: a, parameters: {lambda: 2}}]",
        "models[0].parameters.lambda is not honoured: it is one for all models",
    ),
    "not-a-number": (f"{ISO}parameters: {{weight: much}}", "parameters.weight is 'much'; expected a number"),
    "yes-is-no-number": (f"{ISO}parameters: {{lambda: yes}}", "parameters.lambda is True; expected a number"),
    "infinite": (f"{ISO}parameters: {{weight: .inf}}", "parameters.weight is inf; expected a finite number"),
    "not-a-flag": (f"{TASK}parameters: {{normalize: 2}}", "parameters.normalize is 2; expected true or false"),
    "not-a-word": (f"{ISO}parameters: {{precision: 2}}", "parameters.precision is 2; expected a word"),
    "gradient": (f"{ISO}parameters: {{weight: [0, 1]}}", "parameters.weight is not honoured: a gradient"),
    "gradient-inside": (
        f"{ISO}parameters: {{weight: [{{filter: mlp, value: [0, 1]}}]}}",
        "parameters.weight[0].value is not honoured: a gradient",
    ),
    "condition-key": (f"{ISO}parameters: {{weight: [{{fliter: x, value: 1}}]}}", "unknown key parameters.weight[0].fl"),
    "condition-without-value": (f"{ISO}parameters: {{weight: {{filter: x}}}}", "parameters.weight.value is None"),
    "filter": (f"{ISO}parameters: {{weight: {{filter: 3, value: 1}}}}", "parameters.weight.filter is 3"),
    "lambda-differs": (
        f"{ISO}parameters: {{lambda: [{{filter: mlp, value: 2}}]}}",
        "parameters.lambda is not honoured: it differs between tensors",
    ),
    "no-weight": (
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}]",
        "models[0].parameters.weight is missing; task_arithmetic has no default",
    ),
    "weight-for-some": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: {filter: mlp, value: 1}}}]",
        "models[0].parameters.weight is not honoured: no value for tensors that match no filter",
    ),
    "no-weight-of-the-base": (f"{LINEAR}base_model: base", "base_model (mergekit adds it to the models): parameters.w"),
    "weights-without-a-sum": (
        "merge_method: linear\nmodels: [{model: a}, {model: b, parameters: {weight: -1}}]\nparameters: {weight: 1}",
        "the weights of the models add up to 0",
    ),
    "density": (
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n- {model: b, parameters: {weight: 1}}\n"
        "- {model: a, parameters: {weight: 1, density: 0.5}}",
        "models[1].parameters.density is not honoured: task_arithmetic drops nothing",
    ),
    "density-of-all": (f"{TASK}parameters: {{density: 0.5}}", "parameters.density is not honoured"),
    "rescale": (f"{TASK}parameters: {{rescale: true}}", "parameters.rescale is not honoured"),
    "normalize": (f"{LINEAR}parameters: {{normalize: false}}", "parameters.normalize is not honoured: false needs"),
    "normalize-for-some": (
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n- {model: a, parameters: {weight: 0.5}}\n"
        "- {model: b, parameters: {weight: [{filter: mlp, value: 0.25}, {value: 0.5}]}}",
        "parameters.normalize is not honoured: false needs",
    ),
    "normalize-with-many-filters": (
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n- {model: a, parameters: {weight: ["
        + "".join(f"{{filter: l{layer}, value: 1}}, " for layer in range(11))
        + "{value: 1}]}}",
        "parameters.normalize is not honoured: false with more than 10 filters",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value).startswith("recipe.yml: ")
    assert message in str(caught.value)
