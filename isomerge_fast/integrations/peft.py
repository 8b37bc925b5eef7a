"""Merge the LoRA adapters of a PEFT model into a new adapter of it, from their factors (docs/peft.md, "In memory")."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.lora.settings import check_settings
from ..errors import ConfigError, InputError, nearest
from ..execution.in_memory import merge_to_factors
from ..methods import Method, NotFiniteError, OutOfRangeError, TensorSpec, given_method, method_for
from ..methods.factors import Factors, product_bound
from ..ops import FLOAT_DTYPES, compute_dtype, count_nonfinite
from .peers import require

# The first release with adapters of bare parameters (ParamWrapper), which are to be told from others here.
PEFT = "0.17"
require("peft", PEFT, "peft", or_newer=True)

# isort: split
from peft import LoraConfig, PeftModel  # noqa: E402  # an extra, after the line that says it is one
from peft.tuners.adalora import AdaLoraModel  # noqa: E402  # likewise
from peft.tuners.lora import LoraLayer, LoraModel  # noqa: E402  # likewise
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper  # noqa: E402  # likewise
from peft.utils import ModulesToSaveWrapper  # noqa: E402  # likewise

ON_MISSING = ("error", "zero")


def add_merged_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    adapter_name: str,
    *,
    weights: Sequence[float] | None = None,
    method: str | Method = "iso-cts",
    scaling: float = 1.0,
    rank: int | None = None,
    on_missing: str = "error",
    **options: Any,
) -> dict[str, float]:
    """Add a new adapter with Δ = α · merge of the Δ_t = w_t · scale_t · B_t A_t in every module of a model in memory.

    PEFT's ``add_weighted_adapter`` does so by combinations of its own. Here the deltas are never formed: factors are
    merged as factors (``methods.factors``). The new adapter has scale 1, the modules of all merged adapters, and one
    rank in all of them, with zeros where a module takes less. The adapters that were active stay so; it is not.

    Args:
        model: a PeftModel with LoRA adapters, or its LoraModel.
        adapters: names of the adapters that are merged; adapter_name: of the new one.
        weights: w_t, by which the deltas are multiplied before they are merged; 1 when None.
        method: a name or a method object. Modules whose names it excludes are averaged, as in merges of files.
        scaling: α.
        rank: of the new adapter; as large as it takes when None, so that nothing is cut off.
        on_missing: ``zero`` merges a module that an adapter has not as a zero delta of it.
        options: hyper-parameters, when ``method`` is a name.

    Returns:
        {module: ‖Δ − Δ_rank‖_F / ‖Δ‖_F}, what the rank cut off, before the factors are rounded to the adapter's dtype.

    Raises:
        ConfigError: names, numbers or options that cannot be honoured.
        InputError: adapters that are no plain LoRA, do not fit each other, or hold NaN or Inf.
        In either case, and where PEFT itself fails, the model is as it was.

    Reference: arXiv 2502.04959 (Iso-C, Iso-CTS).
    """
    tuner = _tuner(model)
    chosen = given_method(method, options)
    amounts = _check_arguments(tuner, adapters, adapter_name, weights, scaling, rank, on_missing)
    for name in dict.fromkeys(adapters):
        _check_adapter(tuner, name)
    layers = _layers(tuner, adapters)
    _check_targets(layers, adapters, on_missing)

    factors = {module: _factors(layer, adapters, amounts) for module, layer in layers.items()}
    size = max(1, *map(_full_rank, factors.values())) if rank is None else rank
    root = math.sqrt(abs(scaling))
    values: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, float] = {}
    with torch.no_grad():
        for module, given in factors.items():
            left, right, errors[module] = _merge(chosen, module, given, adapters, size)
            values[module] = (left * math.copysign(root, scaling), right * root)
        config = _config(tuner, adapters, size, layers)
        with _added(tuner, adapter_name, config, layers.keys()):
            for module, (left, right) in values.items():
                _write(module, layers[module], adapters, adapter_name, left, right)
    return errors


def _tuner(model: nn.Module) -> LoraModel:
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, LoraModel) or isinstance(tuner, AdaLoraModel):
        kind = type(model).__name__ if tuner is model else f"{type(model).__name__} of {type(tuner).__name__}"
        raise ConfigError(f"model is a {kind}; expected a PeftModel with LoRA adapters")
    return tuner


def _check_arguments(
    tuner: LoraModel,
    adapters: Sequence[str],
    adapter_name: str,
    weights: Sequence[float] | None,
    scaling: float,
    rank: int | None,
    on_missing: str,
) -> list[float]:
    """Return the weights; refuse what cannot be honoured."""
    if isinstance(adapters, str) or not adapters:
        raise ConfigError(f"adapters is {adapters!r}; expected a list of names, one at least")
    for name in adapters:
        if name not in tuner.peft_config:
            raise ConfigError(f"adapter {name!r} is unknown{nearest(str(name), tuner.peft_config)}")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ConfigError(f"adapter_name is {adapter_name!r}; expected a name without dots")
    if adapter_name in tuner.peft_config:
        raise ConfigError(
            f"adapter_name: there is an adapter {adapter_name!r} already; delete it, or take another name"
        )
    # PEFT tells adapters by parts of the names of parameters, and would take those of the model for this one's.
    if any(adapter_name in name.split(".") for name, _ in tuner.named_parameters()):
        raise ConfigError(
            f"adapter_name: a module or a parameter of the model is called {adapter_name!r}; take another"
        )
    if on_missing not in ON_MISSING:
        raise ConfigError(f"on_missing is {on_missing!r}{nearest(str(on_missing), ON_MISSING)}")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ConfigError(f"rank is {rank!r}; expected a whole number above 0, or None")
    amounts = [1.0] * len(adapters) if weights is None else list(weights)
    if len(amounts) != len(adapters):
        raise ConfigError(f"weights has {len(amounts)} numbers for {len(adapters)} adapters")
    for what, value in [("scaling", scaling), *((f"weights[{i}]", amount) for i, amount in enumerate(amounts))]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{what} is {value!r}; expected a finite number")
    return [float(amount) for amount in amounts]


def _check_adapter(tuner: LoraModel, name: str) -> None:
    """Refuse an adapter that changes the model by more than its factors."""
    where = f"adapter {name!r}"
    settings = tuner.peft_config[name].to_dict()
    check_settings(where, settings)
    if settings.get("bias", "none") != "none":
        raise InputError(
            f"{where}: bias is {settings['bias']!r}: the trained biases lie in the model, whichever adapter is active; "
            "save the adapter and merge its folder"
        )
    for module, wrapper in tuner.model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or name not in wrapper.modules_to_save:
            continue
        trained, own = wrapper.modules_to_save[name].state_dict(), wrapper.original_module.state_dict()
        if trained.keys() != own.keys() or not all(torch.equal(trained[key], own[key]) for key in own):
            raise InputError(
                f"{where}: module {module!r} is trained as a whole (modules_to_save), which factors cannot hold; "
                "save the adapters and merge their folders, or restore the module from the base"
            )


def _layers(tuner: LoraModel, adapters: Sequence[str]) -> dict[str, LoraLayer]:
    """Return the layers that one of the adapters changes, by their names in the model."""
    layers = {}
    for module, layer in _lora_layers(tuner).items():
        if layer.merged_adapters:
            raise ConfigError(
                f"module {module!r}: adapter {layer.merged_adapters[0]!r} is merged into its weight; "
                "call model.unmerge_adapter() first"
            )
        for name in adapters:
            if _has(layer, name):
                _check_layer(module, layer, name)
                layers[module] = layer
    if not layers:
        raise InputError(f"no module of the model has one of the adapters {', '.join(map(repr, adapters))}")
    return layers


def _has(layer: LoraLayer, adapter: str) -> bool:
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def _check_layer(module: str, layer: LoraLayer, adapter: str) -> None:
    where = f"adapter {adapter!r}: module {module!r}"
    if isinstance(layer, MultiheadAttention | ParamWrapper):
        raise InputError(f"{where}: LoRA of a {type(layer).__name__} is not merged; leave the module out")
    a, b = _weights(layer, adapter)
    for tensor in (a, b):
        if tensor.ndim != 2:
            raise InputError(
                f"{where}: factors {list(a.shape)} and {list(b.shape)} of a convolution are not merged; "
                "leave the module out"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise InputError(f"{where}: {tensor.dtype} factors are not merged; dequantize them first")
        if tensor.is_meta:
            raise InputError(f"{where}: its factors are not in memory; load the adapter first")


def _check_targets(layers: Mapping[str, LoraLayer], adapters: Sequence[str], on_missing: str) -> None:
    if on_missing == "zero":
        return
    problems = [
        f"adapter {name!r} has no factors for module {module!r}, which adapter {other!r} has"
        for module, layer in layers.items()
        for other in [next(name for name in adapters if _has(layer, name))]
        for name in dict.fromkeys(adapters)
        if not _has(layer, name)
    ]
    if problems:
        shown = problems[:10] + ([f"… and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise InputError("the adapters have different modules (on_missing='zero' merges zero deltas there):", shown)


def _weights(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return (A [r, in], B [out, r]), the model's own."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # type: ignore[return-value]  # nn.Linear's


def _is_transposed(layer: LoraLayer) -> bool:
    """Return whether the weight is stored [in, out], as in embeddings and GPT-2's Conv1D."""
    return bool(layer.lora_embedding_A) or bool(getattr(layer, "fan_in_fan_out", False))


