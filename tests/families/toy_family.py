"""A family that exists only here: two layers, its own score and its own padding, added as any family is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlm_export.family import (
    DEFAULT_BUILD,
    Array,
    BuildOptions,
    Checkpoint,
    Description,
    Model,
    NoOptions,
    Part,
    StoredTensorInfo,
    WeightStore,
    outlines,
    reference_from_module,
)
from vlm_export.specs import TextSpec, torchvision_image_spec
from vlm_export.specs.codec import Spec
from vlm_export.specs.signature import Axis, Signature, TensorSpec
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec, ScoreSpec

BATCH = Axis("batch")
CONTEXT, VOCABULARY, END, PAD = 6, 9, 1, 0
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ToyArchitecture(Spec):
    image_size: int
    width: int


class Vision(nn.Module):
    """pixel_values float32 (B, 3, S, S) → image_embeds float32 (B, D)."""

    def __init__(self, architecture: ToyArchitecture) -> None:
        super().__init__()
        self.pixels = nn.Linear(3 * architecture.image_size**2, architecture.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeds: Tensor = self.pixels(pixel_values.flatten(1))
        return embeds


class Text(nn.Module):
    """input_ids int64 (B, CONTEXT) → text_embeds float32 (B, D); padding counts, as the toy was trained with it."""

    def __init__(self, architecture: ToyArchitecture) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, architecture.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.tokens(input_ids).mean(dim=1)
        return embeds


class ToyFamily:
    name = "toy"
    reads: tuple[str, ...] = ()
    options: type[Spec] = NoOptions
    marks: tuple[str, ...] = ("toy_pixels.weight",)
    roots: tuple[str, ...] = ()
    config_types: Mapping[str, tuple[str, ...]] = {"toy": ("ToyModel",)}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return "toy_pixels.weight" in checkpoint.tensors

    def describe(self, checkpoint: Checkpoint) -> Description:
        architecture = _architecture(checkpoint)
        parts = outlines(_parts(architecture, Vision(architecture), Text(architecture)))
        return Description(architecture.to_json(), parts, (), image=_image(architecture), text=_text())

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        architecture = _architecture(checkpoint)
        vision, text = Vision(architecture).eval(), Text(architecture).eval()
        names = {"weight": "toy_pixels.weight", "bias": "toy_pixels.bias"}
        vision.pixels.load_state_dict({name: checkpoint.read(key) for name, key in names.items()})
        text.tokens.load_state_dict({"weight": checkpoint.read("toy_tokens.weight")})
        parts = _parts(architecture, vision, text)
        score = ScoreSpec("sigmoid", float(checkpoint.read("toy_scale")), float(checkpoint.read("toy_bias")))
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=_image(architecture),
            text=_text(),
            hub_config={"model_type": "toy"},
            tasks=(EmbedSpec(EncoderSpec("vision", "image_embeds"), EncoderSpec("text", "text_embeds"), score),),
            dropped_keys=(),
            references={part.name: partial(reference_from_module, part) for part in parts},
            reference_name="the toy's own module",
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        sizes = ToyArchitecture.from_config(architecture)
        shapes = {
            "toy_pixels.weight": (sizes.width, 3 * sizes.image_size**2),
            "toy_pixels.bias": (sizes.width,),
            "toy_tokens.weight": (VOCABULARY, sizes.width),
            "toy_scale": (),
            "toy_bias": (),
        }
        return {key: StoredTensorInfo(shape, "float32") for key, shape in shapes.items()}

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        return {"model_type": "toy"}


def _architecture(checkpoint: Checkpoint) -> ToyArchitecture:
    width, pixels = checkpoint.tensors["toy_pixels.weight"].shape
    return ToyArchitecture(image_size=round((pixels / 3) ** 0.5), width=width)


def _parts(architecture: ToyArchitecture, vision: Vision, text: Text) -> tuple[Part, ...]:
    size = architecture.image_size
    sees = Signature(
        inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, size, size)),),
        outputs=(TensorSpec("image_embeds", "float32", ("batch", architecture.width)),),
        axes=(BATCH,),
    )
    reads = Signature(
        inputs=(TensorSpec("input_ids", "int64", ("batch", CONTEXT)),),
        outputs=(TensorSpec("text_embeds", "float32", ("batch", architecture.width)),),
        axes=(BATCH,),
    )
    return Part("vision", vision, sees, partial(_examples, sees)), Part("text", text, reads, partial(_examples, reads))


def _examples(signature: Signature, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
    rng, (tensor,) = np.random.default_rng(seed), signature.inputs
    shape = tensor.concrete_shape(sizes)
    if tensor.dtype == "int64":
        return {tensor.name: rng.integers(0, VOCABULARY, shape)}
    return {tensor.name: rng.standard_normal(shape).astype(np.float32)}


def _image(architecture: ToyArchitecture) -> Any:
    return torchvision_image_spec(architecture.image_size, "bilinear", "before_resize", HALF, HALF, "stretch")


def _text() -> TextSpec:
    return TextSpec(CONTEXT, VOCABULARY, END, PAD, "none", case="kept", padding="context", pooling="first_token")


def toy_state(seed: int = 0, image_size: int = 4, width: int = 5) -> dict[str, Tensor]:
    """Weights of a toy."""
    generator = torch.Generator().manual_seed(seed)
    tensors = ToyFamily().published_tensors({"image_size": image_size, "width": width})
    return {key: torch.randn(info.shape, generator=generator) for key, info in tensors.items()}
