"""What is no weights: quantized tensors and bare LoRA factors are refused by what lies in the files, and nothing else
is taken for them. Names, dtypes and shapes are those that the tools named here write.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import isomerge_fast as imf
from checkpoints import save_folder
from isomerge_fast.config import load_config
from isomerge_fast.planning.planner import make_plan
from openings import problems

N = 16
FLOATS = {"model.embed_tokens.weight": torch.ones(N, N), "model.norm.weight": torch.ones(N)}
OUT = "dequantize them and save in float first, or take the float weights that they were made of"


def of(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.ones(shape).to(dtype)


I8, U8, I16, I32, U32 = torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint32
F16, BF16, F32, F8 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts"
QUANTIZED: dict[str, tuple[dict[str, Tensor], str]] = {
    "AutoGPTQ": (
        {
            f"{Q}.g_idx": of(I32, N),
            f"{Q}.qweight": of(I32, 2, N),
            f"{Q}.qzeros": of(I32, 2, 2),
            f"{Q}.scales": of(F16, 2, N),
        },
        f"GPTQ or AWQ: tensor '{Q}.qweight' I32 [2, 16] beside '{Q}.qzeros'",
    ),
    "AutoAWQ": (
        {f"{Q}.qweight": of(I32, N, 2), f"{Q}.scales": of(F16, 2, N)},
        f"GPTQ or AWQ: tensor '{Q}.qweight' I32 [16, 2] beside '{Q}.scales'",
    ),
    "bitsandbytes-nf4": (
        {
            f"{Q}.weight": of(U8, N * N // 2, 1),
            f"{Q}.weight.absmax": of(F32, 4),
            f"{Q}.weight.quant_map": of(F32, 16),
            f"{Q}.weight.quant_state.bitsandbytes__nf4": of(U8, 80),
        },
        f"bitsandbytes 4-bit: tensor '{Q}.weight' U8 [128, 1] beside '{Q}.weight.quant_map'",
    ),
    "bitsandbytes-fp4-nested": (
        {
            f"{Q}.weight": of(U8, N * N // 2, 1),
            f"{Q}.weight.absmax": of(U8, 4),
            f"{Q}.weight.nested_absmax": of(F32, 1),
            f"{Q}.weight.nested_quant_map": of(F32, 256),
            f"{Q}.weight.quant_state.bitsandbytes__fp4": of(U8, 80),
        },
        f"bitsandbytes 4-bit: tensor '{Q}.weight' U8 [128, 1] beside '{Q}.weight.absmax'",
    ),
    "bitsandbytes-stored-as-bfloat16": (
        {
            f"{Q}.weight": of(BF16, N * N // 4, 1),
            f"{Q}.weight.quant_map": of(F32, 16),
            f"{Q}.weight.absmax": of(F32, 4),
        },
        f"bitsandbytes 4-bit: tensor '{Q}.weight' BF16 [64, 1] beside '{Q}.weight.quant_map'",
    ),
    "bitsandbytes-int8": (
        {f"{Q}.SCB": of(F32, N), f"{Q}.weight": of(I8, N, N), f"{Q}.weight_format": of(U8)},
        f"bitsandbytes int8: tensor '{Q}.weight' I8 [16, 16] beside '{Q}.SCB'",
    ),
    "gpt-oss-mxfp4": (
        {
            f"{EXPERTS}.down_proj_bias": of(BF16, 2, N),
            f"{EXPERTS}.down_proj_blocks": of(U8, 2, N, 1, 8),
            f"{EXPERTS}.down_proj_scales": of(U8, 2, N, 1),
        },
        f"MXFP4: tensor '{EXPERTS}.down_proj_blocks' U8 [2, 16, 1, 8] beside '{EXPERTS}.down_proj_scales'",
    ),
    "compressed-tensors-packed": (
        {
            f"{Q}.weight_packed": of(I32, N, 2),
            f"{Q}.weight_scale": of(BF16, N, 1),
            f"{Q}.weight_shape": of(torch.int64, 2),
        },
        f"compressed-tensors: tensor '{Q}.weight_packed' I32 [16, 2] beside '{Q}.weight_scale'",
    ),
    "compressed-tensors-int8": (
        {f"{Q}.weight": of(I8, N, N), f"{Q}.weight_scale": of(BF16, N, 1)},
        f"integers: tensor '{Q}.weight' I8 [16, 16] beside '{Q}.weight_scale'",
    ),
    "NVFP4": (
        {
            f"{Q}.input_scale": of(F32),
            f"{Q}.weight": of(U8, N, N // 2),
            f"{Q}.weight_scale": of(F8, N, 1),
            f"{Q}.weight_scale_2": of(F32),
        },
        f"NVFP4: tensor '{Q}.weight' U8 [16, 8] beside '{Q}.weight_scale_2'",
    ),
    "fp8-in-blocks": (
        {f"{Q}.weight": of(F8, N, N), f"{Q}.weight_scale_inv": of(F32, 1, 1)},
        f"FP8 in blocks: tensor '{Q}.weight' F8_E4M3 [16, 16] beside '{Q}.weight_scale_inv'",
    ),
    "fp8-with-a-scale": (
        {f"{Q}.weight": of(F8, N, N), f"{Q}.weight_scale": of(F32)},
        f"float8: tensor '{Q}.weight' F8_E4M3 [16, 16] beside '{Q}.weight_scale'",
    ),
    "comfyui-scaled-fp8": (
        {"scaled_fp8": of(F8, 2), "blk.qkv.scale_weight": of(F32), "blk.qkv.weight": of(F8, N, N)},
        "float8: tensor 'blk.qkv.weight' F8_E4M3 [16, 16] beside 'blk.qkv.scale_weight'",
    ),
    "fp8-alone": ({"blk.qkv.weight": of(F8, N, N)}, "float8: tensor 'blk.qkv.weight' F8_E4M3 [16, 16]"),
    "HQQ": (
        {f"{Q}.W_q": of(U8, N // 2, N), f"{Q}.scale": of(F16, 1, N), f"{Q}.zero": of(F16, 1, N)},
        f"HQQ: tensor '{Q}.W_q' U8 [8, 16] beside '{Q}.scale'",
    ),
    "HQQ-viewed-as-float": (
        {f"{Q}.W_q": of(F16, N // 4, N), f"{Q}.scale": of(F16, 1, N), f"{Q}.zero": of(F16, 1, N)},
        f"HQQ: tensor '{Q}.W_q' F16 [4, 16] beside '{Q}.scale'",
    ),
    "quanto": (
        {f"{Q}.input_scale": of(F32), f"{Q}.weight._data": of(I8, N, N), f"{Q}.weight._scale": of(F16, N, 1)},
        f"quanto: tensor '{Q}.weight._data' I8 [16, 16] beside '{Q}.weight._scale'",
    ),
    "torchao": (
        {f"{Q}._weight_qdata": of(I8, N, N), f"{Q}._weight_scale": of(F32, N, 1)},
        f"torchao: tensor '{Q}._weight_qdata' I8 [16, 16] beside '{Q}._weight_scale'",
    ),
    "MLX": (
        {f"{Q}.biases": of(F16, N, 1), f"{Q}.scales": of(F16, N, 1), f"{Q}.weight": of(U32, N, 2)},
        f"MLX: tensor '{Q}.weight' U32 [16, 2] beside '{Q}.biases'",
    ),
    "AQLM": (
        {f"{Q}.codebooks": of(F16, 1, 256, 1, 8), f"{Q}.codes": of(I8, N, 2, 1), f"{Q}.scales": of(F16, N, 1, 1, 1)},
        f"AQLM: tensor '{Q}.codes' I8 [16, 2, 1] beside '{Q}.codebooks'",
    ),
    "BitNet": (
        {f"{Q}.weight": of(U8, N // 4, N), f"{Q}.weight_scale": of(BF16, 1)},
        f"integers: tensor '{Q}.weight' U8 [4, 16] beside '{Q}.weight_scale'",
    ),
    "fused-experts": (
        {f"{EXPERTS}.gate_up_proj": of(I8, 2, N, N), f"{EXPERTS}.gate_up_proj_scale": of(F32, 2, N)},
        f"integers: tensor '{EXPERTS}.gate_up_proj' I8 [2, 16, 16] beside '{EXPERTS}.gate_up_proj_scale'",
    ),
    "of-nobody-known": (
        {f"{Q}.packed": of(I32, N, 4), f"{Q}.scale": of(F32, N)},
        f"integers: tensor '{Q}.packed' I32 [16, 4] beside '{Q}.scale'",
    ),
    "no-scale": ({f"{Q}.weight": of(I16, N, N)}, f"integers: tensor '{Q}.weight' I16 [16, 16]"),
}


@pytest.mark.parametrize(("packed", "shows"), QUANTIZED.values(), ids=QUANTIZED)
def test_quantized_tensors_are_refused_wherever_they_are(tmp_path: Path, packed: dict[str, Tensor], shows: str) -> None:
    sound = save_folder(tmp_path / "sound", FLOATS)
    folder = save_folder(tmp_path / "packed", {**FLOATS, **packed})
    bare = tmp_path / "packed.safetensors"
    save_file({**FLOATS, **packed}, bare)
    line = f"{folder}/model.safetensors: quantized weights ({shows}) cannot be merged; {OUT}"
    assert problems(sound, folder) == [line]
    assert problems(folder, sound) == [line]
    assert problems(sound, sound, bare) == [line.replace(f"{folder}/model.safetensors", str(bare))]


NOT_QUANTIZED: dict[str, dict[str, Tensor]] = {
    "position_ids": {"text_model.embeddings.position_ids": of(torch.int64, 1, 77)},
    "token_type_ids": {"embeddings.token_type_ids": of(torch.int64, 1, 512)},
    "swin-v2": {
        "attn.logit_scale": of(F32, 4, 1, 1),
        "attn.relative_position_index": of(torch.int64, 49, 49),
        "attn.scale": of(F32, 1),
    },
    "gpt-2-masks": {"h.0.attn.bias": of(U8, 1, 1, N, N), "h.0.attn.masked_bias": of(F32), "h.0.attn.scale": of(F32)},
    "boolean-mask": {"attn.bias": of(torch.bool, 1, 1, N, N), "attn.scales": of(F32, N)},
    "batch-norm": {"bn.num_batches_tracked": of(torch.int64), "bn.weight": of(F32, N), "bn.scale": of(F32, N)},
    "codebook": {"quantizer.codebook": of(I32, 8, 4), "quantizer.scale": of(F32, 8)},
    "hash-buffers": {"embed.hash_buckets": of(I32, 4, N), "embed.scale": of(F32, 1)},
    "scales-of-floats": {
        "a.weight": of(BF16, N, N),
        "a.scale": of(F32, N),
        "a.scales": of(F32, N),
        "a.weight_scale": of(F32, N),
        "layer_scale": of(F32, N),
        "logit_scale": of(F32),
    },
    "a-float-matrix-called-W_q": {"attn.W_q": of(F32, N, N), "attn.scale": of(F32, 1)},
    "W_q-of-no-module": {"W_q": of(F16, N, N), "scale": of(F16, 1, N), "zero": of(F16, 1, N)},
    "a-quant_map-of-integers": {"attn.weight": of(BF16, N, N), "attn.weight.quant_map": of(U8, N)},
    "a-lookup-table": {"lookup.weight": of(torch.int64, N, N)},
    "long-indices": {"router.expert_map": of(torch.int64, N, 2), "router.scale": of(F32, 1)},
}


@pytest.mark.parametrize("tensors", NOT_QUANTIZED.values(), ids=NOT_QUANTIZED)
def test_integer_buffers_and_scales_of_floats_are_none(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = save_folder(tmp_path / "model", {**FLOATS, **tensors})
    assert len(make_plan(load_config({"base": folder, "experts": [folder], "method": "mean"})).tensors) == len(
        {**FLOATS, **tensors}
    )


SETTINGS: dict[str, tuple[str, object, str]] = {
    "top": ("config.json", {"quantization_config": {"quant_method": "gptq"}}, ", quantization_config: {} (gptq)"),
    "nested": (
        "config.json",
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        ", text_config.quantization_config: {} (fp8)",
    ),
    "deep": (
        "config.json",
        {"thinker_config": {"language_config": {"quantization_config": {"bits": 4}}}},
        ", thinker_config.language_config.quantization_config: {} (bits: 4)",
    ),
    "compression": (
        "config.json",
        {"compression_config": {"quant_method": "compressed-tensors"}},
        ", compression_config: {} (compressed-tensors)",
    ),
    "AutoGPTQ": ("quantize_config.json", {"bits": 4, "group_size": 128}, ": {} (bits: 4)"),
    "AutoAWQ": ("quant_config.json", {"zero_point": True, "w_bit": 4}, ": {} (w_bit: 4)"),
    "ModelOpt": ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, ": {} (NVFP4)"),
}


@pytest.mark.parametrize(("file", "settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_and_side_files_tell_too(tmp_path: Path, file: str, settings: object, message: str) -> None:
    base = save_folder(tmp_path / "base", FLOATS)
    expert = save_folder(tmp_path / "expert", FLOATS)
    (expert / file).write_text(json.dumps(settings))
    text = f"{expert / file}{message.format('quantized weights')} cannot be merged; {OUT}"
    assert problems(base, expert) == [f"{text} (where they are float already, take this out)"]


def test_empty_settings_say_nothing(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", FLOATS, config={"quantization_config": None, "text_config": {}})
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        (base / name).write_text("{}")
    make_plan(load_config({"base": base, "experts": [base]}))


def test_what_is_refused_is_not_compared(tmp_path: Path) -> None:
    """A quantized model has none of the base's tensors, and one line says it all; the other experts are compared."""
    base = save_folder(tmp_path / "base", {**FLOATS, f"{Q}.weight": torch.ones(N, N)})
    packed = save_folder(tmp_path / "packed", {**FLOATS, **QUANTIZED["AutoGPTQ"][0]})
    lacking = save_folder(tmp_path / "lacking", FLOATS)
    first, second = problems(base, packed, lacking)
    assert first.startswith(f"{packed}/model.safetensors: quantized weights (GPTQ or AWQ: ")
    assert second == f"{lacking}: tensor '{Q}.weight' [16, 16] of the base {base} is missing"


