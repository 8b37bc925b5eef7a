"""Kills merges at thousands of points, resumes them, and compares every byte with an unharmed run.

A point is a merge, the number of a call by which it changes its folder, and what happens there: a kill before the call,
after it or after half of a write; an error, once or from then on; or a write cut short. Afterwards the output must be
absent, as it was before, or complete. Some points damage what is staged, as a power cut may, or are killed again while
resuming. In the end ``resume`` must give the bytes of the unharmed run, and leave nothing beside them.

    python tests/support/fault_driver.py --points 10000 --seed 0
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_runs import ENVIRONMENT, Fault, Outcome, attempt, build_shim, warm_up
from isomerge_fast.checkpoint.output.staging import OLD, run_folders

KILLS = ["kill-before", "kill-after", "kill-half"]
ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS]
# Of the points: the second number is how many of a hundred are not kills.
FAILURES_PERCENT, AGAIN_PERCENT, DAMAGE_PERCENT, LEFTOVER_PERCENT = 20, 30, 15, 15

State = dict[str, bytes] | None


@dataclass(frozen=True)
class Scenario:
    """A merge; with ``before`` it replaces the output of another one, with ``units`` every file is merged in so many;
    attempts after the first have other numbers of them.
    """

    name: str
    config: dict[str, Any]
    io: str = "auto"
    before: str | None = None
    units: int = 0


SCENARIOS = [
    Scenario("one-file", {"family": "one-file", "method": "iso-c"}),
    Scenario("sharded", {"family": "sharded", "method": "task-arithmetic", "scaling": [0.5, 1.25]}, "buffered"),
    Scenario("rounded", {"family": "one-file", "method": "iso-cts", "dtype": "bfloat16", "stochastic_rounding": 7}),
    Scenario("with-delta", {"family": "sharded", "method": "iso-c", "save_delta": True}),
    Scenario("large", {"family": "large", "method": "mean", "scaling": [1.0, 0.3]}),
    Scenario("other-shards", {"family": "sharded", "method": "mean"}, before="one-file"),
    Scenario("divided", {"family": "sharded", "method": "iso-c", "save_delta": True}, units=3),
    Scenario("one-file-divided", {"family": "one-file", "method": "task-arithmetic"}, "buffered", units=4),
    Scenario("fewer-shards", {"family": "one-file", "method": "iso-c", "scaling": 0.5}, "buffered", before="sharded"),
]


def make_families(root: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Inputs of all scenarios, with companions; ``large`` is read and written past the page cache."""
    import torch

    from checkpoints import make_base, make_expert, make_family, save_folder

    families = {
        "one-file": make_family(root / "one-file", tasks=2),
        "sharded": make_family(root / "sharded", tasks=2, shards=3),
    }
    base = {**make_base(torch.bfloat16), "large.weight": torch.randn(2304, 1024).bfloat16()}
    save_folder(root / "large/base", base, config={"model_type": "test"})
    save_folder(root / "large/expert", make_expert(base, 0))
    families["large"] = (root / "large/base", [root / "large/expert"])
    for folder, _ in families.values():
        (folder / "tokenizer.json").write_text(json.dumps({"vocabulary": list(range(3000))}))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text("{}")
    (families["one-file"][0] / "merges.txt").write_text("a b\n")
    return families


def state_of(folder: Path) -> State:
    """Every file with its bytes; of the report what does not tell of times, places and ways of reading."""
    if not folder.exists():
        return None
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    if "report.json" in files:
        try:
            report = json.loads(files["report.json"])
            for key in ("seconds", "io", "outputs", "workers", "digest"):
                report.pop(key)
            for tensor in report["tensors"]:
                tensor.pop("seconds")
            files["report.json"] = json.dumps(report, sort_keys=True).encode()
        except (ValueError, KeyError):
            pass  # cut short: compared as it is
    return files


def difference(found: State, expected: State) -> str:
    if found is None or expected is None:
        return f"absent: {found is None}, to be absent: {expected is None}"
    names = sorted(found.keys() ^ expected.keys())
    changed = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    return f"missing or too many: {names}, with other bytes: {changed}"


