"""A checkpoint in PyTorch behind the runtime's own tasks: its modules run where a bundle's graphs would."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlm_export import Model
from vlm_export.bundle.layout import TOKENIZER_NAME
from vlm_export.bundle.opened import OpenBundle
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.family import Model as BuiltModel
from vlm_export.family import Part
from vlm_export.models.registry import recognise
from vlm_export.runtime.engines.onnxruntime import Array, Engine, TensorInfo
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.runtime.session import Session
from vlm_export.specs import ImageSpec


def load_model(path: Path) -> BuiltModel:
    """The model of a checkpoint, in float32, through the project's own reader."""
    checkpoint = open_checkpoint(str(path))
    # The mappings outlive the scratch file.
    with tempfile.TemporaryDirectory() as folder, ScratchStore(Path(folder) / "weights.bin") as store:
        return recognise(checkpoint).build(checkpoint, store)


def torch_model(built: BuiltModel, tokenizer: Path) -> Model:
    """What `vlm_export.load` returns, with PyTorch as the engine."""
    return Model(TorchSession(built, tokenizer))


def module_of(built: BuiltModel, name: str) -> nn.Module:
    """The module of the part of that name."""
    return next(part.module for part in built.parts if part.name == name)


def pixel_values(images: Sequence[Image.Image], spec: ImageSpec) -> Tensor:
    """float32 (B, 3, S, S), prepared as the runtime does."""
    return torch.from_numpy(np.stack([preprocess_image(image, spec) for image in images]))


class ModuleEngine:
    """A Part as the runtime's `Engine`."""

    def __init__(self, part: Part) -> None:
        self._module, specs = part.module, part.signature
        self.inputs = tuple(TensorInfo(spec.name, spec.dtype, spec.shape) for spec in specs.inputs)
        self.outputs = tuple(TensorInfo(spec.name, spec.dtype, spec.shape) for spec in specs.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.inference_mode():
            outputs = self._module(*(torch.from_numpy(np.ascontiguousarray(feeds[info.name])) for info in self.inputs))
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        return {info.name: tensor.numpy() for info, tensor in zip(self.outputs, tensors, strict=True)}


class TorchSession(Session):
    """A session over a checkpoint's modules; its bundle holds what tasks ask of one, and nothing else."""

    def __init__(self, built: BuiltModel, tokenizer: Path) -> None:
        variants = (SimpleNamespace(precision="fp32"),)
        parts = {p.name: SimpleNamespace(name=p.name, signature=p.signature, variants=variants) for p in built.parts}
        manifest = SimpleNamespace(
            name=built.family,
            image=built.image,
            text=built.text,
            task=built.task,
            part=parts.__getitem__,
            parts=tuple(parts.values()),
            files=(TOKENIZER_NAME,),
        )
        bundle = SimpleNamespace(manifest=manifest, root=tokenizer.parent, file=lambda _: tokenizer)
        super().__init__(cast(OpenBundle, bundle), precision="fp32", engine="onnxruntime")
        self._modules = {part.name: ModuleEngine(part) for part in built.parts}

    def engine(self, part: str) -> Engine:
        return self._modules[part]
