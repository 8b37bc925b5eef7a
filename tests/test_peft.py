"""Beside PEFT itself: adapters that it saves are read as what it applies; those that we add do what they should."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isomerge_fast as imf
import peers
from isomerge_fast.checkpoint.io.reader import Reader, files_of, whole
from isomerge_fast.checkpoint.layout import open_checkpoint
from isomerge_fast.checkpoint.lora import settings
from isomerge_fast.checkpoint.lora.adapter import Adapter, incompatibilities, open_adapter
from isomerge_fast.errors import ConfigError, InputError
from isomerge_fast.methods import METHODS, as_deltas

peers.need("peft", "peft")

import transformers  # noqa: E402  # after the line that skips where PEFT is absent, as what follows
from peft import (  # noqa: E402  # see above
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer  # noqa: E402  # see above

from isomerge_fast.integrations import peft as peft_module  # noqa: E402  # it imports PEFT
from isomerge_fast.integrations.peft import add_merged_adapter  # noqa: E402  # likewise

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

WRAPPER = "base_model.model."


def llama(**changes: Any) -> Any:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **changes))


def gpt2() -> Any:
    sizes: Any = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def bert() -> Any:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_attention_heads=4))


def trained(model: Any, config: PeftConfig, seed: int = 0) -> PeftModel:
    """The model with an adapter whose every weight is random, as is what else the adapter trains."""
    adapted = get_peft_model(model, config)
    randomize(adapted, seed)
    return adapted


def randomize(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix(WRAPPER), module


def products(adapter: Adapter) -> dict[str, Tensor]:
    """scale · B A, or its transpose, of every pair in the files."""
    found = {}
    with Reader(files_of(adapter)) as reader:
        for name, pair in adapter.pairs.items():
            product = pair.scale * (reader.read(whole(pair.b)).double() @ reader.read(whole(pair.a)).double())
            found[name] = product.mT if pair.transposed else product
            assert found[name].shape == pair.shape
    return found


# Of one module never two: PEFT takes the first, and sorts them when it saves.
PATTERNS = {
    "rank_pattern": {r"layers\.\d+\.self_attn\.(q|k)_proj": 3, "^model.layers.1.mlp.up_proj": 5},
    "alpha_pattern": {"0.self_attn.q_proj": 7, "up_proj": 0.5},
}
READ: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "llama": (llama, {"target_modules": "all-linear"}, set()),
    "patterns": (llama, {"target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"], **PATTERNS}, set()),
    "rslora": (llama, {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, **PATTERNS}, set()),
    "head": (llama, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, {"lm_head.weight"}),
    "mica": (llama, {"target_modules": ["v_proj"], "init_lora_weights": "mica"}, set()),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc", "wpe"]}, set()),
    "bert": (
        bert,
        {"target_modules": ["query", "dense", "word_embeddings"], "bias": "lora_only", "task_type": "SEQ_CLS"},
        {"bert.encoder.layer.0.attention.self.query.bias", "bert.pooler.dense.bias", "classifier.weight"},
    ),
    "bert-all-biases": (
        bert,
        {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
        {"bert.encoder.layer.0.output.LayerNorm.bias", "classifier.weight", "classifier.bias"},
    ),
}


@pytest.mark.parametrize(("make", "changes", "whole_tensors"), READ.values(), ids=READ)
def test_what_peft_saves_is_what_it_applies(
    tmp_path: Path, make: Any, changes: dict[str, Any], whole_tensors: set[str]
) -> None:
    model = make()
    model.save_pretrained(tmp_path / "base")
    adapted = trained(model, LoraConfig(r=4, lora_alpha=6, **changes))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    base = open_checkpoint(tmp_path / "base")
    adapter = open_adapter(tmp_path / "adapter", base)
    assert list(incompatibilities(base, adapter)) == []

    expected = {f"{name}.weight": layer.get_delta_weight("default") for name, layer in lora_layers(adapted)}
    found = products(adapter)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        error = torch.linalg.matrix_norm(found[name] - delta) / torch.linalg.matrix_norm(delta)
        assert error <= 1e-6, name

    assert whole_tensors <= adapter.tensors.keys()
    # What PEFT itself calls these, with what it trained in the place of the base's.
    own = {
        name.removeprefix(WRAPPER).replace("base_layer.", "").replace("modules_to_save.default.", ""): tensor
        for name, tensor in adapted.state_dict().items()
        if "original_module" not in name
    }
    with Reader(files_of(adapter)) as reader:
        for name, stored in adapter.tensors.items():
            assert torch.equal(reader.read(whole(stored)), own[name]), name


def test_another_prefix_in_the_base(tmp_path: Path) -> None:
    """The encoder's own file says ``encoder…``, an adapter of the classifier ``bert.encoder…``."""
    model = bert()
    model.bert.save_pretrained(tmp_path / "base")
    adapted = trained(model, LoraConfig(target_modules=["query"]))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    base = open_checkpoint(tmp_path / "base")
    adapter = open_adapter(tmp_path / "adapter", base)
    assert list(incompatibilities(base, adapter)) == []
    expected = {f"{name.removeprefix('bert.')}.weight" for name, _ in lora_layers(adapted)}
    assert adapter.pairs.keys() == expected


