"""The demos' files below a folder that is laid out as `configs/`: checkpoints, configs, reports, and a few images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from demo.sentences import caption
from demo.torch_model import load_model
from demo.world import Composition, draw
from vlm_export.family import Model
from vlm_export.models.reading.weights import Kept, Rows, Target, Transposed, Unsqueezed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_IMAGE_PIXELS, _IMAGE_SEED = 96, 2027
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
class Demo:
    """A demo checkpoint: its name and title, the script that trains it, and its files in the folder `demo`.

    Attributes:
        checkpoint: a file, or a directory as it is published.
        weights: what the config pins.
        tokenizer: beside the checkpoint, or in its directory, where the config names none.
    """

    name: str
    title: str
    script: str
    checkpoint: str
    weights: str
    tokenizer: str


CLIP = Demo(
    "clip-demo",
    "CLIP demo, trained on generated images of coloured shapes",
    "train_demo.py",
    *("clip-demo.pt", "clip-demo.pt", "tokenizer.json"),
)
CAPTION, VQA = (
    Demo(name, f"BLIP demo: {what}", "train_blip_demo.py", f"{name}.pth", f"{name}.pth", "blip-tokenizer.json")
    for name, what in (
        ("blip-demo-caption", "says what images of coloured shapes show"),
        ("blip-demo-vqa", "answers questions about images of coloured shapes"),
    )
)
CHAT = Demo(
    "nanovlm-demo",
    "nanoVLM demo: answers questions about images of coloured shapes, and captions them",
    "train_nanovlm_demo.py",
    *("nanovlm-demo", "nanovlm-demo/model.safetensors", "nanovlm-demo/tokenizer.json"),
)
DEMOS = (CLIP, CAPTION, VQA, CHAT)


class DemoFiles:
    """Where the files of a demo lie below a folder; `images` and `captions` are shared by all demos."""

    def __init__(self, demo: Demo, folder: Path = CONFIGS) -> None:
        self.demo, below = demo, folder / "demo"
        self.config, self.report = folder / f"{demo.name}.yaml", below / f"{demo.name}.json"
        self.checkpoint, self.weights, self.tokenizer = (
            below / name for name in (demo.checkpoint, demo.weights, demo.tokenizer)
        )
        self.images, self.captions = below / "images", below / "captions.txt"

    @property
    def sha256(self) -> str:
        """Of the weights, hexadecimal."""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()

    def save(self, weights: Any) -> None:
        """Writes a PyTorch checkpoint, which replaces what is there only when it is complete."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(weights, temporary)
        os.replace(temporary, self.checkpoint)

    def model(self) -> Model:
        """The model of the checkpoint, in float32, through the project's own reader."""
        return load_model(self.checkpoint)

    def write_config(self) -> None:
        """The YAML that makes the checkpoint a known one."""
        model, beside = self.model(), self.checkpoint not in self.tokenizer.parents
        assert model.image is not None
        assert model.text is not None
        data = {
            "family": model.family,
            "title": self.demo.title,
            "source": {"file": f"demo/{self.demo.checkpoint}"},
            "sha256": self.sha256,
            **({"tokenizer": f"demo/{self.demo.tokenizer}"} if beside else {}),
            "licence": "Apache-2.0",
            "notes": "A demo: it knows drawn shapes and short sentences about them, nothing else. "
            f"Made by scripts/{self.demo.script}; its accuracy is in demo/{self.demo.name}.json.",
            "architecture": dict(model.architecture),
            "image": {k: list(v) if isinstance(v, tuple) else v for k, v in model.image.to_json().items()},
            **({"text": model.text.to_json()} if beside else {}),
            "tolerances": {"fp32": {"max_abs": 0.0001, "cosine": 0.99999}},
        }
        text = yaml.safe_dump(data, sort_keys=False, width=118, default_flow_style=False)
        self.config.write_text(text, encoding="utf-8")

    def write_report(self, figures: Mapping[str, Any]) -> None:
        """The figures that documents quote, about these weights."""
        head = {
            "what": f"a demo checkpoint, written by scripts/{self.demo.script}",
            "sha256": self.sha256,
            "size_bytes": self.weights.stat().st_size,
        }
        self.report.write_text(json.dumps(head | dict(figures), indent=2) + "\n", encoding="utf-8")

    def write_images(self) -> None:
        """Images larger than the models' input, so that preprocessing has work, and one caption a line in order."""
        self.images.mkdir(parents=True, exist_ok=True)
        named = sorted((image_name(composition), i) for i, composition in enumerate(IMAGED))
        for name, i in named:
            draw(IMAGED[i], (_IMAGE_SEED, i), _IMAGE_PIXELS).image.save(self.images / name, optimize=True)
        self.captions.write_text("".join(f"{caption(IMAGED[i])}\n" for _, i in named), encoding="utf-8")


def image_name(composition: Composition) -> str:
    """Says what the image shows."""
    words = (composition.colour, composition.shape, composition.size, composition.count, composition.position)
    return f"{'-'.join(words)}.png"


def published(
    table: Mapping[str, Target], ours: Mapping[str, Tensor], halved: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Our weights under their published keys, sorted: the inverse of loading.

    Args:
        table: published key → the parameter, or the part of one, that it holds.
        halved: marks of the keys that are stored as float16, None for all matrices; the others are float32.
    """
    tensors: dict[str, Tensor] = {}
    for key, target in sorted(table.items(), key=lambda entry: entry[0]):
        if target is not None:
            weight = _stored(ours, target)
            half = weight.squeeze().ndim >= 2 if halved is None else any(mark in key for mark in halved)
            tensors[key] = weight.detach().to(torch.float16 if half else torch.float32).clone().contiguous()
    return tensors


def _stored(ours: Mapping[str, Tensor], target: Kept) -> Tensor:
    if isinstance(target, str):
        return ours[target]
    if isinstance(target, Rows):
        return torch.cat(ours[target.name].chunk(target.count)[target.index : target.index + target.span])
    if isinstance(target, Transposed):
        return ours[target.name].T
    assert isinstance(target, Unsqueezed)
    return ours[target.name].reshape(*[1] * target.axes, *ours[target.name].shape)
