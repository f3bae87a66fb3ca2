"""Which dtypes numpy and engines' Python interfaces share."""

from __future__ import annotations

from typing import Any

import numpy as np


def is_plain_number(dtype: np.dtype[Any]) -> bool:
    """Whether it is one of numpy's own booleans, integers and floats: some narrow types of others say that they are."""
    return dtype.kind in "biuf" and dtype.isbuiltin != 2