def test_pissa_converted_by_peft_is_read(tmp_path: Path) -> None:
    """As it is saved it belongs to a changed base and is refused; converted it is plain, of twice the rank."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    start = tmp_path / "start"
    config: Any = adapted.peft_config["default"]
    config.init_lora_weights = True
    adapted.save_pretrained(str(start))
    config.init_lora_weights = "pissa"
    randomize(adapted, seed=1)
    adapted.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(InputError, match=r"init_lora_weights is 'pissa'.*path_initial_model_for_weight_conversion"):
        open_adapter(tmp_path / "raw", base)
    layer = dict(lora_layers(adapted))["model.layers.0.self_attn.q_proj"]
    delta = layer.base_layer.weight + layer.get_delta_weight("default") - before
    adapted.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(start))
    adapter = open_adapter(tmp_path / "plain", base)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert adapter.pairs[name].rank == 8
    assert torch.linalg.matrix_norm(products(adapter)[name] - delta) <= 1e-5 * torch.linalg.matrix_norm(delta)


REFUSED: dict[str, tuple[PeftConfig, str]] = {
    "dora": (LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora is True"),
    "lora-bias": (LoraConfig(target_modules=["q_proj"], lora_bias=True), "lora_bias is True"),
    "tokens": (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "parameters": (
        LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
        "target_parameters is ",
    ),
    "replication": (LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)]), "layer_replication"),
    "olora": (LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"), "init_lora_weights is 'olora'"),
    "ia3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type 'IA3'"),
    "loha": (LoHaConfig(target_modules=["q_proj"]), "peft_type 'LOHA'"),
    "vera": (VeraConfig(target_modules=["q_proj"]), "peft_type 'VERA'"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_peft_saves_and_is_no_plain_lora(tmp_path: Path, config: PeftConfig, message: str) -> None:
    model = llama(attention_bias=True)
    model.save_pretrained(tmp_path / "base")
    trained(model, config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(InputError, match=message):
        open_adapter(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))


@pytest.mark.parametrize("beside", ["auto", False])
def test_an_embedding_is_read_whether_its_base_lies_beside_it_or_not(tmp_path: Path, beside: Any) -> None:
    """By default PEFT saves the frozen embedding too, and it is the base's."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapted = trained(model, LoraConfig(target_modules=["embed_tokens"]))
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=beside)
    name = "model.embed_tokens.weight"
    adapter = open_adapter(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    assert adapter.pairs[name].shape == (64, 32)
    assert adapter.copies == ((name,) if beside else ())
    assert not adapter.tensors


def test_every_setting_of_this_release_is_known() -> None:
    """A setting that a new PEFT brings is judged here first: what it does, and whether it may be read over."""
    known = {*settings.USED, *settings.HARMLESS, *settings.REFUSED}
    assert {setting.name for setting in fields(LoraConfig)} <= known


def adapted(make: Any = llama, *, configs: dict[str, dict[str, Any]] | None = None) -> Any:
    """A model with several adapters of different ranks, of which the first is active."""
    torch.manual_seed(0)
    configs = configs or {"a": {"r": 4, "lora_alpha": 6}, "b": {"r": 3, "use_rslora": True}, "c": {"r": 2}}
    model: Any = None
    for seed, (name, changes) in enumerate(configs.items()):
        config = LoraConfig(**{"target_modules": "all-linear", **changes})
        if model is None:
            model = get_peft_model(make(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}." in f"{key}.":
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).reshape(2, 6)).logits


