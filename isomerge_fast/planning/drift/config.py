"""Find what in two configs gives the same weights another function: rope, heads, activations, norms, windows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .values import KEY_CHARACTERS, brief, brief_key, is_off, same

# What does not change what the model computes when it is used: names, versions, dtypes, training, output formats, what
# generation_config.json has, and the labels of a head (which have a note of their own).
_IGNORED = re.compile(
    r"architecture|architectures|attn_implementation|auto_map|bad_words_ids|cache_implementation|"
    r"chunk_size_feed_forward|custom_pipelines|diversity_penalty|do_sample|dtype|early_stopping|"
    r"encoder_no_repeat_ngram_size|exponential_decay_length_penalty|finetuning_task|gradient_checkpointing|"
    r"id2label|initializer_cutoff_factor|initializer_factor|initializer_range|is_gated_act|"
    r"keys_to_ignore_at_inference|label2id|length_penalty|max_length|min_length|model_type|n_ctx|name_or_path|"
    r"no_repeat_ngram_size|num_beam_groups|num_beams|num_classes|num_labels|num_logits_to_keep|"
    r"num_return_sequences|output_attentions|output_hidden_states|output_router_logits|output_scores|prefix|"
    r"pretrained_cfg|pretraining_tp|problem_type|pruned_heads|quantization_config|remove_invalid_values|"
    r"repetition_penalty|return_dict|return_dict_in_generate|router_aux_loss_coef|router_jitter_noise|"
    r"router_z_loss_coef|sparse_pred_ignore_index|sparse_prediction|task_specific_params|temperature|"
    r"tf_legacy_loss|tokenizer_class|top_k|top_p|torch_dtype|torchscript|transformers_version|typical_p|"
    r"unsloth_fixed|unsloth_version|use_bfloat16|use_cache|use_return_dict"
    r"|_.*|.*(dropout|_pdrop|layerdrop|drop_rate|drop_path|aux_loss|jitter).*|(classifier|summary|mask)_.*"
)
# What counts though the other config was saved by a release of transformers that may not have known it. A release
# writes all keys that it knows, so that any other key that one of them has alone says what the other takes by default.
_IN_ANY_RELEASE = re.compile(r"(.*\.)?(rope_parameters\..*|sliding_window|\w+_(multiplier|softcapping|scaling))")
# Of a part, releases between 4.38 and 4.57 wrote only what is not its class's default.
_PART = re.compile(r"\w+_config\..*")
_ROPE_KEYS = (
    *("global_rope_theta", "local_rope_theta", "rope_local_base_freq", "rope_parameters", "rope_scaling"),
    *("rope_theta", "rotary_emb_base", "rotary_pct"),
)
_ROPE_TYPES = {"mrope": "default", "su": "longrope", None: "default"}
_NO_KEY = object()


def config_differences(base: Mapping[str, Any] | None, expert: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield how an expert's config differs from the base's, key by key.

    A key that one of them has alone counts, unless its value is neutral (null, false, 0, 1, empty) or what the other is
    known to take without it: a head's size of hidden_size / num_attention_heads, rope_theta 10000. Where another
    release of transformers wrote the other config, only keys of rope, windows and scales count.
    """
    if base is None or expert is None:
        return
    other_release = base.get("transformers_version") != expert.get("transformers_version")
    if other_release and isinstance(base.get("text_config"), dict) != isinstance(expert.get("text_config"), dict):
        base, expert = _with_text(base), _with_text(expert)
    ours, theirs = dict(_flat(base)), dict(_flat(expert))
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key, _NO_KEY), theirs.get(key, _NO_KEY)
        if mine is _NO_KEY:
            if not _goes_without_saying(key, other, ours, other_release):
                yield f"{key} {brief(other)} (the base's config has none)"
        elif other is _NO_KEY:
            if not _goes_without_saying(key, mine, theirs, other_release):
                yield f"no {key} (base {brief(mine)})"
        elif not (
            same(mine, other) or (is_off(mine) and is_off(other)) or (other_release and _rewritten(key, ours, theirs))
        ):
            yield f"{key} {brief(other)} (base {brief(mine)})"


