"""What speeds the demo's training up and is thrown away after it: heads that are told what the images show.

Contrast alone needs several times as many images before the image encoder tells shapes and counts apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from demo.world import ATTRIBUTES, SHAPES, Composition, Drawing
from vlm_export.models.clip.encoders import ClipVisionTransformer

_ATTRIBUTE_WEIGHT = 0.3
# Most patches are empty; without this the head would learn to say so and nothing else.
_EMPTY_WEIGHT = 0.1


class TrainingAids(nn.Module):
    """One linear head per attribute on the image embedding, and one on each patch: which shape is centred here."""

    def __init__(self, vision: ClipVisionTransformer) -> None:
        """Listens to the last but one block of `vision` until `close`; the last block gathers what it has found."""
        super().__init__()
        width, embed_dim = vision.projection.shape
        self.grid = round((vision.position_embedding.shape[0] - 1) ** 0.5)
        self.attributes = nn.ModuleDict({name: nn.Linear(embed_dim, len(ATTRIBUTES[name])) for name in ATTRIBUTES})
        self.patches = nn.Linear(width, len(SHAPES) + 1)
        self._tokens = torch.empty(0)
        self._handle: RemovableHandle = vision.blocks[-2].register_forward_hook(self._keep)

    def loss(self, image_embeds: Tensor, drawings: Sequence[Drawing]) -> Tensor:
        """image_embeds: float32 (B, D), of the forward pass just done for these drawings."""
        compositions = [drawing.composition for drawing in drawings]
        terms = [
            F.cross_entropy(head(image_embeds), _attribute_labels(name, compositions))
            for name, head in self.attributes.items()
        ]
        classes = self.patches(self._tokens[:, 1:]).flatten(0, 1)
        weight = torch.tensor([_EMPTY_WEIGHT] + [1.0] * len(SHAPES))
        return _ATTRIBUTE_WEIGHT * torch.stack(terms).sum() + F.cross_entropy(
            classes, patch_labels(drawings, self.grid).flatten(), weight=weight
        )

    def close(self) -> None:
        """Stops listening."""
        self._handle.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._tokens = output


def patch_labels(drawings: Sequence[Drawing], grid: int) -> Tensor:
    """int64 (B, grid²), row by row: 0 where no object has its centre, else 1 + the number of its shape."""
    labels = torch.zeros(len(drawings), grid, grid, dtype=torch.int64)
    for i, drawing in enumerate(drawings):
        for x, y in drawing.centres:
            labels[i, int(y * grid), int(x * grid)] = 1 + SHAPES.index(drawing.composition.shape)
    return labels.flatten(1)


def _attribute_labels(name: str, compositions: Sequence[Composition]) -> Tensor:
    return torch.tensor([ATTRIBUTES[name].index(composition.value(name)) for composition in compositions])