def dense(model: Any, names: list[str], method: str, weights: list[float], **options: Any) -> dict[str, Tensor]:
    """The merged Δ of every layer, from PEFT's own deltas and the dense route."""
    merged = {}
    for module, layer in lora_layers(model):
        deltas = [weight * layer.get_delta_weight(name) for name, weight in zip(names, weights, strict=True)]
        merged[module], _ = METHODS[method](**options).merge(as_deltas([delta.detach() for delta in deltas]))
    return merged


MERGES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "iso-c": (llama, "iso-c", {}),
    "iso-cts": (llama, "iso-cts", {"common_fraction": 0.9}),
    "mean": (llama, "mean", {}),
    "iso-c-conv1d": (gpt2, "iso-c", {}),
    "iso-cts-conv1d": (gpt2, "iso-cts", {}),
}


@pytest.mark.parametrize(("make", "method", "options"), MERGES.values(), ids=MERGES)
def test_a_merged_adapter_is_the_dense_merge(tmp_path: Path, make: Any, method: str, options: dict[str, Any]) -> None:
    """Square, wide and tall layers, mixed ranks, transposed ones; then the whole model, and the model from files."""
    model = adapted(make)
    before = logits(model)
    weights = [1.0, 0.5, -0.75]
    errors = add_merged_adapter(
        model, ["a", "b", "c"], "merged", weights=weights, method=method, scaling=1.3, **options
    )
    deltas = {
        module: 1.3 * delta for module, delta in dense(model, ["a", "b", "c"], method, weights, **options).items()
    }
    assert list(errors) == list(deltas)
    assert max(errors.values()) < 1e-6
    for module, layer in lora_layers(model):
        assert layer.scaling["merged"] == 1
        sizes = [factor["merged"].weight.norm().item() for factor in (layer.lora_A, layer.lora_B)]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)
        assert torch.dist(layer.get_delta_weight("merged"), deltas[module]) <= 1e-5 * deltas[module].norm(), module

    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model), before)
    model.set_adapter("merged")
    merged = logits(model)
    plain = make()
    plain.load_state_dict(
        {
            name.removeprefix(WRAPPER).replace("base_layer.", ""): tensor
            for name, tensor in model.state_dict().items()
            if ".lora_" not in name
        }
    )
    base = copy.deepcopy(plain)
    for module, delta in deltas.items():
        weight: Any = plain.get_submodule(module).weight
        weight.data += delta
    assert (merged - before).abs().max() > 1e-3
    torch.testing.assert_close(merged, logits(plain.eval()), atol=1e-4, rtol=1e-4)

    model.save_pretrained(str(tmp_path), selected_adapters=["merged"])
    again: Any = PeftModel.from_pretrained(base, str(tmp_path / "merged")).eval()
    assert torch.equal(logits(again), merged)
    base.save_pretrained(tmp_path / "base")
    read = products(open_adapter(tmp_path / "merged", open_checkpoint(tmp_path / "base")))
    for module, delta in deltas.items():
        assert torch.dist(read[f"{module}.weight"], delta) <= 1e-5 * delta.norm(), module


def test_a_rank_that_is_too_small_loses_what_it_says() -> None:
    model = adapted()
    errors = add_merged_adapter(model, ["a", "b"], "small", method="task-arithmetic", rank=3)
    for module, delta in dense(model, ["a", "b"], "task-arithmetic", [1, 1]).items():
        sigma = torch.linalg.svdvals(delta)
        best = float(sigma[3:].norm() / sigma.norm())
        layer = dict(lora_layers(model))[module]
        lost = float(torch.dist(layer.get_delta_weight("small").double(), delta) / delta.norm())
        assert layer.r["small"] == 3
        assert errors[module] == pytest.approx(lost, rel=1e-4)
        assert best - 1e-6 <= lost <= best * 1.01  # of directions that weigh alike, it takes those of the larger sum