def _factors(layer: LoraLayer, adapters: Sequence[str], amounts: Sequence[float]) -> list[Factors | None]:
    """Return the factors of every adapter's w_t Δ_t, as the weight is stored; None where an adapter has none."""
    factors: list[Factors | None] = []
    for name, amount in zip(adapters, amounts, strict=True):
        if not _has(layer, name):
            factors.append(None)
            continue
        a, b = _weights(layer, name)
        left, right = (a.mT, b.mT) if _is_transposed(layer) else (b, a)
        factors.append(Factors(left.detach(), right.detach(), amount * layer.scaling[name]))
    return factors


def _full_rank(factors: Sequence[Factors | None]) -> int:
    """Return the rank that loses nothing of a merge of these factors."""
    present = [factor for factor in factors if factor is not None]
    return min(len(present[0].left), present[0].right.shape[1], sum(factor.rank for factor in present))


def _merge(
    method: Method, module: str, factors: Sequence[Factors | None], adapters: Sequence[str], rank: int
) -> tuple[Tensor, Tensor, float]:
    """Return the merged Δ of one module as ``merge_to_factors`` does."""
    present = [factor for factor in factors if factor is not None]
    shape = (present[0].left.shape[0], present[0].right.shape[1])
    dtype = compute_dtype(*(tensor.dtype for factor in present for tensor in (factor.left, factor.right)))
    spec = TensorSpec(f"{module}.weight", shape, dtype)
    try:
        used = method_for(method, spec)
        used.check(spec, len(factors))
        return merge_to_factors(used, factors, spec, rank)
    except ConfigError as error:
        raise ConfigError(f"module {module!r} {list(shape)}: {error}") from error
    except NotFiniteError as error:
        names = ", ".join(repr(adapters[task]) for task in error.tasks)
        raise InputError(f"module {module!r}: NaN or Inf in the factors or the scale of adapter {names}") from error
    except OutOfRangeError as error:
        raise InputError(f"module {module!r}: adapters {', '.join(map(repr, adapters))}: {error}") from error


