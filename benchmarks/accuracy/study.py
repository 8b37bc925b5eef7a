"""Run all seeds of all settings, and write the results after each setting."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.accuracy.alignment import SMALLEST_GAIN
from benchmarks.accuracy.picture import draw
from benchmarks.accuracy.scores import SeedScore, run_seed
from benchmarks.accuracy.settings import METHODS, Setting
from benchmarks.accuracy.summary import SettingResult, summarise, table
from isomerge_fast.bench.ceilings import device_name


def write(out: Path, results: Sequence[SettingResult], command: str, n_settings: int) -> None:
    """Write the JSON to ``out``, and the picture beside it."""
    plain = {
        "command": command,
        "device": device_name(torch.device("cpu")),
        "threads_per_process": 1,
        "torch": torch.__version__,
        "complete": len(results) == n_settings,
        "smallest_gain": SMALLEST_GAIN,
        "scalings": {key: candidate.scalings for key, candidate in METHODS.items()},
        "settings": [{"title": result.setting.title, **asdict(result)} for result in results],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain, indent=1, ensure_ascii=False)
    # Lists of plain values on one line each: else four fifths of the lines hold a single number.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)
    out.write_text(text + "\n")
    draw(out.with_suffix(".png"), results)


def run_study(
    settings: Sequence[Setting],
    seeds: Sequence[int],
    out: Path,
    *,
    common_fractions: Sequence[float] = (),
    command: str = "",
    processes: int = 1,
    say: Callable[[str], None] = print,
) -> list[SettingResult]:
    """Run all seeds of all settings; give table, JSON and picture after every setting.

    ``processes`` seeds run at once, each on one thread, so that figures do not depend on it.
    """
    results: list[SettingResult] = []
    jobs = [(setting, seed, tuple(common_fractions)) for setting in settings for seed in seeds]
    started = time.perf_counter()
    with _in_order(jobs, processes) as scores:
        for setting in settings:
            found = []
            for seed in seeds:
                found.append(next(scores))
                say(f"{time.perf_counter() - started:5.0f} s  {setting.title}, seed {seed}")
            results.append(summarise(setting, found, common_fractions))
            write(out, results, command, len(settings))
            say(f"\n{table(results[-1])}\n")
    return results


@contextmanager
def _in_order(jobs: Sequence[tuple[Setting, int, tuple[float, ...]]], processes: int) -> Iterator[Iterator[SeedScore]]:
    if processes == 1:
        yield (run_seed(*job) for job in jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:  # torch's threads do not survive a fork
        yield pool.map(run_seed, *zip(*jobs, strict=True))
