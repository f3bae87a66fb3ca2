"""The nanoVLM demo's files: a checkpoint's directory as nanoVLM publishes it, the config and the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from demo.checkpoint import stored
from demo.files import known_yaml, sha256_of
from demo.nanovlm_vocab import tokenizer_config_json, tokenizer_json
from vlm_export.family import Model
from vlm_export.models.nanovlm.architecture import NanoVlmArchitecture, config_from_architecture
from vlm_export.models.nanovlm.parts import NanoVlmModules
from vlm_export.models.nanovlm.weights import EMBEDDING_KEY, HEAD_KEY, weight_table

NAME = "nanovlm-demo"


@dataclass(frozen=True)
class NanoVlmDemoFiles:
    """Where everything lies below a folder that is laid out as `configs/`."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / f"{NAME}.yaml"

    @property
    def checkpoint(self) -> Path:
        """The directory."""
        return self.folder / "demo" / NAME

    @property
    def weights(self) -> Path:
        return self.checkpoint / "model.safetensors"

    @property
    def tokenizer(self) -> Path:
        return self.checkpoint / "tokenizer.json"

    @property
    def report(self) -> Path:
        return self.folder / "demo" / f"{NAME}.json"


def write_checkpoint(folder: Path, modules: NanoVlmModules, architecture: NanoVlmArchitecture) -> None:
    """Weights, sizes and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "config.json": json.dumps(config_from_architecture(architecture), indent=2) + "\n",
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": tokenizer_config_json(architecture.decoder.positions),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    # A tied head is stored once, and the metadata says what else it is, as `safetensors.torch.save_model` writes it.
    content = save(published_tensors(modules, architecture), metadata={EMBEDDING_KEY: HEAD_KEY})
    (folder / "model.safetensors").write_bytes(content)


def published_tensors(modules: NanoVlmModules, architecture: NanoVlmArchitecture) -> dict[str, Tensor]:
    """The weights under nanoVLM's keys. Matrices are float16 where the original has float32."""
    ours = modules.state_dict()
    table = weight_table(architecture.vision.layers, architecture.decoder)
    return {key: stored(ours, target) for key, target in sorted(table.items()) if target is not None}


def write_config(files: NanoVlmDemoFiles, model: Model) -> None:
    """The YAML that makes the checkpoint a known one; the directory holds the tokenizer."""
    title = "nanoVLM demo: answers questions about images of coloured shapes, and captions them"
    sha256, script = sha256_of(files.weights), "train_nanovlm_demo.py"
    files.config.write_text(known_yaml(model, title, files.checkpoint, sha256, script, {}, {}), encoding="utf-8")
