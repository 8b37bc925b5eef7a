"""Check what the contracts in pyproject.toml cannot say: which third parties a package may import, and what that loads.

Modules are parsed and not imported, so that a file which is wrong in another way still shows.
"""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"isomerge_kernels": ROOT / "kernels" / "isomerge_kernels", "isomerge_fast": ROOT / "isomerge_fast"}
FILES = [path for folder in FOLDERS.values() for path in sorted(folder.rglob("*.py"))]

# A machine that has only these runs the kernel tests and the benchmarks.
EVERYWHERE = {"torch", "triton", "numpy", "safetensors"} | set(FOLDERS) | sys.stdlib_module_names
PEOPLE = {"pydantic", "typer", "click", "rich", "yaml", "matplotlib", "sklearn"}
# What else a package or module may import, and what it may import inside functions alone.
ALSO = {"cli": PEOPLE, "demo": PEOPLE, "parsing/strict_yaml.py": {"yaml"}}
ALSO_IN_FUNCTIONS = {
    "config.py": {"pydantic", "yaml"},
    "checkpoint": {"xxhash"},
    "linalg/cusolver.py": {"cupy", "cupyx"},
}


def third_parties(source: str) -> Iterator[tuple[str, int, bool]]:
    """Yield (top-level name, line, whether inside a function) of every absolute import, also by `import_module`."""

    def visit(node: ast.AST, local: bool) -> Iterator[tuple[str, int, bool]]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
        ):
            first = node.args[0]
            names = [str(first.value)] if isinstance(first, ast.Constant) else []
        for name in names:
            if not name.startswith("."):
                yield name.partition(".")[0], getattr(node, "lineno", 0), local
        inside = local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def complaints_about(place: str, source: str) -> list[str]:
    """Return what is wrong with the imports of a module at `place` (``linalg/auto.py``), in words."""
    if place.startswith("integrations/"):  # where peers are imported
        return []
    homes = (place, place.partition("/")[0])
    anywhere = EVERYWHERE.union(*(ALSO.get(home, set()) for home in homes))
    in_functions = set().union(*(ALSO_IN_FUNCTIONS.get(home, set()) for home in homes))
    return [
        f"{place}:{line} imports {name}"
        for name, line, local in third_parties(source)
        if name not in anywhere and not (local and name in in_functions)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_third_parties_stay_where_they_belong(path: Path) -> None:
    folder = next(folder for folder in FOLDERS.values() if path.is_relative_to(folder))
    assert complaints_about(str(path.relative_to(folder)), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("place", "source", "is_fine"),
    [
        ("planning/plan.py", "import typer", False),
        ("execution/engine.py", "def f():\n    from rich.progress import Progress", False),
        ("api.py", "import transformers", False),
        ("config.py", "import yaml", False),
        ("config.py", "def f():\n    import yaml, pydantic", True),
        ("linalg/auto.py", "def f():\n    import cupy.cuda", False),
        ("linalg/cusolver.py", "def f():\n    importlib.import_module('cupy')", True),
        ("linalg/svd.py", "def f():\n    importlib.import_module('cupy')", False),
        ("cli/app.py", "import typer", True),
        ("demo/tasks.py", "def f():\n    from sklearn.datasets import load_digits", True),
        ("integrations/peft.py", "import peft", True),
        ("checkpoint/io/checksum.py", "import xxhash", False),
    ],
)
def test_a_violation_is_caught(place: str, source: str, is_fine: bool) -> None:
    assert (not complaints_about(place, source)) is is_fine


def test_files_are_found() -> None:
    """An empty or misplaced source root would let everything above pass."""
    assert all(any(path.is_relative_to(folder) for path in FILES) for folder in FOLDERS.values())


def ends_well(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["isomerge_fast", "isomerge_fast.cli", "isomerge_fast.machine"])
def test_import_does_not_load_torch(module: str) -> None:
    ends_well(f"import sys, {module}; sys.exit('torch' in sys.modules)")


def test_a_merge_does_not_import_symbolic_algebra() -> None:
    """Which takes the first merge half a second to a second: ``torch.broadcast_shapes`` does."""
    ends_well("""
import sys, torch, isomerge_fast as imf
for merge in (imf.iso_c, imf.iso_cts):
    merge([torch.randn(2, 24, 16), torch.randn(2, 24, 16)])
    merge([torch.randn(24, 16), torch.randn(24, 16)], precision="fast")
sys.exit("sympy" in sys.modules)
""")


# --- the contracts in pyproject.toml: `make lint` has what checks them ------------------------------------------------


def broken_contracts(root: Path) -> str:
    pytest.importorskip("importlinter", reason="of the dev extra")
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache"]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert ("0 broken" in done.stdout) is (done.returncode == 0), done.stdout + done.stderr
    return "" if done.returncode == 0 else done.stdout


def test_contracts_are_kept() -> None:
    assert broken_contracts(ROOT) == ""


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("isomerge_fast/ops.py", "def f():\n    from .linalg import auto", "Imports go down only BROKEN"),
        ("isomerge_fast/api.py", "from .cli import main", "Imports go down only BROKEN"),
        (
            "isomerge_fast/execution/engine.py",
            "import isomerge_kernels.reference",
            "the one door to the kernels BROKEN",
        ),
        (
            "kernels/isomerge_kernels/task_sum.py",
            "import isomerge_fast.errors",
            "know nothing of ours above them BROKEN",
        ),
        ("isomerge_fast/methods/iso_c.py", "from ..checkpoint import layout", "Algebra knows nothing of files BROKEN"),
        ("isomerge_fast/linalg/protocol.py", "from .svd import FullSvd", "Inside linalg"),
        ("isomerge_fast/planning/outputs.py", "from .planner import make_plan", "No circles inside a package BROKEN"),
        ("isomerge_fast/utils/__init__.py", "", "Imports go down only BROKEN"),  # a package without a floor
    ],
)
def test_a_broken_contract_is_caught(file: str, line: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("importlinter", reason="of the dev extra")
    for name in ("isomerge_fast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    with (tmp_path / file).open("a", encoding="utf-8") as source:
        source.write(f"{line}\n")
    assert said in broken_contracts(tmp_path)
