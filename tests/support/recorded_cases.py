"""The cases of a recording: merges of files by every way, commands with what they print, and merges in memory."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import isomerge_fast as imf
from recorded_inputs import (
    BF16,
    F16,
    F32,
    F64,
    PROJECTIONS,
    SMALL,
    Family,
    aged,
    base_tensors,
    change_expert,
    make_adapters,
    make_deltas,
    make_family,
    moved,
    random,
)
from recorded_texts import Place

Case = tuple[str, Callable[[], dict[str, Any]]]
Cases = Iterator[Case]
SPECTRAL = ("iso-c", "iso-cts")
METHODS = (*SPECTRAL, "mean", "task-arithmetic")
# What is met by which method in a whole recording.
EXPECTED_ROUTES = {
    "copy": ("copy",),
    "iso-c": ("resident", "streamed", "by-rows", "factors", "adapter"),
    "iso-cts": ("resident", "streamed", "by-rows", "factors", "adapter"),
    "mean": ("by-rows", "factors", "adapter"),
    "task-arithmetic": ("by-rows", "factors", "adapter"),
}
# Names of families: dtype of the base, and of the experts in turn where it is another.
STORED: dict[str, dict[str, Any]] = {
    "f32": {"dtype": F32},
    "bf16": {"dtype": BF16},
    "f16": {"dtype": F16},
    "f64": {"dtype": F64},
    "bf16-of-f32": {"dtype": BF16, "expert_dtypes": (F32,)},
    "f32-of-all": {"dtype": F32, "expert_dtypes": (F16, BF16, F64)},
}
WEIGHTS = [1.0, 0.3, 1.7]
RULES = [
    [{"match": "*attn*", "weight": 0.35}, {"match": "layers.*", "weight": 1.5}],
    1.0,
    [{"match": "*", "weight": 3}],
]


def cases(work: Path) -> Cases:
    """Yield all cases, each a name and what makes its part of the recording; they run in the folder ``work``."""
    here = Recorded(work)
    yield from here.commands()  # first: they fork this process
    yield from here.dtypes()
    yield from here.settings()
    yield from here.options()
    yield from here.routes()
    yield from here.adapters()
    yield from here.resumed()
    yield from here.over_ray()
    yield from memory()


def flags(config: dict[str, Any]) -> list[str]:
    """Return a config of plain keys as options of the command line."""
    names = {"experts": "--expert", "weights": "--weight", "overrides": "--override", "options": "--option"}
    given: list[str] = []
    for key, value in config.items():
        name = names.get(key, "--" + key.replace("_", "-"))
        if isinstance(value, bool):
            given += [name] if value else []
        elif isinstance(value, dict):
            given += [part for pair in value.items() for part in (name, "=".join(map(str, pair)))]
        else:
            given += [part for each in (value if isinstance(value, list) else [value]) for part in (name, str(each))]
    return given


class Recorded:
    """Cases of files, which know the folder that they work in."""

    def __init__(self, work: Path) -> None:
        self._place = Place(work)

    # ------------------------------------------------------------------------------------------------ merges of files

    def merge(self, config: dict[str, Any], **running: Any) -> dict[str, Any]:
        """Merge into a fresh folder; return its files."""
        return self._written(lambda out: imf.merge({**config, "out": out}, **self._running(running)))

    def _running(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"device": "cpu", "threads": 1, **given}

    def _written(self, action: Callable[[str], object], out: str = "out") -> dict[str, Any]:
        """Return the files of the folder that ``action`` writes, which is removed."""
        try:
            action(out)
            return self._place.folder(Path(out))
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def merge_and_apply(self, config: dict[str, Any], *applied: dict[str, Any], **running: Any) -> dict[str, Any]:
        """Merge with ``save_delta``; return its files and those of other scalings, each of ``applied`` in turn."""
        kept = {**config, "save_delta": True, "out": "kept"}
        try:
            imf.merge(kept, **self._running(running))
            aged(Path("kept"))
            found = {f"kept/{name}": value for name, value in self._place.folder(Path("kept")).items()}
            for index, given in enumerate(applied):
                own = self._written(lambda out, given=given: imf.apply("kept", out=out, device="cpu", **given))
                found |= {f"applied {index}/{name}": value for name, value in own.items()}
            return found
        finally:
            shutil.rmtree("kept", ignore_errors=True)

    def dtypes(self) -> Cases:
        """Yield every method with every stored dtype, of one file and of two shards."""
        for method in METHODS:
            for index, (name, given) in enumerate(STORED.items()):
                shards = 1 + index % 2
                yield (
                    f"dtypes/{method}/{name}",
                    lambda given=given, method=method, shards=shards: self.merge(
                        {**make_family(shards=shards, **given).config, "method": method}
                    ),
                )
            yield (
                f"dtypes/{method}/bf16-three-shards",
                lambda method=method: self.merge({**make_family(dtype=BF16, shards=3).config, "method": method}),
            )

    def settings(self) -> Cases:
        """Yield every key of a config, by methods for which it means something."""
        given: dict[str, dict[str, Any]] = {
            "to-bfloat16": {"dtype": "bfloat16"},
            "to-float16": {"dtype": "float16"},
            "two-scalings": {"scaling": [0.5, 1.3]},
            "weights": {"weights": WEIGHTS},
            "rules-of-weights": {"weights": RULES},
            "normalized-weights": {"weights": WEIGHTS, "normalize_weights": True, "scaling": 0.7},
            "stochastic": {"dtype": "bfloat16", "stochastic_rounding": 7},
            "excluded": {"exclude": ["*attn*", "embed*"], "scaling": 0.9},
            "all-of-it": {
                "weights": RULES,
                "scaling": [0.4, 1.1],
                "dtype": "bfloat16",
                "stochastic_rounding": 3,
                "exclude": ["*odd*"],
                "overrides": [{"match": "*down*", "method": "task-arithmetic"}],
                "save_delta": True,
            },
        }
        for method in METHODS:
            for name, config in given.items():
                yield (
                    f"settings/{method}/{name}",
                    lambda config=config, method=method: self.merge(
                        {**make_family(shards=2).config, "method": method, **config}
                    ),
                )
            yield f"settings/{method}/applied", lambda method=method: self._applied(method, F32)
            yield (
                f"settings/{method}/deltas",
                lambda method=method: self.merge(
                    {**make_deltas().config, "method": method, "experts_are_deltas": True, "scaling": 0.8}
                ),
            )
            for tasks in (1, 2, 8):
                yield (
                    f"settings/{method}/{tasks}-tasks",
                    lambda method=method, tasks=tasks: self.merge(
                        {**make_family(dtype=BF16, tasks=tasks).config, "method": method}
                    ),
                )
        yield "settings/iso-cts/applied-bf16", lambda: self._applied("iso-cts", BF16)
        yield "settings/iso-c/applied-stochastic", lambda: self._applied("iso-c", BF16, stochastic_rounding=5)
        yield from self._single_settings()

    def _applied(self, method: str, dtype: torch.dtype, **config: Any) -> dict[str, Any]:
        """Keep the merged Δ, and apply it at other scalings."""
        family = make_family(dtype=dtype, shards=2)
        others = [{"scaling": 0.7}, {"scaling": [0.2, 2.0]}, {"scaling": 1.0, "dtype": "bfloat16"}]
        return self.merge_and_apply({**family.config, "method": method, "scaling": [0.7, 1.0], **config}, *others)

    def _single_settings(self) -> Cases:
        """Yield what is the same whatever the method."""
        overrides = [
            {"match": "*attn*", "method": "iso-c", "options": {"precision": "reference"}},
            {"match": "layers.1.*", "method": "mean"},
            {"match": "*up*", "method": "task-arithmetic"},
        ]
        yield (
            "settings/overrides",
            lambda: self.merge({**make_family(dtype=BF16).config, "method": "iso-cts", "overrides": overrides}),
        )
        for choice in ("copy", "ignore"):
            yield f"settings/extra-{choice}", lambda choice=choice: self._extra(choice)
        yield "settings/bare-files", lambda: self.merge({**make_family(bare=True).config, "method": "iso-c"})
        yield (
            "settings/two-threads",
            lambda: self.merge({**make_family("medium", BF16).config, "method": "iso-cts"}, threads=2),
        )
        yield (
            "settings/buffered",
            lambda: self.merge({**make_family(dtype=BF16).config, "method": "iso-cts"}, io="buffered"),
        )
        yield "settings/overwritten", self._overwritten

    def _extra(self, choice: str) -> dict[str, Any]:
        """Merge experts of which one has a tensor that the base has not."""
        family = change_expert("extra", lambda tensors: tensors.update(extra=random((5, 7), 1).float()))
        return self.merge({**family.config, "method": "iso-c", "on_extra": choice})

    def _overwritten(self) -> dict[str, Any]:
        """Merge twice into one folder."""
        config = {**make_family().config, "out": "out"}

        def twice(out: str) -> None:
            imf.merge({**config, "method": "mean"}, **self._running({}))
            imf.merge({**config, "method": "iso-c"}, **self._running({"overwrite": True}))

        return self._written(twice)

    def options(self) -> Cases:
        """Yield options of the spectral methods, with sizes on which their solvers differ."""
        of_both: list[dict[str, Any]] = [{"precision": each} for each in ("fast", "default", "reference")]
        of_both += [{"rank_policy": "min-dim"}, {"rank_policy": "min-dim", "precision": "fast"}]
        of_one = [{"common_fraction": each} for each in (0.0, 0.5, 1.0)]
        of_one += [{"common_fraction": 0.5, "precision": each} for each in ("fast", "reference")]
        for method, given in (("iso-c", of_both), ("iso-cts", [*of_both, *of_one])):
            for kind in ("small", "medium"):
                for chosen in given:
                    label = "-".join(map(str, chosen.values()))
                    yield (
                        f"options/{method}/{kind}/{label}",
                        lambda method=method, kind=kind, chosen=chosen: self.merge(
                            {**make_family(kind, BF16).config, "method": method, "options": chosen}
                        ),
                    )
            yield (
                f"options/{method}/medium-f64",
                lambda method=method: self.merge({**make_family("medium", F64).config, "method": method}),
            )

    # ---------------------------------------------------------------------------------------------------------- routes

    def routes(self) -> Cases:
        """Yield large tensors with room, and under the lowest ceiling, at which they are not held."""
        families = {"square-bf16": BF16, "wide-bf16": BF16, "wide-f32": F32, "tall-bf16": BF16, "tall-f32": F32}
        for method in SPECTRAL:
            for name, dtype in families.items():
                kind = name.split("-")[0]
                config = {"method": method, "scaling": [0.5, 1.0], "save_delta": kind == "tall"}
                for label, way in {"with-room": self.merge, "lowest": self._lowest}.items():
                    yield (
                        f"routes/{method}/{name}/{label}",
                        lambda kind=kind, dtype=dtype, config=config, way=way: way(
                            {**make_family(kind, dtype).config, **config}
                        ),
                    )
            for kind in ("wide", "tall"):
                for label, config in self._of_routes(method):
                    yield (
                        f"routes/{method}/{kind}-bf16/lowest-{label}",
                        lambda method=method, kind=kind, config=config: self._lowest(
                            {**make_family(kind, BF16).config, "method": method, **config}
                        ),
                    )
            yield f"routes/{method}/tall-bf16/between", lambda method=method: self._between(method)
            yield (
                f"routes/{method}/wide-bf16/lowest-applied",
                lambda method=method: self._lowest_applied({**make_family("wide", BF16).config, "method": method}),
            )
        for method in ("mean", "task-arithmetic"):
            yield (
                f"routes/{method}/square/lowest",
                lambda method=method: self._lowest(
                    {**make_family("square", BF16).config, "method": method, "stochastic_rounding": 1}
                ),
            )
        yield (
            "routes/iso-cts/adapters/lowest",
            lambda: self._lowest({**make_adapters("plain").config, "method": "iso-cts"}),
        )

    def _of_routes(self, method: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what changes the passes over tensors that are not held, or what is made of them."""
        yield "weights", {"weights": WEIGHTS}
        yield "fast", {"options": {"precision": "fast"}}
        yield "reference", {"options": {"precision": "reference"}}
        yield "min-dim", {"options": {"rank_policy": "min-dim"}}
        yield "deltas", {"experts_are_deltas": True}
        yield "stochastic", {"stochastic_rounding": 9, "scaling": [0.3, 0.9]}
        yield "float16", {"dtype": "float16", "save_delta": True}
        if method == "iso-cts":
            yield "half", {"options": {"common_fraction": 0.5}}
            yield "all-common", {"options": {"common_fraction": 1.0}}

    def _least_ram(self, config: dict[str, Any]) -> int:
        """Return the lowest ceiling under which a merge runs, as the error of a lower one tells it."""
        try:
            imf.merge({**config, "out": "out"}, **self._running({"max_ram": 1}))
        except imf.ResourceError as error:
            if found := re.search(r"smallest that would do is (\d+)", str(error)):
                return int(found[1])
            raise
        raise RuntimeError("a ceiling of one byte was kept")

    def _lowest(self, config: dict[str, Any]) -> dict[str, Any]:
        """Merge under the lowest ceiling."""
        least = self._least_ram(config)
        return {"ceiling": least, **self.merge(config, max_ram=least)}

    def _lowest_applied(self, config: dict[str, Any]) -> dict[str, Any]:
        """Merge under the lowest ceiling, keep Δ, and apply it under the lowest ceiling for that."""
        ceiling = self._least_ram({**config, "save_delta": True})
        return self.merge_and_apply(config, {"scaling": 0.4, "max_ram": ceiling}, max_ram=ceiling)

    def _between(self, method: str) -> dict[str, Any]:
        """Merge under a ceiling a little higher than the lowest, where the ways are others."""
        config = {**make_family("tall", BF16).config, "method": method}
        ceiling = self._least_ram(config) + (8 << 20)
        return {"ceiling": ceiling, **self.merge(config, max_ram=ceiling)}

    # -------------------------------------------------------------------------------------------------------- adapters

    def adapters(self) -> Cases:
        """Yield adapters as experts: merged into their base, and into another adapter."""
        given: dict[str, dict[str, Any]] = {
            "plain": {},
            "weights": {"weights": WEIGHTS},
            "two-scalings": {"scaling": [0.5, 1.3], "dtype": "bfloat16"},
            "rank-2": {"adapter_rank": 2},
            "rank-2-weights": {"adapter_rank": 2, "weights": WEIGHTS},
            "rank-8-two-scalings": {"adapter_rank": 8, "scaling": [0.5, 1.3]},
            "rank-32": {"adapter_rank": 32},
        }
        for method in METHODS:
            for name, config in given.items():
                yield (
                    f"adapters/{method}/{name}",
                    lambda method=method, config=config: self.merge(
                        {**make_adapters("plain").config, "method": method, **config}
                    ),
                )
            yield (
                f"adapters/{method}/applied",
                lambda method=method: self.merge_and_apply(
                    {**make_adapters("plain").config, "method": method, "scaling": 0.6}, {"scaling": [0.6, 1.2]}
                ),
            )
        yield from self._kinds_of_adapters()

    def _kinds_of_adapters(self) -> Cases:
        """Yield what else PEFT writes, by both spectral methods and as an adapter again."""
        kinds: dict[str, dict[str, Any]] = {
            "bf16": {"dtype": BF16, "base_dtype": BF16},
            "rslora": {"use_rslora": True},
            "patterns": {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 5, "down_proj": 16}},
            "embedding": {"embedding": True},
            "whole": {"whole": ("lm_head.weight", "model.layers.0.norm.weight"), "modules_to_save": ["lm_head"]},
            "turned": {"fan_in_fan_out": True, "names": ("model.layers.0.q_proj.weight",)},
            "one": {"tasks": 1},
            "many": {"tasks": 12},
        }
        for name, settings in kinds.items():
            for method in SPECTRAL:
                yield (
                    f"adapters/{method}/{name}",
                    lambda name=name, method=method, settings=settings: self.merge(
                        {**make_adapters(name, **settings).config, "method": method, "scaling": 0.9}
                    ),
                )
                if name != "whole":
                    yield (
                        f"adapters/{method}/{name}-rank-4",
                        lambda name=name, method=method, settings=settings: self.merge(
                            {**make_adapters(name, **settings).config, "method": method, "adapter_rank": 4}
                        ),
                    )
        for method in METHODS:
            yield f"adapters/{method}/missing", lambda method=method: self._missing_in_adapters(method)

    def _missing_in_adapters(self, method: str) -> dict[str, Any]:
        """Merge adapters of which each adapts other tensors."""
        some = make_adapters("some", tasks=2, names=PROJECTIONS[:2])
        others = make_adapters("others", tasks=2, names=PROJECTIONS[1:])
        family = Family(some.base, (*some.experts, *others.experts))
        return self.merge({**family.config, "method": method, "on_missing": "zero"})

    # ------------------------------------------------------------------------------------------ interrupted, and shared

    def resumed(self) -> Cases:
        """Yield merges that were stopped half-way, and went on."""
        for method in METHODS:
            for done in (1, 6):
                yield (
                    f"resumed/{method}/after-{done}",
                    lambda method=method, done=done: self._resumed(
                        {**make_family(dtype=BF16, shards=2).config, "method": method, "scaling": [0.5, 1.0]}, done
                    ),
                )
        yield (
            "resumed/adapters/after-2",
            lambda: self._resumed({**make_adapters("plain").config, "method": "iso-cts"}, 2),
        )

    def _resumed(self, config: dict[str, Any], done: int) -> dict[str, Any]:
        """Stop after so many tensors and go on; the weights have to be those of a merge that was not stopped."""

        def stop(progress: Any) -> None:
            if progress.done_tensors >= done:
                raise KeyboardInterrupt

        def stopped(out: str) -> None:
            try:
                imf.merge({**config, "out": out}, **self._running({"observer": stop}))
            except KeyboardInterrupt:
                imf.merge({**config, "out": out}, **self._running({"resume": True}))
            else:
                raise RuntimeError("was not stopped")

        found, whole = self._written(stopped), self.merge(config)
        unlike = [name for name in whole if not name.endswith("report.json") and found.get(name) != whole[name]]
        if unlike:
            raise RuntimeError(f"resumed, other bytes: {', '.join(unlike)}")
        return found

    def over_ray(self) -> Cases:
        """Yield merges by two worker processes, where Ray is installed."""
        if importlib.util.find_spec("ray") is None:
            return
        yield "ray/iso-cts", lambda: self._over_ray({**make_family("medium", BF16, shards=3).config})

    def _over_ray(self, config: dict[str, Any]) -> dict[str, Any]:
        """Merge by the command line on a cluster that is started for it."""

        def merge(out: str) -> None:
            given = [_command(), "run", *flags({**config, "method": "iso-cts", "out": out}), "--ray", "local"]
            ended = subprocess.run([*given, "--threads", "1", "--device", "cpu"], capture_output=True, text=True)
            if ended.returncode:
                raise RuntimeError(self._place.text(ended.stderr))

        return self._written(merge)

    # -------------------------------------------------------------------------------------------------------- commands

    def commands(self) -> Cases:
        """Yield what the command line prints: of plans, of a merge and what follows it, and of bad input."""
        for name in imf.__all__:  # loaded once, before the forks
            getattr(imf, name)
        for name in ("typer", "pydantic", "rich.console", "rich.table", "yaml"):
            importlib.import_module(name)
        for name, config in self._planned().items():
            for format in ("human", "json"):
                yield (
                    f"plan/{name}/{format}",
                    lambda config=config, format=format: self.command(
                        "plan", *flags(config()), "--device", "cpu", "--format", format
                    ),
                )
        yield "command/run", self._run
        for name, arguments in self._wrong().items():
            yield f"wrong/{name}", lambda arguments=arguments: self._refused(*arguments())

    def command(self, *arguments: str) -> dict[str, Any]:
        """Run ``isomerge`` in a fork of this process, which has torch already; return what it printed."""
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _become_command(arguments)
        _, status = os.waitpid(child, 0)
        printed = {name: Path(name) for name in ("stdout", "stderr")}
        texts = {name: self._place.output(path.read_text()) for name, path in printed.items()}
        for path in printed.values():
            path.unlink()
        return {"exit": os.waitstatus_to_exitcode(status), **texts}

    def _planned(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Return configs to be planned."""
        overrides = {"*attn*": "iso-c", "layers.1.*": "mean"}
        return {
            "iso-c": lambda: {**make_family(shards=2).config, "method": "iso-c"},
            "iso-cts": lambda: {**make_family(dtype=BF16).config, "method": "iso-cts"},
            "mean": lambda: {**make_family(dtype=F64).config, "method": "mean", "weights": WEIGHTS},
            "task-arithmetic": lambda: {**make_family(dtype=F16).config, "method": "task-arithmetic"},
            "scalings": lambda: {**make_family().config, "scaling": [0.5, 1.3], "save_delta": True, "out": "new"},
            "overrides": lambda: {**make_family().config, "overrides": overrides, "exclude": ["*down*"]},
            "dtype": lambda: {**make_family().config, "dtype": "bfloat16", "stochastic_rounding": 1},
            "options": lambda: {
                **make_family("medium").config,
                "method": "iso-cts",
                "options": {"precision": "fast", "common_fraction": 0.5},
            },
            "reference": lambda: {
                **make_family("medium").config,
                "method": "iso-c",
                "options": {"precision": "reference"},
            },
            "large": lambda: {**make_family("tall", BF16).config, "method": "iso-cts"},
            "ceiling-iso-c": lambda: {**make_family("tall", BF16).config, "method": "iso-c", "max_ram": "395MB"},
            "ceiling-iso-cts": lambda: {**make_family("wide", BF16).config, "method": "iso-cts", "max_ram": "425MB"},
            "deltas": lambda: {**make_deltas().config, "experts_are_deltas": True},
            "extra": lambda: {
                **change_expert("extra", lambda tensors: tensors.update(extra=random((5, 7), 1).float())).config,
                "on_extra": "copy",
            },
            "adapters": lambda: {**make_adapters("plain").config, "method": "iso-cts"},
            "adapter-rank": lambda: {**make_adapters("plain").config, "method": "iso-c", "adapter_rank": 6},
            "bare": lambda: {**make_family(bare=True).config, "method": "iso-c"},
        }

    def _run(self) -> dict[str, Any]:
        """Merge, report and verify by the command line."""
        config = {**make_family(dtype=BF16, shards=2).config, "method": "iso-cts", "scaling": [0.5, 1.0], "out": "out"}

        def action(out: str) -> None:
            steps = {
                "run": ["run", *flags(config), "--threads", "1", "--device", "cpu"],
                "again": ["run", *flags(config), "--threads", "1", "--device", "cpu"],
                "report": ["report", out],
                "verify": ["verify", out, "--samples", "3"],
                "apply": ["apply", out, "--scaling", "2", "--out", "other"],
            }
            for name, arguments in steps.items():
                printed[name] = self.command(*arguments, "--format", "json")

        printed: dict[str, Any] = {}
        written = self._written(action)
        return {**printed, **written}

    def _refused(self, *arguments: str) -> dict[str, Any]:
        """Run a command that fails; return what it printed and what it left in the folder."""
        before = {path.name for path in Path().iterdir()}
        found = self.command(*arguments)
        left = sorted({path.name for path in Path().iterdir()} - before)
        for name in left:
            shutil.rmtree(name, ignore_errors=True)
        if found["exit"] == 0:
            raise RuntimeError(f"{' '.join(arguments)}: was done")
        return {**found, "left": left}

    def _wrong(self) -> dict[str, Callable[[], list[str]]]:
        """Return commands that are refused."""

        def run(family: Family | None = None, *more: str, **config: Any) -> list[str]:
            given = {**(family or make_family()).config, "method": "iso-c", "out": "new", **config}
            return ["run", *flags(given), "--threads", "1", "--device", "cpu", *more]

        def changed(name: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[], list[str]]:
            return lambda: run(change_expert(name, change))

        def number(value: float) -> Callable[[dict[str, Tensor]], object]:
            return lambda tensors: tensors["layers.0.up.weight"][3].fill_(value)

        def large_with_nan(kind: str) -> Family:
            name = f"{kind}.weight"
            return change_expert("nan", lambda tensors: tensors[name][-1].fill_(math.nan), kind, BF16)

        attn = "layers.0.attn.weight"
        adapted = "model.layers.0.q_proj.weight"
        return {
            "missing": changed("missing", lambda tensors: tensors.pop(attn)),
            "missing-several": changed("few", lambda tensors: [tensors.pop(name) for name in [*tensors][:4]]),
            "extra": changed("more", lambda tensors: tensors.update(extra=torch.ones(3))),
            "shape": changed("shape", lambda tensors: tensors.update({attn: torch.ones(24, 25)})),
            "integers": changed("integers", lambda tensors: tensors.update({attn: torch.ones(24, 24).int()})),
            "nan": changed("nan", number(math.nan)),
            "infinity": changed("infinity", number(math.inf)),
            "nan-json": lambda: run(change_expert("nan", number(math.nan)), "--format", "json"),
            "nan-mean": lambda: run(change_expert("nan", number(math.nan)), method="mean"),
            "nan-by-rows": lambda: run(large_with_nan("tall"), "--max-ram", "395MB"),
            "nan-by-rows-cts": lambda: run(large_with_nan("tall"), "--max-ram", "410MB", method="iso-cts"),
            "nan-streamed": lambda: run(large_with_nan("wide"), "--max-ram", "425MB"),
            "nan-streamed-cts": lambda: run(large_with_nan("wide"), "--max-ram", "430MB", method="iso-cts"),
            "far-apart": changed("far", number(1e30)),
            "overflow": lambda: run(dtype="float16", scaling=1e7),
            "option": lambda: run(options={"comon_fraction": 0.5}, method="iso-cts"),
            "option-of-another": lambda: run(options={"common_fraction": 0.5}),
            "option-value": lambda: run(options={"common_fraction": 1.5}, method="iso-cts"),
            "option-word": lambda: run(options={"precision": "fastest"}),
            "method": lambda: run(method="iso-d"),
            "method-of-override": lambda: run(overrides={"*attn*": "ties"}),
            "weights": lambda: run(weights=[1.0, 2.0]),
            "weights-of-sum-zero": lambda: run(weights=[1.0, -1.0, 0.0], normalize_weights=True),
            "negative-k": lambda: run(make_family(tasks=8), method="iso-cts", options={"common_fraction": 0.0}),
            "ceiling": lambda: run(None, "--max-ram", "300MB"),
            "ceiling-large": lambda: run(make_family("tall", BF16), "--max-ram", "300MB", "--format", "json"),
            "size": lambda: run(None, "--max-ram", "many"),
            "out-is-base": lambda: run(out=make_family().base),
            "out-is-expert": lambda: run(out=make_family().experts[1]),
            "out-is-there": lambda: run(out=make_adapters("plain").base),
            "no-out": lambda: [each for each in run(out="") if each not in ("--out", "")],
            "no-expert": lambda: run(Family(make_family().base, ("in/nothing",))),
            "no-base": lambda: ["run", "--out", "new"],
            "no-config": lambda: ["plan", "nothing.yml"],
            "key": lambda: ["plan", _yaml("key", "base: a\nexperts: [b]\nscalling: 2\n")],
            "types": lambda: ["plan", _yaml("types", "base: a\nexperts: b\nscaling: much\nweights: {a: 1}\n")],
            "syntax": lambda: ["plan", _yaml("syntax", "base: [a\n")],
            "dtype": lambda: run(dtype="float8"),
            "scaling": lambda: run(scaling="nan"),
            "pattern": lambda: run(exclude=["*nowhere*"]),
            "rounding": lambda: run(stochastic_rounding=1),
            "threads": lambda: run(None, "--threads", "0"),
            "device": lambda: run(None, "--device", "tpu"),
            "io": lambda: run(None, "--io", "fast"),
            "adapter-rank": lambda: run(adapter_rank=4),
            "adapter-dora": lambda: run(make_adapters("dora", use_dora=True)),
            "adapter-of-another-base": lambda: run(Family(make_family().base, make_adapters("plain").experts)),
            "adapter-nan": lambda: run(_adapters_with_nan(adapted)),
            "adapters-unlike": lambda: run(
                Family(
                    make_adapters("some", tasks=2, names=PROJECTIONS[:2]).base,
                    (
                        *make_adapters("some", tasks=2, names=PROJECTIONS[:2]).experts,
                        *make_adapters("others", tasks=2, names=PROJECTIONS[1:]).experts,
                    ),
                )
            ),
            "adapters-of-two-bases": lambda: run(_of_two_bases()),
            "truncated": lambda: run(_broken("truncated", lambda data: data[:-100])),
            "header": lambda: run(_broken("header", lambda data: b"\xff" * 8 + data[8:])),
            "no-safetensors": lambda: run(_broken("text", lambda data: b"hello")),
            "shard": lambda: run(_without_shard()),
            "apply-nothing": lambda: ["apply", make_family().base, "--scaling", "1", "--out", "new"],
            "verify-nothing": lambda: ["verify", make_family().base],
            "report-nothing": lambda: ["report", make_family().base, "--format", "json"],
        }


def _command() -> str:
    """Return the path of ``isomerge``, which lies beside the interpreter."""
    return str(Path(sys.executable).parent / "isomerge")


def _become_command(arguments: Sequence[str]) -> None:
    """End this process as ``isomerge`` would, with its answers in two files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        sys.argv = ["isomerge", *arguments]
        runpy.run_path(_command(), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _yaml(name: str, text: str) -> str:
    """Return the path of a config file with this text."""
    path = Path("in") / f"{name}.yml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def _broken(name: str, change: Callable[[bytes], bytes]) -> Family:
    """Return the small family with another last expert, whose file holds other bytes."""
    family = change_expert(f"broken-{name}", lambda tensors: None)
    path = Path(family.experts[1]) / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    return family


def _without_shard() -> Family:
    """Return a family of two shards, of which the second expert lacks one."""
    family = make_family(shards=2)
    path = Path("in/changed/shard")
    if not path.exists():
        shutil.copytree(family.experts[1], path)
        (path / "model-00002-of-00002.safetensors").unlink()
    return Family(family.base, (family.experts[0], str(path), family.experts[2]))


def _adapters_with_nan(name: str) -> Family:
    """Return adapters of which the second holds NaN."""
    from safetensors.torch import load_file, save_file

    family = make_adapters("nan")
    path = Path(family.experts[1]) / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"][0, 0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    return family


def _of_two_bases() -> Family:
    """Return adapters that name different bases."""
    family = make_adapters("two-bases")
    path = Path(family.experts[2]) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "another/model"}))
    return family


