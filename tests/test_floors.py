"""The house's floors: imports go down only, and what serves people (typer, rich, yaml) stays on the floors for people.

Every module of both source roots is parsed, never imported, so that a file which is wrong in another way still shows.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"isomerge_kernels": ROOT / "kernels" / "isomerge_kernels", "isomerge_fast": ROOT / "isomerge_fast"}

# Lowest first. A module may import what lies on a lower row, never its own row's neighbours.
FLOORS = (
    {"isomerge_kernels", "errors", "globs", "regular_files", "schema"},
    {"values", "ops"},
    {"checkpoint", "report", "heap", "mergekit_recipe", "strict_yaml"},
    {"linalg"},
    {"methods"},
    {"config"},
    {"budget", "inputs", "patterns"},
    {"routes"},
    {"plan", "workers", "transfers", "drift", "tensor_roles"},
    {"sources", "drafts", "loads", "notes", "file_notes", "memory_inputs"},
    {"planner"},
    {"output", "finishing", "forecast"},
    {"unit"},
    {"engine", "verify", "in_memory"},
    {"api", "console", "doctor", "terminal"},
    {"demo", "bench", "integrations"},
    {"cli"},
    {"__init__", "__main__"},
)
FLOOR_OF = {name: height for height, names in enumerate(FLOORS) for name in names}

# What only some of the floors above may know.
FROM_PLAN_UP = {"inputs"} | {name for name, height in FLOOR_OF.items() if height >= FLOOR_OF["plan"]}
KNOWN_TO = {"isomerge_kernels": {"ops"}, "checkpoint": FROM_PLAN_UP, "report": FROM_PLAN_UP}

# Inside linalg: the protocol lies under the solvers, the choice among them above.
LINALG_FLOOR_OF = {"protocol": 0, "auto": 2, "": 3}
SOLVER_FLOOR = 1

# Their function-local imports keep `import isomerge_fast` and `isomerge --help` free of torch; they do not count.
LAZY = {"__init__", "api", "cli"}

EVERYWHERE = {"torch", "triton", "numpy", "safetensors"}
PEOPLE = {"pydantic", "typer", "click", "rich", "yaml", "matplotlib", "sklearn"}
ALSO = {"cli": PEOPLE, "console": {"rich"}, "demo": PEOPLE, "strict_yaml": {"yaml"}}
ALSO_IN_FUNCTIONS = {"config": {"pydantic", "yaml"}, "checkpoint": {"xxhash"}}


@dataclass(frozen=True)
class Import:
    """One imported module: its full dotted name, the line, and whether it stands inside a function."""

    target: str
    line: int
    local: bool


def modules_on_disk() -> dict[str, Path]:
    """{dotted name: path} of every module; a package appears under its own name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules_on_disk()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def imports_of(module: str, source: str, modules: AbstractSet[str], packages: AbstractSet[str]) -> Iterator[Import]:
    """Every import in `source`, as the absolute name of the module that is reached.

    `from package import name` reaches `package.name` where that is a module, else `package` itself.
    """
    package = module if module in packages else module.rpartition(".")[0]

    def absolute(name: str, level: int) -> str:
        if level == 0:
            return name
        anchor = package.split(".")[: len(package.split(".")) - (level - 1)]
        return ".".join([*anchor, name] if name else anchor)

    def visit(node: ast.AST, local: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, local)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(node.module or "", node.level)
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                if inner in modules:
                    yield Import(inner, node.lineno, local)
                elif inner != "isomerge_fast.__version__":  # the one fact that every floor may know
                    yield Import(origin, node.lineno, local)
        elif isinstance(node, ast.Call) and called_name(node.func) in {"import_module", "__import__"} and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                name = first.value.lstrip(".")
                yield Import(absolute(name, len(first.value) - len(name)), node.lineno, local)
        inside = local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def called_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def floor_name(module: str) -> str:
    """`isomerge_fast.linalg.auto` → `linalg`; anything of the kernels → `isomerge_kernels`."""
    top, _, rest = module.partition(".")
    if top == "isomerge_kernels":
        return top
    return rest.partition(".")[0] or "__init__"


