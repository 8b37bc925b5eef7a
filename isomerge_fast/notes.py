"""Says what of a planned merge might surprise, each with what changes it."""

from __future__ import annotations

import os
from collections.abc import Iterable

from .checkpoint.adapter import Adapter, base_name
from .checkpoint.buffers import Buffers
from .checkpoint.companions import code_files
from .checkpoint.layout import (
    FLOAT_DTYPES,
    TOKEN_TABLES,
)
from .inputs import last_part
from .methods import make_method
from .plan import Plan


def notes_of(plan: Plan) -> Iterable[str]:
    """Yield what might surprise, each with what changes it."""
    config, base, experts, tensors = plan.config, plan.base, plan.experts, plan.tensors
    code = code_files(plan.companions)
    if code:
        yield (
            f"code is copied from {base.path}, which loading the output with trust_remote_code would run: "
            f"{', '.join(code)}"
        )
    tables = [
        tensor.name
        for tensor in tensors
        if tensor.method and tensor.action.startswith("iso") and TOKEN_TABLES.search(tensor.name)
    ]
    if tables:
        lines = ", ".join(f'{{match: "{name}", method: mean}}' for name in tables)
        yield (
            f"token tables are matrices and are merged by {config.method}, as published; "
            f"to average them: overrides: [{lines}]"
        )
    stacks = [tensor.name for tensor in tensors if tensor.method and len(tensor.base.shape) == 3]
    if stacks and make_method(config.method, config.options).default_exclude:
        yield f"{len(stacks)} 3-D tensor(s), such as {stacks[0]!r}, are averaged: the methods are defined on matrices"
    extras = [tensor for tensor in tensors if tensor.name not in base.tensors]
    if extras:
        yield f"{len(extras)} tensor(s) that only an expert has are copied, such as {extras[0].name!r}"
    if any(
        tensor.method is None and tensor.base.dtype not in FLOAT_DTYPES
        for tensor in tensors
        if tensor.name in base.tensors
    ):
        yield "integer and boolean tensors come from the base"
    yield from _of_buffers(plan.buffers)
    paths = [os.path.realpath(expert.path) for expert in experts]
    for expert in experts:
        trained_on = base_name(expert) if isinstance(expert, Adapter) else None
        if trained_on and last_part(trained_on) != last_part(str(base.path)):
            yield f"{expert.path} was trained on {trained_on!r}: see to it that {base.path} is the same"
        if isinstance(expert, Adapter) and expert.copies:
            yield f"{expert.path}: {', '.join(expert.copies)} of its base lies in it too; the base's own is taken"
    for index, path in enumerate(paths):
        if path in paths[:index]:
            yield f"expert {config.experts[index]} is given more than once"
        if path == os.path.realpath(base.path):
            yield f"expert {config.experts[index]} is the base itself: its delta is zero"
    for expert in experts:
        mine, other = (base.config or {}).get("model_type"), (expert.config or {}).get("model_type")
        if mine and other and mine != other:
            yield f"{expert.path} is a {other!r} model, the base a {mine!r}; their tensors fit all the same"
    if config.dtype in ("float16", "bfloat16") and any(tensor.base.dtype in ("F32", "F64") for tensor in tensors):
        yield f"float tensors are rounded to {config.dtype}; the base is wider"


def _of_buffers(buffers: Buffers) -> Iterable[str]:
    """Yield what becomes of buffers that base and experts do not have alike."""
    computed = "buffer(s) that the model computes for itself are"
    for found, what in (
        (buffers.from_base, f"{computed} the base's, since experts lack them or have others"),
        (buffers.left_out, f"{computed} left out, since the base lacks them"),
        (buffers.others, "integer or boolean tensor(s) are the base's, though experts have others"),
    ):
        if found:
            first = found[0]
            example = f"{first.name!r} {first.dtype} {list(first.shape)} in {first.file}"
            yield f"{len(found)} {what}, such as {example}"
