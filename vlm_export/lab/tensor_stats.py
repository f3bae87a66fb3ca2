"""What the values of one tensor were, over all runs: range, and shares that float16 would lose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.precision.fp16_rules import LARGEST_FLOAT16
from vlm_export.proof.metrics import json_number

LEAST_NORMAL = 2.0**-14
"""The smallest float16 that keeps all of its bits."""
LEAST_FLOAT16 = 2.0**-24
"""The smallest float16 beside zero."""
NEARLY_ONE = 1 - 2.0**-11
"""From here on float16 rounds to one."""


@dataclass
class TensorStats:
    """Figures of one tensor; `add` takes the array of one run.

    Attributes:
        samples: rows of axis 0, over all runs.
        count: values.
        smallest, largest: of finite values; nan before there are any.
        peak: largest finite magnitude.
        beyond: values of a finite magnitude above float16's largest.
        denormal, flushed: values beside zero below `LEAST_NORMAL`, and those of them below `LEAST_FLOAT16`.
        nans, infinities, minus_infinities: values that are none of the finite.
        alive: for each channel whether it ever was something else than zero; None where no axis holds channels.
        saturated, saturable: rows of a softmax whose largest is one to float16, and values of a sigmoid that are 0 or
            1 to it; of how many.
    """

    samples: int = 0
    count: int = 0
    smallest: float = float("nan")
    largest: float = float("nan")
    peak: float = 0.0
    beyond: int = 0
    denormal: int = 0
    flushed: int = 0
    nans: int = 0
    infinities: int = 0
    minus_infinities: int = 0
    alive: Array | None = None
    saturated: int = 0
    saturable: int = 0
    _shapes: set[int] = field(default_factory=set)

    def add(self, array: Array) -> None:
        self.samples += len(array) if array.ndim else 1
        self.count += array.size
        if not array.size:
            return
        values = array
        if not (np.isfinite(array.min()) and np.isfinite(array.max())):
            self.nans += int(np.isnan(array).sum())
            self.infinities += int(np.isposinf(array).sum())
            self.minus_infinities += int(np.isneginf(array).sum())
            values = array[np.isfinite(array)]
        if values.size:
            self._add_finite(values)
        self._add_channels(array)

    def _add_finite(self, values: Array) -> None:
        smallest, largest = float(values.min()), float(values.max())
        self.smallest = float(np.fmin(self.smallest, smallest))
        self.largest = float(np.fmax(self.largest, largest))
        self.peak = max(self.peak, -smallest, largest)
        magnitude = np.abs(values)
        if self.peak > LARGEST_FLOAT16:
            self.beyond += int((magnitude > LARGEST_FLOAT16).sum())
        small = magnitude[(magnitude < LEAST_NORMAL) & (magnitude > 0)]
        self.denormal += small.size
        self.flushed += int((small < LEAST_FLOAT16).sum())

    def _add_channels(self, array: Array) -> None:
        """Channels are axis 1 of images and heads, (B, C, …), and else the last axis; it has one size in all runs."""
        if array.ndim < 2:
            return
        axis = 1 if array.ndim >= 4 else array.ndim - 1
        self._shapes.add(array.shape[axis])
        alive = (array != 0).any(axis=tuple(i for i in range(array.ndim) if i != axis))
        if len(self._shapes) > 1:
            self.alive = None
        elif self.alive is None:
            self.alive = alive
        else:
            self.alive |= alive

    def add_softmax(self, array: Array, axis: int) -> None:
        """Rows over more than one value that are all but certain of one of them."""
        if array.size and array.shape[axis] > 1:
            peaks = array.max(axis=axis)
            self.saturable += peaks.size
            self.saturated += int((peaks >= NEARLY_ONE).sum())

    def add_sigmoid(self, array: Array) -> None:
        self.saturable += array.size
        self.saturated += int(((array >= NEARLY_ONE) | (array < LEAST_FLOAT16)).sum())

    @property
    def is_constant(self) -> bool:
        """One value everywhere, in several places."""
        no_number = self.nans + self.infinities + self.minus_infinities
        return self.count > 1 and self.smallest == self.largest and not no_number

    @property
    def dead(self) -> int:
        """Channels that were zero in every sample, where others were not."""
        return 0 if self.alive is None else int((~self.alive).sum())

    def share(self, number: int) -> float:
        return number / self.count if self.count else 0.0

    def to_json(self) -> dict[str, Any]:
        shares = {
            name: self.share(number)
            for name, number in (
                ("beyond", self.beyond),
                ("denormal", self.denormal),
                ("flushed", self.flushed),
                ("minus_infinities", self.minus_infinities),
            )
        }
        figures = {"smallest": self.smallest, "largest": self.largest, "peak": self.peak, **shares}
        return {
            "samples": self.samples,
            "count": self.count,
            **{name: json_number(value) for name, value in figures.items()},
            "nans": self.nans,
            "infinities": self.infinities,
            "dead_channels": self.dead,
            "saturated": self.saturated / self.saturable if self.saturable else 0.0,
        }
