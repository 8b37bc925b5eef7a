"""Copy between the host and a GPU beside the arithmetic: each direction in a thread and a stream of its own.

On a CPU there is nothing to copy. The thread that copies waits for its stream, so that buffers are free again when it
goes on, and what it returns is there for every other stream.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from ..checkpoint.io.direct_io import PAGE
from ..checkpoint.io.read_ahead import ReadAhead


class Uploads:
    """Copy the bundles of a ``ReadAhead`` to the device that computes, the next one while one is used.

    Two bundles at most are on the device: a third is not begun before the first is given up. There they are put
    together of the parts that they are read in. A context manager.
    """

    def __init__(self, ahead: ReadAhead, device: torch.device, *, copied: bool | None = None) -> None:
        self._ahead, self._device = ahead, device
        self._copied = device.type == "cuda" if copied is None else copied
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "isomerge-upload")
        self._next: Future[list[Tensor] | None] | None = None

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._next = None

    def take(self) -> list[Tensor]:
        """Return the next bundle, valid until the next call.

        After a torch.OutOfMemoryError nothing was taken, and it can be asked for again.
        """
        if not self._copied:
            return self._ahead.take()
        tensors = None if self._next is None else self._next.result()
        self._next = None
        if tensors is None:  # none was begun, or there was no room for it beside what is gone now
            tensors = self._thread.submit(self._upload).result()
        for tensor in tensors:
            if self._stream is not None:  # made in another stream: not to be reused before this one is done with it
                tensor.record_stream(torch.cuda.current_stream(self._device))
        if self._ahead.upcoming is not None:
            self._next = self._thread.submit(self._upload_if_room)
        return tensors

    def skip(self) -> None:
        """Read past the next bundle, for which there need be no room on the device."""
        begun, self._next = self._next, None
        if begun is not None and begun.result() is not None:
            return
        bundle = self._ahead.upcoming
        assert bundle is not None
        for _ in bundle.parts(self._ahead.part_bytes):
            self._ahead.take()

    def _upload_if_room(self) -> list[Tensor] | None:
        with suppress(torch.OutOfMemoryError):
            return self._upload()

    def _upload(self) -> list[Tensor]:
        bundle = self._ahead.upcoming
        assert bundle is not None
        with torch.cuda.stream(self._stream):
            # Before anything is taken: where there is no room, it is still to come.
            tensors = [
                torch.empty(piece.shape, dtype=piece.stored.dtype, device=self._device) for piece in bundle.pieces
            ]
            missing = deque(tensor.view(-1) for tensor in tensors if tensor.numel())
            for _ in bundle.parts(self._ahead.part_bytes):
                for data in filter(Tensor.numel, self._ahead.take()):
                    place = missing.popleft()
                    place[: data.numel()].copy_(data.view(-1), non_blocking=True)
                    if data.numel() < place.numel():
                        missing.appendleft(place[data.numel() :])
                if self._stream is not None:
                    self._stream.synchronize()
        return tensors


class Download:
    """Copy a tensor to the host when it is called, in the thread that wants it, which alone waits for the device.

    The copy begins at the same offset within a page as ``position`` in the file, so that a direct write takes it as it
    is.
    """

    def __init__(self, tensor: Tensor, position: int = 0) -> None:
        self._tensor, self._position = tensor, position
        self._made = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def __call__(self) -> Tensor:
        if self._made is None:
            return self._tensor
        stream = torch.cuda.Stream(self._tensor.device)
        with torch.cuda.stream(stream):
            stream.wait_event(self._made)
            memory = torch.empty(self._tensor.nbytes + PAGE, dtype=torch.uint8, device="cpu", pin_memory=True)
            start = (self._position - memory.data_ptr()) % PAGE
            place = memory[start : start + self._tensor.nbytes]
            on_host = place.view(self._tensor.dtype).view(self._tensor.shape)
            on_host.copy_(self._tensor, non_blocking=True)
        stream.synchronize()
        return on_host
