"""Pairs of merges into one output where locks do nothing: whatever happens, the output is one of them, or absent.

Both run in forks of this process, slowed at random at every call that changes a folder. As it is on a network file
system without locks, neither sees the other's; with ``--locks`` they work.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fault_driver import State, difference, state_of
from fault_runs import ENVIRONMENT, Fork, Outcome, merged, warm_up

SLOWED = ["open", "rename", "mkdir", "rmdir", "unlink", "fsync", "replace"]
MOST_SECONDS = 0.004  # at one call
SCALINGS = (1.0, 0.5)
# Of the second merge: its options, and whether it is another merge than the first.
MODES: dict[str, tuple[dict[str, Any], bool]] = {
    "the same again": ({}, False),
    "the same, --overwrite": ({"overwrite": True}, False),
    "the same, --resume": ({"resume": True}, False),
    "another, --overwrite": ({"overwrite": True}, True),
    "another, --resume --overwrite": ({"resume": True, "overwrite": True}, True),
}
# How a merge may end that finds another one at work.
ALLOWED = {"done", "killed", "ConfigError", "ResourceError"}


def _slowed(config: dict[str, Any], seed: int, locks: bool, options: dict[str, Any]) -> Outcome:
    """A merge in this process, which is a fork."""
    chance = random.Random(seed)

    def slow(real: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            time.sleep(chance.random() ** 4 * MOST_SECONDS)
            return real(*given, **named)

        return call

    for name in SLOWED:
        setattr(os, name, slow(getattr(os, name)))
    if not locks:
        fcntl.flock = fcntl.lockf = lambda *_: None
    return merged(config, **options)


class Pairs:
    """Tries pairs below ``root``; what is wrong goes into ``wrong``."""

    def __init__(self, root: Path, *, locks: bool) -> None:
        from checkpoints import make_family

        base, experts = make_family(root / "inputs", tasks=2, shards=3)
        (base / "tokenizer.json").write_text("{}")
        self._root, self._locks = root, locks
        self._config = {"base": str(base), "experts": [str(path) for path in experts], "method": "iso-c"}
        self._expected: dict[float, State] = {}
        self._seconds = 0.0
        for scaling in SCALINGS:
            started = time.monotonic()
            first, _ = self._start(root / f"whole-{scaling}/out", scaling, 0, {})
            assert first.wait().status == "done"
            self._expected[scaling] = state_of(root / f"whole-{scaling}/out")
            self._seconds = time.monotonic() - started
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []

    def _start(self, out: Path, scaling: float, seed: int, options: dict[str, Any]) -> tuple[Fork, float]:
        config = {**self._config, "scaling": scaling, "save_delta": True, "out": str(out)}
        return Fork(lambda: _slowed(config, seed, self._locks, options)), scaling

    def try_pair(self, chance: random.Random) -> None:
        """One pair: the second starts while the first is at work, which may be killed."""
        out = self._root / "pair/out"
        shutil.rmtree(out.parent, ignore_errors=True)
        name, (options, is_other) = chance.choice(list(MODES.items()))
        kill = chance.random() < 0.2
        first, one = self._start(out, SCALINGS[0], chance.getrandbits(32), {})
        time.sleep(chance.random() * self._seconds)
        second, other = self._start(out, SCALINGS[1] if is_other else SCALINGS[0], chance.getrandbits(32), options)
        if kill:
            time.sleep(chance.random() * self._seconds)
            os.kill(first.pid, signal.SIGKILL)
        outcomes = [first.wait(), second.wait()]
        told = f"{name}{', the first killed' if kill else ''}: {' / '.join(outcome.status for outcome in outcomes)}"
        self.ended[told] += 1
        found = state_of(out)
        complete = [self._expected[scaling] for scaling in {one, other}]
        if found is not None and found not in complete:
            self.wrong.append(f"{told}: the output is neither: {difference(found, complete[0])}")
        if found is None and any(outcome.status == "done" for outcome in outcomes):
            self.wrong.append(f"{told}: done, and no output")
        if outcomes[1].status == "done" and found != self._expected[other] and outcomes[0].status != "done":
            self.wrong.append(f"{told}: the second is done, and the output is not its own")
        for outcome in outcomes:
            if outcome.status not in ALLOWED:
                self.wrong.append(f"{told}: {outcome.message[-1500:]}")
        # What is left is settled by the next run, whatever it is.
        last, scaling = self._start(out, SCALINGS[0], 0, {"resume": True, "overwrite": True})
        outcome = last.wait()
        if outcome.status != "done" or state_of(out) != self._expected[scaling]:
            self.wrong.append(f"{told}: then --resume --overwrite: {outcome.status} {outcome.message[-800:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--locks", action="store_true", help="let them work")
    parser.add_argument("--folder", default=None, help="where; on a disk or in memory")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    started = time.monotonic()
    warm_up()
    with tempfile.TemporaryDirectory(prefix="isomerge-pairs-", dir=arguments.folder) as made:
        driver, chance = Pairs(Path(made), locks=arguments.locks), random.Random(arguments.seed)
        for _ in range(arguments.pairs):
            driver.try_pair(chance)
    for line in driver.wrong[:20]:
        print(line)
    for told, count in sorted(driver.ended.items()):
        print(f"{count:5d}  {told}")
    print(f"{arguments.pairs} pairs, {len(driver.wrong)} wrong outputs, {time.monotonic() - started:.0f} s")
    return 1 if driver.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
