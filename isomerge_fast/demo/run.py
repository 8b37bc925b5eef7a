"""Train a base and its experts, merge them from their files, choose each scaling on validation, score on test."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors.torch import save_file

from ..errors import ConfigError, MissingPackageError, ResourceError
from ..parsing.values import LARGEST_WHOLE, path_text, whole_number
from .model import DigitsNetwork, Training, accuracies, initial, normalised, own_accuracies, train_family
from .picture import draw_singular_values
from .tasks import TRANSFORMS, TaskSuite, load_tasks

# 36 steps leave the base at 0.76 to 0.81 on validation (three seeds): good enough to fine-tune, bad enough that
# merging has something to win. 300 steps take the experts to 0.98, their plateau. The test digits had no say in either.
WIDTH = 128
DEPTH = 3
TRAINING = Training(base_steps=36, base_learning_rate=1e-3, expert_steps=300, expert_learning_rate=5e-4)

# Per method: its name in the table, and the scalings to choose from; the ends of each range are past the optimum. The
# mean is what the name says to a reader, the plain average of the weights: its scaling is 1 and nothing is chosen.
METHODS: dict[str, tuple[str, tuple[float, ...]]] = {
    "mean": ("mean of the weights", (1.0,)),
    "task-arithmetic": ("task arithmetic", (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)),
    "iso-c": ("Iso-C", (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0)),
    "iso-cts": ("Iso-CTS", (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0)),
}
PICTURED_LAYERS = ("blocks.0.up.weight", "blocks.2.down.weight")  # a tall one and a wide one, early and late
LEGEND = (
    "Accuracy is the mean over the tasks, each expert on its own. Normalised: as a share of the expert's accuracy.",
    "The mean is the plain average of the weights (α = 1); every other α was chosen on validation digits alone.",
)


@dataclass(frozen=True)
class DemoRow:
    """Hold one line of the table; accuracies are means over the tasks, the experts' each of its own task."""

    name: str  # as printed
    method: str | None  # None for the base and the experts
    folder: str  # of the checkpoint (for the experts: of all of them), relative to the demo's `out`
    scaling: float | None  # the chosen α, or None where nothing was merged
    validation: float
    test: float
    normalised: float  # mean of (test accuracy / the expert's test accuracy), of which the experts have 1
    test_by_task: dict[str, float]
    # (α, validation accuracy) of every candidate that α was chosen from.
    validation_by_scaling: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class DemoResult:
    """Hold what one demo run found and wrote; the files are in `out`, and `demo.json` holds `to_dict()`."""

    out: Path
    picture: Path
    seed: int
    tasks: tuple[str, ...]
    n_train: int
    n_validation: int
    n_test: int
    rows: tuple[DemoRow, ...]
    seconds: float

    def row(self, name: str) -> DemoRow:
        """Return the row of "base", "experts", or of a merge method."""
        return next(row for row in self.rows if name in (row.method, row.name))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        plain = asdict(self) | {"out": str(self.out), "picture": str(self.picture)}
        return json.loads(json.dumps(plain))

    def table(self) -> str:
        """Return the rows as aligned text, for any terminal or log."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'':{width}}  {'α':>5}  validation   test  normalised"]
        for row in self.rows:
            scaling = "-" if row.scaling is None else f"{row.scaling:g}"
            lines.append(
                f"{row.name:{width}}  {scaling:>5}  {row.validation:10.3f}  {row.test:.3f}  {row.normalised:10.3f}"
            )
        return "\n".join(lines)


def run_demo(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    n_tasks: int = 8,
    base_steps: int = TRAINING.base_steps,
    expert_steps: int = TRAINING.expert_steps,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Train experts of one base on `n_tasks` views of handwritten digits, and merge them by four methods.

    Under `out`: `base/`, `experts/<task>/` and `merged/<method>/…` (checkpoint folders), `heads.safetensors` (per task
    `[10, width]`, frozen), `singular_values.png` and `demo.json`. α is chosen by validation accuracy; the test digits
    are looked at once per row, after that.

    Args:
        seed: of the split, the heads, the initial weights and the batches.
        n_tasks: 2 … 16.
        base_steps, expert_steps: optimizer steps of the joint pre-training, and of each fine-tuning.
        say: receives each line of progress, then the table.

    Raises:
        MissingPackageError: scikit-learn or matplotlib is missing.
        ConfigError: `n_tasks` or `seed` is out of range.
        ResourceError: `out` cannot be written to.
    """
    _require_extras()
    started = time.perf_counter()
    # The seeds after it are the experts'.
    seed = whole_number(seed, "seed", 0, LARGEST_WHOLE - len(TRANSFORMS))
    out = _make_folder(path_text(out, "out"))
    suite = load_tasks(n_tasks, WIDTH, seed)
    n_train, n_validation, n_test = (len(part.labels) for part in (suite.train, suite.validation, suite.test))
    say(f"{n_tasks} tasks on {n_train} digits (validation {n_validation}, test {n_test}): {', '.join(suite.names)}")

    training = replace(TRAINING, base_steps=base_steps, expert_steps=expert_steps)
    base, experts = _train_all(suite, out, seed, training, say)
    own = own_accuracies(experts, suite.test, suite.heads)
    validation = accuracies(base, suite.validation, suite.heads)
    of_experts = own_accuracies(experts, suite.validation, suite.heads)
    rows = (
        _row(suite, own, validation, accuracies(base, suite.test, suite.heads), name="base", folder="base"),
        _row(suite, own, of_experts, own, name="experts", folder="experts"),
        *(_merged_row(method, out, suite, own, say) for method in METHODS),
    )
    picture = out / "singular_values.png"
    pictured = [(row.name, out / row.folder, row.scaling or 1.0) for row in rows[-3:]]
    draw_singular_values(picture, out / "base", pictured, PICTURED_LAYERS, n_tasks)
    seconds = time.perf_counter() - started
    result = DemoResult(out, picture, seed, suite.names, n_train, n_validation, n_test, rows, seconds)
    (out / "demo.json").write_text(json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n")
    for text in ("", result.table(), "", *LEGEND, f"{seconds:.0f} s. Singular values before and after: {picture}"):
        say(text)
    return result


def _require_extras() -> None:
    """Refuse to begin without both extras: the picture comes last."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(f"the demo needs {error.name}: pip install 'isomerge-fast[demo]'") from error


def _make_folder(path: str) -> Path:
    """Return the folder for all that the demo writes, made before any work is done."""
    if not path:
        raise ConfigError("out is an empty path")
    out = Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out.absolute()
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = error.strerror if isinstance(error, OSError) else "not a name that a folder can have"
        raise ResourceError(f"{out}: cannot be written to ({reason})") from error


def _train_all(
    suite: TaskSuite, out: Path, seed: int, training: Training, say: Callable[[str], None]
) -> tuple[DigitsNetwork, list[DigitsNetwork]]:
    """Train the base and the experts, and save them with their heads beside them."""
    networks = train_family(initial(partial(DigitsNetwork, WIDTH, DEPTH), seed), suite, training, seed)
    base = next(networks)
    base.save(out / "base")
    save_file(dict(zip(suite.names, suite.heads.unbind(), strict=True)), out / "heads.safetensors")
    say(f"base: validation accuracy {fmean(accuracies(base, suite.validation, suite.heads)):.3f}")
    experts = []
    for task, (name, expert) in enumerate(zip(suite.names, networks, strict=True)):
        expert.save(out / "experts" / name)
        score = accuracies(expert, suite.validation, suite.heads)
        others = fmean(score[:task] + score[task + 1 :])
        say(f"expert {name}: validation accuracy {score[task]:.3f} on its task, {others:.3f} on the others")
        experts.append(expert)
    return base, experts


def _merged_row(
    method: str, out: Path, suite: TaskSuite, own: tuple[float, ...], say: Callable[[str], None]
) -> DemoRow:
    """Merge the files, every scaling from one decomposition, and score the scaling that is best on validation."""
    import isomerge_fast as imf

    name, scalings = METHODS[method]
    folder = out / "merged" / method
    single = len(scalings) == 1  # then the checkpoint is the folder itself, else one folder a scaling lies in it
    config = {
        "method": method,
        "base": str(out / "base"),
        "experts": [str(out / "experts" / task) for task in suite.names],
        "scaling": scalings[0] if single else list(scalings),
        "out": str(folder),
    }
    started = time.perf_counter()
    imf.merge(config, overwrite=True)
    seconds = time.perf_counter() - started
    folders = {scaling: folder if single else folder / f"scaling-{scaling:g}" for scaling in scalings}
    models = {scaling: DigitsNetwork.load(folders[scaling]) for scaling in scalings}
    validation = {scaling: accuracies(model, suite.validation, suite.heads) for scaling, model in models.items()}
    curve = {scaling: fmean(scores) for scaling, scores in validation.items()}
    best = max(curve, key=curve.__getitem__)  # of equals, the smallest
    chosen = "α = 1" if single else f"{len(scalings)} scalings, best α = {best:g}"
    say(f"{name}: merged in {seconds:.1f} s, {chosen}")
    path = folders[best].relative_to(out).as_posix()
    described = {"name": name, "method": method, "folder": path, "scaling": best}
    test = accuracies(models[best], suite.test, suite.heads)
    return _row(suite, own, validation[best], test, **described, validation_by_scaling=tuple(curve.items()))


def _row(
    suite: TaskSuite, own: Sequence[float], validation: Sequence[float], test: Sequence[float], **described: Any
) -> DemoRow:
    """Return the row of these accuracies by task."""
    return DemoRow(
        **{"method": None, "scaling": None, **described},
        validation=fmean(validation),
        test=fmean(test),
        normalised=normalised(test, own),
        test_by_task=dict(zip(suite.names, test, strict=True)),
    )
