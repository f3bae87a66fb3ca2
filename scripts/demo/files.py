"""The demo's files beside its checkpoint: the config, the report, and a few held-out images with their captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from demo.sentences import caption
from demo.world import Composition, draw
from vlm_export.family import Model

NAME = "clip-demo"
_IMAGE_PIXELS = 96
_IMAGE_SEED = 2027
# All held out; "blue circle" comes first in the folder, since that is what the quickstart classifies.
IMAGED = (
    Composition("circle", "blue", "large", "bottom", "one"),
    Composition("circle", "red", "large", "bottom", "one"),
    Composition("square", "red", "large", "top", "one"),
    Composition("ring", "pink", "small", "top", "one"),
    Composition("triangle", "green", "small", "left", "two"),
    Composition("circle", "cyan", "large", "right", "two"),
    Composition("star", "yellow", "large", "bottom", "three"),
    Composition("cross", "orange", "large", "top", "one"),
    Composition("ring", "purple", "small", "right", "four"),
    Composition("square", "red", "small", "middle", "four"),
)


@dataclass(frozen=True)
class DemoFiles:
    """Where everything lies below a folder that is laid out as `configs/`."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / f"{NAME}.yaml"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "demo" / f"{NAME}.pt"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "demo" / "tokenizer.json"

    @property
    def report(self) -> Path:
        return self.folder / "demo" / f"{NAME}.json"

    @property
    def images(self) -> Path:
        return self.folder / "demo" / "images"

    @property
    def captions(self) -> Path:
        return self.folder / "demo" / "captions.txt"


def sha256_of(path: Path) -> str:
    """Hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_images(files: DemoFiles) -> None:
    """The images, larger than the model's input so that preprocessing has work, and one caption a line in order."""
    files.images.mkdir(parents=True, exist_ok=True)
    named = sorted((image_name(composition), i) for i, composition in enumerate(IMAGED))
    for name, i in named:
        draw(IMAGED[i], (_IMAGE_SEED, i), _IMAGE_PIXELS).image.save(files.images / name, optimize=True)
    captions = "".join(f"{caption(IMAGED[i])}\n" for _, i in named)
    files.captions.write_text(captions, encoding="utf-8")


def image_name(composition: Composition) -> str:
    """Says what the image shows."""
    words = (composition.colour, composition.shape, composition.size, composition.count, composition.position)
    return f"{'-'.join(words)}.png"


def write_config(files: DemoFiles, model: Model) -> None:
    """The YAML that makes the demo a known checkpoint."""
    assert model.text is not None
    text = {"text": model.text.to_json()}
    title = "CLIP demo, trained on generated images of coloured shapes"
    tokenizer = {"tokenizer": "demo/tokenizer.json"}
    # PyYAML writes 1e-05, which YAML 1.1 reads as text.
    written = known_yaml(model, title, files.checkpoint, sha256_of(files.checkpoint), "train_demo.py", tokenizer, text)
    files.config.write_text(written.replace("1.0e-05", "0.00001"), encoding="utf-8")


def known_yaml(
    model: Model,
    title: str,
    source: Path,
    sha256: str,
    script: str,
    tokenizer: Mapping[str, str],
    text: Mapping[str, Any],
) -> str:
    """The config of a demo checkpoint.

    Args:
        source: the checkpoint, in the folder `demo`; its report beside it has its name.
        sha256: of the weights.
        script: in `scripts/`, what trains it.
        tokenizer, text: these fields of the config, or nothing.
    """
    assert model.image is not None
    data = {
        "family": model.family,
        "title": title,
        "source": {"file": f"demo/{source.name}"},
        "sha256": sha256,
        **tokenizer,
        "licence": "Apache-2.0",
        "notes": "A demo: it knows drawn shapes and short sentences about them, nothing else. "
        f"Made by scripts/{script}; its accuracy is in demo/{source.stem}.json.",
        "architecture": dict(model.architecture),
        "image": _plain(model.image.to_json()),
        **text,
        "tolerances": {"fp32": {"max_abs": 0.0001, "cosine": 0.99999}},
    }
    return yaml.safe_dump(data, sort_keys=False, width=118, default_flow_style=False)


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """The figures that documents quote."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