def complaints_about(
    module: str, source: str, modules: AbstractSet[str] = MODULES.keys(), packages: AbstractSet[str] = PACKAGES
) -> list[str]:
    """What is wrong with the imports of one module, in words; [] where nothing is."""
    own = floor_name(module)
    if own not in FLOOR_OF:
        return [f"{module}: unknown module; give it a floor in FLOORS of tests/test_floors.py"]
    complaints = []
    for found in imports_of(module, source, modules, packages):
        if found.local and own in LAZY:
            continue
        top = found.target.partition(".")[0]
        reason = complain_inside(module, found) if top in SOURCES else complain_outside(module, found)
        if reason:
            complaints.append(f"{module}:{found.line} imports {found.target}: {reason}")
    return complaints


def complain_inside(module: str, found: Import) -> str | None:
    own, other = floor_name(module), floor_name(found.target)
    if other == "__init__":
        other = "api"  # the package's public names are those of api
    if other not in FLOOR_OF:
        return "unknown module; give it a floor in FLOORS of tests/test_floors.py"
    if own == other:
        return complain_in_linalg(module, found.target) if own == "linalg" else None
    if FLOOR_OF[other] >= FLOOR_OF[own]:
        return f"{other} does not lie under {own}"
    if own not in KNOWN_TO.get(other, {own}):
        return f"only {', '.join(sorted(KNOWN_TO[other]))} may know {other}"
    return None


def complain_in_linalg(module: str, target: str) -> str | None:
    own, other = (name.removeprefix("isomerge_fast.linalg").lstrip(".") for name in (module, target))
    own_floor, other_floor = (LINALG_FLOOR_OF.get(name, SOLVER_FLOOR) for name in (own, other))
    if other_floor < own_floor or own_floor == other_floor == SOLVER_FLOOR:
        return None
    return f"inside linalg, {other or 'the package'} does not lie under {own}"


def complain_outside(module: str, found: Import) -> str | None:
    own, name = floor_name(module), found.target.partition(".")[0]
    if name in sys.stdlib_module_names or name in EVERYWHERE or own == "integrations" or name in ALSO.get(own, ()):
        return None
    if name in ("cupy", "cupyx"):
        return None if module == "isomerge_fast.linalg.cusolver" else "only linalg/cusolver.py may know cupy"
    if name in ALSO_IN_FUNCTIONS.get(own, ()):
        return None if found.local else f"{own} may import {name} inside functions only"
    return f"{own} may import {', '.join(sorted(EVERYWHERE))} and the standard library only"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str):
    complaints = complaints_about(module, MODULES[module].read_text(encoding="utf-8"))
    assert not complaints, "\n".join(complaints)


