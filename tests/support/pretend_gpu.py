"""GPUs that are not there: described, and pretended.

Under ``pretend_gpu`` a tensor on ``cuda:0`` is one on the CPU that says so: everything that follows a tensor's device
takes the way of a GPU, with the arithmetic of a CPU. What a GPU would refuse is refused (operands on two devices), and
what costs time on one is counted: launches, and reads of the device, at each of which the host waits for it.
"""

# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false
# (A tensor's traits are no properties where torch declares them.)
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from isomerge_fast import ops
from isomerge_fast.linalg import cusolver
from isomerge_kernels import devices, reference
from isomerge_kernels.devices import DeviceTraits

A100 = DeviceTraits(True, (8, 0), 80 << 30, "pretended A100")
H100 = DeviceTraits(True, (9, 0), 80 << 30, "pretended H100")
# Of NVIDIA's, without tensor cores for float64.
RTX5090 = DeviceTraits(True, (12, 0), 32 << 30, "pretended RTX 5090")

CUDA = torch.device("cuda:0")
# Which only make room, or look at what is there in another way.
NO_LAUNCH = ("aten.empty", "aten.new_empty", "aten.detach", "aten._local_scalar_dense", "aten._unsafe_view")
# At which torch itself waits for the device, to read a flag of its own or a size.
READING = {
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.nonzero",
    "aten.masked_select",
    "aten._linalg_eigh",
    "aten._linalg_svd",
    "aten._linalg_check_errors",
    "aten.linalg_cholesky",
    "aten.linalg_inv",
    "aten._unique2",
}
# Whose result is the host's.
READ_BY_HOST = ("aten._local_scalar_dense", "aten.equal")
# Where a GPU takes operands from both sides.
BOTH_SIDES = {"aten._to_copy", "aten.copy_", "aten.index", "aten.index_put_", "aten._index_put_impl_"}


def _product_of_bf16(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A B of bf16 in float32, made by numpy: torch's memory, which tests count, holds the result alone."""
    assert dtype == torch.float32
    left, right = (
        (x.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        for x in (a, b)
    )
    return torch.from_numpy(left @ right).clone()


# bf16 into float32, which torch does not multiply on a CPU.
MULTIPLIED_AS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.dtype: _product_of_bf16,
    torch.ops.aten.bmm.dtype: _product_of_bf16,
}


class PretendTensor(Tensor):
    """A CPU tensor that says it is on ``CUDA``."""

    held: Tensor
    gpu: PretendGpu

    @staticmethod
    def __new__(cls, held: Tensor, gpu: PretendGpu) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("meta"),  # what torch's own code asks; of CUDA it would want a driver
        )
        made.held, made.gpu = held, gpu
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    @property
    def is_cpu(self) -> bool:
        return False

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": CUDA} | options)

    def record_stream(self, stream: object) -> None:
        pass

    def __repr__(self, **_: Any) -> str:
        return f"on {CUDA}: {self.held}"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        gpu = next(leaf.gpu for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PretendTensor))
        return gpu.run(function, args, kwargs or {})


