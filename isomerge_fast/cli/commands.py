"""The command line: thin verbs over the API. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

import enum
import functools
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import ConfigError, IsomergeError, ResourceError, nearest, shown, visible
from ..parsing.values import Reader, number, size, whole_number
from .terminal import CLOSED_PIPE, Stopped, guard_streams, stoppable, take_failure

# click's, of which typer may have a copy of its own.
UsageError: Any = typer.BadParameter.__base__
INTERRUPTED = "isomerge: interrupted; --resume continues"


class Verbs(TyperGroup):
    """The verbs, from the first word of theirs that is read."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _told():
            return super().make_context(*arguments, **options)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"No such command {shown(args[0])}{nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _told():
            return super().invoke(ctx)


@contextmanager
def _told() -> Iterator[None]:
    """Shows what was given in a wrong way instead of obeying it, and says what comes after an interruption."""
    try:
        yield
    except KeyboardInterrupt as stop:
        print(INTERRUPTED, file=sys.stderr)
        raise typer.Exit(stop.exit_code if isinstance(stop, Stopped) else 130) from None
    except UsageError as error:
        if error.ctx is not None and type(error).__name__ == "NoArgsIsHelpError":
            raise
        verb = error.ctx.command_path if error.ctx is not None else "isomerge"
        print(f"isomerge: {visible(_message_of(error))} ({verb} --help)", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def _message_of(error: Any) -> str:
    """What a usage error says; of an option that there is not, also the one that has another name."""
    given = getattr(error, "option_name", None)
    if type(error).__name__ != "NoSuchOption" or given is None or error.ctx is None:
        return error.format_message()
    options = [name for parameter in error.ctx.command.params for name in parameter.opts if name.startswith("--")]
    return f"No such option: {given}{nearest(given, options)}"


app = typer.Typer(
    cls=Verbs,
    name="isomerge",
    help="Merge fine-tuned checkpoints of one base model with Iso-C and Iso-CTS.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def parsed(read: Reader, *bounds: int) -> dict[str, Any]:
    """What an option is declared with whose value a reader reads."""

    def parse(text: Any) -> Any:
        try:
            return read(text, "it", *bounds)
        except ConfigError as error:
            several = "; several are given one by one, each after the option" if "," in str(text) else ""
            raise typer.BadParameter(str(error).removeprefix("it is ") + several) from None

    return {"parser": parse, "metavar": "<number>"}


class Format(enum.StrEnum):
    """How a verb answers."""

    human = "human"
    json = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="For people, or one JSON object on standard output.")]
