"""The vision modules of MiniCPM-V and OmniLMM: image encoder and resampler, whole and split."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from vlm_export.models.layers.blocks import meta_modules
from vlm_export.models.layers.navit import NavitEncoder, NavitSizes, patch_mask, patch_places
from vlm_export.models.layers.resampler import Resampler, ResamplerSizes, sine_positions, sine_waves
from vlm_export.models.layers.vit import VisionTransformer, VitForm


class VisionModules(nn.Module):
    """All weights, as one module to load into."""

    def __init__(self, vision: VitForm | NavitSizes, resampler: ResamplerSizes) -> None:
        super().__init__()
        self.vision: VisionTransformer | NavitEncoder
        if isinstance(vision, NavitSizes):
            self.vision = NavitEncoder(vision)
        else:
            self.vision = VisionTransformer(vision)
            self.vision.dynamic_image_size = True
        self.resampler = Resampler(resampler)


def build_modules(vision: VitForm | NavitSizes, resampler: ResamplerSizes) -> VisionModules:
    """The modules on the meta device: shapes without weights."""
    with meta_modules():
        return VisionModules(vision, resampler)


class GridTokens(nn.Module):
    """pixel_values float32 (B, 3, H, W), multiples of the patch size → image_tokens float32 (B, rows, columns, C)."""

    def __init__(self, vision: VisionTransformer) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, pixel_values: Tensor) -> Tensor:
        patch, form = self.vision.form.patch_size, self.vision.form
        tokens = self.vision(pixel_values)
        # OmniLMM drops the class token, whose position no key of the resampler has.
        patches = tokens[:, 1:] if form.has_class_token else tokens
        rows, columns = pixel_values.shape[2] // patch, pixel_values.shape[3] // patch
        return cast(Tensor, patches).reshape(-1, rows, columns, form.width)


class GridResampler(nn.Module):
    """image_tokens float32 (B, rows, columns, C) → image_features float32 (B, Q, D)."""

    def __init__(self, resampler: Resampler) -> None:
        super().__init__()
        self.resampler = resampler

    def forward(self, image_tokens: Tensor) -> Tensor:
        positions = self.resampler.grid_positions(image_tokens.shape[1], image_tokens.shape[2])
        features: Tensor = self.resampler(image_tokens.flatten(1, 2), positions)
        return features


class GridVision(nn.Module):
    """pixel_values float32 (B, 3, H, W) → image_features float32 (B, Q, D)."""

    def __init__(self, vision: VisionTransformer, resampler: Resampler) -> None:
        super().__init__()
        self.tokens, self.resampler = GridTokens(vision), GridResampler(resampler)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.resampler(self.tokens(pixel_values))
        return features


class PackedResampler(nn.Module):
    """image_tokens float32 (B, L, C), tgt_sizes int64 (B, 2) → image_features float32 (B, Q, D); padding is hidden."""

    def __init__(self, resampler: Resampler) -> None:
        super().__init__()
        self.resampler = resampler

    def forward(self, image_tokens: Tensor, tgt_sizes: Tensor) -> Tensor:
        tokens = image_tokens.shape[1]
        positions = sine_positions(*patch_places(tgt_sizes, tokens), self.resampler.sizes.width)
        features: Tensor = self.resampler(image_tokens, positions, patch_mask(tgt_sizes, tokens))
        return features


class PackedVision(nn.Module):
    """pixel_values float32 (B, 3, p, p·L), tgt_sizes int64 (B, 2) → image_features float32 (B, Q, D)."""

    def __init__(self, vision: NavitEncoder, resampler: Resampler) -> None:
        super().__init__()
        self.tokens, self.resampler = vision, PackedResampler(resampler)

    def forward(self, pixel_values: Tensor, tgt_sizes: Tensor) -> Tensor:
        features: Tensor = self.resampler(self.tokens(pixel_values, tgt_sizes), tgt_sizes)
        return features


class VideoResampler(nn.Module):
    """Frames of a video in groups, each of which becomes one image's worth of features (MiniCPM-V 4.5).

    image_tokens float32 (G, F, L, C), tgt_sizes int64 (G, F, 2), temporal_ids int64 (G, F) → image_features float32
    (G, Q, D). An id says when a frame was taken; -1 is a frame without a time. A group with fewer frames than F is
    filled with frames of tgt_sizes 0, which are hidden.
    """

    def __init__(self, resampler: Resampler) -> None:
        super().__init__()
        self.resampler = resampler

    def forward(self, image_tokens: Tensor, tgt_sizes: Tensor, temporal_ids: Tensor) -> Tensor:
        frames, tokens = image_tokens.shape[1], image_tokens.shape[2]
        width, states_width = self.resampler.sizes.width, self.resampler.sizes.states_width
        sizes = tgt_sizes.reshape(-1, 2)
        # A frame that is hidden has no columns to count in. (No clamp: opset 11 has it for floats only.)
        places = sine_positions(*patch_places(sizes + (sizes == 0).to(torch.int64), tokens), width)
        is_timed = (temporal_ids >= 0).to(torch.int64)
        times = sine_waves(temporal_ids * is_timed, width) * is_timed.unsqueeze(-1)
        positions = places.reshape(-1, frames, tokens, width) + times.unsqueeze(2)
        mask = patch_mask(sizes, tokens).reshape(-1, frames * tokens)
        joined = image_tokens.reshape(-1, frames * tokens, states_width)
        features: Tensor = self.resampler(joined, positions.reshape(-1, frames * tokens, width), mask)
        return features