FUSE = (
    "fuse it into its model first (Diffusers: pipe.load_lora_weights(file); pipe.fuse_lora(); "
    "pipe.unload_lora_weights(); pipe.save_pretrained(folder); single files: networks/merge_lora.py of sd-scripts), "
    "and give that as the expert"
)
PEFT = "give the adapter's folder, with its adapter_config.json, as --expert and its base as --base"
A, B = torch.ones(4, N), torch.ones(N, 4)
KOHYA = "lora_unet_down_blocks_0_attentions_0_proj_in"
MERGE = "merge it into its model first (PEFT: merge_and_unload), and give that as the expert"
LORA: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "PEFT": (
        {f"base_model.model.{Q}.lora_A.weight": A, f"base_model.model.{Q}.lora_B.weight": B},
        f"'base_model.model.{Q}.lora_A.weight' [4, 16]",
        PEFT,
    ),
    "PEFT-with-a-head": (
        {f"{Q}.lora_A.default.weight": A, f"{Q}.lora_B.default.weight": B, "score.weight": torch.ones(2, N)},
        f"'{Q}.lora_A.default.weight' [4, 16]",
        PEFT,
    ),
    "PEFT-embeddings": (
        {"model.embed.lora_embedding_A": A, "model.embed.lora_embedding_B": B},
        "'model.embed.lora_embedding_A' [4, 16]",
        PEFT,
    ),
    "loralib": ({f"{Q}.lora_A": A, f"{Q}.lora_B": B}, f"'{Q}.lora_A' [4, 16]", PEFT),
    "Diffusers": (
        {"unet.down.attn.to_q.lora_A.weight": A, "unet.down.attn.to_q.lora_B.weight": B},
        "'unet.down.attn.to_q.lora_A.weight' [4, 16]",
        FUSE,
    ),
    "Diffusers-older": (
        {"unet.mid.attn1.processor.to_q_lora.down.weight": A, "unet.mid.attn1.processor.to_q_lora.up.weight": B},
        "'unet.mid.attn1.processor.to_q_lora.down.weight' [4, 16]",
        FUSE,
    ),
    "kohya": (
        {
            f"{KOHYA}.alpha": torch.tensor(4.0),
            f"{KOHYA}.lora_down.weight": A[..., None, None],
            f"{KOHYA}.lora_up.weight": B[..., None, None],
        },
        f"'{KOHYA}.lora_down.weight' [4, 16, 1, 1]",
        FUSE,
    ),
    "LoHa": ({f"{KOHYA}.hada_w1_a": B, f"{KOHYA}.hada_w1_b": A}, f"'{KOHYA}.hada_w1_a' [16, 4]", FUSE),
    "LoKr": ({f"{KOHYA}.lokr_w1": A, f"{KOHYA}.lokr_w2_a": B}, f"'{KOHYA}.lokr_w1' [4, 16]", FUSE),
    "LyCORIS-full": ({f"{KOHYA}.diff": torch.ones(N, N), f"{KOHYA}.diff_b": A[0]}, f"'{KOHYA}.diff' [16, 16]", FUSE),
    "LyCORIS-norms": ({"lora_te1_text_norm.w_norm": A[0]}, "'lora_te1_text_norm.w_norm' [16]", FUSE),
    "LyCORIS-IA3": ({f"{KOHYA}.weight": A[0], f"{KOHYA}.on_input": torch.ones(1)}, f"'{KOHYA}.on_input' [1]", FUSE),
    "GLoRA": ({"lycoris_unet_x.a1.weight": A}, "'lycoris_unet_x.a1.weight' [4, 16]", FUSE),
    "single-file-names": (
        {"diffusion_model.blocks.0.q.lora_A.weight": A, "diffusion_model.blocks.0.q.lora_B.weight": B},
        "'diffusion_model.blocks.0.q.lora_A.weight' [4, 16]",
        FUSE,
    ),
    "MLX": ({f"{Q}.lora_a": B, f"{Q}.lora_b": A}, f"'{Q}.lora_a' [16, 4]", MERGE),
    "VeRA": ({f"base_model.model.{Q}.vera_lambda_b": A[0]}, f"'base_model.model.{Q}.vera_lambda_b' [16]", MERGE),
    "IA3": ({f"base_model.model.{Q}.ia3_l": A[:1]}, f"'base_model.model.{Q}.ia3_l' [1, 16]", MERGE),
    "OFT": ({f"{KOHYA}.oft_blocks": torch.ones(4, 4, 4)}, f"'{KOHYA}.oft_blocks' [4, 4, 4]", FUSE),
}


