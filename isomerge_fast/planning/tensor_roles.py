"""Tell what a matrix is where that matters to a merge: a table of tokens or positions, a router, a classifier's head.

Its shape beside the config tells, and names where no config does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cache
from typing import Any

from ..checkpoint.layout import Checkpoint

TOKENS, POSITIONS, SEGMENTS = "token tables", "position tables", "segment tables"
ROUTERS, HEADS = "routers", "classifier heads"

# The module that holds the matrix, by the last word of its name.
_TOKEN_MODULES = {
    *("embed_in", "embed_out", "embed_tokens", "lm_head", "shared", "tok_embeddings"),
    *("token_embedding", "token_embeddings", "word_embedding", "word_embeddings", "wte"),
}
_POSITION_MODULES = {
    *("embed_positions", "pos_emb", "pos_embed", "position_embedding", "position_embeddings"),
    *("positional_embedding", "relative_attention_bias", "wpe"),
}
_SEGMENT_MODULES = {"segment_embeddings", "token_type_embeddings"}
# Which no other module is called, and which others may be called too.
_HEAD_MODULES = {"classification_head", "classifier", "pre_classifier", "qa_outputs", "score"}
_PERHAPS_HEADS = {"fc", "head", "heads", "logits_proj"}
# A row for every token, or a name like it, and all the same no table of the vocabulary.
_NO_TABLES = re.compile(r"per_layer|time|label|patch|text_projection|visual_projection")

_VOCABULARY_KEYS = {"n_vocab", "padded_vocab_size", "src_vocab_size", "tgt_vocab_size", "vocab_size"}
_EXPERT_KEYS = {"moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts", "num_routed_experts"}
_NUMBER = re.compile(r"\d+")
_LABEL_KEYS = {"num_classes", "num_labels"}
_CLASSIFIER = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)|RewardModel")
# Rows that a table has beyond its vocabulary, at most: it is padded to a multiple of 64 to 512, or begins at an offset.
MAX_PADDING = 1_024
# Smaller ones are no evidence by themselves: a layer may have as many rows.
LEAST_VOCABULARY = 1_000
# Without a config: a router has fewer rows, and far fewer than columns.
MAX_ROUTES = 1_024
MAX_CONFIG_DEPTH = 6
# Classes that a config names, and their names: others are looked at by no pattern.
MAX_CLASSES, MAX_CLASS_CHARACTERS = 20, 200


class Roles:
    """Find the roles of a checkpoint's matrices."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config or {}
        found = list(_numbers(config))
        self._vocabularies = _sizes(found, _VOCABULARY_KEYS)
        self._experts = _sizes(found, _EXPERT_KEYS)
        self._other_sizes = {value for key, value in found if key not in _VOCABULARY_KEYS and not key.endswith("_id")}
        self._labels = _sizes(found, _LABEL_KEYS) | {len(labels) for labels in [labels_of(checkpoint)] if labels}
        architectures = config.get("architectures")
        named = architectures[:MAX_CLASSES] if isinstance(architectures, list) else []
        self._classifies = any(
            _CLASSIFIER.search(name) for name in named if isinstance(name, str) and len(name) <= MAX_CLASS_CHARACTERS
        )
        self._has_config = bool(config)
        self._role_of = cache(self._role)  # the layers of a model are looked at once

    def of(self, name: str, shape: Sequence[int]) -> str | None:
        """Return TOKENS, POSITIONS, SEGMENTS, ROUTERS or HEADS of such a matrix; None of any other tensor."""
        return self._role_of(_NUMBER.sub("#", name), (shape[0], shape[1])) if len(shape) == 2 else None

    def _role(self, name: str, shape: tuple[int, int]) -> str | None:
        """Return the role of tensors whose name has ``#`` for every number."""
        path = [part for part in name.removesuffix(".weight").split(".") if part != "#"] or [""]
        if path[-1] in _POSITION_MODULES:
            return POSITIONS
        if path[-1] in _SEGMENT_MODULES:
            return SEGMENTS
        if self._has_tokens(name, path[-1], shape):
            return TOKENS
        if self._routes(path, shape):
            return ROUTERS
        return HEADS if self._is_head(path, shape[0]) else None

    def _has_tokens(self, name: str, module: str, shape: Sequence[int]) -> bool:
        """Return whether there is a row for every word of the vocabulary."""
        rows = shape[0]
        if _NO_TABLES.search(name):
            return False
        if not self._vocabularies:
            return (module in _TOKEN_MODULES or name == "output.weight") and rows > shape[1]
        if module in _TOKEN_MODULES:
            return any(size <= rows <= size + MAX_PADDING for size in self._vocabularies)
        # Under any name, where nothing else of the model has this size.
        is_like_no_other = rows >= LEAST_VOCABULARY or ".#." not in name
        return is_like_no_other and rows in self._vocabularies - self._other_sizes

    def _routes(self, path: Sequence[str], shape: Sequence[int]) -> bool:
        """Return whether there is a row for every expert of a mixture."""
        if path[-1] not in ("gate", "wg") and "router" not in path[-2:]:
            return False
        if self._experts or self._has_config:
            return shape[0] in self._experts
        return shape[0] <= MAX_ROUTES and 4 * shape[0] <= shape[1]

    def _is_head(self, path: Sequence[str], rows: int) -> bool:
        """Return whether the matrix computes a classifier's answer, as Roberta's classifier.dense and out_proj do."""
        if _is_at_the_top(path, _HEAD_MODULES):
            return True
        is_told = self._classifies or rows in self._labels or not self._has_config
        return is_told and _is_at_the_top(path, _PERHAPS_HEADS)


def _is_at_the_top(path: Sequence[str], modules: Set[str]) -> bool:
    """Return whether a matrix is in one of these modules, of the whole model and not of a layer."""
    return path[0] in modules or (len(path) == 2 and path[1] in modules)


def looks_like_a_head(name: str) -> bool:
    """Return whether a tensor belongs to a trained head, by its name alone."""
    path = [part for part in name.split(".")[:-1] if not part.isdecimal()]
    return bool(path) and _is_at_the_top(path, _HEAD_MODULES | _PERHAPS_HEADS | {"lm_head"})


def labels_of(checkpoint: Checkpoint) -> list[str] | None:
    """Return the names of the classes, in their order, where the config has them."""
    labels = (checkpoint.config or {}).get("id2label")
    if not isinstance(labels, dict) or not labels:
        return None
    return [str(labels[key]) for key in sorted(labels, key=lambda key: (len(key), key))]


def _numbers(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, int]]:
    """Yield (key, number) of the whole numbers of a config and of the dicts in it, except its tables of labels."""
    for key, value in config.items():
        if type(value) is int:
            yield key, value
        elif isinstance(value, dict) and depth < MAX_CONFIG_DEPTH and key not in ("id2label", "label2id"):
            yield from _numbers(value, depth + 1)


def _sizes(found: Sequence[tuple[str, int]], keys: set[str]) -> set[int]:
    return {value for key, value in found if key in keys and value > 0}
