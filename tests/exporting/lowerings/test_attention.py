"""The equality proof of the attention lowering, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm_export.exporting.lowerings.operators import composed_attention, lower_attention

ORIGINAL = F.scaled_dot_product_attention
small = st.integers(1, 5)


@settings(deadline=None, max_examples=60)
@given(
    batch=small,
    heads=small,
    queries=small,
    keys=small,
    width=st.integers(1, 9),
    scale=st.sampled_from([None, 0.3]),
    magnitude=st.sampled_from([0.1, 1.0, 30.0]),
    mask=st.sampled_from(["none", "causal", "float"]),
    seed=st.integers(0, 1000),
)
def test_equal_to_torchs_operator(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    scale: float | None,
    magnitude: float,
    mask: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return magnitude * torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key, value = (noise(batch, heads, tokens, width) for tokens in (queries, keys, keys))
    # The first key stays visible: a row of nothing but -inf has no softmax.
    causal = torch.full((queries, keys), float("-inf"), dtype=torch.float64).triu(1)
    added = {"none": None, "causal": causal, "float": noise(queries, keys)}[mask]
    expected = ORIGINAL(query, key, value, attn_mask=added, scale=scale)
    got = composed_attention(query, key, value, attn_mask=added, scale=scale)
    # Scores are products of two values, and a softmax turns their rounding into its own.
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * max(1.0, magnitude))


def test_wide_heads_scale_by_their_root() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 4, 64, generator=generator, dtype=torch.float64) for _ in range(3))
    wrong = composed_attention(query, key, value, scale=1.0)
    right = composed_attention(query, key, value)
    torch.testing.assert_close(right, ORIGINAL(query, key, value), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(right, wrong)


@pytest.mark.parametrize("option", [{"dropout_p": 0.1}, {"is_causal": True}, {"enable_gqa": True}])
def test_what_no_part_uses_is_refused(option: dict[str, float]) -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(NotImplementedError):
        composed_attention(x, x, x, **option)  # type: ignore[arg-type]  # values of several types by name


def test_undone_on_exit() -> None:
    with lower_attention():
        assert F.scaled_dot_product_attention is composed_attention
    assert F.scaled_dot_product_attention is ORIGINAL


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_undone_by_an_exception(error: type[BaseException]) -> None:
    with pytest.raises(error), lower_attention():
        raise error
    assert F.scaled_dot_product_attention is ORIGINAL
