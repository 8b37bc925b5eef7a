"""Measure the peak memory of merging a pool of Llama folders, by FusionBench's class and by ours.

Makes a pretrained model and experts of about --megabytes each in a temporary folder, and merges them in a fresh process
for each class. Prints the peak resident memory, and how much of it was there before the pool was touched.

    python examples/fusion_bench/memory.py --experts 5 --megabytes 100
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = {
    "FusionBench": "fusion_bench.method.ISO_C_Merge",
    "isomerge-fast": "isomerge_fast.integrations.fusion_bench.IsoCFast",
}


def make_pool(folder: Path, experts: int, megabytes: float) -> None:
    """Make folders ``_pretrained_``, ``task0``, … of one architecture, every weight of the experts moved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layer = 512, 4 * 512**2 + 3 * 512 * 1376
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=1376,
        num_hidden_layers=max(1, round((megabytes * 1e6 / 4 - 2 * 4096 * width) / layer)),
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "_pretrained_")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for task in range(experts):
        for name, tensor in model.state_dict().items():
            tensor.copy_(start[name] + 0.01 * torch.randn_like(tensor))
        model.save_pretrained(folder / f"task{task}")


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def merge(folder: Path, target: str) -> str:
    """Merge in this process, and return in words what memory it took."""
    from fusion_bench import instantiate
    from fusion_bench.modelpool import CausalLMPool
    from transformers import LlamaForCausalLM

    models = {path.name: str(path) for path in sorted(folder.iterdir())}
    method = instantiate({"_target_": target, "scaling_factor": 1.0})
    pool = CausalLMPool(models, tokenizer=None)
    assert LlamaForCausalLM is not None  # its import takes memory, which must not count
    assert method.fabric.device.type == "cpu"
    before = peak_bytes()
    method.run(pool)
    return f"peak {peak_bytes() / 1e6:.0f} MB, of which {before / 1e6:.0f} MB before the pool was loaded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--merge", nargs=2, metavar=("FOLDER", "TARGET"), help="merge in this process")
    arguments = parser.parse_args()
    if arguments.merge:
        print(merge(Path(arguments.merge[0]), arguments.merge[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_pool(Path(folder), arguments.experts, arguments.megabytes)
        for name, target in TARGETS.items():
            command = [sys.executable, __file__, "--merge", folder, target]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{name}: {done.stdout.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
