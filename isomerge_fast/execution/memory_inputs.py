"""Read what callers give to a merge in memory: check deltas, state dicts and weights, and return them as tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..checkpoint.checks.buffers import is_computed
from ..checkpoint.state_dict import StoredStateDict
from ..errors import ConfigError, InputError, shown
from ..parsing.values import is_list, list_of, number, refuse

Array = Tensor | np.ndarray


def read_deltas(deltas: Array | Sequence[Array]) -> list[Tensor]:
    """Return T matrices [M, N] or batches [B, M, N]; refuse anything else.

    Kernels of convolutions can be read as matrices in several ways: the caller chooses.
    """
    expected = "a list of T tensors [M, N] or [B, M, N], or one stack of them [T, M, N] or [T, B, M, N]"
    if isinstance(deltas, Tensor | np.ndarray):
        stack = as_tensor(deltas, "deltas")
        if stack.ndim not in (3, 4):
            raise InputError(f"deltas has shape {list(stack.shape)}; expected {expected}")
        tensors = list(stack.unbind(0))
    elif isinstance(deltas, str | Mapping) or not is_list(deltas):
        raise InputError(f"deltas is {_called(deltas)}; expected {expected}")
    else:
        tensors = [as_tensor(delta, f"deltas[{task}]") for task, delta in enumerate(deltas)]
    for task, tensor in enumerate(tensors):
        what = f"deltas[{task}]"
        if tensor.dtype not in ops.FLOAT_DTYPES:
            raise InputError(f"{what} is {tensor.dtype}, which is not merged")
        if tensor.ndim not in (2, 3):
            shape = list(tensor.shape)
            way_out = f" (of a convolution's kernels: delta.flatten(1), and result.reshape({shape}))"
            raise InputError(
                f"{what} has shape {shape}; expected a matrix [M, N] or a batch of them [B, M, N]"
                + (way_out if tensor.ndim > 3 else "")
            )
    return tensors


def read_experts(experts: Iterable[Mapping[str, Array]]) -> list[Mapping[str, Array]]:
    """Return the state dicts as a list, one an expert."""
    if isinstance(experts, Mapping) and experts and all(isinstance(each, Mapping) for each in experts.values()):
        raise ConfigError("experts maps names to state dicts; expected a list of them: list(experts.values())")
    if isinstance(experts, Mapping):
        raise ConfigError("experts is one state dict; expected a list of them: [expert]")
    if not is_list(experts):
        raise ConfigError(f"experts is {_called(experts)}; expected a list of state dicts")
    found = list(experts)
    if not found:
        raise ConfigError("experts is empty; at least one is needed")
    for index, expert in enumerate(found):
        if not isinstance(expert, StoredStateDict):
            _check_state(expert, f"experts[{index}]")
    return found


def shapes_of(state: Mapping[str, Array], what: str) -> dict[str, Tensor]:
    """Return the tensors themselves, or on the meta device where they would have to be read."""
    if isinstance(state, StoredStateDict):
        return state.meta()
    _check_state(state, what)
    return {name: as_tensor(value, f"{what}: tensor {name!r}") for name, value in state.items()}


def _check_state(state: object, what: str) -> None:
    """Raise an error where something else is given for a state dict, or stands in one."""
    if not isinstance(state, Mapping):
        if isinstance(state, str | os.PathLike):
            way = "open_state_dict(path) opens a checkpoint, and merge(config) merges files"
        elif callable(getattr(state, "state_dict", None)):
            way = f"give its state dict: {what}.state_dict()"
        else:
            way = "expected a mapping of names to tensors"
        raise ConfigError(f"{what} is {_called(state)}; {way}")
    for name in state:
        if not isinstance(name, str):
            raise InputError(f"{what} has the key {shown(name)}; names of tensors are texts")
    # Of other mappings every value that is looked at may be read from a file.
    for name, value in state.items() if isinstance(state, dict) else ():
        _check_value(name, value, what)


def _check_value(name: str, value: object, what: str) -> None:
    """Raise InputError where a value is no tensor or numpy array: whole checkpoints and modules' states have some."""
    if isinstance(value, Mapping):
        raise InputError(
            f"{what}[{name!r}] is itself a mapping; where a checkpoint keeps its tensors under {name!r}, give "
            f"{what}[{name!r}]"
        )
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return
    if name.rpartition(".")[2] == "_extra_state":
        raise InputError(f"{what}: {name!r} is {_called(value)}, a module's extra state and no tensor: leave it out")
    raise InputError(
        f"{what}: tensor {name!r} is {_called(value)}; expected a tensor or a numpy array (leave out what is neither)"
    )


def _called(value: object) -> str:
    """Return what a value is, for a message."""
    if value is None or isinstance(value, str | int | float | os.PathLike):
        return shown(value)
    return f"a {type(value).__name__}"


