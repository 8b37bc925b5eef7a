"""Run the command line: find the verb, print its answer or one error, and end with the exit code."""

from __future__ import annotations

import enum
import functools
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from inspect import Parameter
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ..errors import IsomergeError, ResourceError, nearest, shown, visible
from .terminal import CLOSED_PIPE, Stopped, guard_streams, stoppable, take_failure

# click's class; typer may have its own copy of click.
UsageError: Any = typer.BadParameter.__base__
INTERRUPTED = "isomerge: interrupted; --resume continues"


class Verbs(TyperGroup):
    """Find the verb, and report usage errors and interruptions in one line."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _reported():
            return super().make_context(*arguments, **options)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"No such command {shown(args[0])}{nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _reported():
            return super().invoke(ctx)


@contextmanager
def _reported() -> Iterator[None]:
    """Print a usage error or an interruption in one line, control characters escaped, and end with its exit code."""
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
    """Return the message of a usage error; for an unknown option, with the nearest one that exists."""
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


class Format(enum.StrEnum):
    """List the forms of an answer."""

    human = "human"
    json = "json"


FORMAT: Any = typer.Option(Format.human, help="For people, or one JSON object on standard output.")


@dataclass(frozen=True)
class Answer:
    """Hold what a verb has found."""

    value: dict[str, Any]  # as JSON
    show: Callable[[], None]  # prints it for a person
    done: str | None = None  # what stands even if the answer cannot be printed; without it the verb fails then
    error: IsomergeError | None = None  # raised after the answer is printed


def verb(body: Callable[..., Answer]) -> Callable[..., None]:
    """Return ``body`` as a command that prints its answer in ``--format``.

    A parameter of ``body`` whose type is a dataclass is a group of options: the command has an option for each field.
    """
    options: dict[str, Parameter] = {}
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, parameter in inspect.signature(body, eval_str=True).parameters.items():
        group: Any = parameter.annotation
        if is_dataclass(group):
            members = inspect.signature(group, eval_str=True).parameters  # type: ignore[arg-type]  # a class
            options |= members
            groups[name] = group, list(members)
        else:
            options[name] = parameter
    takes_format = "format" in options
    options.setdefault("format", Parameter("format", Parameter.KEYWORD_ONLY, default=FORMAT, annotation=Format))

    @functools.wraps(body)
    def command(**given: Any) -> None:
        format = given["format"] if takes_format else given.pop("format")
        for name, (group, members) in groups.items():
            given[name] = group(**{member: given.pop(member) for member in members})
        with _exit_codes(format):
            _print_answer(format, body(**given))

    options = {name: option.replace(kind=Parameter.KEYWORD_ONLY) for name, option in options.items()}
    command.__signature__ = inspect.Signature([*options.values()])  # type: ignore[attr-defined]  # functions have it
    command.__annotations__ = {name: option.annotation for name, option in options.items()}
    return command


def _print_answer(format: Format, answer: Answer) -> None:
    if format is Format.json:
        print_json(answer.value)
    else:
        answer.show()
    if answer.done is not None and (error := take_failure(sys.stdout)):
        print(f"isomerge: {answer.done}; only its report could not be printed ({error.strerror})", file=sys.stderr)
    if answer.error is not None:
        raise answer.error


def print_json(value: dict[str, Any]) -> None:
    """Print JSON in ASCII, for any terminal and encoding; DEL is the one control that JSON has no need to escape."""
    print(json.dumps(value, allow_nan=False).replace("\x7f", "\\u007f"))


@contextmanager
def _exit_codes(format: Format) -> Iterator[None]:
    """Turn every error that a user can mend into one message and its exit code."""

    def fail(error: IsomergeError) -> NoReturn:
        if format is Format.json:
            details = {"kind": error.kind, "exit_code": error.exit_code, "message": str(error)}
            details |= {"problems": error.problems} if error.problems else {}
            print_json({"error": details})
        if format is Format.human or take_failure(sys.stdout):
            print(f"isomerge: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None

    try:
        yield
    except IsomergeError as error:
        fail(error)
    except MemoryError as error:
        fail(ResourceError(f"out of memory ({error})"))
    except OSError as error:  # of the machine: no temporary folder, a disk that is full
        reason = error.strerror or str(error)
        if "temporary directory" in reason:
            reason += "; TMPDIR names one that can be written to"
        fail(ResourceError(f"{error.filename}: {reason}" if error.filename else reason))


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True)) -> None:
    if version:
        from .. import __version__

        print(f"isomerge-fast {__version__}")
        raise typer.Exit()


def main() -> None:
    """Run the console script."""
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
    """Run the verb and return its exit code; a verb that only answers fails if its answer cannot be printed."""
    try:
        app()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except Exception:  # a mistake in this program
        print(visible(traceback.format_exc(), keep="\n"), file=sys.stderr)
        code = 1
    lost = take_failure(sys.stdout)
    if code or lost is None:
        return code
    if isinstance(lost, BrokenPipeError):  # whoever read it has seen enough
        return CLOSED_PIPE
    print(f"isomerge: standard output cannot be written to ({lost.strerror})", file=sys.stderr)
    return ResourceError.exit_code
