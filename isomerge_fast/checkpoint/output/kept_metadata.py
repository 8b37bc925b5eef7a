"""``__metadata__`` of the base's files, as far as it is true of the output's files of the same names."""

from __future__ import annotations

from collections.abc import Mapping

# What every file of an output says; that alone where the base says no more.
PLAIN = {"format": "pt"}
# Of a header: tag counts and a thumbnail, which trainers and tools put there, have some hundred kilobytes.
MAX_METADATA_BYTES = 8_000_000
# Checksums of the weights, which a merge changes, and their size, which another dtype changes.
_UNTRUE = frozenset({"modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "sha256", "hash", "total_size"})


def kept_metadata(found: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return what of a file's metadata is written again, and the keys of what is too large for that."""
    kept, left, room = dict(PLAIN), [], MAX_METADATA_BYTES
    for key, value in sorted(found.items(), key=lambda item: (len(item[1]), item[0])):
        if key in _UNTRUE or key in PLAIN:
            continue
        room -= len(key.encode()) + len(value.encode())
        if room < 0:
            left.append(key)
        else:
            kept[key] = value
    return {**PLAIN, **{key: kept[key] for key in found if key in kept and key not in PLAIN}}, left
