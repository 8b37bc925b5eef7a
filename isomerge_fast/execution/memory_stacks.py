"""Merge matrices of one shape in memory as stacks on a GPU, and hand each out in its turn."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, visible
from ..methods import Method, TensorSpec
from ..planning.budget import usable_memory_bytes
from ..planning.routes import LEAST_ALIKE, out_of_memory_at_once, places_of

LOG = logging.getLogger("isomerge_fast")

# From the first tensor of a stack to its last no more results than these, which wait for their turn.
WAITING_BYTES = 1 << 30
# Of the memory of a GPU that merges may take: in memory all state dicts may lie there, beside the copies of a stack.
STACK_SHARE = 1 / 4


@dataclass(frozen=True)
class Stackable:
    """Describe a tensor that may be merged in a stack, before it is read."""

    spec: TensorSpec
    method: Method
    device: torch.device
    dtypes: tuple[torch.dtype, ...]  # of the base and every expert
    begin: int = 0  # where its result lies among all results, in bytes
    end: int = 0

    @property
    def places(self) -> int:
        """Return how many places stacks of such tensors have; 1 where there is no room for one."""
        if self.device.type != "cuda" or self.method.any_shape or not self.spec.elements:
            return 1
        given = self.spec, len(self.dtypes) - 1, self.device
        places = places_of(self.method, *given)
        if places == 1:
            return 1
        copies = places * self.spec.elements * sum(dtype.itemsize for dtype in self.dtypes)
        room = STACK_SHARE * usable_memory_bytes(self.device)
        return places if copies + self.method.stack_bytes(*given) <= room else 1

    @property
    def kind(self) -> Hashable:
        return self.spec.shape, self.spec.dtype, self.method, self.device, self.dtypes


def stacks_of(tensors: Iterable[Stackable]) -> Iterator[tuple[list[Stackable], int]]:
    """Yield the tensors that are merged together, and the places of their stack."""
    chosen = [(tensor, places) for tensor in tensors if (places := tensor.places) > 1]
    alike = Counter(tensor.kind for tensor, _ in chosen)
    waiting: dict[Hashable, tuple[list[Stackable], int]] = {}
    for tensor, places in chosen:
        if alike[tensor.kind] < LEAST_ALIKE:
            continue
        members, _ = waiting.get(tensor.kind, ([], places))
        if members and (len(members) == places or tensor.end - members[0].begin > WAITING_BYTES):
            yield members, places
            members = []
        waiting[tensor.kind] = [*members, tensor], places
    yield from waiting.values()


class Together:
    """Merge tensors together when the first of them is asked for, and each by itself where that fails.

    Args:
        device: that merges them.
        names: of the tensors.
        merge: returns the merged tensors, all of them.
        alone: returns one of them, by its place; an error is that of the tensor which is asked for.
    """

    def __init__(
        self,
        device: torch.device,
        names: Sequence[str],
        merge: Callable[[], Sequence[Tensor]],
        alone: Callable[[int], Tensor],
    ) -> None:
        self._device, self._names, self._merge, self._alone = device, names, merge, alone
        self._made: dict[int, Tensor] | None = None

    def make(self, index: int) -> Tensor:
        """Return a tensor; each is asked for once."""
        if self._made is None:
            self._made = dict(enumerate(self._merge_all()))
        return self._made.pop(index) if index in self._made else self._alone(index)

    def _merge_all(self) -> Sequence[Tensor]:
        try:
            return self._merge()
        except InputError:
            return ()
        except torch.OutOfMemoryError:
            remark = out_of_memory_at_once(self._device, len(self._names))
        torch.cuda.empty_cache()
        LOG.warning("tensor %s: %s", visible(repr(self._names[0])), remark)
        return ()
