"""A decoder small enough to enumerate: a seeded recurrent net whose next token depends on all tokens before it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class ToyDecoder:
    """Implements DecoderState; its cache is one hidden vector per row.

    Its logits are read-only, as those of an engine may be. They are computed in float64 and rounded, so that they do
    not depend on the rows beside them.

    Args:
        rows: how many rows are decoded.
        seed: of the weights.
        vocabulary: V, number of tokens.
        end_id: a token whose logits are raised by `end_bonus`.
        sharpness: spread of the logits.

    Attributes:
        fed: shape of the ids of each step so far.
    """

    def __init__(
        self,
        rows: int,
        seed: int = 0,
        vocabulary: int = 17,
        end_id: int = 2,
        end_bonus: float = 0.0,
        sharpness: float = 2.0,
    ) -> None:
        rng = np.random.default_rng(seed)
        width = 12
        self.embedding = rng.standard_normal((vocabulary, width))
        self.recurrence = rng.standard_normal((width, width)) / np.sqrt(width)
        self.readout = rng.standard_normal((width, vocabulary)) * sharpness / np.sqrt(width)
        self.bias = np.where(np.arange(vocabulary) == end_id, end_bonus, 0.0)
        self.hidden = np.zeros((rows, width))
        self.fed: list[tuple[int, ...]] = []

    def step(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        assert token_ids.dtype == np.int64
        assert len(token_ids) == len(self.hidden)
        self.fed.append(token_ids.shape)
        for column in token_ids.T:
            self.hidden = np.tanh(self.hidden @ self.recurrence + self.embedding[column])
        logits: npt.NDArray[np.float32] = (self.hidden @ self.readout + self.bias).astype(np.float32)
        logits.flags.writeable = False
        return logits

    def select(self, rows: npt.NDArray[np.int64]) -> None:
        assert rows.dtype == np.int64
        self.hidden = self.hidden[rows]
