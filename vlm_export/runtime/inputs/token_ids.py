"""Token ids that callers hand over, checked before a graph sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError
from vlm_export.specs import TextSpec

_IDS, _MASK = "token ids do not fit the model", "the attention mask does not fit the token ids"


def checked_ids(given: npt.ArrayLike, spec: TextSpec) -> npt.NDArray[np.int64]:
    """Ids as int64 (N, T), 1 ≤ T ≤ the context length; InputError when they are none of the model's."""
    expected = f"integers (N, T), T from 1 to {spec.context_length}, each in [0, {spec.vocab_size})"
    ids = _array(given, _IDS, expected)
    fits = ids.ndim == 2 and ids.dtype.kind in "iu" and 1 <= ids.shape[1] <= spec.context_length
    if not fits or (ids.size and not 0 <= ids.min() <= ids.max() < spec.vocab_size):
        got = f"{ids.dtype} {ids.shape}" + (f", {ids.min()} to {ids.max()}" if fits else "")
        raise InputError(_IDS, expected=expected, got=got)
    return ids.astype(np.int64)


def checked_mask(given: npt.ArrayLike, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A mask as int64 like `ids`; InputError unless it is zeros and ones with a one in every row."""
    expected = f"zeros and ones {ids.shape}, a one in every row"
    mask = _array(given, _MASK, expected)
    fits = mask.shape == ids.shape and mask.dtype.kind in "biu" and bool(np.isin(mask, (0, 1)).all())
    if not fits or not mask.any(axis=1).all():
        got = f"{mask.dtype} {mask.shape}" + (", a row of zeros" if fits else "")
        raise InputError(_MASK, expected=expected, got=got)
    return mask.astype(np.int64)


def _array(given: npt.ArrayLike, refusal: str, expected: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(given)
    except (OverflowError, ValueError) as error:
        raise InputError(refusal, expected=expected, got=f"rows that make no array: {error}") from error
