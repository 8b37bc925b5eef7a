"""All of an output beside its weights: their index, the manifest, the report, and what belongs to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __version__
from .checkpoint.checksum import ALGORITHM
from .checkpoint.companions import config_with_dtype, copy_companions, model_card
from .checkpoint.layout import ADAPTER_CONFIG_FILE
from .checkpoint.manifest import FORMAT, MANIFEST_FILE, to_json
from .checkpoint.writer import write_durably
from .config import MergeConfig
from .methods import METHODS
from .plan import Plan, scaling_folders
from .report import REPORT_FILE, Report


def write_all_else(
    plan: Plan,
    folder: Path,
    description: Mapping[str, Any],
    entries: Mapping[str, Mapping[str, Any]],
    report: Report,
) -> None:
    """Completes the output in ``folder``, durably.

    Args:
        description: all that decides the output's bytes.
        entries: of the journal, by tensor.
    """
    scalings = scaling_folders(plan.config.scalings)
    for name, files in plan.folders.items():
        path = folder / name
        if name in scalings:
            _add_companions(plan, path, scalings[name])
        if plan.index_name is not None:
            total_bytes = sum(output.bytes for tensors in files.values() for output in tensors)
            weight_map = {output.name: file for file, tensors in files.items() for output in tensors}
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            write_durably(path / plan.index_name, to_json(index, indent=2))
    written = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    manifest = {
        "files": sorted([*written, MANIFEST_FILE, REPORT_FILE]),
        "format": FORMAT,
        "checksum": ALGORITHM,
        "description": description,
        "outputs": {
            name: {
                "scaling": scalings.get(name),
                "tensors": {
                    output: {"file": tensor.shard, "action": tensor.action, "checksum": checksum}
                    for tensor in plan.tensors
                    for output, checksum in entries[tensor.name]["checksum"].get(name, {}).items()
                },
            }
            for name in plan.folders
        },
    }
    write_durably(folder / MANIFEST_FILE, to_json(manifest))
    write_durably(folder / REPORT_FILE, to_json(report.to_dict()))


def _add_companions(plan: Plan, path: Path, scaling: float) -> None:
    """What belongs to a checkpoint, or an adapter, beside its weights and their index."""
    if plan.base.is_folder:
        copy_companions(plan.base.path, path, plan.companions)
    if plan.adapter_settings is not None:
        write_durably(path / ADAPTER_CONFIG_FILE, to_json(plan.adapter_settings, indent=2))
    elif plan.base.config is not None:
        text = json.dumps(config_with_dtype(plan.base.config, plan.config.dtype), indent=2, ensure_ascii=False)
        write_durably(path / "config.json", (text + "\n").encode())
    write_durably(path / "README.md", _card(plan, scaling).encode())


def _card(plan: Plan, scaling: float) -> str:
    config = plan.config
    nothing = MergeConfig(base="", experts=[])
    said = {
        key: value
        for key, value in asdict(config).items()
        if key not in ("out", "save_delta") and value != getattr(nothing, key)
    }
    recipe = {
        "method": config.method,
        **said,
        "base": str(plan.base.path),
        "experts": [str(expert.path) for expert in plan.experts],
        "scaling": scaling,
    }
    kinds = {"LoRA adapters": plan.has_adapters, "deltas": config.experts_are_deltas}
    library = "transformers" if "model_type" in (plan.base.config or {}) else None
    return model_card(
        recipe,
        kind=next((kind for kind, holds in kinds.items() if holds), "checkpoints"),
        citation=METHODS[config.method].citation,
        version=__version__,
        library=library if plan.adapter_settings is None else "peft",
    )
