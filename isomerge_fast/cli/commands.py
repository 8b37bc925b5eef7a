"""Declare the verbs, each a thin layer over the API. Nothing heavy is imported until a verb runs."""

# typer reads the declaration of an option from its default.
# ruff: noqa: B008

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ConfigError, VerificationError, visible
from ..parsing.values import number, whole_number
from .application import FORMAT, Answer, Format, app, verb
from .options import (
    DTYPE,
    THREADS,
    DeviceOptions,
    MergeOptions,
    OptionalAddress,
    OutlookOptions,
    OutputOptions,
    one_or_several,
    parsed,
)

if TYPE_CHECKING:
    import torch

    from ..execution.report import Report
    from ..planning.plan import Plan

MERGED: Any = typer.Argument(help="Output of a merge.")


@app.command(cls=OptionalAddress)
@verb
def run(
    *,
    merge: MergeOptions,
    target: DeviceOptions,
    threads: int | None = THREADS,
    ray: str | None = typer.Option(
        None, metavar="[ADDRESS]", help="Share the work out over Ray: host:port, local, or what is found here."
    ),
    output: OutputOptions,
    format: Format = FORMAT,
) -> Answer:
    """Merge checkpoints into --out."""
    from .. import api
    from .screen import watched

    config = merge.merge_config()
    # Ray reports lost workers on standard output, where only the answer belongs.
    with watched(enabled=format is Format.human) as observer, redirect_stdout(sys.stderr):
        report = api.merge(
            config,
            device=target.device,
            threads=threads,
            observer=observer,
            ray=False if ray is None else ray or True,
            **vars(output),
            **target.ceilings(),
        )
    return _merged(report)


@app.command(cls=OptionalAddress)
@verb
def plan(
    *, merge: MergeOptions, target: DeviceOptions, threads: int | None = THREADS, outlook: OutlookOptions
) -> Answer:
    """Show what a run would do with every tensor: reads headers only, writes nothing. With --ray also how long it would
    take so many workers, for which a second of the inputs is read.
    """
    from ..planning.cost import estimate_seconds, matrices_at_once
    from .render import print_plan

    rates = outlook.rates()
    made, device = _plan(merge, target, threads)
    found = {**made.to_dict(), "estimated_seconds": estimate_seconds(made), "at_once": matrices_at_once(made)}
    if outlook.ray is not None:
        from ..bench.outlook import WORKERS, measure_rates, predict
        from ..integrations.ray.session import ray_executor

        counts = {*(outlook.workers or WORKERS)}
        if outlook.ray:
            with ray_executor(outlook.ray, device=device.type, threads=threads) as executor:
                counts.add(here := executor.workers(made, executor.threads))
            found["cluster_workers"] = here
        measured = measure_rates(made, device, made.cores, **rates)
        found["outlook"] = predict(made, measured, counts - {0})
    return Answer(found, lambda: print_plan(made, found))


@app.command()
@verb
def apply(
    *,
    merged: Path = typer.Argument(help="Output of a merge with --save-delta."),
    scaling: list[float] = typer.Option(help="α; repeated: one output each.", **parsed(number)),
    out: str = typer.Option(help="Folder to write."),
    base: str | None = typer.Option(None, help="The base, if it has moved."),
    dtype: str | None = DTYPE,
    target: DeviceOptions,
    output: OutputOptions,
    format: Format = FORMAT,
) -> Answer:
    """Write another scaling of a finished merge, from the Δ it kept: reads base and Δ only."""
    from .. import api
    from .screen import watched

    with watched(enabled=format is Format.human) as observer:
        report = api.apply(
            merged,
            one_or_several(scaling),
            out,
            base=base,
            dtype=dtype,
            device=target.device,
            observer=observer,
            **vars(output),
            **target.ceilings(),
        )
    return _merged(report)


