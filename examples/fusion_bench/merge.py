"""Merge one pool of checkpoint folders by FusionBench's Iso-CTS and by ours, and compare: the same model.

Makes a small CLIP vision tower and four experts in a temporary folder, and merges them by FusionBench's own class and
by the one that ``method/iso_cts_fast.yaml`` names.

    python examples/fusion_bench/merge.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from fusion_bench import instantiate
from fusion_bench.modelpool import CLIPVisionModelPool
from omegaconf import OmegaConf
from transformers import CLIPVisionConfig, CLIPVisionModel

METHOD = Path(__file__).parent / "method" / "iso_cts_fast.yaml"


def make_pool(folder: Path) -> CLIPVisionModelPool:
    """Make a pretrained model and four experts with every weight moved."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=64, intermediate_size=128, image_size=32, num_attention_heads=4)
    config.num_hidden_layers = 2
    model = CLIPVisionModel(config)
    models = {}
    for name in ("_pretrained_", "cars", "digits", "flowers", "scenes"):
        models[name] = str(folder / name)
        model.save_pretrained(models[name])
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return CLIPVisionModelPool(OmegaConf.create(models))


def main() -> None:
    config = dict(OmegaConf.load(METHOD))
    theirs = instantiate({**config, "_target_": "fusion_bench.method.ISO_CTS_Merge"})
    ours = instantiate(config)
    with tempfile.TemporaryDirectory() as folder:
        pool = make_pool(Path(folder))
        start = pool.load_pretrained_model().state_dict()
        published, fast = theirs.run(pool).state_dict(), ours.run(pool).state_dict()
    largest = max(((fast[n] - t).norm() / (t - start[n]).norm()).item() for n, t in published.items())
    print(f"largest difference of a tensor, of what it moved by: {largest:.0e}, at most 1e-4: {largest <= 1e-4}")


if __name__ == "__main__":
    main()