# --------------------------------------------------------------------------------------------------------------- memory


def memory() -> Cases:
    """Yield merges in memory, which give tensors."""
    calls: dict[str, Callable[..., Tensor]] = {"iso-c": imf.iso_c, "iso-cts": imf.iso_cts}
    for method, call in calls.items():
        for name, given, options in _of_deltas(method):
            yield (
                f"memory/{method}/{name}",
                lambda call=call, given=given, options=options: {"delta": call(given(), **options)},
            )
    for method in METHODS:
        for name, dtype in (("f32", F32), ("bf16", BF16), ("f16", F16), ("f64", F64)):
            for label, options in _of_states(dtype):
                yield (
                    f"memory/states/{method}/{name}/{label}",
                    lambda method=method, dtype=dtype, options=options: _states(method, dtype, **options),
                )
        yield f"memory/stored/{method}", lambda method=method: _stored(method)
    for name, action in _refused_in_memory().items():
        yield f"refused-in-memory/{name}", lambda action=action: _error_of(action)


DELTAS: dict[str, tuple[int, ...]] = {
    "square": (96, 96),
    "wide": (64, 224),
    "tall": (224, 64),
    "nearly": (100, 72),
    "large-tall": (1200, 160),
    "row": (1, 30),
    "batch": (4, 40, 56),
    "tall-batch": (3, 160, 32),
}


