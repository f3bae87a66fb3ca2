"""Position embeddings at another grid against the libraries' own functions and the originals' records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from timm.layers import resample_abs_pos_embed
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from vlm_export.models.layers.positions import resample_position_embedding

BLIP = Path(__file__).parents[1] / "data" / "blip"
GRIDS = [(5, 5), (7, 7), (9, 4), (1, 1), (3, 12), (2, 8)]


def table(grid: int, prefix: int, width: int = 6) -> torch.Tensor:
    return torch.randn(prefix + grid**2, width, generator=torch.Generator().manual_seed(grid))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_timm(grid: tuple[int, int], prefix: int) -> None:
    positions = table(5, prefix)
    expected = resample_abs_pos_embed(positions[None], list(grid), (5, 5), num_prefix_tokens=prefix)[0]
    found = resample_position_embedding(positions, 5, *grid, prefix_tokens=prefix, antialias=True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_equals_transformers(grid: tuple[int, int]) -> None:
    original = CLIPVisionEmbeddings(CLIPVisionConfig(hidden_size=6, num_attention_heads=1, image_size=40, patch_size=8))
    positions = table(5, 1)
    with torch.no_grad():
        original.position_embedding.weight.copy_(positions)
        tokens = torch.zeros(1, 1 + grid[0] * grid[1], 6)
        expected = original.interpolate_pos_encoding(tokens, grid[0] * 8, grid[1] * 8)[0]
    torch.testing.assert_close(resample_position_embedding(positions, 5, *grid), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["caption", "feature_extractor", "retrieval", "vqa"])
def test_equals_blips_record(variant: str) -> None:
    stored = torch.load(next((BLIP / variant).glob("*.pth")), weights_only=True)["model"]["visual_encoder.pos_embed"][0]
    expected = load_file(BLIP / variant / "golden.safetensors")["output_resized.pos_embed_interpolated"][0]
    grid, resized = (round((len(positions) - 1) ** 0.5) for positions in (stored, expected))
    assert grid != resized
    found = resample_position_embedding(stored, grid, resized, resized).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_two_filters_differ_even_where_nothing_shrinks() -> None:
    positions = table(5, 0)
    plain, antialiased = (
        resample_position_embedding(positions, 5, 8, 8, prefix_tokens=0, antialias=flag) for flag in (False, True)
    )
    assert (plain - antialiased).abs().max() > 0.1
