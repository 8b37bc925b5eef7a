"""Tell how configs and tokenizers of the experts differ from the base's, which the output has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ...checkpoint.layout import Checkpoint
from .config import config_differences
from .tokenizer import SettingsReader, token_settings, tokenizer_differences

# So many differences, and so many experts that have the same ones, stand in one note.
DIFFERENCES_SHOWN, EXPERTS_SHOWN = 14, 6


def drift_notes(base: Checkpoint, experts: Sequence[Checkpoint]) -> Iterator[str]:
    """Yield a note for all experts with the same differences, and one for every file that cannot be read."""
    if not base.is_folder:
        return
    folders = [expert for expert in experts if expert.is_folder and expert.path != base.path]
    reader = SettingsReader()
    ours = token_settings(base, reader)
    yield from _grouped(
        folders,
        lambda expert: config_differences(base.config, expert.config),
        "config.json differs from the base's, which the output has",
    )
    yield from _grouped(
        folders,
        lambda expert: tokenizer_differences(ours, token_settings(expert, reader)),
        "tokens, chat or generation settings differ from the base's, which the output has",
    )
    for problem in reader.problems:
        yield f"{problem}: not compared with what the output has"


def _grouped(
    experts: Sequence[Checkpoint], differences: Callable[[Checkpoint], Iterable[str]], what: str
) -> Iterator[str]:
    groups: dict[tuple[str, ...], list[Checkpoint]] = {}
    for expert in experts:
        if found := tuple(differences(expert)):
            groups.setdefault(found, []).append(expert)
    for found, members in groups.items():
        names = ", ".join(str(expert.path) for expert in members[:EXPERTS_SHOWN])
        more = f" and {len(members) - EXPERTS_SHOWN} more" if len(members) > EXPERTS_SHOWN else ""
        rest = f", and {len(found) - DIFFERENCES_SHOWN} more" if len(found) > DIFFERENCES_SHOWN else ""
        yield f"{names}{more}: {what}: {', '.join(found[:DIFFERENCES_SHOWN])}{rest}"
