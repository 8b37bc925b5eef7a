"""Adapters saved by PEFT, merged from files to files, and loaded by PEFT again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
import peers
from checkpoints import load_folder
from isomerge_fast.execution.verify import verify

peers.need("peft", "peft")

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
EXAMPLE = Path(__file__).parents[1] / "examples" / "peft" / "merge_adapters.py"
TOKENS = torch.arange(3, 35)[None]
LLAMA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    """Its Conv1D layers store their weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=64))


FAMILIES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "llama": (
        llama,
        [
            {"r": 4, "lora_alpha": 8, "target_modules": LLAMA_MODULES},
            {"r": 8, "lora_alpha": 4, "target_modules": LLAMA_MODULES, "use_rslora": True},
            {
                "r": 6,
                "lora_alpha": 6,
                "target_modules": LLAMA_MODULES,
                "rank_pattern": {"down_proj": 2, "layers.0.self_attn.q_proj": 9},
                "alpha_pattern": {"layers.1.*": 3},
            },
        ],
    ),
    "llama-head": (
        llama,
        [
            {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
            {"r": 6, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        ],
    ),
    "gpt2": (
        gpt2,
        [
            {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]},
            {"r": 5, "target_modules": ["c_attn", "c_proj", "c_fc"]},
        ],
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, its adapters, and each adapter merged into the base by PEFT itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp(request.param)
    make, settings = FAMILIES[request.param]
    torch.manual_seed(0)
    make().save_pretrained(root / "base")
    adapters, experts = [], []
    for task, given in enumerate(settings):
        torch.manual_seed(1 + task)
        plain = AutoModelForCausalLM.from_pretrained(root / "base")
        model: Any = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **given))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(root / f"adapter{task}")
        model.merge_and_unload().save_pretrained(root / f"expert{task}")
        adapters.append(root / f"adapter{task}")
        experts.append(root / f"expert{task}")
    return {"name": request.param, "base": root / "base", "adapters": adapters, "experts": experts}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.double()


def distance(found: Tensor, expected: Tensor, origin: Tensor) -> float:
    """Relative to how far the merge moves from the base."""
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected - origin))


@pytest.mark.parametrize("method", ["iso-c", "iso-cts", "task-arithmetic"])
def test_checkpoint_out_is_the_dense_merge(family: dict[str, Any], tmp_path: Path, method: str) -> None:
    """Of adapters and of the same adapters merged into their base: one result, but for the rounding of the latter."""
    config = {"base": family["base"], "method": method, "scaling": 1.3}
    imf.merge({**config, "experts": family["adapters"], "out": tmp_path / "factors"})
    imf.merge({**config, "experts": family["experts"], "on_extra": "ignore", "out": tmp_path / "dense"})
    base, ours, dense = (load_folder(path) for path in (family["base"], tmp_path / "factors", tmp_path / "dense"))
    moved = {name for name in base if not torch.equal(ours[name], base[name])}
    assert len(moved) >= len(family["adapters"])
    for name, origin in base.items():
        change = torch.linalg.vector_norm((dense[name] - origin).double())
        # θ + Δ in float32 leaves of Δ what its own rounding leaves, and that is far above the promise for small Δ.
        rounding = 3 * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(origin.double())
        error = torch.linalg.vector_norm((ours[name] - dense[name]).double())
        assert error <= 1e-5 * change + (20 if method == "iso-cts" else 1) * rounding, name
    assert verify(tmp_path / "factors", samples=6).recomputed


def test_adapter_out_is_loaded_by_peft(family: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # So little that the logits follow the weights about linearly.
    config = {"base": family["base"], "experts": family["adapters"], "method": "iso-c", "scaling": 0.1}
    imf.merge({**config, "out": tmp_path / "full"})
    full = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "full"))
    origin = logits(AutoModelForCausalLM.from_pretrained(family["base"]))
    for rank in (24, 5):
        report = imf.merge({**config, "adapter_rank": rank, "out": tmp_path / f"rank-{rank}"})
        lost = max(tensor.get("truncation", 0.0) for tensor in report.tensors)
        assert lost <= 1e-9 if rank == 24 else 0.1 < lost < 1.0
        plain = AutoModelForCausalLM.from_pretrained(family["base"])
        model: Any = PeftModel.from_pretrained(plain, str(tmp_path / f"rank-{rank}"))
        assert model.peft_config["default"].r == rank
        error = distance(logits(model), full, origin)
        if rank == 24:
            assert error <= 2e-5
            # As PEFT merges it, it is the checkpoint.
            assert distance(logits(model.merge_and_unload()), full, origin) <= 2e-5
        else:
            assert 0.3 * lost <= error <= 1.3 * lost


def test_the_example_runs(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    errors = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if "logits" in line]
    assert len(errors) == 2
    assert max(errors) <= 1e-5
    assert (tmp_path / "merged-adapter-9" / "adapter_config.json").exists()
