"""Keep the entries of ``__metadata__`` in the base's files that are true of the output's files too."""

from __future__ import annotations

from collections.abc import Mapping

# Every file of an output has it.
PLAIN = {"format": "pt"}
# In a header: tag counts and a thumbnail, which trainers and tools put there, have some hundred kilobytes.
MAX_METADATA_BYTES = 8_000_000
# Checksums of the weights, which a merge changes, and their size, which another dtype changes.
_UNTRUE = frozenset({"modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "sha256", "hash", "total_size"})


def kept_metadata(found: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the metadata of a file that is written again, and the keys of what is too large for that."""
    others = {key: value for key, value in found.items() if key not in _UNTRUE and key not in PLAIN}
    left, room = [], MAX_METADATA_BYTES
    for key in sorted(others, key=lambda key: (len(others[key]), key)):
        room -= len(key.encode()) + len(others[key].encode())
        if room < 0:
            left.append(key)
    dropped = set(left)
    return {**PLAIN, **{key: value for key, value in others.items() if key not in dropped}}, left
