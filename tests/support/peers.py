"""Which peers are here: test modules of an absent one are skipped with a line, or fail where all are wanted."""

import importlib.util
import os
import sys

import pytest


def need(module: str, extra: str) -> None:
    """Called first by a test module of a peer, before it imports it.

    With ISOMERGE_REQUIRE_PEERS set, as `.ci/run` does, an absent peer is a failure and not a skip.
    """
    if module in sys.modules or importlib.util.find_spec(module) is not None:
        return
    line = f"{module} is not installed: pip install 'isomerge-fast[{extra}]'"
    if os.environ.get("ISOMERGE_REQUIRE_PEERS"):
        pytest.fail(line, pytrace=False)
    pytest.skip(line, allow_module_level=True)