@dataclass
class PretendGpu:
    """What a merge did on it.

    Attributes:
        launches: by operation, views and empty tensors left out.
        reads: by operation.
        uploads: copies from the host.
        fractions: that the process was allowed of its memory, one after the other.
        place: where what is on the GPU is held.
    """

    traits: DeviceTraits = H100
    place: str = "cpu"
    launches: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    uploads: int = 0
    fractions: list[float] = field(default_factory=lambda: [1.0])
    _lock: Lock = field(default_factory=Lock)

    def upload(self, tensor: Tensor) -> Tensor:
        with self._lock:
            self.uploads += 1
        return PretendTensor(tensor.detach().clone(), self)

    def reset(self) -> None:
        self.launches.clear()
        self.reads.clear()
        self.uploads = 0

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation of torch whose operands or whose result are on the GPU, or neither."""
        name = str(function).rsplit(".", 1)[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        device = kwargs.get("device")
        asked = None if device is None else torch.device(device).type
        if (
            name == "aten._to_copy"
            and ours
            and asked in ("cuda", "meta")
            and kwargs.get("dtype") in (None, ours[0].dtype)
        ):
            return ours[0]  # there already, which only torch does not know
        asked = "cuda" if asked == "meta" else asked  # a number that becomes an operand
        if not ours and asked != "cuda":
            return function(*args, **kwargs)
        self._check(name, tensors, asked)
        by_held = {id(tensor.held): tensor for tensor in ours}
        plain = dict(kwargs)
        if device is not None:
            plain["device"] = self.place
        if name == "aten._linalg_svd":
            plain.pop("driver", None)  # of cuSOLVER's
        args, plain = tree_map(lambda leaf: leaf.held if isinstance(leaf, PretendTensor) else leaf, (args, plain))
        target = args[0] if name == "aten.copy_" else None
        to_host = asked == "cpu" or (target is not None and id(target) not in by_held)
        call: Any = MULTIPLIED_AS.get(function, function)
        result = self.compute(name, call, args, plain, is_read=to_host or name in READ_BY_HOST)
        if self._count(name, function, ours, tensors, to_host):
            self.note(name, args, result)
        if to_host:
            return result
        return self._back(result, by_held)

    def compute(
        self, name: str, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], *, is_read: bool
    ) -> Any:
        """Return what an operation makes of what is held; ``is_read`` where the host gets it."""
        return call(*args, **options)

    def note(self, name: str, operands: Sequence[Any], result: Any) -> None:
        """See a launch, with its operands; who counts more than launches keeps them."""

    def _check(self, name: str, tensors: list[Tensor], asked: str | None) -> None:
        if name in BOTH_SIDES or asked is not None:
            return
        for tensor in tensors:
            if not isinstance(tensor, PretendTensor) and tensor.ndim:
                raise RuntimeError(f"{name}: expected all tensors to be on the same device, one is on {tensor.device}")

    def _count(self, name: str, function: Any, ours: list[Any], tensors: list[Tensor], to_host: bool) -> bool:
        """Count an operation; return whether it is a launch."""
        schema = function._schema
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
        with self._lock:
            if to_host or name in READING or (name.startswith("aten.index") and _has_mask(tensors)):
                self.reads[name] += 1
            copied = name in ("aten._to_copy", "aten.copy_")
            if copied and not to_host and (not ours or len(ours) < len(tensors)):
                self.uploads += 1
            elif not is_view and not name.startswith(NO_LAUNCH):
                self.launches[name] += 1
                return True
        return False

    def on_host(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """With plain tensors, what is written to and what is returned on the GPU again; not counted."""
        operands = (args, kwargs)
        by_held = {id(leaf.held): leaf for leaf in tree_leaves(operands) if isinstance(leaf, PretendTensor)}
        args, kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, PretendTensor) else leaf, operands)
        with _disable_current_modes():
            result = function(*args, **kwargs)
        return self._back(result, by_held)

    def _back(self, result: Any, by_held: dict[int, PretendTensor]) -> Any:
        """What is written to is what was given; all else is new."""

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return by_held[id(leaf)] if id(leaf) in by_held else PretendTensor(leaf, self)

        return tree_map(wrap, result)

    def launched(self, name: str, operands: Sequence[Tensor | None], count: int = 1) -> None:
        """Count launches of what torch does not see, with operands on the GPU."""
        with self._lock:
            self.launches[name] += count
        self.note(name, operands, None)

    @property
    def launch_count(self) -> int:
        return sum(self.launches.values())

    @property
    def read_count(self) -> int:
        return sum(self.reads.values())


def _has_mask(tensors: Sequence[Tensor]) -> bool:
    """Whether torch has to count what a mask chooses before it can go on."""
    return any(tensor.dtype == torch.bool for tensor in tensors[1:])


class _Mode(TorchDispatchMode):
    """Catches what has no operand on the GPU, in one thread."""

    def __init__(self, gpu: PretendGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._gpu.run(function, args, kwargs or {})


class PretendKernels:
    """The launchers, each as many launches as it takes; computed by ``reference``."""

    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu = gpu

    def task_sum(self, *arguments: Any) -> ops.TaskSum:
        found = self._gpu.on_host(reference.task_sum, *arguments[:-1])  # the largest entries are always found
        self._gpu.launched(
            "task_sum", [*arguments[0], arguments[1], found.total], 2
        )  # the sum, and what blocks saw added up
        return found

    def apply_delta(self, *arguments: Any) -> list[Tensor]:
        self._gpu.launched("apply_delta", arguments[:2])
        return self._gpu.on_host(reference.apply_delta, *arguments)

    def symmetric_matmul(
        self,
        a: Tensor,
        b: Tensor | None = None,
        *,
        c: Tensor | None = None,
        out: Tensor | None = None,
        precision: str = "ieee",
        **factors: float,
    ) -> Tensor:
        self._gpu.launched("symmetric_matmul", [a, b, c])
        return self._gpu.on_host(reference.symmetric_matmul, a, b, c=c, out=out, **factors)


class _Stream:
    """Also an event: everything is done when the next thing begins."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: self