@dataclass
class Tally:
    points: int = 0
    calls: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Driver:
    """Tries points one after the other below ``root``."""

    def __init__(self, root: Path, families: dict[str, tuple[Path, list[Path]]]) -> None:
        self._point = root / "point"
        self._families = families
        self.tally = Tally()
        self._expected: dict[str, State] = {}
        self._calls: dict[str, int] = {}
        self._saved: dict[str, Path] = {}
        for scenario in SCENARIOS:
            self._measure(scenario, root / "saved")

    def _measure(self, scenario: Scenario, saved: Path) -> None:
        """Runs it unharmed: what is expected, and after how many calls."""
        self._prepare(scenario)
        outcome = self._attempt(scenario, Fault(str(self._point)))
        assert outcome.status == "done", outcome
        self._expected[scenario.name] = state_of(self._point / "out")
        self._calls[scenario.name] = outcome.calls
        self._saved[scenario.name] = saved / scenario.name
        shutil.copytree(self._point / "out", self._saved[scenario.name])

    def _prepare(self, scenario: Scenario) -> None:
        shutil.rmtree(self._point, ignore_errors=True)
        self._point.mkdir()
        if scenario.before:
            shutil.copytree(self._saved[scenario.before], self._point / "out")

    def _attempt(
        self,
        scenario: Scenario,
        fault: Fault,
        *,
        resume: bool = False,
        overwrite: bool = False,
        units: int | None = None,
    ) -> Outcome:
        config = dict(scenario.config)
        base, experts = self._families[config.pop("family")]
        config |= {"base": str(base), "experts": [str(expert) for expert in experts], "out": str(self._point / "out")}
        overwrite = overwrite or scenario.before is not None
        units = scenario.units if units is None else units
        return attempt(config, fault, resume=resume, overwrite=overwrite, io=scenario.io, units=units)

    def try_point(self, chance: random.Random) -> None:
        """One point; what is wrong goes into ``tally.wrong``."""
        scenario = chance.choice(SCENARIOS)
        self._prepare(scenario)
        told = [scenario.name]
        overwrite = False
        if chance.randrange(100) < LEFTOVER_PERCENT:
            # What another merge left behind is discarded.
            other = chance.choice(SCENARIOS)
            fault = self._fault(other, chance, KILLS)
            overwrite = True
            told += [f"after {other.name} {fault.mode} {fault.nth}", self._attempt(other, fault, overwrite=True).status]
        before = self._settled_output()
        resume, units = False, scenario.units
        for _ in range(8):
            failing = chance.randrange(100) < FAILURES_PERCENT
            fault = self._fault(scenario, chance, ["fail", "fail-on", "short"] if failing else KILLS)
            outcome = self._attempt(scenario, fault, resume=resume, overwrite=overwrite, units=units)
            told += [f"{fault.mode} {fault.nth}" + (f" ({errno.errorcode[fault.errno]})" if fault.errno else "")]
            told += [outcome.status]
            self.tally.points += 1
            self.tally.statuses[outcome.status if fault.mode in KILLS else f"{fault.mode}: {outcome.status}"] += 1
            self._check_attempt(scenario, fault, outcome, before, told)
            if outcome.status == "done":
                break
            resume = True
            units = chance.randrange(4) if scenario.units else 0
            if chance.randrange(100) < DAMAGE_PERCENT:
                told += [self._damage(chance)]
            if chance.randrange(100) >= AGAIN_PERCENT:
                break
        outcome = self._attempt(scenario, Fault(str(self._point)), resume=True, overwrite=overwrite, units=units)
        self._check_end(scenario, outcome, told)

    def _fault(self, scenario: Scenario, chance: random.Random, modes: list[str]) -> Fault:
        mode = chance.choice(modes)
        error = chance.choice(ERRORS) if mode in ("fail", "fail-on") else 0
        return Fault(str(self._point), mode, chance.randint(1, self._calls[scenario.name]), errno=error)

    def _settled_output(self) -> State:
        """What counts as the output: a commit that was cut between its two renames has it in ``old``."""
        out, old = self._point / "out", self._replaced()
        return state_of(old if old is not None and not out.exists() else out)

    def _replaced(self) -> Path | None:
        return next((run / OLD for run in run_folders(self._point / "out") if (run / OLD).exists()), None)

    def _damage(self, chance: random.Random) -> str:
        """Does to staged files what a power cut may: bytes that were not synced are zero, or the end is gone."""
        staged = [path for path in sorted((self._point / ".out.isomerge").rglob("*")) if path.is_file()]
        staged = [path for path in staged if path.stat().st_size and path.name != "lock" and "old" not in path.parts]
        if not staged:
            return "nothing staged"
        path = chance.choice(staged)
        content = bytearray(path.read_bytes())
        at = chance.randrange(len(content))
        if chance.random() < 0.5:
            del content[at:]
        else:
            end = min(len(content), at + chance.randint(1, 4096))
            content[at:end] = bytes(end - at)
        path.write_bytes(bytes(content))
        return f"damaged {path.name} at {at}"

    def _check_attempt(
        self, scenario: Scenario, fault: Fault, outcome: Outcome, before: State, told: list[str]
    ) -> None:
        allowed = {
            "kill": ("killed", "done"),
            "fail": ("done", "ResourceError"),
            "short": ("done",),
        }[fault.mode.split("-")[0]]
        if outcome.status not in allowed or (
            outcome.status == "ResourceError" and str(self._point) not in outcome.message
        ):
            self._complain(told, f"{outcome.status}: {outcome.message}")
        found = state_of(self._point / "out")
        complete = self._expected[scenario.name]
        between = found is None and self._replaced() is not None and fault.mode != "fail"
        if not (found in (before, complete) or (between and self._settled_output() == before)):
            self._complain(told, f"the output is neither old nor new: {difference(found, complete)}")
        if outcome.status == "done" and found != complete:
            self._complain(told, f"done, and the output is not it: {difference(found, complete)}")

    def _check_end(self, scenario: Scenario, outcome: Outcome, told: list[str]) -> None:
        if outcome.status != "done":
            self._complain(told, f"resuming ended in {outcome.status}: {outcome.message}")
            return
        found, complete = state_of(self._point / "out"), self._expected[scenario.name]
        if found != complete:
            self._complain(told, f"resumed to other bytes: {difference(found, complete)}")
        if os.listdir(self._point) != ["out"]:
            self._complain(told, f"left beside the output: {sorted(os.listdir(self._point))}")

    def _complain(self, told: list[str], what: str) -> None:
        self.tally.wrong.append(f"{', '.join(told)}: {what[-1500:]}")


