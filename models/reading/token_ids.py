"""Random token ids for verification, in which every row of an embedding may stand, and the likeliest faults do."""

from __future__ import annotations

import numpy as np

from vlm_export.family import Array

# Ids of both ends: padding, unknown and special tokens, where a table that is shifted or cut differs.
EDGES = 4


def random_ids(
    rng: np.random.Generator, shape: tuple[int, ...], vocab_size: int, *, without: int | None = None
) -> Array:
    """int64 (B, T), every id alike; the first row begins with the vocabulary's edges, in an order of its own.

    Args:
        without: an id that is put elsewhere, or None.
    """
    known = np.array([i for i in (0, vocab_size - 1, 1, vocab_size - 2) if 0 <= i < vocab_size and i != without])
    if without is None or vocab_size == 1:
        ids = rng.integers(0, max(vocab_size, 1), shape, dtype=np.int64)
    else:
        ids = rng.integers(0, vocab_size - 1, shape, dtype=np.int64)
        ids += ids >= without
    edges = rng.permutation(known)[: shape[1]]
    ids[0, : len(edges)] = edges
    return ids
