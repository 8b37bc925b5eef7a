"""What a source distribution, a wheel and an editable install hold: both packages, and never one named `kernels`.

Everything is built from a copy of the checkout, by the build tools that are installed: no network, nothing left behind.
"""

import email
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = (ROOT, ROOT / "kernels")
PACKAGES = ("isomerge_fast", "isomerge_kernels")

# Where files land is asked in an interpreter that sees the standard library and `folder` only (-S: no site-packages, so
# this environment's own editable install of the project cannot answer instead; -P: nor the working directory).
# torch and the rest come after that, without the .pth files beside them.
PROBE = """
import importlib.util, site, sys
folder, dependencies = sys.argv[1:]
site.addsitedir(folder)
assert importlib.util.find_spec("kernels") is None, importlib.util.find_spec("kernels")
sys.path.append(dependencies)
import isomerge_fast, isomerge_kernels
print(isomerge_fast.__file__, isomerge_kernels.__file__, sep="\\n")
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip_install(*arguments: str | Path, into: Path) -> None:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--quiet", "--target", into)
    run(sys.executable, "-m", "pip", "install", *options, *arguments, cwd=into.parent)


def imported_from(folder: Path) -> list[Path]:
    """Files of both packages as imported with `folder` as the site-packages, from a working directory elsewhere."""
    command = (sys.executable, "-S", "-P", "-c", PROBE, folder, sysconfig.get_path("purelib"))
    return [Path(line).resolve() for line in run(*command, cwd=folder.parent).splitlines()]


def python_files() -> set[str]:
    """Every module of both packages by its path in an installation: `isomerge_kernels/reference.py`."""
    return {
        path.relative_to(source_root).as_posix()
        for source_root, package in zip(SOURCE_ROOTS, PACKAGES, strict=True)
        for path in (source_root / package).rglob("*.py")
    }


def version() -> str:
    text = (ROOT / "isomerge_fast" / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads: a build writes egg-info and build/ beside its sources."""
    copy = tmp_path_factory.mktemp("checkout") / "isomerge-fast"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for folder in ("isomerge_fast", "kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return copy


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{suffix: path} of the source distribution and of the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    return {path.suffix: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def wheel(distributions: dict[str, Path]) -> zipfile.ZipFile:
    return zipfile.ZipFile(distributions[".whl"])


def test_wheel_holds_every_module_and_nothing_else_at_the_top(wheel: zipfile.ZipFile):
    names = set(wheel.namelist())
    assert {name for name in names if name.endswith(".py")} == python_files()
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, f"isomerge_fast-{version()}.dist-info"}
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_wheel_metadata(wheel: zipfile.ZipFile):
    folder = f"isomerge_fast-{version()}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert metadata["Name"] == "isomerge-fast"
    assert metadata["Version"] == version()
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    extras = {"cuda", "mergekit", "fusion-bench", "peft", "ray", "demo", "test", "bench", "dev"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    assert "isomerge = isomerge_fast.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_source_distribution_holds_what_its_build_needs(distributions: dict[str, Path]):
    """The wheel above was built from it; here only that nothing of it was taken from elsewhere."""
    with tarfile.open(distributions[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names
    assert {f"kernels/{name}" if name.startswith("isomerge_kernels") else name for name in python_files()} <= names


def test_wheel_install_imports_both_packages(distributions: dict[str, Path], tmp_path: Path):
    site_packages = tmp_path / "site-packages"
    site_packages.mkdir()
    pip_install(distributions[".whl"], into=site_packages)
    assert imported_from(site_packages) == [site_packages / package / "__init__.py" for package in PACKAGES]
    assert (site_packages / "bin" / "isomerge").is_file()


def test_editable_install_imports_both_packages(checkout: Path, tmp_path: Path):
    site_packages = tmp_path / "site-packages"
    site_packages.mkdir()
    pip_install("--editable", checkout, into=site_packages)
    assert imported_from(site_packages) == [
        checkout / "isomerge_fast" / "__init__.py",
        checkout / "kernels" / "isomerge_kernels" / "__init__.py",
    ]


def test_kernels_is_a_source_root_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "kernels").iterdir() if path.suffix == ".py"] == []


def test_pyproject_holds_no_metadata():
    with open(ROOT / "pyproject.toml", "rb") as file:
        settings = tomllib.load(file)
    assert set(settings) == {"build-system", "tool"}
    assert not any("==" in requirement for requirement in settings["build-system"]["requires"])


def test_constraints_pin_every_requirement_once(wheel: zipfile.ZipFile):
    """constraints.txt is the only place of pins; setup.py repeats those of the two peers it cannot do without."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)] == []
    names = [pin.partition("==")[0] for pin in pins]
    assert len(names) == len(set(names))

    metadata = email.message_from_bytes(wheel.read(f"isomerge_fast-{version()}.dist-info/METADATA"))
    required = [value.partition(";")[0].strip() for value in metadata.get_all("Requires-Dist", [])]
    required_names = {re.split(r"[^A-Za-z0-9._-]", value)[0].lower().replace("_", "-") for value in required}
    assert required_names - set(names) == set(), "no tested version in constraints.txt"
    pinned = {value for value in required if "==" in value}
    assert {value.partition("==")[0] for value in pinned} <= {"mergekit", "fusion-bench"}
    assert pinned <= set(pins)


@pytest.mark.parametrize("name", ["Makefile", ".ci/run", ".pre-commit-config.yaml", "CONTRIBUTING.md", "README.md"])
def test_no_pins_elsewhere(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.findall(r"[A-Za-z0-9_-]+==[0-9][0-9.]*", text) == []