def _goes_without_saying(key: str, value: Any, other: Mapping[str, Any], other_release: bool) -> bool:
    """Return whether ``other``, a flat config without ``key``, means the same as one in which it has this value."""
    if is_off(value) or same(value, 1):
        return True
    if other_release and _PART.fullmatch(key):
        return True
    place, _, name = key.rpartition(".")
    if name == "rope_theta":
        return same(value, 10_000)
    if name == "rope_type":
        return value == "default"
    if name == "head_dim":
        width, heads = (other.get(f"{place}.{each}".lstrip(".")) for each in ("hidden_size", "num_attention_heads"))
        return isinstance(width, int) and isinstance(heads, int) and heads > 0 and same(value, width // heads)
    return other_release and _IN_ANY_RELEASE.fullmatch(key) is None


def _with_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config with the text model's keys beside those of the whole model, as some releases wrote it."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    return {**text, **{key: value for key, value in config.items() if key != "text_config"}}


def _rewritten(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Return whether two releases of transformers write different values for the same thing.

    One writes "auto" and the other the number; T5's tying has another sense beside ``scale_decoder_outputs``.
    """
    if key == "tie_word_embeddings":
        return ("scale_decoder_outputs" in ours) != ("scale_decoder_outputs" in theirs)
    return "auto" in (ours[key], theirs[key])


def _flat(node: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values that change the function, with rope in one spelling."""
    for key, value in (node if "rope_parameters." in place else _with_one_rope(node)).items():
        if len(key) <= KEY_CHARACTERS and _IGNORED.fullmatch(key):
            continue
        if key in ("sliding_window", "max_window_layers") and node.get("use_sliding_window") is False:
            continue  # some releases write null then, others the size that would be used
        if key == "hidden_act" and (node.get("hidden_activation") or node.get("model_type") == "gemma"):
            continue  # of Gemma it was never used
        if key == "pos_att_type" and isinstance(value, str):
            value = value.split("|")  # DeBERTa's list, in its first spelling
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{brief_key(place + key)}.")
        else:
            yield brief_key(place + key), value


def _with_one_rope(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config with rope as transformers 5 writes it, ``rope_parameters``.

    It stands for ``rope_theta`` with ``rope_scaling``, Gemma's and ModernBERT's two bases, and GPT-NeoX's names.
    """
    given = {key: node[key] for key in _ROPE_KEYS if node.get(key) is not None}
    if not any(key in node for key in _ROPE_KEYS):
        return node
    rest = {key: value for key, value in node.items() if key not in _ROPE_KEYS}
    found = given.get("rope_parameters", given.get("rope_scaling", {}))
    if not isinstance(found, dict):
        return node
    if any(isinstance(value, dict) for value in found.values()):
        layers = {key: _one_rope(value) if isinstance(value, dict) else value for key, value in found.items()}
        return {**rest, "rope_parameters": layers}
    beside: dict[str, Any] = {}
    for name, keys in {
        "rope_theta": ("rope_theta", "global_rope_theta", "rotary_emb_base"),
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
        "original_max_position_embeddings": ("original_max_position_embeddings",),
    }.items():
        value = next((node[key] for key in keys if node.get(key) is not None), None)
        if value is not None:
            beside[name] = value
            rest = {key: value for key, value in rest.items() if key not in keys}
    rope = _one_rope({**beside, **found})
    local = given.get("rope_local_base_freq", given.get("local_rope_theta"))
    if local is not None:
        rope = {"full_attention": rope, "sliding_attention": {"rope_theta": local, "rope_type": "default"}}
    return {**rest, "rope_parameters": rope}


def _one_rope(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of one kind of layers, with ``rope_type`` for what was ``type``."""
    kind = found.get("rope_type", found.get("type"))
    kind = _ROPE_TYPES.get(kind, kind) if isinstance(kind, str | None) else kind
    return {**{key: value for key, value in found.items() if key != "type"}, "rope_type": kind}
