"""Check how docstrings begin: with a verb and its object, in the imperative, as in "Return the top k directions"."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("isomerge_fast", "kernels", "benchmarks")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
# What a sentence with no verb in front begins with.
NO_VERB = re.compile(
    "A|All|An|And|Any|As|At|Both|By|Bytes|Each|Entry|Every|Experts|For|From|Has|How|If|In|It|Its|Many|No|None|Nothing|Of|On"
    "|One|Only|Out|Peak|Plain|Predicted|Ratios|Rows|Same|Seconds|Singular|Some|Something|Such|Tensors|The|There|These|They"
    "|This|Those|To|Top|Two|What|When|Where|Whether|Which|While|Whole|Whose|Why|With|Without"
)


def is_imperative(word: str) -> bool:
    """Return whether a word may be a verb in the imperative: a capital, small letters, no third person's s."""
    return bool(re.fullmatch(r"[A-Z][a-z-]+", word)) and not NO_VERB.fullmatch(word) and not re.search(r"[^s]s$", word)


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (where, first sentence) of every docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                name = getattr(node, "name", "the module")
                yield f"{path.relative_to(ROOT)}: {name}", text.split(". ")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb(path: Path) -> None:
    wrong = [f"{where}: {text[:70]!r}" for where, text in docstrings(path) if not is_imperative(text.split()[0])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("word", ["Return", "Pass", "Re-open", "Yield", "Express"])
def test_a_verb_passes(word: str) -> None:
    assert is_imperative(word)


@pytest.mark.parametrize("word", ["Returns", "Of", "What", "σ₁", "``eigh``", "[rows,", "Whether", "iso"])
def test_what_is_no_verb_is_found(word: str) -> None:
    assert not is_imperative(word)
