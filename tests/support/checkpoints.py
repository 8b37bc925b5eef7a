"""Small checkpoints for tests, made with safetensors itself."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from isomerge_fast.checkpoint.io.writer import ShardWriter

SHAPES = {
    "embed_tokens.weight": (48, 16),
    "layers.0.up.weight": (40, 16),
    "layers.0.down.weight": (16, 40),
    "layers.0.norm.weight": (16,),
    "layers.1.up.weight": (40, 16),
    "conv.weight": (4, 3, 3, 3),
    "logit_scale": (),
}


def make_base(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Float tensors of 0 to 4 dimensions, an integer and a boolean buffer, and an empty tensor."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    tensors["position_ids"] = torch.arange(8)
    tensors["mask"] = torch.tensor([True, False, True])
    tensors["empty"] = torch.zeros(0, 4, dtype=dtype)
    return tensors


def make_expert(base: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The base with every float weight moved by a tenth of a standard normal."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: (tensor + 0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in base.items()
    }


def save_folder(
    folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, config: Mapping[str, object] | None = None
) -> Path:
    """A Hugging Face folder in ``shards`` files; tensors are dealt out to them in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
        weight_map = {tensor: names[index % shards] for index, tensor in enumerate(tensors)}
        for name in names:
            part = {tensor: tensors[tensor] for tensor, shard in weight_map.items() if shard == name}
            save_file(part, folder / name, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_family(
    root: Path, *, tasks: int = 3, dtype: torch.dtype = torch.float32, shards: int = 1
) -> tuple[Path, list[Path]]:
    """A base folder and ``tasks`` expert folders."""
    base = make_base(dtype)
    config = {"model_type": "test", "dtype": str(dtype).removeprefix("torch.")}
    base_folder = save_folder(root / "base", base, shards=shards, config=config)
    experts = [
        save_folder(root / f"expert{task}", make_expert(base, task), shards=shards, config=config)
        for task in range(tasks)
    ]
    return base_folder, experts


def load_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of all safetensors files in a folder, by safetensors."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    tensors = {**load_folder(folder), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def write_tensor(writer: ShardWriter, name: str, value: Tensor) -> None:
    """Write one tensor whole, as the file's header has it."""
    stored = writer.tensors[name]
    assert (value.dtype, tuple(value.shape)) == (stored.dtype, stored.shape), name
    writer.write_part(name, value, 0)
    writer.finish(name)


def config_of(family: tuple[Path, list[Path]], out: Path, **changes: object) -> dict[str, object]:
    """Return the config of a merge of a family by Iso-CTS."""
    return {"base": family[0], "experts": family[1], "out": out, "method": "iso-cts", **changes}


def damage_nan(family: tuple[Path, list[Path]]) -> None:
    """Write NaN in two places of the second expert."""
    tensor = load_folder(family[1][1])["layers.0.up.weight"]
    tensor[1, 2] = tensor[3, 4] = float("nan")
    rewrite(family[1][1], **{"layers.0.up.weight": tensor})


def raw_file(header: object, data: bytes = b"\0" * 8, *, text: bytes | None = None) -> bytes:
    """Return the bytes of a safetensors file with any header."""
    encoded = json.dumps(header).encode() if text is None else text
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    """Return what a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}
