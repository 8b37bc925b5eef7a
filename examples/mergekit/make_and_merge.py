"""Make a small Llama and three experts of it, merge them by one recipe in both ways, and compare.

    python examples/mergekit/make_and_merge.py [FOLDER]

Needs `pip install 'isomerge-fast[mergekit]'`; nothing is downloaded. In FOLDER (mergekit-example when left out), which
must not exist, it leaves models/, by-isomerge/ and by-mergekit/.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: every model here is a folder

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

RECIPE = Path(__file__).with_name("recipe.yml")
# These models have no tokenizer; and for its model card mergekit asks the hub about paths that look like a name there.
WITHOUT_THE_HUB = ("--no-copy-tokenizer", "--no-write-model-card")


def make_models(folder: Path, dtype: torch.dtype = torch.bfloat16, experts: int = 3) -> None:
    """Make a base and experts near it, as Hugging Face folders."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
    )
    base = LlamaForCausalLM(config)
    torch.nn.Module.to(base, dtype)
    base.save_pretrained(folder / "base")
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for index in range(experts):
        moved = {name: tensor + 0.03 * torch.randn_like(tensor) for name, tensor in start.items()}
        base.load_state_dict(moved)
        base.save_pretrained(folder / f"expert{index}")


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    make_models(folder / "models")
    shutil.copy(RECIPE, folder)
    # The console scripts `isomerge` and `isomerge-mergekit-yaml`, called so that they need not be on the path.
    for command in (
        ["isomerge_fast.cli", "run", RECIPE.name, "--out", "by-isomerge"],
        ["isomerge_fast.integrations.mergekit", RECIPE.name, "by-mergekit", *WITHOUT_THE_HUB],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=folder, check=True)
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("by-isomerge", "by-mergekit"))
    same = sum(int((ours[name] == theirs[name]).sum()) for name in ours)
    print(f"{same} of {sum(tensor.numel() for tensor in ours.values())} weights are the same bfloat16 numbers")
    for name in ("by-isomerge", "by-mergekit"):
        model = LlamaForCausalLM.from_pretrained(folder / name).float()
        with torch.no_grad():
            logits = model(torch.arange(8)[None]).logits
        print(f"{name}: next token {logits[0, -1].argmax().item()}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "mergekit-example"))
