"""The BLIP demo's files: for each of its two checkpoints the weights, the config and the report, and one tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demo.files import known_yaml, sha256_of
from vlm_export.family import Model

CAPTION, VQA = "blip-demo-caption", "blip-demo-vqa"
NAMES = (CAPTION, VQA)
_TITLES = {
    CAPTION: "BLIP demo: says what images of coloured shapes show",
    VQA: "BLIP demo: answers questions about images of coloured shapes",
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
    assert model.text is not None
    checkpoint, text = files.checkpoint(name), {"text": model.text.to_json()}
    tokenizer = {"tokenizer": f"demo/{files.tokenizer.name}"}
    written = known_yaml(model, _TITLES[name], checkpoint, sha256_of(checkpoint), "train_blip_demo.py", tokenizer, text)
    files.config(name).write_text(written, encoding="utf-8")
