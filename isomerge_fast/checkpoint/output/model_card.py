"""Write the README.md of an output: what it was made of, what may surprise, and how to make it again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import shortened, visible

MAX_NOTES, MAX_NOTE_CHARACTERS = 30, 1_000
# Characters that mean something in Markdown and HTML.
_MARKUP = re.compile(r"[\\`*_~<>\[\]#|&]")


def _code(text: str) -> str:
    """Return ``text`` as a code span of Markdown, whatever stands in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if len(fence) > 1 else ""
    return f"{fence}{padding}{visible(text)}{padding}{fence}"


def _notes(notes: Sequence[str]) -> list[str]:
    """Return the section of notes, their Markdown escaped, or nothing."""
    if not notes:
        return []
    lines = [shortened(visible(note), MAX_NOTE_CHARACTERS) for note in notes[:MAX_NOTES]]
    if len(notes) > MAX_NOTES:
        lines.append(f"… and {len(notes) - MAX_NOTES} more, in report.json")
    return ["## Notes", "", *("- " + _MARKUP.sub(r"\\\g<0>", line) for line in lines), ""]


def model_card(
    recipe: Mapping[str, Any],
    *,
    kind: str,
    citation: str,
    version: str,
    library: str | None,
    notes: Sequence[str] = (),
) -> str:
    """Return README.md of a merged checkpoint or adapter.

    ``recipe`` has the keys of the config that differ from their defaults. ``kind`` names the experts in the plural,
    ``library`` what loads the output, as model hubs name it; ``notes`` tell what may surprise about the merge.
    """
    base, experts, scaling = recipe["base"], recipe["experts"], recipe["scaling"]
    lines = [
        "---",
        *([f"library_name: {library}"] if library else []),
        "tags: [merge, isomerge-fast]",
        "---",
        "",
        f"# Merge of {len(experts)} {kind} with {recipe['method']}",
        "",
        f"- Base: {_code(base)}",
        *(f"- Expert: {_code(expert)}" for expert in experts),
        f"- Method: {recipe['method']}{f' ({citation})' if citation else ''}, scaling α = {scaling:g}",
        f"- Made with isomerge-fast {version}",
        "",
        "To make it again, `isomerge run` this file:",
        "",
        "```yaml",
        # A JSON value is a YAML value, and an escape that ``visible`` makes is one of YAML's.
        *(f"{key}: {visible(json.dumps(value, ensure_ascii=False))}" for key, value in recipe.items()),
        "out: merged",
        "```",
        "",
        "`manifest.json` records every input's identity and every tensor's checksum; `isomerge verify` checks them.",
        "",
        *_notes(notes),
    ]
    return "\n".join(lines)