@app.command()
@verb
def verify(
    *,
    folder: Path = MERGED,
    samples: int = typer.Option(
        4, help="Tensors to recompute in float64; 0: checksums only.", **parsed(whole_number, 0)
    ),
    seed: int = typer.Option(0, help="Of the choice of samples.", **parsed(whole_number)),
) -> Answer:
    """Check a merged checkpoint: every byte of every file, and a sample of tensors recomputed in float64."""
    from ..execution.verify import verify as check
    from .render import print_verification

    result = check(folder, samples=samples, seed=seed)
    return Answer(asdict(result), lambda: print_verification(result))


@app.command()
@verb
def report(*, folder: Path = MERGED) -> Answer:
    """Show what a merge did: algorithm, evidence, seconds and bytes of every tensor."""
    from ..execution.finalize import read_report
    from .render import print_report

    loaded, _ = read_report(folder)
    return Answer(loaded.to_dict(), lambda: print_report(loaded, every_tensor=True))


@app.command()
@verb
def doctor() -> Answer:
    """Show what this machine offers, and check a small merge of each method against float64."""
    from .doctor import examine
    from .render import print_doctor

    findings = examine()
    wrong = VerificationError("a merge on this machine is not what float64 gives; see above")
    return Answer(findings, lambda: print_doctor(findings), error=None if findings["healthy"] else wrong)


@app.command()
@verb
def bench(
    *,
    merge: MergeOptions,
    target: DeviceOptions,
    tasks: int | None = typer.Option(None, help="Without a merge: deltas to merge. [8]", **parsed(whole_number, 1)),
    folder: Path = typer.Option(Path("."), help="On the disk to be measured; left as it is."),
    budget: float = typer.Option(60.0, help="Seconds for timing, about.", **parsed(number, 0)),
    format: Format = FORMAT,
) -> Answer:
    """Time this machine against the published algorithm; with a merge: estimate what that would take here."""
    from ..execution.engine import resolve_device
    from .render import print_bench, print_estimate

    def say(doing: str) -> None:
        if format is Format.human and sys.stderr.isatty():
            print(f"… {visible(doing)}", file=sys.stderr)

    common: dict[str, Any] = {"folder": folder, "budget_seconds": budget, "say": say}
    device = resolve_device(target.device)
    if not any(vars(merge).values()) and target.max_ram is None and target.max_vram is None:
        from ..bench.short import measure_short

        found = measure_short(device, tasks=tasks or 8, **common)
        return Answer(found, lambda: print_bench(found))
    from ..bench.estimate import estimate_merge

    if tasks is not None:
        raise ConfigError("--tasks is for a bench without a merge; a merge has as many as it has experts")
    made, _ = _plan(merge, target, None)
    found = estimate_merge(made, device, **common)
    return Answer(found, lambda: print_estimate(found))


@app.command()
@verb
def demo(
    *,
    out: str = typer.Option("demo-out", help="Folder for checkpoints, table and picture."),
    seed: int = typer.Option(0, help="Of data split, networks and training.", **parsed(whole_number, 0)),
    format: Format = FORMAT,
) -> Answer:
    """Train eight experts on handwritten digits, merge them, and compare: about a minute."""
    from ..demo import run_demo

    quiet = format is Format.json
    result = run_demo(out, seed=seed, say=lambda text: None if quiet else print(visible(text, keep="\n")))
    return Answer(result.to_dict(), lambda: None)


def _plan(merge: MergeOptions, target: DeviceOptions, threads: int | None) -> tuple[Plan, torch.device]:
    """Return the plan of a merge, its resources checked, and the device it is for."""
    from ..execution.engine import resolve_device
    from ..planning.planner import make_plan
    from ..planning.resources import check_resources

    config, device, ceilings = merge.merge_config(), resolve_device(target.device), target.ceilings()
    made = make_plan(config, device, threads=threads, **ceilings)
    check_resources(made, device=device, **ceilings)
    return made, device


def _merged(report: Report) -> Answer:
    from .render import print_report

    return Answer(report.to_dict(), lambda: print_report(report), done="the merge is finished and written")