def test_one_adapter_is_merged_with_itself_and_nothing_else_changes() -> None:
    model = adapted(configs={"a": {"target_modules": ["q_proj"]}})
    model.set_adapter("a")
    before = snapshot(model)
    add_merged_adapter(model, ["a"], "merged", method="mean", scaling=-2)
    after = snapshot(model)
    for _, layer in lora_layers(model):
        torch.testing.assert_close(layer.get_delta_weight("merged"), -2 * layer.get_delta_weight("a"))
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert dict(after[1]).items() >= dict(before[1]).items()
    assert not any(flag for name, flag in after[1] if ".merged." in name)  # as with add_weighted_adapter
    assert after[3] == before[3]
    assert after[5] == before[5]


def test_an_embedding_is_merged_as_it_is_stored() -> None:
    """Iso-CTS is not the same of a transpose: what is common is taken from the left."""
    changes: dict[str, Any] = {"target_modules": ["word_embeddings", "query", "output.dense"]}
    model = adapted(bert, configs={"a": {**changes, "r": 13}, "b": {**changes, "r": 12}, "c": {**changes, "r": 11}})
    names = ["a", "b", "c"]  # with more directions together than are common
    add_merged_adapter(model, names, "merged", method="iso-cts", common_fraction=0.5)
    for module, delta in dense(model, names, "iso-cts", [1, 1, 1], common_fraction=0.5).items():
        layer = dict(lora_layers(model))[module]
        assert torch.dist(layer.get_delta_weight("merged"), delta) <= 1e-5 * delta.norm(), module


