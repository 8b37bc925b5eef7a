"""Recognises LoRA files that are given as if they were checkpoints: factors are no weights, and a mean of factors is
not the factors of a mean.
"""

from __future__ import annotations

import re

from .layout import ADAPTER_CONFIG_FILE, Checkpoint

# PEFT, Diffusers and loralib: lora_A, lora_B; kohya: lora_up, lora_down, lora_mid; older Diffusers: to_q_lora.up.
_FACTOR = re.compile(
    r"(?P<module>.*?)[._]?lora(_linear_layer|_embedding)?\d*[._](?P<side>A|B|up|down|mid|magnitude_vector)"
    r"([._].*)?(?<!\.bias)"
)
_PEFT_SIDES = ("A", "B", "magnitude_vector")
# LyCORIS and PEFT's other kinds.
_OTHER_FACTOR = re.compile(r"(?P<module>.*)\.(lokr_[wt]\d\w*|hada_[wt]\d\w*|(b?oft)_(blocks|diag|R|S)(\..*)?)")

_FUSE = (
    "fuse it into its model first (Diffusers: pipe.load_lora_weights(file); pipe.fuse_lora(); "
    "pipe.unload_lora_weights(); pipe.save_pretrained(folder); single files: networks/merge_lora.py of sd-scripts)"
)


def bare_lora(checkpoint: Checkpoint) -> str | None:
    """Return why a checkpoint is factors instead of weights, and what to do; None where it is not.

    A model that holds the weights under its factors (``base_layer``, or the same module's ``weight``) is one.
    """
    tensors = checkpoint.tensors
    for name, stored in tensors.items():
        # Most names of most models end here.
        if "lora" not in name and "lokr_" not in name and "hada_" not in name and "oft_" not in name:
            continue
        match = _FACTOR.fullmatch(name) or _OTHER_FACTOR.fullmatch(name)
        if match is None:
            continue
        module = match["module"]
        if any(f"{module}.{own}" in tensors for own in ("weight", "base_layer.weight")):
            continue
        where = f"{stored.file}: LoRA factors ({name!r} {list(stored.shape)}) are no weights to merge; "
        if match.re is _FACTOR and match["side"] in _PEFT_SIDES and not _is_of_a_pipeline(name):
            folder = stored.file.parent
            if (folder / ADAPTER_CONFIG_FILE).exists():
                return f"{where}give the adapter's folder, {folder}, as --expert and its base as --base"
            return (
                f"{where}give the adapter's folder, with its {ADAPTER_CONFIG_FILE}, as --expert and its base as --base"
            )
        return f"{where}{_FUSE}, and give that as the expert"
    return None


def _is_of_a_pipeline(name: str) -> bool:
    """Whether Diffusers wrote it: there the first part is the pipeline's component."""
    return name.startswith(("unet.", "transformer.", "text_encoder")) and ".lora_" in name