def _of_deltas(method: str) -> Iterator[tuple[str, Callable[[], Any], dict[str, Any]]]:
    """Yield (name, what gives deltas, options)."""
    for shape_name, shape in DELTAS.items():
        for name, dtype in (("f32", F32), ("bf16", BF16), ("f64", F64)):
            yield f"{shape_name}-{name}", lambda shape=shape, dtype=dtype: _deltas(shape, dtype), {}
        yield f"{shape_name}-weights", lambda shape=shape: _deltas(shape, F32), {"weights": WEIGHTS}
        for options in ({"precision": "fast"}, {"precision": "reference"}, {"rank_policy": "min-dim"}):
            label = "-".join(options.values())
            yield f"{shape_name}-{label}", lambda shape=shape: _deltas(shape, F32), dict(options)
        if method == "iso-cts":
            for fraction in (0.0, 0.5, 1.0):
                least = 0.1 if shape_name == "tall-batch" else 0.0  # k would be negative
                yield (
                    f"{shape_name}-fraction-{fraction}",
                    lambda shape=shape: _deltas(shape, F32),
                    {"common_fraction": max(fraction, least)},
                )
    yield "stack", lambda: torch.stack(_deltas((40, 30), F32)), {}
    yield "stack-of-batches", lambda: torch.stack(_deltas((2, 40, 30), F32)), {}
    yield "numpy", lambda: [delta.numpy() for delta in _deltas((40, 30), F32)], {}
    yield "mixed", lambda: [d.to(t) for d, t in zip(_deltas((40, 30), F64), (F32, BF16, F16), strict=True)], {}
    yield "transposed", lambda: [delta.mT for delta in _deltas((40, 30), F32)], {}
    yield "low-rank", lambda: _low_rank((90, 60)), {}
    yield "low-rank-min-dim", lambda: _low_rank((90, 60)), {"rank_policy": "min-dim"}
    yield "cancelling", lambda: _cancelling((64, 48)), {}
    yield "zero", lambda: [torch.zeros(12, 9)] * 3, {}
    for tasks in (1, 2, 8):
        yield f"{tasks}-tasks", lambda tasks=tasks: _deltas((60, 80), F32, tasks=tasks), {}
    yield "ill-conditioned", lambda: _ill_conditioned(64), {}


