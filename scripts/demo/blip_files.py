"""The BLIP demo's files: for each of its two checkpoints the weights, the config and the report, and one tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from demo.files import sha256_of
from vlm_export.family import Model

CAPTION, VQA = "blip-demo-caption", "blip-demo-vqa"
NAMES = (CAPTION, VQA)
_TITLES = {
    CAPTION: "BLIP demo: says what pictures of coloured shapes show",
    VQA: "BLIP demo: answers questions about pictures of coloured shapes",
}


@dataclass(frozen=True)
class BlipDemoFiles:
    """Where everything lies below a folder that is laid out as `configs/`."""

    folder: Path

    def config(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    def checkpoint(self, name: str) -> Path:
        return self.folder / "demo" / f"{name}.pth"

    def report(self, name: str) -> Path:
        return self.folder / "demo" / f"{name}.json"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "demo" / "blip-tokenizer.json"

    def size_bytes(self) -> int:
        """Of both checkpoints."""
        return sum(self.checkpoint(name).stat().st_size for name in NAMES)


def write_config(files: BlipDemoFiles, name: str, model: Model) -> None:
    """The YAML that makes the checkpoint a known one."""
    assert model.image is not None
    assert model.text is not None
    data = {
        "family": model.family,
        "title": _TITLES[name],
        "source": {"file": f"demo/{name}.pth"},
        "sha256": sha256_of(files.checkpoint(name)),
        "tokenizer": f"demo/{files.tokenizer.name}",
        "licence": "Apache-2.0",
        "notes": "A demo: it knows drawn shapes and short sentences about them, nothing else. Made by "
        f"scripts/train_blip_demo.py; its accuracy is in demo/{name}.json.",
        "architecture": dict(model.architecture),
        "image": model.image.to_json() | {"mean": list(model.image.mean), "std": list(model.image.std)},
        "text": model.text.to_json(),
        "tolerances": {"fp32": {"max_abs": 0.0001, "cosine": 0.99999}},
    }
    text = yaml.safe_dump(data, sort_keys=False, width=118, default_flow_style=False)
    files.config(name).write_text(text, encoding="utf-8")


def write_report(files: BlipDemoFiles, name: str, report: dict[str, Any]) -> None:
    """The figures that documents quote."""
    files.report(name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
