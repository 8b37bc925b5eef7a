"""Command lines, run in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from isomerge_fast.cli.commands import app


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Run a command line; return its exit code, output and errors."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def flags(family: tuple[Path, list[Path]], *more: object) -> list[object]:
    """Return the options that name a family's checkpoints, and others."""
    pairs = [("--expert", expert) for expert in family[1]]
    return ["--base", family[0], *(part for pair in pairs for part in pair), *more]
