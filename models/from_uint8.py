"""Preprocessing inside the graph: uint8 pictures of any size to a vision part's `pixel_values`.

Reproduces Pillow's 8-bit antialiased resize (libImaging/Resample.c): a horizontal, then a vertical pass, each rounded
to whole numbers from 0 to 255. Only the rows and columns that the centre crop keeps are computed. Pillow 13 takes the
passes in the other order for pictures more than twice as tall as wide (python-pillow/Pillow#9549); before, and here,
the horizontal pass is always first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_export.specs import ImageSpec


class PreprocessedVision(nn.Module):
    """pixels uint8 (B, H, W, 3), RGB, 1 ≤ H, W → what the vision part gives for the preprocessed pictures.

    Shorter edge to `size_pixels`, centre crop, rescale to [0, 1], normalise; the rounding of sizes and offsets is
    torchvision's (`Resize`, `CenterCrop`).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec, vision: nn.Module) -> None:
        super().__init__()
        self.size, self.filter = spec.size_pixels, spec.resample
        self.vision = vision
        # On the CPU also when the module around them is built on the meta device.
        self.register_buffer("mean", torch.tensor(spec.mean, device="cpu").reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std, device="cpu").reshape(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        encoded: Tensor = self.vision(self.preprocess(pixels))
        return encoded

    def preprocess(self, pixels: Tensor) -> Tensor:
        """float32 (B, 3, S, S), normalised."""
        height, width = _tensor_from_size(pixels, 1), _tensor_from_size(pixels, 2)
        shorter = torch.minimum(height, width)
        x = pixels.permute(0, 3, 1, 2).to(torch.float32)
        columns = self._weights(torch.arange(pixels.shape[2]), width, self.size * width // shorter)
        x = _round_to_bytes(x @ columns.transpose(0, 1))
        rows = self._weights(torch.arange(pixels.shape[1]), height, self.size * height // shorter)
        x = _round_to_bytes(rows @ x)
        return (x / 255 - self.mean) / self.std

    def _weights(self, source: Tensor, length: Tensor, resized: Tensor) -> Tensor:
        """float32 (S, length): weights of every source pixel for each kept pixel of an edge resized to `resized`."""
        excess = resized - self.size
        half = excess // 2
        # round(excess / 2) with ties to even, as CenterCrop computes it.
        offset = half + (excess % 2) * (half % 2)
        # A kept pixel's centre in the source is (2 i + 1) length / (2 resized): whole part and rest are kept apart, so
        # that float32 is exact enough for any picture.
        doubled = (2 * (torch.arange(self.size) + offset) + 1) * length
        whole, rest = doubled // (2 * resized), doubled % (2 * resized)
        fraction = rest.to(torch.float32) / (2 * resized).to(torch.float32)
        scale = torch.clamp(length.to(torch.float32) / resized.to(torch.float32), min=1.0)
        distance = (source[None, :] - whole[:, None]).to(torch.float32) + (0.5 - fraction)[:, None]
        weights = _filter(distance / scale, self.filter)
        return weights / weights.sum(dim=1, keepdim=True)


def _tensor_from_size(x: Tensor, axis: int) -> Tensor:
    """int64 scalar: the size as a value of the graph, so that arithmetic on it is no condition on a shape."""
    return torch.ones_like(x.select(3, 0).select(0, 0).select(2 - axis, 0), dtype=torch.int64).sum()


def _filter(x: Tensor, name: str) -> Tensor:
    x = x.abs()
    if name == "bilinear":
        return torch.clamp(1 - x, min=0)
    # Keys' cubic with a = -0.5; zero outside two pixels.
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _round_to_bytes(x: Tensor) -> Tensor:
    # Pillow adds a half and truncates; values are never far below zero.
    return torch.clamp(torch.floor(x + 0.5), 0, 255)
