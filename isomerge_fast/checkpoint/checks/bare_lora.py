"""Recognise LoRA files that are given as checkpoints: a mean of factors is not the factors of a mean."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..layout import ADAPTER_CONFIG_FILE, Checkpoint

# PEFT, Diffusers and loralib: lora_A, lora_B; kohya: lora_up, lora_down, lora_mid; older Diffusers: to_q_lora.up.
_FACTOR = re.compile(
    r"(?P<module>.*?)[._]?lora(_linear_layer|_embedding)?\d*[._](?P<side>A|B|up|down|mid|magnitude_vector)"
    r"([._].*)?(?<!\.bias)"
)
# MLX and torchtune.
_SMALL_FACTOR = re.compile(r"(?P<module>.*)\.lora_[ab](\.weight)?")
_PEFT_SIDES = ("A", "B", "magnitude_vector")
# LyCORIS and PEFT's other kinds.
_OTHER_FACTOR = re.compile(r"(?P<module>.*)\.(lokr_[wt]\d\w*|hada_[wt]\d\w*|(b?oft)_(blocks|diag|R|S)(\..*)?)")
_PEFT_FACTOR = re.compile(
    r"(?P<module>.*)\.(vera_(A|B|lambda_[bd])|ia3_l|fourierft_spectrum|waveft_spectrum|hra_u|vblora_(logits_[AB]|"
    r"vector_bank)|randlora_(A|B|lambda|gamma)|shira_weight|miss_block|bone_block|road_(theta|alpha)|c3a_kernel)(\..*)?"
)
# kohya's and LyCORIS' names of modules: every tensor in one is a change, and no weight.
_OF_A_CHANGE = re.compile(r"(?P<module>(lora|lycoris)_(unet|te\d*|transformer|prior|text_encoder)\w*)\.(?!alpha$).*")
_KINDS = (_FACTOR, _OTHER_FACTOR, _SMALL_FACTOR, _PEFT_FACTOR, _OF_A_CHANGE)
# Most models have no name that holds any of these.
_HINT = re.compile(
    r"lora|lycoris_|lokr_|hada_|oft_|vera_|ia3_l|ft_spectrum|hra_u|shira_|miss_block|bone_block|road_|c3a_"
)

# torch.nn.utils.parametrize: ``layer.parametrizations.weight.0`` holds the factors beside ``original``.
_PARAMETRIZATION = re.compile(r"(?<=\.parametrizations\.weight)\.\d+$")
# What LyCORIS writes beside factors.
_OF_FACTORS = ("alpha", "b_norm", "diff", "diff_b", "dora_scale", "scalar", "w_norm")

_MERGE = "merge it into its model first (PEFT: merge_and_unload), and give that as the expert"
_FUSE = (
    "fuse it into its model first (Diffusers: pipe.load_lora_weights(file); pipe.fuse_lora(); "
    "pipe.unload_lora_weights(); pipe.save_pretrained(folder); single files: networks/merge_lora.py of sd-scripts)"
)


def bare_lora(checkpoint: Checkpoint) -> str | None:
    """Return why a checkpoint is factors instead of weights, and what to do, or None.

    A model that holds the weights beside its factors (``weight``, ``base_layer.weight``, ``linear.weight`` of the same
    module, the ``original`` of torch's parametrizations) is one.
    """
    matches = [(stored, match) for name, stored in checkpoint.tensors.items() if (match := _match(name)) is not None]
    whole = _modules_with_weights(checkpoint) if matches else set()
    for stored, match in matches:
        name = stored.name
        if match.re is not _OF_A_CHANGE and _PARAMETRIZATION.sub("", match["module"]) in whole:
            continue
        where = f"{stored.file}: LoRA factors ({name!r} {list(stored.shape)}) are no weights to merge; "
        if match.re is _FACTOR and match["side"] in _PEFT_SIDES and not _is_of_a_pipeline(name):
            folder = stored.file.parent
            which = f"{folder}" if (folder / ADAPTER_CONFIG_FILE).exists() else f"with its {ADAPTER_CONFIG_FILE}"
            return f"{where}give the adapter's folder, {which}, as --expert and its base as --base"
        if match.re in (_SMALL_FACTOR, _PEFT_FACTOR):
            return f"{where}{_MERGE}"
        return f"{where}{_FUSE}, and give that as the expert"
    return None


def _match(name: str) -> re.Match[str] | None:
    if _HINT.search(name) is None:
        return None
    return next((match for kind in _KINDS if (match := kind.fullmatch(name)) is not None), None)


def _modules_with_weights(checkpoint: Checkpoint) -> set[str]:
    """Return the modules that hold a matrix which is no factor, and all modules around them."""
    found: set[str] = set()
    for name, stored in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        if len(stored.shape) < 2 or last in _OF_FACTORS or _match(name) is not None:
            continue
        while module and module not in found:
            found.add(module)
            module = module.rpartition(".")[0]
    return found


def factors_among(names: Iterable[str]) -> list[str]:
    """Return the names of LoRA factors, in a model that holds the weights under them as well."""
    return [name for name in names if _HINT.search(name) and _FACTOR.fullmatch(name)]


def _is_of_a_pipeline(name: str) -> bool:
    """Return whether a name is of a pipeline's component, as in Diffusers and in single files of image models."""
    return name.startswith(("unet.", "transformer.", "text_encoder", "diffusion_model.")) and ".lora_" in name
