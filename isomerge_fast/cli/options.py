"""Declare the options of the verbs, and read their values."""

# typer reads the declaration of an option from its default.
# ruff: noqa: RUF009

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from ..errors import ConfigError, shown
from ..parsing.values import Reader, number, size, whole_number

if TYPE_CHECKING:
    from ..config import MergeConfig


def parsed(read: Reader, *bounds: int) -> dict[str, Any]:
    """Return typer's arguments for an option whose text ``read`` turns into its value."""

    def parse(text: Any) -> Any:
        try:
            return read(text, "it", *bounds)
        except ConfigError as error:
            several = "; several are given one by one, each after the option" if "," in str(text) else ""
            raise typer.BadParameter(str(error).removeprefix("it is ") + several) from None

    return {"parser": parse, "metavar": "<number>"}


DTYPE: Any = typer.Option(None, help="Of the output's float tensors, e.g. bfloat16.")
THREADS: Any = typer.Option(None, help="CPU threads of each process.", **parsed(whole_number, 1))


@dataclass(frozen=True)
class MergeOptions:
    """Describe a merge: by a file, by options, or by options laid over a file."""

    config: Path | None = typer.Argument(None, help="YAML file; its keys can be given as options instead.")
    base: str | None = typer.Option(None, help="Base checkpoint: a folder or a .safetensors file.")
    experts: list[str] | None = typer.Option(None, "--expert", help="A fine-tuned checkpoint; repeat for each.")
    method: str | None = typer.Option(
        None, help="iso-c, iso-cts, mean, task-arithmetic, or one of an installed package."
    )
    scaling: list[float] | None = typer.Option(None, help="α; repeated: one output each.", **parsed(number))
    options: list[str] | None = typer.Option(None, "--option", help="Method option, e.g. common_fraction=0.7.")
    weights: list[float] | None = typer.Option(
        None, "--weight", help="Of each expert's delta, in their order.", **parsed(number)
    )
    normalize_weights: bool = typer.Option(False, "--normalize-weights", help="Divide the weights by their sum.")
    exclude: list[str] | None = typer.Option(None, help="Name pattern of tensors to average.")
    overrides: list[str] | None = typer.Option(
        None, "--override", metavar="PATTERN=METHOD", help="Another method for tensors of this name; repeat."
    )
    dtype: str | None = DTYPE
    stochastic_rounding: int | None = typer.Option(
        None, help="Seed: what is written as bfloat16 is rounded at random.", **parsed(whole_number, 0)
    )
    on_extra: str | None = typer.Option(None, help="Tensors only an expert has: error, ignore or copy.")
    on_missing: str | None = typer.Option(None, help="Tensors only some adapters adapt: error, or zero.")
    on_other_base: str | None = typer.Option(None, help="Adapters that name different bases: error, or ignore.")
    adapter_rank: int | None = typer.Option(
        None, help="Write a LoRA adapter of this rank (experts are adapters).", **parsed(whole_number, 1)
    )
    experts_are_deltas: bool = typer.Option(False, "--experts-are-deltas", help="The experts hold Δ, not weights.")
    save_delta: bool = typer.Option(False, "--save-delta", help="Keep the merged Δ in OUT/delta, for isomerge apply.")
    out: str | None = typer.Option(None, help="Folder to write.")

    def merge_config(self) -> MergeConfig:
        """Return the file's config, or that of a base and experts, changed by the options that are given."""
        from ..config import load_config

        # A list or a switch that is not given changes nothing.
        changes: dict[str, Any] = {
            key: None if value is False or value == [] else value for key, value in vars(self).items()
        }
        file = changes.pop("config")
        if file is not None and file.suffix not in (".yml", ".yaml", ".json") and not file.exists():
            raise ConfigError(
                f"{file}: no such config file; every value of an option needs the option before it "
                "(--scaling 1.0 --scaling 1.3), and quotes around spaces (--max-ram '600 MB')"
            )
        if file is None and (self.base is None or not self.experts):
            raise ConfigError("give CONFIG.yml, or --base and at least one --expert")
        changes["scaling"] = one_or_several(self.scaling) if self.scaling else None
        changes["overrides"] = parse_overrides(self.overrides)
        changes["options"] = parse_options(self.options)
        return load_config(file if file is not None else {}, **changes)


