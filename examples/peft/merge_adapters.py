"""Merge LoRA adapters of one base into a checkpoint, and into one adapter: python merge_adapters.py [folder]

The base is a tiny Llama and the adapters are made up, so that this runs anywhere in seconds; put your own folders in
their place. Needs: pip install 'isomerge-fast[peft]'.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import isomerge_fast as imf
from isomerge_fast.integrations.peft import add_merged_adapter

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, seed: int, rank: int) -> Path:
    """Make an adapter whose B is not zero, in place of a fine-tuning."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return folder


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    base = make_base(root / "base")
    adapters = [make_adapter(base, root / f"adapter-{seed}", seed, rank) for seed, rank in ((1, 4), (2, 8), (3, 6))]

    # From files to files: a checkpoint; and an adapter, of the rank that holds all of it (4 + 8 + 6) and of half of it.
    config = {"base": base, "experts": adapters, "method": "iso-cts", "scaling": 1.3}
    imf.merge({**config, "out": root / "merged"})
    for rank in (18, 9):
        report = imf.merge({**config, "adapter_rank": rank, "out": root / f"merged-adapter-{rank}"})
        lost = max(tensor["truncation"] for tensor in report.tensors)
        print(f"adapter of rank {rank}: {lost:.1%} of the merged delta's norm is left out")

    tokens = torch.arange(32)[None]
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(root / "merged")(tokens).logits
        small = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), root / "merged-adapter-18")
        error = (small(tokens).logits - full).norm() / full.norm()
        print(f"logits of the adapter of rank 18 against the checkpoint: {error:.1e}")

        # The same in memory, on a model that has the adapters loaded.
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], adapter_name="one")
        model.load_adapter(adapters[1], adapter_name="two")
        model.load_adapter(adapters[2], adapter_name="three")
        add_merged_adapter(model, ["one", "two", "three"], "merged", method="iso-cts", scaling=1.3)
        model.set_adapter("merged")
        error = (model(tokens).logits - full).norm() / full.norm()
        print(f"logits of the adapter merged in memory against the checkpoint: {error:.1e}")


if __name__ == "__main__":
    main()