@contextmanager
def pretend_gpu(traits: DeviceTraits = H100, gpu: PretendGpu | None = None) -> Iterator[PretendGpu]:
    """Pretends that there is a GPU, in this thread and in those of pools that are used meanwhile; ``gpu``, or a new one
    of these ``traits``.
    """
    gpu = gpu or PretendGpu(traits)
    traits = gpu.traits
    kernels = PretendKernels(gpu)
    submit = ThreadPoolExecutor.submit

    def submit_under_mode(
        self: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        def call() -> Any:
            with _Mode(gpu):
                return function(*args, **kwargs)

        return submit(self, call)

    def made_of(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``torch.tensor`` and its like, which make numbers into tensors where no mode sees it."""

        def call(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
            there = device is not None and torch.device(device).type == "cuda"
            if isinstance(data, PretendTensor):
                return data.to(device=device, **options)
            return gpu.upload(make(data, *args, **options)) if there else make(data, *args, device=device, **options)

        return call

    def batched_syev(x: Tensor) -> tuple[Tensor, Tensor]:
        gpu.launched("XsyevBatched", [x])
        return gpu.on_host(lambda x: tuple(torch.linalg.eigh(x)), x)

    def set_fraction(fraction: float, device: Any = None) -> None:
        if torch.device(device).index is None:  # as torch has it
            raise ValueError("Expected a torch.device with a specified index or an integer, but got: cuda")
        gpu.fractions.append(fraction)

    properties = SimpleNamespace(
        name=traits.name, total_memory=traits.memory_bytes, major=(traits.capability or (0, 0))[0], minor=0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", submit_under_mode)
        patch.setattr(ops, "gpu_kernels", lambda: kernels)
        # Which would take addresses of the CPU's memory for a GPU's.
        patch.setattr(cusolver, "xsyev", lambda: gpu)
        patch.setattr(cusolver, "batched_syev", batched_syev)
        patch.setattr(cusolver, "_version", lambda library: "pretended")
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
        for make in (torch.tensor, torch.as_tensor):
            patch.setattr(torch, make.__name__, made_of(make))
        for device in (CUDA, torch.device("cuda")):
            patch.setitem(devices.KNOWN, device, traits)
        for attribute, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "current_stream": lambda device=None: _Stream(),
            "Stream": _Stream,
            "stream": lambda stream: nullcontext(),
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda device=None: None,
            "max_memory_allocated": lambda device=None: 0,
            "get_device_name": lambda device=None: traits.name,
            "get_device_capability": lambda device=None: traits.capability,
            "get_device_properties": lambda device=None: properties,
            "mem_get_info": lambda device=None: (traits.memory_bytes, traits.memory_bytes),
            "set_per_process_memory_fraction": set_fraction,
            "get_per_process_memory_fraction": lambda device=None: gpu.fractions[-1],
        }.items():
            patch.setattr(torch.cuda, attribute, value)
        with _Mode(gpu):
            yield gpu
