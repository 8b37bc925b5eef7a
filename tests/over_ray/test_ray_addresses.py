"""Addresses of clusters: which is tried, and what is said where there is none."""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import HTTPServer, SimpleHTTPRequestHandler
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

import isomerge_fast as imf
import peers
from isomerge_fast.errors import MissingPackageError

peers.need("ray", "ray")

import ray  # noqa: E402  # after the line that skips where Ray is absent

from isomerge_fast.integrations.ray import cluster  # noqa: E402  # likewise
from ray_site import Family, Merge, invoke, write_config  # noqa: E402  # likewise

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

# --- no cluster, or not the one that was meant ------------------------------------------------------------------------


@pytest.mark.parametrize(("found", "said"), [(None, "ray is not installed"), ("2.9.3", "ray 2.9.3 is installed")])
def test_without_ray_it_says_what_to_install(
    families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str | None, said: str
) -> None:
    real = metadata.version

    def version(package: str) -> str:
        if package != "ray":
            return real(package)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)
    merge = Merge(tmp_path, families["one-file"])
    with pytest.raises(MissingPackageError, match=rf"{re.escape(said)}.*pip install -U 'isomerge-fast\[ray\]'"):
        merge.over_ray(ray="local")
    code, _, told = invoke("run", write_config(merge), "--ray", "local")
    assert (code, said in told) == (4, True)
    merge.expect_nothing()


def listener(kind: str) -> Iterator[int]:
    """A port where something listens, or nothing."""
    if kind == "http":
        with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield server.server_address[1]
            server.shutdown()
            thread.join()
        return
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if kind == "silent":
            server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("way", ["address", "RAY_ADDRESS", "last-started"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [("nobody", "nothing answers there"), ("silent", "nothing answers there"), ("http", "is no head of a Ray cluster")],
    ids=["nobody", "silent", "http"],
)
def test_an_address_without_a_cluster(
    unconnected: None,
    families: dict[str, Family],
    tmp_path: Path,
    ray_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    said: str,
    way: str,
) -> None:
    """Said within seconds, where Ray itself would try for minutes, and before there is anything on the disk."""
    merge = Merge(tmp_path, families["one-file"])
    if kind == "silent":
        monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.3)
    for port in listener(kind):
        address = f"127.0.0.1:{port}"
        if way == "RAY_ADDRESS":
            monkeypatch.setenv("RAY_ADDRESS", address)
        if way == "last-started":
            (ray_folder / "ray").mkdir(exist_ok=True)
            (ray_folder / "ray/ray_current_cluster").write_text(address)
        started = time.monotonic()
        code, _, told = invoke("run", write_config(merge), "--ray", address if way == "address" else "auto")
        assert time.monotonic() - started < 15
        assert code == 2
        assert f"ray {address}: " in told
        assert said in told
    (ray_folder / "ray/ray_current_cluster").unlink(missing_ok=True)
    merge.expect_nothing()


def test_sigterm_does_what_it_did_before_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which ``ray.init`` changes."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    cluster.connect("local")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("address", ["nonsense", "host", "ray://127.0.0.1:10001", "a:b", "host:1234567", "http://h:1"])
def test_what_is_no_address(
    unconnected: None, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    merge = Merge(tmp_path, families["one-file"])
    with pytest.raises(
        imf.ConfigError, match=rf"ray '{re.escape(address)}' is no address of a cluster: give host:port"
    ):
        merge.over_ray(ray=address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(imf.ConfigError, match="is no address of a cluster"):
        merge.over_ray()
    merge.expect_nothing()


@pytest.mark.parametrize("address", ["host..name:1", "127.0.0.1:99999", "no-such-host.invalid:6379"])
def test_an_address_that_cannot_be_reached(
    unconnected: None, families: dict[str, Family], tmp_path: Path, address: str
) -> None:
    merge = Merge(tmp_path, families["one-file"])
    with pytest.raises(imf.ConfigError, match=rf"ray {re.escape(address)}: nothing answers there"):
        merge.over_ray(ray=address)
    merge.expect_nothing()


class Head:
    """What says the first word of a cluster's head at a port, and nothing more."""

    def __enter__(self) -> str:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()
        return f"127.0.0.1:{self._server.getsockname()[1]}"

    def _answer(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()


@pytest.mark.parametrize(
    ("given", "variable", "last", "tried"),
    [
        (None, None, None, ["auto", "local"]),
        (None, None, "nobody", ["local"]),
        (None, None, "head", ["auto", "local"]),  # it may be gone all the same
        (None, "head", "nobody", ["head"]),
        (None, "local", None, ["local"]),
        ("auto", "head", None, ["head"]),
        ("auto", None, "head", ["auto"]),
        ("head", "nobody", "nobody", ["head"]),
        ("local", "nobody", "nobody", ["local"]),
    ],
)
def test_which_cluster_is_tried(
    unconnected: None,
    ray_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    variable: str | None,
    last: str | None,
    tried: list[str],
) -> None:
    """An address goes before RAY_ADDRESS, that before the cluster which ``ray start`` was told of last."""
    found: list[str] = []

    def init(address: str, **_: Any) -> None:
        found.append(address)
        if address != "local":
            raise ConnectionError("no such cluster")

    monkeypatch.setattr(ray, "init", init)
    with Head() as head:
        names = {"head": head, "nobody": "127.0.0.1:9"}
        if variable is not None:
            monkeypatch.setenv("RAY_ADDRESS", names.get(variable, variable))
        if last is not None:
            (ray_folder / "ray").mkdir(exist_ok=True)
            (ray_folder / "ray/ray_current_cluster").write_text(names[last])
        try:
            if tried[-1] == "local":
                cluster.connect(given)
            else:
                with pytest.raises(
                    imf.ConfigError, match=r"no such cluster; this machine has to be one of that cluster's"
                ):
                    cluster.connect(names.get(given or "", given))
        finally:
            (ray_folder / "ray/ray_current_cluster").unlink(missing_ok=True)
    assert found == [names.get(name, name) for name in tried]


@pytest.mark.parametrize("line", [["--ray", "nonsense"], ["--ray=nonsense"], ["--ray", "nonsense:"]])
def test_no_address_on_the_command_line(
    unconnected: None, families: dict[str, Family], tmp_path: Path, line: list[str]
) -> None:
    merge = Merge(tmp_path, families["one-file"])
    code, _, told = invoke("run", write_config(merge), *line)
    assert (code, "nonsense" in told) == (2, True)
    merge.expect_nothing()


def test_auto_without_a_cluster(unconnected: None, families: dict[str, Family], tmp_path: Path) -> None:
    """Before this module has one; another one on this machine would be found."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    if any("--gcs-address" in argument for line in lines for argument in line):
        pytest.skip("there is a cluster on this machine")
    merge = Merge(tmp_path, families["one-file"])
    with pytest.raises(imf.ConfigError, match="ray auto: "):
        merge.over_ray(ray="auto")
    merge.expect_nothing()
