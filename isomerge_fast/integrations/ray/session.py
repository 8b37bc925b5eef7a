"""Open a session of a Ray cluster for a merge.

Ray decides where a task runs, and runs it again where its worker or its machine is lost. All files are on a file system
that every machine sees under the same paths. Tasks are given paths and slices of the plan, never tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..peers import RAY, require

if TYPE_CHECKING:
    from .executor import RayExecutor


@contextmanager
def ray_executor(address: str | None, *, device: str, threads: int | None) -> Iterator[RayExecutor]:
    """Connect to Ray, check that every machine of the cluster is fit to merge, and disconnect at the end.

    Args:
        address: ``host:port`` of a cluster; ``auto``: that of ``RAY_ADDRESS``, or that which this machine belongs to;
            ``local``: one is started on this machine; None: ``auto`` where there is one, else ``local``. A connection
            that this process has already is used, whatever the address.
        device: ``auto``, ``cpu`` or ``cuda``: what the workers compute on.
        threads: CPU threads of a worker.

    Raises:
        MissingPackageError: no Ray here, or too old.
        ConfigError: an address where nothing answers; workers with another version of this package or of torch.
        ResourceError: Ray did not start, or a machine does not answer.
    """
    require("ray", RAY, "ray", or_newer=True)
    import ray

    from .cluster import connect
    from .executor import RayExecutor

    is_ours = not ray.is_initialized()
    if is_ours:
        connect(address)
    try:
        executor = RayExecutor(device, threads)
        executor.check_versions()
        yield executor
    finally:
        if is_ours:
            ray.shutdown()