@contextmanager
def _added(tuner: LoraModel, adapter_name: str, config: LoraConfig, modules: Set[str]) -> Iterator[None]:
    """Add an adapter to the model; take it away again where that, or what is done with it inside, fails.

    Afterwards all that PEFT changes beside the adapter is as it was: what is active, targeted and trained.
    """
    active, targeted = tuner.active_adapter, list(tuner.targeted_module_names)
    trainable = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    wrapped = _lora_layers(tuner)
    try:
        tuner.peft_config[adapter_name] = config
        # New layers are drawn at random before they are overwritten; nobody else's random numbers are to change by it.
        with torch.random.fork_rng(devices=[]):
            tuner.inject_adapter(tuner.model, adapter_name)
        added = {module for module, layer in _lora_layers(tuner).items() if _has(layer, adapter_name)}
        if added != modules:
            difference = sorted(added ^ modules)
            raise InputError(f"PEFT did not put the adapter on the modules that it is for: {', '.join(difference[:5])}")
        yield
    except BaseException:
        if adapter_name in tuner.peft_config:
            tuner.delete_adapter(adapter_name)
        for module, layer in _lora_layers(tuner).items():
            if module not in wrapped:  # only the failed adapter had wrapped it
                parent, _, child = module.rpartition(".")
                setattr(tuner.model.get_submodule(parent), child, layer.get_base_layer())
        raise
    finally:
        tuner.active_adapter = active
        tuner.targeted_module_names = targeted
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _lora_layers(tuner: LoraModel) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in tuner.model.named_modules() if isinstance(layer, LoraLayer)}


