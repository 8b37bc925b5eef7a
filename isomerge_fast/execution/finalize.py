"""Write all of an output but its weights: index, manifest, report, and the other files of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from .. import __version__
from ..checkpoint.io.checksum import ALGORITHM, Checksum
from ..checkpoint.io.writer import write_blocks_durably
from ..checkpoint.layout import ADAPTER_CONFIG_FILE, DTYPE_NAMES, OutputTensor
from ..checkpoint.output.companions import copy_companions
from ..checkpoint.output.journal import Entries
from ..checkpoint.output.json_files import LazyMapping, json_blocks, read_with_digest, to_json, write_with_digest
from ..checkpoint.output.manifest import (
    FORMAT,
    MANIFEST_FILE,
    REPORT_FILE,
    Description,
    FileEntry,
    Manifest,
    ShardEntry,
    TensorEntry,
    entry_of,
    file_name,
    no_output,
)
from ..checkpoint.output.model_card import model_card
from ..config import MergeConfig, recorded_config
from ..errors import ConfigError, VerificationError
from ..methods import make_method, method_class
from ..planning.outputs import scaling_folders
from ..planning.plan import OriginalMerge, Plan
from .report import Report


def write_metadata(
    plan: Plan,
    folder: Path,
    description: Mapping[str, Any],
    entries: Entries,
    shards: dict[str, ShardEntry],
    report: Report,
) -> None:
    """Write all of an output but its weights into ``folder``, durably: companions, configs, manifest and report."""
    scalings = scaling_folders(plan.config)
    files: dict[str, FileEntry] = {}
    for name, scaling in scalings.items():
        written = {} if scaling is None else _add_companions(plan, folder / name, scaling)
        if plan.index_name is not None:
            written[plan.index_name] = _add_index(plan.index_name, folder / name, plan.folders[name])
        files |= {file_name(name, each): entry_of(content) for each, content in written.items()}
    manifest: Manifest = {
        "format": FORMAT,
        "checksum": ALGORITHM,
        "description": cast(Description, description),
        "outputs": {
            name: {
                "scaling": scaling,
                "tensors": cast(dict[str, TensorEntry], _recorded(plan, name, entries)),
            }
            for name, scaling in scalings.items()
        },
        "files": files,
        "shards": shards,
    }
    if plan.config.save_delta:
        checksums = LazyMapping(entries.keys(), entries.base_checksum)
        manifest["base"] = cast(dict[str, str], checksums)
    digest = write_with_digest(folder / MANIFEST_FILE, json_blocks(manifest))
    write_with_digest(folder / REPORT_FILE, json_blocks({**report.to_dict(), "manifest": digest}))


def read_report(folder: Path) -> tuple[Report, str]:
    """Return the report of a finished output, and the digest of the manifest that it was written with."""
    path = folder / REPORT_FILE
    if not os.path.isfile(path):  # of a name that is too long, too
        raise no_output(folder, REPORT_FILE)
    value, flaw = read_with_digest(path)
    if flaw is not None:
        raise VerificationError(flaw)
    try:
        return Report.from_dict(value), str(value.get("manifest"))
    except ValueError as error:
        raise VerificationError(f"{path}: not a report ({error})") from error


def config_of(manifest: Manifest) -> MergeConfig:
    """Return the config of the merge that wrote a manifest; refuse one of other outputs than those it lists."""
    config = recorded_config(manifest["description"])
    for chosen in (config, *config.overrides):
        make_method(chosen.method, chosen.options)
    expected = scaling_folders(config)
    found = {name: output["scaling"] for name, output in manifest["outputs"].items()}
    if found != expected:
        raise ConfigError(f"its outputs are of scalings {found}, its config of {expected}")
    return config


def _recorded(plan: Plan, folder: str, entries: Entries) -> LazyMapping:
    """Return what the manifest says of a sub-folder's tensors, by their names there."""
    written = {made.name: (tensor, made) for tensor in plan.tensors for made in tensor.tensors_in(folder)}

    def record(name: str) -> TensorEntry:
        tensor, made = written[name]
        return {
            "file": tensor.shard,
            "action": tensor.action,
            "dtype": DTYPE_NAMES[made.dtype],
            "shape": list(made.shape),
            "checksum": entries.checksums(tensor.name)[folder][name],
        }

    return LazyMapping(written, record)


def _add_index(name: str, path: Path, weights: Mapping[str, Iterable[OutputTensor]]) -> Checksum:
    """Write the file that tells which shard holds which tensor; return its checksum."""
    total_bytes = sum(output.bytes for tensors in weights.values() for output in tensors)
    weight_map = {output.name: file for file, tensors in weights.items() for output in tensors}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    return write_blocks_durably(path / name, json_blocks(index, indent=2))


def _add_companions(plan: Plan, path: Path, scaling: float) -> dict[str, Checksum]:
    """Write the other files of a checkpoint, or of an adapter; return their checksums."""
    written = copy_companions(plan.base.path, path, plan.companions) if plan.base.is_folder else {}
    if plan.adapter_settings is not None:
        written[ADAPTER_CONFIG_FILE] = write_blocks_durably(
            path / ADAPTER_CONFIG_FILE, [to_json(plan.adapter_settings, indent=2)]
        )
    elif (config := plan.config_and_notes[0]) is not None:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        written["config.json"] = write_blocks_durably(path / "config.json", [(text + "\n").encode()])
    written["README.md"] = write_blocks_durably(path / "README.md", [_card(plan, scaling).encode()])
    return written


def _card(plan: Plan, scaling: float) -> str:
    """Return the model card of the merge; where a kept Δ is applied, of the merge that kept it."""
    original = plan.original_merge or OriginalMerge(plan.config, bool(plan.adapters))
    experts = [expert.path for expert in plan.experts] if plan.original_merge is None else original.config.experts
    config = replace(original.config, dtype=plan.config.dtype)
    nothing = MergeConfig(base="", experts=[]).described
    said = {
        key: value
        for key, value in config.described.items()
        if key not in ("out", "save_delta") and value != nothing[key]
    }
    recipe = {
        "method": config.method,
        **said,
        "base": str(plan.base.path),
        "experts": [str(expert) for expert in experts],
        "scaling": scaling,
    }
    kinds = {"LoRA adapters": original.has_adapters, "deltas": config.experts_are_deltas}
    library = "transformers" if "model_type" in (plan.base.config or {}) else None
    return model_card(
        recipe,
        kind=next((kind for kind, holds in kinds.items() if holds), "checkpoints"),
        citation=method_class(config.method).citation,
        version=__version__,
        library=library if plan.adapter_settings is None else "peft",
        notes=plan.notes,
    )