def _deltas(shape: Sequence[int], dtype: torch.dtype, tasks: int = 3) -> list[Tensor]:
    """Return deltas with something in common."""
    common = random(shape, 77)
    return [(0.1 * common + 0.2 * random(shape, 80 + task)).to(dtype) for task in range(tasks)]


def _low_rank(shape: tuple[int, int]) -> list[Tensor]:
    """Return deltas of rank 4."""
    return [(random((shape[0], 4), task) @ random((4, shape[1]), 50 + task)).float() for task in range(3)]


def _cancelling(shape: tuple[int, int]) -> list[Tensor]:
    """Return deltas whose sum is a thousandth of each."""
    first, small = random(shape, 1), 1e-3 * random(shape, 2)
    return [first.float(), (small - first).float(), small.float()]


def _ill_conditioned(side: int) -> list[Tensor]:
    """Return deltas whose sum has singular values from 1 to 1e-6."""
    left, right = (torch.linalg.qr(random((side, side), seed))[0] for seed in (1, 2))
    total = left @ torch.diag(torch.logspace(0, -6, side, dtype=F64)) @ right
    return [(total / 3 + sign * 1e-7 * random((side, side), 3)).float() for sign in (-1, 0, 1)]


def _of_states(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, options) for ``merge_state_dicts``."""
    yield "plain", {}
    yield "weights", {"weights": WEIGHTS, "scaling": 0.6}
    yield "to-bf16", {"dtype": BF16, "scaling": 1.3}
    if dtype in (F32, BF16):
        yield "excluded", {"exclude": ["*attn*"], "dtype": "float16"}
        yield "stochastic", {"dtype": "bfloat16", "stochastic_rounding": 11}


def _states(method: str, stored: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Merge state dicts of which two tensors are tied."""
    base = base_tensors(SMALL, stored)
    experts = [moved(base, task) for task in range(3)]
    for state in (base, *experts):
        state["tied.weight"] = state["embed.weight"]
    return imf.merge_state_dicts(base, experts, method, **options)