def _write(
    module: str, layer: LoraLayer, adapters: Sequence[str], adapter_name: str, left: Tensor, right: Tensor
) -> None:
    """Write Δ = left right, as the weight is stored, into A and B, in the dtype of the adapters that are merged.

    PEFT keeps those in float32 over a base of 16 bits, but makes new ones in the base's dtype. What the dtype cannot
    hold is refused.
    """
    if not (bound := product_bound(left, right)) <= torch.finfo(torch.float32).max:
        raise InputError(f"module {module!r}: weights up to {bound:.3g} of the merged delta overflow float32")
    dtypes = [tensor.dtype for name in adapters if _has(layer, name) for tensor in _weights(layer, name)]
    dtype = functools.reduce(torch.promote_types, dtypes)
    a, b = _weights(layer, adapter_name)
    new_a, new_b = (left.mT, right.mT) if _is_transposed(layer) else (right, left)
    for parameter, value in ((a, new_a), (b, new_b)):
        made = value.to(device=parameter.device, dtype=dtype).contiguous()
        if count := int(count_nonfinite(made)):
            raise InputError(f"module {module!r}: {count} entries of the merged factors overflow {dtype}")
        parameter.data = made


def _config(tuner: LoraModel, adapters: Sequence[str], rank: int, layers: Mapping[str, LoraLayer]) -> LoraConfig:
    """Return the config of a plain LoRA adapter with scale 1 on these layers; its task is the first adapter's."""
    configs: list[Any] = [tuner.peft_config[name] for name in adapters]
    first = configs[0]
    kept = sorted({module for config in configs for module in config.modules_to_save or ()})
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(tuner, [config.target_modules for config in configs], set(layers)),
        fan_in_fan_out=first.fan_in_fan_out,
        # Equal to the base's (see _check_adapter); PEFT wants to find those of a classifier in every adapter.
        modules_to_save=kept or None,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        inference_mode=True,
    )


def _targets(tuner: LoraModel, given: Sequence[Any], modules: set[str]) -> list[str] | str:
    """Return ``target_modules`` that select these modules alone: the union of the adapters' own where that does."""
    inside = tuple(f"{name}." for name in _lora_layers(tuner))
    names = [name for name, _ in tuner.model.named_modules() if not name.startswith(inside)]
    choices = [sorted(modules)]
    if all(isinstance(targets, set | list) for targets in given):
        choices.insert(0, sorted({target for targets in given for target in targets}))
    for targets in choices:
        if modules == {name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)}:
            return targets
    # A full name may be the end of another one: `head` and `other.head`.
    return "|".join(re.escape(module) for module in sorted(modules))
