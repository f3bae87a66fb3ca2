"""The shared blocks against torch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlm_export.models.layers.blocks import (
    AttentionPooling,
    CrossAttention,
    KeyValueProjection,
    MultiHeadAttention,
    PatchEmbedding,
    QuickGELU,
    build_activation,
    build_causal_mask,
    cached_causal_mask,
    padding_mask,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _randomised(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torchs_with_packed_weights(heads: int, causal: bool) -> None:
    width, tokens = 16, 5
    original = nn.MultiheadAttention(width, heads, batch_first=True).double().eval()
    _randomised(original)
    ours = MultiHeadAttention(width, heads).double()
    ours.qkv.weight, ours.qkv.bias = original.in_proj_weight, original.in_proj_bias
    ours.out.load_state_dict(original.out_proj.state_dict())
    x = torch.randn(3, tokens, width, dtype=torch.float64)
    mask = build_causal_mask(tokens).double() if causal else None
    expected, _ = original(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x, mask), expected)


def test_causal_attention_sees_nothing_later() -> None:
    attention = MultiHeadAttention(8, 2)
    mask = build_causal_mask(6)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = attention(x, mask), attention(changed, mask)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    torch.testing.assert_close(attention(x[:, :3], mask[:3, :3]), before[:, :3])


def test_causal_mask_is_made_on_the_cpu_even_under_meta() -> None:
    with torch.device("meta"):
        mask = build_causal_mask(3)
    inf = float("-inf")
    assert mask.tolist() == [[0.0, inf, inf], [0.0, 0.0, inf], [0.0, 0.0, 0.0]]


def test_attention_pooling_equals_torchs_functional_form() -> None:
    """The form in which openai/CLIP calls it: every token a query, all rows but the first discarded."""
    channels, heads, output = 24, 3, 10
    pool = AttentionPooling(4, channels, heads, output).double()
    _randomised(pool)
    features = torch.randn(2, channels, 2, 2, dtype=torch.float64)
    tokens = features.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(dim=0, keepdim=True), tokens]) + pool.position_embedding[:, None]
    expected, _ = F.multi_head_attention_forward(
        query=tokens,
        key=tokens,
        value=tokens,
        embed_dim_to_check=channels,
        num_heads=heads,
        q_proj_weight=pool.q.weight,
        k_proj_weight=pool.k.weight,
        v_proj_weight=pool.v.weight,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q.bias, pool.k.bias, pool.v.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.out.weight,
        out_proj_bias=pool.out.bias,
        use_separate_proj_weight=True,
        training=False,
        need_weights=False,
    )
    torch.testing.assert_close(pool(features), expected[0])


def test_patches_are_read_row_by_row() -> None:
    embedding = PatchEmbedding(width=3, patch=2, bias=False)
    # Each output channel is one input channel's patch mean.
    with torch.no_grad():
        embedding.conv.weight.copy_(torch.eye(3)[:, :, None, None].expand(3, 3, 2, 2) / 4)
    pixels = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    patches = embedding(pixels)
    assert patches.shape == (2, 6, 3)
    for i in range(6):
        row, column = divmod(i, 3)
        block = pixels[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(patches[:, i], block.mean(dim=(2, 3)))


def test_activations() -> None:
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))
    assert isinstance(build_activation("quick_gelu"), QuickGELU)
    exact = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    torch.testing.assert_close(build_activation("gelu")(x), exact)
    assert (QuickGELU()(x) - exact).abs().max() > 0.01


@pytest.mark.parametrize("split", [1, 3, 5])
def test_steps_after_a_cache_equal_the_whole(split: int) -> None:
    attention = MultiHeadAttention(8, 2).double()
    x, tokens = torch.randn(2, 6, 8, dtype=torch.float64), 6
    attention_mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    empty = torch.zeros(2, 2, 0, 4, dtype=torch.float64)
    whole, *_ = attention.step(x, cached_causal_mask(attention_mask, 0, tokens).double(), empty, empty)
    first, key, value = attention.step(
        x[:, :split], cached_causal_mask(attention_mask[:, :split], 0, split).double(), empty, empty
    )
    mask = cached_causal_mask(attention_mask, split, tokens - split).double()
    second, key, value = attention.step(x[:, split:], mask, key, value)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    assert key.shape == value.shape == (2, 2, 6, 4)


def test_cached_mask_hides_padding_and_what_comes_later() -> None:
    visible = cached_causal_mask(torch.tensor([[0, 1, 1, 1]]), 2, 2)[0, 0] == 0
    assert visible.tolist() == [[False, True, True, False], [False, True, True, True]]


def test_cross_attention_equals_torchs() -> None:
    width, states_width, heads = 12, 20, 3
    original = nn.MultiheadAttention(width, heads, kdim=states_width, vdim=states_width, batch_first=True).double()
    _randomised(original)
    attention, projection = (
        CrossAttention(width, heads).double(),
        KeyValueProjection(width, states_width, heads).double(),
    )
    q_bias, k_bias, v_bias = original.in_proj_bias.chunk(3)
    with torch.no_grad():
        attention.q.weight.copy_(original.q_proj_weight)
        attention.q.bias.copy_(q_bias)
        projection.k.weight.copy_(original.k_proj_weight)
        projection.k.bias.copy_(k_bias)
        projection.v.weight.copy_(original.v_proj_weight)
        projection.v.bias.copy_(v_bias)
    attention.out.load_state_dict(original.out_proj.state_dict())
    x, states = torch.randn(2, 4, width).double(), torch.randn(2, 5, states_width).double()
    attention_mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    expected, _ = original(x, states, states, key_padding_mask=attention_mask == 0, need_weights=False)
    torch.testing.assert_close(attention(x, *projection(states), padding_mask(attention_mask).double()), expected)


def test_modules_without_weights_need_no_compiler() -> None:
    """torch's own initialisation of an embedding on the meta device imports it."""
    code = """
import sys
from torch import nn
from vlm_export.models.layers.blocks import meta_modules
with meta_modules():
    modules = [nn.Embedding(5, 4), nn.Linear(3, 4), nn.Conv2d(3, 4, 2), nn.LayerNorm(4), nn.BatchNorm2d(3)]
assert all(tensor.is_meta for module in modules for tensor in module.state_dict().values())
assert modules[0].weight.shape == (5, 4)
assert "torch._dynamo" not in sys.modules
assert float(nn.LayerNorm(2).weight.sum()) == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
