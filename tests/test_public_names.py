"""Check the public names: stated once, seen by type checkers, listed, loaded when they are used, kept when renamed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import isomerge_fast as imf

SOURCE = Path(imf.__file__).read_text(encoding="utf-8")


def test_every_public_name_is_there_and_listed() -> None:
    names = imf.__all__  # type: ignore[attr-defined]  # type checkers go by the imports
    assert len(set(names)) == len(names) > 20
    assert dir(imf) == sorted(names)
    assert all(getattr(imf, name) is not None for name in names)
    scope: dict[str, object] = {}
    exec("from isomerge_fast import *", scope)
    assert scope.keys() - {"__builtins__"} == set(names)


def test_type_checkers_see_the_same_names() -> None:
    """By PEP 484 what is imported under its own name with ``as`` is public."""
    imported = {
        (alias.name, alias.asname): node.module
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert {(name, name): module for name, module in imf._HOMES.items()} == imported


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'iso_d'"):
        imf.iso_d  # noqa: B018


def test_a_name_that_is_gone_warns_and_gives_what_took_its_place() -> None:
    for name, instead in imf._DEPRECATED.items():
        with pytest.warns(DeprecationWarning, match=rf"{name} is deprecated: it gives {instead}") as warned:
            assert getattr(imf, name) is getattr(imf, instead)
        assert warned[0].filename == __file__
        assert name not in dir(imf)


def test_a_name_of_the_errors_loads_no_torch() -> None:
    code = "import sys, isomerge_fast as imf; imf.ConfigError, imf.MergeConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