def test_no_circle_of_imports():
    graph = {
        module: {
            found.target
            for found in imports_of(module, path.read_text(encoding="utf-8"), set(MODULES), PACKAGES)
            if found.target in MODULES and not (found.local and floor_name(module) in LAZY)
        }
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circle of imports: " + " ← ".join(error.args[1]))


def test_every_floor_is_found_by_the_parser():
    """An empty or misplaced source root would let everything above pass."""
    assert {"isomerge_kernels", "isomerge_fast"} <= PACKAGES


@pytest.mark.parametrize("module", ["isomerge_fast", "isomerge_fast.cli"])
def test_import_does_not_load_torch(module: str):
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"import {module} loads torch, or fails\n{done.stderr}"


def test_a_merge_does_not_import_symbolic_algebra() -> None:
    """Which takes the first merge half a second to a second: ``torch.broadcast_shapes`` does."""
    check = """
import sys, torch, isomerge_fast as imf
for merge in (imf.iso_c, imf.iso_cts):
    merge([torch.randn(2, 24, 16), torch.randn(2, 24, 16)])
    merge([torch.randn(24, 16), torch.randn(24, 16)], precision="fast")
sys.exit("sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


VIOLATIONS = {
    "upwards": ("isomerge_fast.ops", "from isomerge_fast.linalg import auto", "does not lie under"),
    "upwards-relative": ("isomerge_fast.linalg.auto", "from ..methods.iso_c import IsoC", "does not lie under"),
    "upwards-in-function": ("isomerge_fast.planning.plan", "def f():\n    from . import engine", "does not lie under"),
    "upwards-dynamic": ("isomerge_fast.ops", "m = importlib.import_module('.plan', 'x')", "does not lie under"),
    "upwards-through-package": (
        "isomerge_fast.execution.engine",
        "from isomerge_fast import iso_c",
        "does not lie under",
    ),
    "package-itself": ("isomerge_fast.methods.iso_c", "import isomerge_fast", "does not lie under"),
    "beside": ("isomerge_fast.execution.engine", "from .verify import verify", "does not lie under"),
    "kernels-know-errors": ("isomerge_kernels.task_sum", "import isomerge_fast.errors", "does not lie under"),
    "kernels-past-ops": ("isomerge_fast.execution.engine", "import isomerge_kernels.reference", "only ops may know"),
    "checkpoint-known-too-low": (
        "isomerge_fast.methods.mean",
        "from ..checkpoint import reader",
        "may know checkpoint",
    ),
    "report-known-too-low": ("isomerge_fast.config", "def f():\n    from .report import Report", "may know report"),
    "solver-knows-auto": ("isomerge_fast.linalg.polar_svd", "from .auto import choose", "does not lie under"),
    "protocol-knows-solver": ("isomerge_fast.linalg.protocol", "from .polar_svd import X", "does not lie under"),
    "solver-knows-package": ("isomerge_fast.linalg.polar_svd", "from . import choose", "does not lie under"),
    "cupy-elsewhere": ("isomerge_fast.linalg.auto", "import cupy.cuda", "cusolver.py"),
    "typer-in-plan": ("isomerge_fast.planning.plan", "import typer", "standard library only"),
    "rich-in-engine": (
        "isomerge_fast.execution.engine",
        "def f():\n    from rich.progress import Progress",
        "library only",
    ),
    "transformers-in-api": ("isomerge_fast.api", "import transformers", "standard library only"),
    "yaml-at-top-of-config": ("isomerge_fast.config", "import yaml", "inside functions only"),
    "under-type-checking": ("isomerge_fast.ops", "if TYPE_CHECKING:\n    from .plan import Plan", "does not lie under"),
    "unknown-module": ("isomerge_fast.utils", "", "give it a floor"),
    "unknown-target": ("isomerge_fast.api", "from .helpers import x", "give it a floor"),
}
PERMITTED = {
    "down": ("isomerge_fast.planning.plan", "from .checkpoint import layout\nfrom .methods.iso_c import IsoC"),
    "version": ("isomerge_fast.checkpoint.output.manifest", "from .. import __version__"),
    "errors": ("isomerge_fast.checkpoint.io.reader", "from ..errors import ConfigError"),
    "kernels-through-ops": ("isomerge_fast.ops", "from isomerge_kernels import reference"),
    "solver-on-protocol": ("isomerge_fast.linalg.polar_svd", "from .protocol import Solver"),
    "auto-on-solvers": ("isomerge_fast.linalg.auto", "from . import polar_svd\nfrom .polar_svd import X"),
    "cupy-in-cusolver": ("isomerge_fast.linalg.cusolver", "def f():\n    import cupy"),
    "yaml-in-function": ("isomerge_fast.config", "def f():\n    import yaml, pydantic"),
    "typer-in-cli": ("isomerge_fast.cli", "import typer"),
    "sklearn-in-demo": ("isomerge_fast.demo.tasks", "def f():\n    from sklearn.datasets import load_digits"),
    "peer-in-integrations": ("isomerge_fast.integrations.mergekit", "import mergekit"),
    "public-names-in-demo": ("isomerge_fast.demo.run", "import isomerge_fast as imf"),
    "lazy-in-api": ("isomerge_fast.api", "def f():\n    from .integrations import peft"),
}
# A fixed set of modules for the examples, so that they do not depend on what exists today.
EXAMPLE_PACKAGES = {"isomerge_kernels", "isomerge_fast", "isomerge_fast.linalg", "isomerge_fast.checkpoint"}
EXAMPLE_MODULES = EXAMPLE_PACKAGES | {
    "isomerge_fast.linalg.auto",
    "isomerge_fast.linalg.polar_svd",
    "isomerge_fast.execution.engine",
    "isomerge_kernels.reference",
}


@pytest.mark.parametrize(("module", "source", "reason"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_violation_is_caught(module: str, source: str, reason: str):
    (complaint,) = complaints_about(module, source, EXAMPLE_MODULES, EXAMPLE_PACKAGES)
    assert reason in complaint
    assert complaint.startswith(module)


@pytest.mark.parametrize(("module", "source"), PERMITTED.values(), ids=PERMITTED)
def test_what_is_permitted_passes(module: str, source: str):
    assert complaints_about(module, source, EXAMPLE_MODULES, EXAMPLE_PACKAGES) == []