def drive(points: int, seed: int, seconds: float | None = None, folder: str | None = None) -> Tally:
    """Tries ``points`` points in ``folder``, or as many as fit into ``seconds``. Needs the shim preloaded."""
    warm_up()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="isomerge-faults-", dir=folder) as made:
        root = Path(made)
        driver = Driver(root, make_families(root / "inputs"))
        chance = random.Random(seed)
        while driver.tally.points < points and (seconds is None or time.monotonic() - started < seconds):
            before = driver.tally.points // 1000
            driver.try_point(chance)
            if driver.tally.points // 1000 > before:
                told = (
                    f"{driver.tally.points} points, {len(driver.tally.wrong)} wrong, {time.monotonic() - started:.0f} s"
                )
                print(told, file=sys.stderr, flush=True)
        return driver.tally


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=None, help="stop after so many")
    parser.add_argument("--folder", default=None, help="where; on a disk or in memory")
    arguments = parser.parse_args()
    if "fault_shim" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, **ENVIRONMENT, "LD_PRELOAD": str(build_shim(Path(folder)))}
            return os.spawnve(os.P_WAIT, sys.executable, [sys.executable, *sys.argv], environment)
    started = time.monotonic()
    count = arguments.processes
    shares = [(arguments.points + index) // count for index in range(count)]
    tasks = [
        (share, arguments.seed * 1000 + index, arguments.seconds, arguments.folder)
        for index, share in enumerate(shares)
    ]
    if count == 1:
        tallies = [drive(*tasks[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            tallies = pool.starmap(drive, tasks)
    seconds = time.monotonic() - started
    points = sum(tally.points for tally in tallies)
    wrong = [line for tally in tallies for line in tally.wrong]
    for line in wrong[:20]:
        print(line)
    statuses = sum((tally.statuses for tally in tallies), Counter[str]())
    print("ended as:", ", ".join(f"{name} {number}" for name, number in sorted(statuses.items())))
    print(f"{points} points, {len(wrong)} wrong outputs, {seconds:.0f} s ({seconds / max(1, points):.3f} s a point)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