def _stored(method: str) -> dict[str, Tensor]:
    """Merge state dicts that are read from files."""
    family = make_family(dtype=BF16, shards=2)
    with ExitStack() as stack:
        base, *experts = [stack.enter_context(imf.open_state_dict(path)) for path in (family.base, *family.experts)]
        return imf.merge_state_dicts(base, experts, method, scaling=0.8)


def _error_of(action: Callable[[], object]) -> dict[str, Any]:
    """Return what an action raises."""
    try:
        action()
    except (imf.IsomergeError, ValueError) as error:
        return {"type": type(error).__name__, "text": str(error)}
    raise RuntimeError("was not refused")


def _refused_in_memory() -> dict[str, Callable[[], object]]:
    """Return calls that are refused."""
    deltas = _deltas((8, 6), F32)
    nan = [deltas[0], deltas[1].clone().fill_(math.nan), deltas[2]]
    base = {"w": deltas[0]}
    experts = [{"w": delta} for delta in deltas]
    return {
        "none": lambda: imf.iso_c([]),
        "shapes": lambda: imf.iso_c([deltas[0], deltas[1].T]),
        "nan": lambda: imf.iso_c(nan),
        "nan-cts": lambda: imf.iso_cts(nan),
        "vectors": lambda: imf.iso_cts([torch.ones(3)]),
        "integers": lambda: imf.iso_c([torch.ones(3, 3).int()]),
        "weights": lambda: imf.iso_c(deltas, weights=[1.0]),
        "option": lambda: imf.iso_c(deltas, precison="fast"),
        "negative-k": lambda: imf.iso_cts(_deltas((6, 9), F32, tasks=4), 0.0),
        "method": lambda: imf.merge_state_dicts(base, experts, "iso"),
        "missing": lambda: imf.merge_state_dicts(base, [*experts, {}]),
        "extra": lambda: imf.merge_state_dicts(base, [{"w": deltas[0], "v": deltas[0]}]),
        "state-nan": lambda: imf.merge_state_dicts(base, [{"w": delta} for delta in nan]),
        "pattern": lambda: imf.merge_state_dicts(base, experts, exclude=["*v*"]),
        "overflow": lambda: imf.merge_state_dicts(base, experts, "mean", scaling=1e6, dtype=F16),
    }