def check_fit(
    base: Mapping[str, Tensor], is_stored: bool, experts: Sequence[Mapping[str, Array]]
) -> dict[str, list[torch.dtype]]:
    """Return the dtypes that every merged tensor has in the base and the experts, by name.

    Others are the base's: integers, and buffers that a model computes for itself where an expert lacks one or has
    another shape. An InputError lists all that keeps these state dicts from being merged.
    """
    dtypes = {name: [tensor.dtype] for name, tensor in base.items() if tensor.is_floating_point()}
    computed = {name for name in dtypes if is_computed(name, base[name].shape)}
    problems = [
        f"base: tensor {name!r} is {tensor.dtype}, which is not merged"
        for name, tensor in base.items()
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in ops.FLOAT_DTYPES)
    ]
    for index, expert in enumerate(experts):
        if prefix := _prefix_of(expert, base):
            problems.append(_prefix_problem(f"experts[{index}]", "expert", prefix, "in the base they do not"))
            continue
        if prefix := _prefix_of(base, expert):
            problems.append(_prefix_problem("base", "base", prefix, f"in experts[{index}] they do not"))
            continue
        stored = expert.meta() if isinstance(expert, StoredStateDict) else None
        for name in [*dtypes]:
            where, tensor = f"experts[{index}]: tensor {name!r}", base[name]
            if name not in expert:
                if name in computed:
                    del dtypes[name]
                else:
                    problems.append(f"{where} of the base is missing")
                continue
            value = as_tensor(expert[name], where) if stored is None else stored[name]
            if value.shape != tensor.shape and name in computed:
                del dtypes[name]
                continue
            dtypes[name].append(value.dtype)
            is_real, base_is_real = stored is not None or not value.is_meta, is_stored or not tensor.is_meta
            if value.shape != tensor.shape:
                problems.append(f"{where} has shape {list(value.shape)}, in the base {list(tensor.shape)}")
            elif value.is_floating_point() != tensor.is_floating_point():
                problems.append(f"{where} is {value.dtype}, in the base {tensor.dtype}")
            elif value.is_floating_point() and value.dtype not in ops.FLOAT_DTYPES:
                problems.append(f"{where} is {value.dtype}, which is not merged")
            elif is_real != base_is_real:
                there, here = ("holds numbers", "a meta tensor") if is_real else ("is a meta tensor", "numbers")
                problems.append(f"{where} {there}, in the base {here}: all on the meta device, or none")
        shapes = expert if stored is None else stored
        problems += [
            f"experts[{index}]: tensor {name!r} is not in the base"
            for name in expert
            if name not in base and not is_computed(name, shapes[name].shape)
        ]
    if problems:
        raise InputError("the state dicts do not fit each other:", problems)
    return dtypes


def _prefix_of(longer: Iterable[str], shorter: Iterable[str]) -> str:
    """Return the prefix by which all names differ, as a wrapped module's do (DataParallel, torch.compile); or none."""
    there, here = set(longer), set(shorter)
    if not here or len(there) != len(here):
        return ""
    length = (sum(map(len, there)) - sum(map(len, here))) // len(here)  # there is one that it can have
    prefix = min(there)[: max(length, 0)]
    return prefix if prefix.endswith(".") and there == {prefix + name for name in here} else ""


def _prefix_problem(what: str, state: str, prefix: str, elsewhere: str) -> str:
    return (
        f"{what}: all names begin with {prefix!r}, as a wrapped module saves them, and {elsewhere}: "
        f"{{name.removeprefix({prefix!r}): tensor for name, tensor in {state}.items()}}"
    )


def read_weights(weights: Sequence[float] | None, tasks: int) -> Sequence[float] | None:
    """Return w_t, or None where there are none; refuse another number of weights than tasks."""
    if weights is None:
        return None
    values = list_of(number, f"{tasks} numbers, one a task")(weights, "weights")
    if len(values) != tasks:
        refuse(values, "weights", f"{tasks} numbers, one a task")
    return values


def as_tensor(value: object, what: str) -> Tensor:
    """Return a tensor as it is, an array as a tensor in its memory; copy only strides and bytes that torch has not."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise InputError(f"{what} is {value.layout}; expected a dense tensor")
        if value.is_quantized:
            raise InputError(f"{what} is {value.dtype}, quantized; give tensor.dequantize()")
        return value
    if not isinstance(value, np.ndarray | np.generic):
        raise InputError(f"{what} is {_called(value)}; expected a tensor or a numpy array")
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(f"{what} is a masked array, whose mask would be lost; fill it first")
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise InputError(f"{what} is a numpy array of {array.dtype}; expected float16, float32, float64 or integers")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing is written to it
        try:
            return torch.from_numpy(array)
        except ValueError:  # negative strides, or steps that are no multiple of an element
            return torch.from_numpy(array.copy())
