"""What is recorded of files, texts and tensors: hashes, or what they say without times and places."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Keys of JSON whose values are measured, or are hashes of what holds paths.
DROPPED = {"seconds", "io", "workers", "digest", "manifest", "estimated_seconds"}
# What texts tell of measurements, or is a hash of what holds paths, and what stands for it.
MEASURED = [
    (re.compile(r"compute ≈ [^,\n]+"), "compute ≈ TIME"),
    (re.compile(r'"digest": "[0-9a-f]+"'), '"digest": "DIGEST"'),
    (re.compile(r'(README\.md": \{\s*"bytes": \d+,\s*"checksum": )"[0-9a-f]+"'), r'\1"CHECKSUM"'),
]


class Place:
    """The folder in which a recording works, which texts are cleared of."""

    def __init__(self, work: Path) -> None:
        self._names = sorted({str(work), str(work.resolve())}, key=len, reverse=True)

    def text(self, text: str) -> str:
        """Return a text without the folder's name and without what is measured."""
        for name in self._names:
            text = text.replace(name, "WORK")
        for pattern, instead in MEASURED:
            text = pattern.sub(instead, text)
        return text

    def value(self, value: Any) -> Any:
        """Return a value of JSON likewise."""
        if isinstance(value, dict):
            return {self.text(key): self.value(each) for key, each in value.items() if key not in DROPPED}
        if isinstance(value, list):
            return [self.value(each) for each in value]
        return self.text(value) if isinstance(value, str) else value

    def output(self, text: str) -> Any:
        """Return what a command printed: as a value where it is JSON."""
        try:
            return self.value(json.loads(text))
        except ValueError:
            return self.text(text)

    def folder(self, folder: Path) -> dict[str, Any]:
        """Return all files of an output, by their names in it: hashes of their bytes, or what they say."""
        found: dict[str, Any] = {}
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            name, data = path.relative_to(folder).as_posix(), path.read_bytes()
            if path.name == "README.md":
                found[name] = self.text(data.decode())
            elif path.name == "report.json":
                found[name] = self.value(json.loads(data))
                found[name]["tensors"].sort(key=lambda tensor: tensor["name"])
            elif path.name == "manifest.json":  # nothing in it is measured: its keys' order and layout count as well
                text = self.text(data.decode())
                found[name] = self.value(json.loads(text))
                found[f"{name} as text"] = hashlib.sha256(text.encode()).hexdigest()
            else:
                found[name] = hashlib.sha256(data).hexdigest()
        return found


def fingerprint(tensor: Tensor) -> dict[str, Any]:
    """Return what is recorded of a tensor: the hash of its bytes, their sum in float64, dtype and shape."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "sum": float(tensor.double().sum()),
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
    }
