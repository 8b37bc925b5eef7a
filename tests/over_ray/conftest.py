"""Start what tests over Ray need, once for a file: a cluster, and checkpoints to merge.

Ray is imported where it is used: this file is read where Ray is absent, and the tests are skipped there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import adapters
from checkpoints import make_expert, save_folder
from fault_driver import make_families
from isomerge_fast.execution.work_item import WorkResult

if TYPE_CHECKING:
    from ray_site import Family, Site


@pytest.fixture(scope="module", autouse=True)
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its sockets and logs, and what it knows of clusters on this machine: none but those made here."""
    before = {name: os.environ.pop(name, None) for name in ("RAY_TMPDIR", "RAY_ADDRESS")}
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:  # paths of sockets are short
        os.environ["RAY_TMPDIR"] = folder
        yield Path(folder)
        del os.environ["RAY_TMPDIR"]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    from ray_site import Site

    made = Site(tmp_path_factory.mktemp("machines"))
    try:
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def connected(site: Site) -> Iterator[Site]:
    """This process is a driver of the cluster; its worker processes have torch loaded after the first merge."""
    site.connect()
    yield site
    site.head.clear()


@pytest.fixture
def unconnected() -> None:
    import ray

    ray.shutdown()


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    root = tmp_path_factory.mktemp("families")
    made = make_families(root)
    adapted, folders = adapters.make_adapters(root / "adapters", tasks=2)
    shutil.rmtree(adapted)
    made["adapters"] = adapters.make_base(adapted, shards=2), folders
    # Eight tensors in a row, of a size that is written at once.
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{index}.weight": torch.randn(32, 24, generator=generator) for index in range(8)}
    folder = root / "eight"
    made["eight"] = save_folder(folder / "base", base), [save_folder(folder / "expert", make_expert(base, 0))]
    return made


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[WorkResult]:
    """Return the results of the units of merges over Ray, as they come."""
    from isomerge_fast.integrations.ray.executor import RayExecutor

    found: list[WorkResult] = []
    real = RayExecutor.merge

    def merge(executor: RayExecutor, *arguments: Any) -> list[WorkResult]:
        made = real(executor, *arguments)
        found.extend(made)
        return made

    monkeypatch.setattr(RayExecutor, "merge", merge)
    return found