@pytest.mark.parametrize(("factors", "example", "way"), LORA.values(), ids=LORA)
def test_bare_lora_files_are_refused(tmp_path: Path, factors: dict[str, Tensor], example: str, way: str) -> None:
    base = save_folder(tmp_path / "base", FLOATS)
    file = tmp_path / "lora.safetensors"
    save_file(factors, file)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(factors, folder / "pytorch_lora_weights.safetensors")
    for path, where in ((file, file), (folder, folder / "pytorch_lora_weights.safetensors")):
        line = f"{where}: LoRA factors ({example}) are no weights to merge; {way}"
        assert problems(base, path) == [line]
        assert problems(path, path) == [line]


def test_the_file_of_an_adapter_names_its_folder(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", FLOATS)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    file = adapter / "adapter_model.safetensors"
    save_file(LORA["PEFT"][0], file)
    assert problems(base, file) == [
        f"{file}: LoRA factors ('base_model.model.{Q}.lora_A.weight' [4, 16]) are no weights to merge; "
        f"give the adapter's folder, {adapter}, as --expert and its base as --base"
    ]


@pytest.mark.parametrize("own", ["weight", "base_layer.weight"])
def test_a_model_with_lora_of_its_own_is_none(tmp_path: Path, own: str) -> None:
    """As Phi-4-multimodal has it: the weights lie under their factors. RWKV's own ``lora`` is a layer like others."""
    layer = {f"{Q}.{own}": torch.ones(N, N), f"{Q}.lora_A.vision.weight": A, f"{Q}.lora_B.vision.weight": B}
    rwkv = {"attn.w_lora.lora.0.weight": A.clone(), "attn.w_lora.lora.2.bias": torch.ones(N)}
    folder = save_folder(tmp_path / "model", {**FLOATS, **layer, **rwkv})
    make_plan(load_config({"base": folder, "experts": [folder]}))


@pytest.mark.parametrize(
    ("own", "factor"),
    [
        ("parametrizations.weight.original", "parametrizations.weight.0.lora_{}"),
        ("base_layer.gate_up_proj", "lora_{}.weight"),
        ("linear.weight", "lora_{}"),
    ],
    ids=["jina-v3", "target-parameters", "wrapped"],
)
def test_weights_lie_beside_factors_under_many_names(tmp_path: Path, own: str, factor: str) -> None:
    layer = {f"{Q}.{own}": torch.ones(N, N), f"{Q}.{factor.format('A')}": A, f"{Q}.{factor.format('B')}": B}
    folder = save_folder(tmp_path / "model", {**FLOATS, **layer})
    make_plan(load_config({"base": folder, "experts": [folder]}))


OTHERS = {
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 9085657\n",
        "a Git LFS pointer to one; run git lfs pull in its folder",
    ),
    "torch-save": (
        b"PK\x03\x04\x00\x00\x08\x08" + bytes(90),
        "pickled weights under another name, which are never opened; save them as safetensors",
    ),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(90), "GGUF, which is not read; give the model's .safetensors files"),
    "web-page": (
        b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>",
        "a web page; download it again, logged in where that is asked for",
    ),
    "answer": (
        b"Invalid username or password.\n",
        "a text that begins with 'Invalid username or password.'; download it again",
    ),
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_pointers_in_place_of_settings(tmp_path: Path, name: str) -> None:
    base = save_folder(tmp_path / "base", FLOATS)
    (base / name).write_bytes(OTHERS["git-lfs"][0])
    with pytest.raises(imf.InputError) as caught:
        make_plan(load_config({"base": base, "experts": [base]}))
    assert str(caught.value) == f"{base / name}: a Git LFS pointer, not the file itself; run git lfs pull in its folder"


@pytest.mark.parametrize(("content", "what"), OTHERS.values(), ids=OTHERS)
def test_what_has_the_name_of_weights_and_is_something_else(tmp_path: Path, content: bytes, what: str) -> None:
    base = save_folder(tmp_path / "base", FLOATS)
    for name in ("bare.safetensors", "folder/model.safetensors"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        with pytest.raises(imf.InputError) as caught:
            make_plan(load_config({"base": base, "experts": [file.parent if "/" in name else file]}))
        assert str(caught.value) == f"{file}: not a safetensors file, but {what}"