ConfigArgument = Annotated[Path | None, typer.Argument(help="YAML file; its keys can be given as options instead.")]
BaseOption = Annotated[str | None, typer.Option("--base", help="Base checkpoint: a folder or a .safetensors file.")]
ExpertOption = Annotated[list[str] | None, typer.Option("--expert", help="A fine-tuned checkpoint; repeat for each.")]
MethodOption = Annotated[
    str | None, typer.Option("--method", help="iso-c, iso-cts, mean, task-arithmetic, or one of an installed package.")
]
ScalingOption = Annotated[
    list[float] | None, typer.Option("--scaling", help="α; repeated: one output each.", **parsed(number))
]
OptionOption = Annotated[list[str] | None, typer.Option("--option", help="Method option, e.g. common_fraction=0.7.")]
ExcludeOption = Annotated[list[str] | None, typer.Option("--exclude", help="Name pattern of tensors to average.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="Of the output's float tensors, e.g. bfloat16.")]
RoundingOption = Annotated[
    int | None,
    typer.Option(
        "--stochastic-rounding",
        help="Seed: what is written as bfloat16 is rounded at random.",
        **parsed(whole_number, 0),
    ),
]
OnExtraOption = Annotated[
    str | None, typer.Option("--on-extra", help="Tensors only an expert has: error, ignore or copy.")
]
WeightOption = Annotated[
    list[float] | None, typer.Option("--weight", help="Of each expert's delta, in their order.", **parsed(number))
]
MissingOption = Annotated[
    str | None, typer.Option("--on-missing", help="Tensors only some adapters adapt: error, or zero.")
]
OtherBaseOption = Annotated[
    str | None, typer.Option("--on-other-base", help="Adapters that name different bases: error, or ignore.")
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--override", metavar="PATTERN=METHOD", help="Another method for tensors of this name; repeat."),
]
NormalizeOption = Annotated[bool, typer.Option("--normalize-weights", help="Divide the weights by their sum.")]
DeltasOption = Annotated[bool, typer.Option("--experts-are-deltas", help="The experts hold Δ, not weights.")]
RankOption = Annotated[
    int | None,
    typer.Option(
        "--adapter-rank", help="Write a LoRA adapter of this rank (experts are adapters).", **parsed(whole_number, 1)
    ),
]
OutOption = Annotated[str | None, typer.Option("--out", help="Folder to write.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
RamOption = Annotated[str | None, typer.Option("--max-ram", help="Ceiling for resident memory, e.g. 4GiB.")]
VramOption = Annotated[str | None, typer.Option("--max-vram", help="Ceiling for GPU memory, e.g. 8GiB.")]
DeltaOption = Annotated[bool, typer.Option("--save-delta", help="Keep the merged Δ in OUT/delta, for isomerge apply.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue an unfinished merge.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output, at the very end.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", help="CPU threads of each process.", **parsed(whole_number, 1))
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="[ADDRESS]", help="Share the work out over Ray: host:port, local, or what is found here."
    ),
]
IoOption = Annotated[str, typer.Option("--io", help="auto: past the page cache where that is faster; or buffered.")]


def parse_bytes(text: str | None, option: str) -> int | None:
    """``8GiB``, ``600 MB`` or a plain number as bytes."""
    return None if text is None else size(text, option)


def parse_options(pairs: list[str] | None) -> dict[str, Any] | None:
    """``key=value`` pairs, values read as YAML scalars."""
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
    """``pattern=method`` pairs; a pattern may hold = too."""
    if not pairs:
        return None
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--override {shown(pair)} is not PATTERN=METHOD, such as '*norm*=mean'")
    return [dict(zip(("match", "method"), pair.rsplit("=", 1), strict=True)) for pair in pairs]


@dataclass(frozen=True)
class Described:
    """What a command line says of a merge: a file, options, or options laid over a file."""

    file: Path | None
    options: dict[str, Any]

    @property
    def is_empty(self) -> bool:
        return self.file is None and not any(self.options.values())

    def config(self) -> Any:
        """The MergeConfig."""
        from ..config import load_config

        changes = dict(self.options)
        if self.file is not None and self.file.suffix not in (".yml", ".yaml", ".json") and not self.file.exists():
            raise ConfigError(
                f"{self.file}: no such config file; every value of an option needs the option before it "
                "(--scaling 1.0 --scaling 1.3), and quotes around spaces (--max-ram '600 MB')"
            )
        if self.file is None and (changes.get("base") is None or not changes.get("expert")):
            raise ConfigError("give CONFIG.yml, or --base and at least one --expert")
        scaling = changes.pop("scaling")
        changes["scaling"] = None if not scaling else scaling[0] if len(scaling) == 1 else scaling
        changes["experts"] = changes.pop("expert") or None
        changes["weights"] = changes.pop("weight") or None
        changes["exclude"] = changes["exclude"] or None
        changes["overrides"] = parse_overrides(changes.pop("override"))
        for switch in ("save_delta", "normalize_weights", "experts_are_deltas"):
            changes[switch] = changes[switch] or None
        changes["options"] = parse_options(changes.pop("option"))
        return load_config(self.file if self.file is not None else {}, **changes)


def _merge_options(
    config: ConfigArgument = None,
    base: BaseOption = None,
    expert: ExpertOption = None,
    method: MethodOption = None,
    scaling: ScalingOption = None,
    option: OptionOption = None,
    weight: WeightOption = None,
    normalize_weights: NormalizeOption = False,
    exclude: ExcludeOption = None,
    override: OverrideOption = None,
    dtype: DtypeOption = None,
    stochastic_rounding: RoundingOption = None,
    on_extra: OnExtraOption = None,
    on_missing: MissingOption = None,
    on_other_base: OtherBaseOption = None,
    adapter_rank: RankOption = None,
    experts_are_deltas: DeltasOption = False,
    save_delta: DeltaOption = False,
    out: OutOption = None,
) -> None:
    """The options of every verb that takes a merge."""


def describes_a_merge(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb`` with ``_merge_options`` for its first parameter, which gets them as ``Described``."""
    signature = inspect.signature(verb, eval_str=True)
    shared = inspect.signature(_merge_options, eval_str=True).parameters

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        options = {name: given.pop(name) for name in shared}
        verb(Described(options.pop("config"), options), **given)

    parameters = [*shared.values(), *list(signature.parameters.values())[1:]]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # functions have it
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


class OptionalAddress(TyperCommand):
    """A command whose ``--ray`` may stand without its value: what follows is one if it looks like an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from ..integrations.peers import is_ray_address

        told = [
            "--ray=" if argument == "--ray" and not is_ray_address(after) else argument
            for argument, after in zip(args, [*args, ""][1:], strict=True)
        ]
        return super().parse_args(ctx, told)


def answer(format: Format, value: dict[str, Any], human: Callable[[], None], *, done: str | None = None) -> None:
    """Prints what a verb has found.

    Args:
        done: what stands all the same if that cannot be printed; without it the verb has failed then.
    """
    if format is Format.json:
        print_json(value)
    else:
        human()
    if done is not None and (error := take_failure(sys.stdout)):
        print(f"isomerge: {done}; only its report could not be printed ({error.strerror})", file=sys.stderr)


def print_json(value: dict[str, Any]) -> None:
    """In ASCII, for any terminal and encoding; DEL is the one control that JSON has no need to escape."""
    print(json.dumps(value, allow_nan=False).replace("\x7f", "\\u007f"))


def guarded(format: Format, action: Callable[[], None]) -> None:
    """Runs a verb; every error a user can mend becomes one message and the exit code of the contract."""

    def fail(error: IsomergeError) -> NoReturn:
        if format is Format.json:
            details = {"kind": error.kind, "exit_code": error.exit_code, "message": str(error)}
            details |= {"problems": error.problems} if error.problems else {}
            print_json({"error": details})
        if format is Format.human or take_failure(sys.stdout):
            print(f"isomerge: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None

    try:
        action()
    except IsomergeError as error:
        fail(error)
    except MemoryError as error:
        fail(ResourceError(f"out of memory ({error})"))
    except OSError as error:  # of the machine: no temporary folder, a disk that is full
        reason = error.strerror or str(error)
        if "temporary directory" in reason:
            reason += "; TMPDIR names one that can be written to"
        fail(ResourceError(f"{error.filename}: {reason}" if error.filename else reason))


@app.command(cls=OptionalAddress)
@describes_a_merge
def run(
    described: Described,
    device: DeviceOption = "auto",
    max_ram: RamOption = None,
    max_vram: VramOption = None,
    threads: ThreadsOption = None,
    ray: RayOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    io: IoOption = "auto",
    format: FormatOption = Format.human,
) -> None:
    """Merge checkpoints into --out."""

    def action() -> None:
        from ..api import merge
        from .render import print_report, watched

        config = described.config()
        # Ray tells on standard output of workers that were lost, which is no part of the answer.
        with watched(enabled=format is Format.human) as observer, redirect_stdout(sys.stderr):
            report = merge(
                config,
                device=device,
                threads=threads,
                resume=resume,
                overwrite=overwrite,
                io=io,
                observer=observer,
                ray=False if ray is None else ray or True,
                max_ram=parse_bytes(max_ram, "--max-ram"),
                max_vram=parse_bytes(max_vram, "--max-vram"),
            )
        answer(format, report.to_dict(), lambda: print_report(report), done="the merge is finished and written")

    guarded(format, action)


@app.command(cls=OptionalAddress)
@describes_a_merge
def plan(
    described: Described,
    device: DeviceOption = "auto",
    max_ram: RamOption = None,
    max_vram: VramOption = None,
    threads: ThreadsOption = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="[ADDRESS]", help="Predict wall times over Ray; with an address, of that cluster as well."
        ),
    ] = None,
    workers: Annotated[
        list[int] | None, typer.Option("--workers", help="With --ray: so many; repeat.", **parsed(whole_number, 1))
    ] = None,
    flops: Annotated[
        float | None, typer.Option("--flops", help="FLOP/s of a worker, e.g. 2e13. [measured]", **parsed(number))
    ] = None,
    worker_rate: Annotated[
        str | None, typer.Option("--worker-rate", help="Bytes a second that one worker reads, or writes. [measured]")
    ] = None,
    storage_rate: Annotated[
        str | None, typer.Option("--storage-rate", help="Bytes a second of all workers together, e.g. 40GB.")
    ] = None,
    format: FormatOption = Format.human,
) -> None:
    """What a run would do with every tensor: reads headers only, writes nothing. With --ray also how long it would
    take so many workers, for which a second of the inputs is read.
    """

    def action() -> None:
        from ..execution.engine import resolve_device
        from ..planning.cost import estimate_seconds
        from ..planning.plan import check_resources
        from ..planning.planner import make_plan
        from .render import print_plan

        rates = {
            "--flops": flops,
            "--worker-rate": parse_bytes(worker_rate, "--worker-rate"),
            "--storage-rate": parse_bytes(storage_rate, "--storage-rate"),
        }
        for option, value in {"--workers": workers, **rates}.items():
            if value is not None and ray is None:
                raise ConfigError(f"{option} is for a plan with --ray")
            if isinstance(value, int | float) and value <= 0:
                raise ConfigError(f"{option} is {value:g}; a rate is above zero")
        config, target = described.config(), resolve_device(device)
        ceilings: dict[str, Any] = {
            "max_ram": parse_bytes(max_ram, "--max-ram"),
            "max_vram": parse_bytes(max_vram, "--max-vram"),
        }
        made = make_plan(config, target, **ceilings)
        check_resources(made, device=target, **ceilings)
        found = {**made.to_dict(), "estimated_seconds": estimate_seconds(made)}
        if ray is not None:
            import torch

            from ..bench.outlook import WORKERS, measure_rates, predict
            from ..integrations.ray.executor import ray_executor

            counts = {*(workers or WORKERS)}
            if ray:
                with ray_executor(ray, device=target.type, threads=threads) as executor:
                    counts.add(here := executor.workers(made, executor.threads))
                found["cluster_workers"] = here
            measured = measure_rates(
                made,
                target,
                threads or torch.get_num_threads(),
                flops=rates["--flops"],
                worker_bytes=rates["--worker-rate"],
                storage_bytes=rates["--storage-rate"],
            )
            found["outlook"] = predict(made, measured, counts - {0})
        answer(format, found, lambda: print_plan(made, found))

    guarded(format, action)


@app.command()
def apply(
    merged: Annotated[Path, typer.Argument(help="Output of a merge with --save-delta.")],
    scaling: Annotated[list[float], typer.Option("--scaling", help="α; repeated: one output each.", **parsed(number))],
    out: Annotated[str, typer.Option("--out", help="Folder to write.")],
    base: Annotated[str | None, typer.Option("--base", help="The base, if it has moved.")] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    max_ram: RamOption = None,
    max_vram: VramOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    io: IoOption = "auto",
    format: FormatOption = Format.human,
) -> None:
    """Another scaling of a finished merge, from the Δ it kept: reads base and Δ only."""

    def action() -> None:
        from ..api import apply as apply_saved
        from .render import print_report, watched

        with watched(enabled=format is Format.human) as observer:
            report = apply_saved(
                merged,
                scaling[0] if len(scaling) == 1 else scaling,
                out,
                base=base,
                dtype=dtype,
                device=device,
                resume=resume,
                overwrite=overwrite,
                io=io,
                observer=observer,
                max_ram=parse_bytes(max_ram, "--max-ram"),
                max_vram=parse_bytes(max_vram, "--max-vram"),
            )
        answer(format, report.to_dict(), lambda: print_report(report), done="the merge is finished and written")

    guarded(format, action)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Output of a merge.")],
    samples: Annotated[
        int, typer.Option(help="Tensors to recompute in float64; 0: checksums only.", **parsed(whole_number, 0))
    ] = 4,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.", **parsed(whole_number))] = 0,
    format: FormatOption = Format.human,
) -> None:
    """Check a merged checkpoint: every byte of every file, and a sample of tensors recomputed in float64."""

    def action() -> None:
        from dataclasses import asdict

        from ..execution.verify import verify as check
        from .render import print_verification

        result = check(folder, samples=samples, seed=seed)
        answer(format, asdict(result), lambda: print_verification(result))

    guarded(format, action)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Output of a merge.")],
    format: FormatOption = Format.human,
) -> None:
    """What a merge did: algorithm, evidence, seconds and bytes of every tensor."""

    def action() -> None:
        from ..execution.finalize import read_report
        from .render import print_report

        loaded, _ = read_report(folder)
        answer(format, loaded.to_dict(), lambda: print_report(loaded, every_tensor=True))

    guarded(format, action)


@app.command()
def doctor(format: FormatOption = Format.human) -> None:
    """What this machine offers, and a small merge of each method checked against float64."""

    def action() -> None:
        from ..errors import VerificationError
        from .doctor import examine
        from .render import print_doctor

        findings = examine()
        answer(format, findings, lambda: print_doctor(findings))
        if not findings["healthy"]:
            raise VerificationError("a merge on this machine is not what float64 gives; see above")

    guarded(format, action)


@app.command()
@describes_a_merge
def bench(
    described: Described,
    device: DeviceOption = "auto",
    max_ram: RamOption = None,
    max_vram: VramOption = None,
    tasks: Annotated[
        int | None, typer.Option("--tasks", help="Without a merge: deltas to merge. [8]", **parsed(whole_number, 1))
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="On the disk to be measured; left as it is.")] = Path("."),
    budget: Annotated[float, typer.Option("--budget", help="Seconds for timing, about.", **parsed(number, 0))] = 60.0,
    format: FormatOption = Format.human,
) -> None:
    """What this machine does against the published algorithm; with a merge: what that would take here."""

    def say(doing: str) -> None:
        if format is Format.human and sys.stderr.isatty():
            print(f"… {visible(doing)}", file=sys.stderr)

    def action() -> None:
        from ..execution.engine import resolve_device
        from .render import print_bench, print_estimate

        target = resolve_device(device)
        if described.is_empty and max_ram is None and max_vram is None:
            from ..bench.short import measure_short

            found = measure_short(target, tasks=tasks or 8, folder=folder, budget_seconds=budget, say=say).to_dict()
            answer(format, found, lambda: print_bench(found))
            return
        from ..bench.estimate import estimate_merge
        from ..planning.plan import check_resources
        from ..planning.planner import make_plan

        if tasks is not None:
            raise ConfigError("--tasks is for a bench without a merge; a merge has as many as it has experts")
        ram, vram = parse_bytes(max_ram, "--max-ram"), parse_bytes(max_vram, "--max-vram")
        made = make_plan(described.config(), target, max_ram=ram, max_vram=vram)
        check_resources(made, max_ram=ram, max_vram=vram, device=target)
        found = estimate_merge(made, target, folder=folder, budget_seconds=budget, say=say).to_dict()
        answer(format, found, lambda: print_estimate(found))

    guarded(format, action)


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="Folder for checkpoints, table and picture.")] = "demo-out",
    seed: Annotated[int, typer.Option(help="Of data split, networks and training.", **parsed(whole_number, 0))] = 0,
    format: FormatOption = Format.human,
) -> None:
    """Train eight experts on handwritten digits, merge them, and compare: about a minute."""

    def action() -> None:
        from ..demo import run_demo

        quiet = format is Format.json
        result = run_demo(out, seed=seed, say=lambda text: None if quiet else print(visible(text, keep="\n")))
        answer(format, result.to_dict(), lambda: None)

    guarded(format, action)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from .. import __version__

        print(f"isomerge-fast {__version__}")
        raise typer.Exit()


def main() -> None:
    """Entry point of the console script."""
    # Before torch is loaded. OpenMP threads that spin while they wait take the core from the one waited for, when
    # another process is busy: Iso-CTS of eight 768 x 768 deltas on 2 cores took 0.14 s alone and over 15 s beside
    # one busy process; with this spin count 0.12 s and 0.39 s, with 1000 0.14 s and 0.33 s.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Tensors come in many sizes; segments that grow leave no holes between them in a GPU's memory.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    guard_streams()
    with stoppable(INTERRUPTED):
        sys.exit(_exit_code())


def _exit_code() -> int:
    """Runs the verb of the command line. One whose answer could not be printed has failed, if it did nothing else."""
    try:
        app()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except Exception:  # a mistake of ours
        print(visible(traceback.format_exc(), keep="\n"), file=sys.stderr)
        code = 1
    lost = take_failure(sys.stdout)
    if code or lost is None:
        return code
    if isinstance(lost, BrokenPipeError):  # whoever read it has seen enough
        return CLOSED_PIPE
    print(f"isomerge: standard output cannot be written to ({lost.strerror})", file=sys.stderr)
    return ResourceError.exit_code