def test_other_modules_in_every_adapter(tmp_path: Path) -> None:
    """Missing ones are refused by name, or merged as zero deltas; ends of names that fit too much are not targeted."""
    configs = {
        "a": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        "b": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]},
    }
    model = adapted(configs=configs)
    with pytest.raises(InputError, match=r"on_missing='zero'[\s\S]*adapter 'a' has no factors for module .*v_proj"):
        add_merged_adapter(model, ["a", "b"], "merged", method="iso-c")
    add_merged_adapter(model, ["a", "b"], "merged", method="mean", on_missing="zero")
    layers = dict(lora_layers(model))
    names = {f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")}
    assert {module for module, layer in layers.items() if "merged" in layer.lora_A} == names
    value = layers["model.layers.0.self_attn.v_proj"]
    torch.testing.assert_close(value.get_delta_weight("merged"), value.get_delta_weight("b") / 2)
    model.save_pretrained(str(tmp_path), selected_adapters=["merged"])
    again: Any = PeftModel.from_pretrained(llama(), str(tmp_path / "merged"))
    assert {module for module, _ in lora_layers(again)} == names


def test_a_name_that_is_the_end_of_another(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 5)
            self.other = nn.ModuleDict({"head": nn.Linear(6, 5)})

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.other["head"](x)

    model = adapted(Twice, configs={"a": {"target_modules": "head"}, "b": {"target_modules": "head"}})
    add_merged_adapter(model, ["a", "b"], "merged", method="iso-c")
    assert [module for module, layer in lora_layers(model) if "merged" in layer.lora_A] == ["head"]
    model.save_pretrained(str(tmp_path), selected_adapters=["merged"])
    again: Any = PeftModel.from_pretrained(Twice(), str(tmp_path / "merged"))
    assert [module for module, _ in lora_layers(again)] == ["head"]


def test_what_a_method_excludes_is_averaged() -> None:
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_projection, self.visual_projection = nn.Linear(6, 5, dtype=torch.bfloat16), nn.Linear(6, 5)

    targets = {"target_modules": ["text_projection", "visual_projection"], "r": 2}
    model = adapted(Projections, configs={"a": targets, "b": targets})
    add_merged_adapter(model.base_model, ["a", "b"], "merged", method="iso-c")  # the LoraModel itself will do
    for module, layer in lora_layers(model):
        mean = (layer.get_delta_weight("a") + layer.get_delta_weight("b")) / 2
        same = torch.dist(layer.get_delta_weight("merged"), mean) <= 1e-5 * mean.norm()
        assert bool(same) == (module == "text_projection")
        assert layer.lora_A["merged"].weight.dtype == torch.float32  # as PEFT makes adapters of bfloat16 layers


def test_a_classifier_that_was_not_trained_stays(tmp_path: Path) -> None:
    """PEFT saves one with every adapter of a classification model; trained, it is refused."""
    configs: dict[str, dict[str, Any]] = {name: {"target_modules": ["query"], "task_type": "SEQ_CLS"} for name in "ab"}
    model = adapted(bert, configs=configs)
    with pytest.raises(InputError, match=r"adapter 'a': module 'classifier' is trained as a whole \(modules_to_save\)"):
        add_merged_adapter(model, ["a", "b"], "merged")
    classifier = model.base_model.model.classifier
    for name in "ab":
        classifier.modules_to_save[name].load_state_dict(classifier.original_module.state_dict())
    add_merged_adapter(model, ["a", "b"], "merged", method="iso-c")
    model.set_adapter("merged")
    model.save_pretrained(str(tmp_path), selected_adapters=["merged"])
    base = bert()
    base.load_state_dict(
        {
            name.removeprefix(WRAPPER).replace("base_layer.", "").replace("original_module.", ""): tensor
            for name, tensor in model.state_dict().items()
            if ".lora_" not in name and "modules_to_save" not in name
        }
    )
    again: Any = PeftModel.from_pretrained(base, str(tmp_path / "merged")).eval()
    assert torch.equal(logits(again), logits(model))


def snapshot(model: Any) -> tuple[Any, ...]:
    """All that an attempt could leave behind."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        list(model.peft_config),
        (model.active_adapter, model.base_model.active_adapter, list(model.base_model.targeted_module_names)),
        {name: (dict(layer.r), dict(layer.scaling), list(layer.lora_dropout)) for name, layer in lora_layers(model)},
        torch.random.get_rng_state().tolist(),
    )


def assert_unchanged(model: Any, before: tuple[Any, ...]) -> None:
    after = snapshot(model)
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert after[1:] == before[1:]


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-adapter": ({"adapters": ["a", "bb"]}, "adapter 'bb' is unknown"),
    "none": ({"adapters": []}, "adapters is"),
    "text": ({"adapters": "a"}, "adapters is 'a'"),
    "taken": ({"adapter_name": "c"}, "there is an adapter 'c' already"),
    "dotted": ({"adapter_name": "x.y"}, "without dots"),
    "a-module": ({"adapter_name": "self_attn"}, "is called 'self_attn'"),
    "weights": ({"weights": [1.0]}, "weights has 1 numbers for 2 adapters"),
    "nan-weight": ({"weights": [1.0, float("nan")]}, r"weights\[1\] is nan"),
    "scaling": ({"scaling": float("inf")}, "scaling is inf"),
    "rank": ({"rank": 0}, "rank is 0"),
    "on-missing": ({"on_missing": "skip"}, "on_missing is 'skip'"),
    "method": ({"method": "isoc"}, "method 'isoc' is unknown"),
    "option": ({"fraction": 0.5}, "option 'fraction'"),
    "object-and-option": ({"method": imf.IsoC(), "precision": "fast"}, "options belong to a method given by name"),
    "too-many-tasks": ({"common_fraction": 0.0, "adapters": ["a", "b"] * 10}, "with 20 tasks"),
}


def test_arguments_are_refused_before_the_model_is_touched() -> None:
    model = adapted()
    before = snapshot(model)
    for changes, message in BAD_ARGUMENTS.values():
        arguments = {"adapters": ["a", "b"], "adapter_name": "merged", **changes}
        with pytest.raises(ConfigError, match=message):
            add_merged_adapter(model, **arguments)
    with pytest.raises(ConfigError, match="expected a PeftModel with LoRA adapters"):
        add_merged_adapter(llama(), ["a"], "merged")
    others: list[PeftConfig] = [IA3Config(target_modules=["q_proj"], feedforward_modules=[])]
    others.append(AdaLoraConfig(target_modules=["q_proj"], total_step=10))  # whose model is a LoraModel to Python
    for config, message in zip(others, ["IA3Model", "AdaLoraModel"], strict=True):
        with pytest.raises(ConfigError, match=f"of {message}; expected a PeftModel with LoRA"):
            add_merged_adapter(get_peft_model(llama(), config), ["default"], "merged")
    model.merge_adapter(["a"])
    with pytest.raises(ConfigError, match=r"adapter 'a' is merged into its weight; call model\.unmerge_adapter"):
        add_merged_adapter(model, ["a", "b"], "merged")
    model.unmerge_adapter()
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["b"].weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"'model\.layers\.1\.mlp\.up_proj': NaN or Inf .* of adapter 'b'"):
        add_merged_adapter(model, ["a", "b"], "merged")
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["b"].weight[0, 0] = 0
    with pytest.raises(InputError, match=r"module '.*': weights up to .* of the merged delta overflow float32"):
        add_merged_adapter(model, ["a", "b"], "merged", method="mean", scaling=1e60)
    assert list(model.peft_config) == before[2]


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


UNMERGEABLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "dora": (llama, {"use_dora": True}, "adapter 'b': use_dora is True"),
    "lora-bias": (lambda: llama(attention_bias=True), {"lora_bias": True}, "adapter 'b': lora_bias is True"),
    "tokens": (llama, {"trainable_token_indices": [1]}, "adapter 'b': trainable_token_indices"),
    "bias": (lambda: llama(attention_bias=True), {"bias": "lora_only"}, "adapter 'b': bias is 'lora_only'"),
    "olora": (llama, {"init_lora_weights": "olora"}, "adapter 'b': init_lora_weights is 'olora'"),
    "head": (llama, {"modules_to_save": ["lm_head"]}, "adapter 'b': module 'lm_head' is trained as a whole"),
    "attention": (Attention, {"target_modules": ["attention"]}, "LoRA of a MultiheadAttention is not merged"),
    "convolution": (Convolution, {"target_modules": ["conv"]}, "factors .* of a convolution"),
    "parameter": (llama, {"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
}


@pytest.mark.parametrize(("make", "changes", "message"), UNMERGEABLE.values(), ids=UNMERGEABLE)
def test_what_is_no_plain_lora_is_refused(make: Any, changes: dict[str, Any], message: str) -> None:
    plain = {"target_modules": changes.get("target_modules") or ["q_proj"]}
    model = adapted(
        make, configs={"a": plain, "b": {**plain, **changes}} if "target_parameters" not in changes else {"b": changes}
    )
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        add_merged_adapter(model, list(model.peft_config), "merged")
    assert_unchanged(model, before)


def test_factors_that_are_no_floats_or_not_there() -> None:
    model = adapted(configs={"a": {"target_modules": ["q_proj"]}})
    factor = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["a"]
    factor.weight = nn.Parameter(factor.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"q_proj': torch\.int8 factors are not merged"):
        add_merged_adapter(model, ["a"], "merged")
    factor.weight = nn.Parameter(torch.empty(8, 32, device="meta"))
    with pytest.raises(InputError, match=r"q_proj': its factors are not in memory"):
        add_merged_adapter(model, ["a"], "merged")


@pytest.mark.parametrize("fails", ["inject", "copy", "targets"])
def test_nothing_is_left_of_an_attempt_that_fails(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    model = adapted(
        bert, configs={name: {"target_modules": ["query"], "modules_to_save": ["classifier"]} for name in "ab"}
    )
    classifier = model.base_model.model.classifier
    for name in "ab":
        classifier.modules_to_save[name].load_state_dict(classifier.original_module.state_dict())
    before = snapshot(model)
    calls = 0
    original = {"inject": LoraLayer.update_layer, "copy": peft_module._write}

    def fail_at_the_second(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original[fails](*arguments, **keywords)

    with monkeypatch.context() as patch:
        if fails == "inject":
            patch.setattr(LoraLayer, "update_layer", fail_at_the_second)
        elif fails == "copy":
            patch.setattr(peft_module, "_write", fail_at_the_second)
        else:
            patch.setattr(peft_module, "_targets", lambda *_: ["query", "key"])
        with pytest.raises(InputError if fails == "targets" else KeyboardInterrupt):
            add_merged_adapter(model, ["a", "b"], "merged", method="iso-c")
    assert_unchanged(model, before)
    add_merged_adapter(model, ["a", "b"], "merged", method="iso-c")
    assert snapshot(model)[1:4] != before[1:4]
