"""A Reference that another process computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlm_export.family import Array, Arrays
from vlm_export.proof.metrics import Deviation


@dataclass(frozen=True)
class RemoteReference:
    """Called as a Reference is.

    Attributes:
        part: its part's name.
        call: a method of `OriginalHere` by name, with its arguments → what it gives there.
    """

    part: str
    call: Callable[..., Any]

    def __call__(self, inputs: Arrays) -> dict[str, Array]:
        outputs: dict[str, Array] = self.call("outputs", self.part, inputs)
        return outputs

    def noise(self, precision: str, inputs: Arrays) -> dict[str, Deviation]:
        """`measure_noise` of the Reference, which catches what torch does, where torch does it."""
        noise: dict[str, Deviation] = self.call("noise", self.part, precision, inputs)
        return noise

    def noise_around(self, precision: str, inputs: Arrays) -> dict[str, Deviation]:
        """`measure_noise_around` of the Reference."""
        noise: dict[str, Deviation] = self.call("noise_around", self.part, precision, inputs)
        return noise