@dataclass(frozen=True)
class DeviceOptions:
    """Say where a merge is computed, and under which ceilings."""

    device: str = typer.Option("auto", help="auto, cpu, cuda or cuda:N.")
    max_ram: str | None = typer.Option(None, help="Ceiling for resident memory, e.g. 4GiB.")
    max_vram: str | None = typer.Option(None, help="Ceiling for GPU memory, e.g. 8GiB.")

    def ceilings(self) -> dict[str, Any]:
        """Return ``max_ram`` and ``max_vram`` in bytes."""
        return {
            "max_ram": parse_bytes(self.max_ram, "--max-ram"),
            "max_vram": parse_bytes(self.max_vram, "--max-vram"),
        }


@dataclass(frozen=True)
class OutputOptions:
    """Say how an output is written."""

    resume: bool = typer.Option(False, "--resume", help="Continue an unfinished merge.")
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the output, at the very end.")
    io: str = typer.Option("auto", help="auto: past the page cache where that is faster; or buffered.")


@dataclass(frozen=True)
class OutlookOptions:
    """Ask for the wall times of a merge over several workers."""

    ray: str | None = typer.Option(
        None, metavar="[ADDRESS]", help="Predict wall times over Ray; with an address, of that cluster as well."
    )
    workers: list[int] | None = typer.Option(None, help="With --ray: so many; repeat.", **parsed(whole_number, 1))
    flops: float | None = typer.Option(None, help="FLOP/s of a worker, e.g. 2e13. [measured]", **parsed(number))
    worker_rate: str | None = typer.Option(None, help="Bytes a second that one worker reads, or writes. [measured]")
    storage_rate: str | None = typer.Option(None, help="Bytes a second of all workers together, e.g. 40GB.")

    def rates(self) -> dict[str, Any]:
        """Return the rates that are given, as ``measure_rates`` takes them; refuse them without ``--ray``."""
        worker_bytes = parse_bytes(self.worker_rate, "--worker-rate")
        storage_bytes = parse_bytes(self.storage_rate, "--storage-rate")
        rates = {"--flops": self.flops, "--worker-rate": worker_bytes, "--storage-rate": storage_bytes}
        for option, value in {"--workers": self.workers, **rates}.items():
            if value is not None and self.ray is None:
                raise ConfigError(f"{option} is for a plan with --ray")
            if isinstance(value, int | float) and value <= 0:
                raise ConfigError(f"{option} is {value:g}; a rate is above zero")
        return {"flops": self.flops, "worker_bytes": worker_bytes, "storage_bytes": storage_bytes}


class OptionalAddress(TyperCommand):
    """Allow ``--ray`` without a value: the next word is its value if it looks like an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from ..integrations.peers import is_ray_address

        given = [
            "--ray=" if argument == "--ray" and not is_ray_address(after) else argument
            for argument, after in zip(args, [*args, ""][1:], strict=True)
        ]
        return super().parse_args(ctx, given)


def one_or_several(values: list[float]) -> float | list[float]:
    """Return the single value of a list of one, or the list."""
    return values[0] if len(values) == 1 else values


def parse_bytes(text: str | None, option: str) -> int | None:
    """Return ``8GiB``, ``600 MB`` or a plain number as bytes."""
    return None if text is None else size(text, option)


def parse_options(pairs: list[str] | None) -> dict[str, Any] | None:
    """Return ``key=value`` pairs as a dict, values read as YAML scalars."""
    if not pairs:
        return None
    from ..parsing.strict_yaml import parse_yaml

    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        key = key.strip()
        if not separator:
            raise ConfigError(f"--option {shown(pair)} is not key=value")
        if key in options:
            raise ConfigError(f"--option {shown(key)} is given twice")
        options[key] = parse_yaml(value, f"--option {shown(key)}")
    return options


def parse_overrides(pairs: list[str] | None) -> list[dict[str, str]] | None:
    """Return ``pattern=method`` pairs as the config has them; a pattern may hold = too."""
    if not pairs:
        return None
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--override {shown(pair)} is not PATTERN=METHOD, such as '*norm*=mean'")
    return [dict(zip(("match", "method"), pair.rsplit("=", 1), strict=True)) for pair in pairs]
