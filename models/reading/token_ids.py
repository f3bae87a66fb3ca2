"""Random token ids for verification, in which every row of an embedding may stand, and the likeliest faults do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlm_export.family import Array
from vlm_export.specs.signature import Signature, TensorSpec

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


class ArrayExamples:
    """Normal noise for floats, random ids for `input_ids`, and for masks 1 up to a random length of each row, in the
    first at least that of the vocabulary's edges."""

    def __init__(self, signature: Signature, vocab_size: int = 0) -> None:
        self.signature, self.vocab_size = signature, vocab_size

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {spec.name: self._array(spec, sizes, rng) for spec in self.signature.inputs}

    def _array(self, spec: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Array:
        shape = spec.concrete_shape(sizes)
        if spec.dtype == "float32":
            return rng.standard_normal(shape, dtype=np.float32)
        if spec.name == "input_ids":
            return random_ids(rng, shape, self.vocab_size)
        lengths = rng.integers(1, shape[1] + 1, (shape[0], 1))
        lengths[0] = max(lengths[0, 0], min(EDGES, shape[1]))
        return (np.arange(shape[1]) < lengths).astype(np.int64)
