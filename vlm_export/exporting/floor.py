"""Measures the floor of a part's variant on its Reference (`proof/floor.py` says what it is for)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from vlm_export.exporting.options import FP32
from vlm_export.exporting.reference_precision import float16_outputs, float64_outputs
from vlm_export.family import Array, Arrays, Reference
from vlm_export.proof.floor import Floor, FloorJudge
from vlm_export.proof.golden import golden_points
from vlm_export.proof.grid import Attention, GridPoint, point_bytes
from vlm_export.proof.metrics import Deviation, measure_deviation, worst_by_output
from vlm_export.proof.remembered import RememberedReference
from vlm_export.specs.signature import Signature

# The points of the records are few and small. Of a large part, which takes seconds at each, the smallest two do.
_LARGE_POINTS = 2
_LARGE_BYTES = 1 << 30
# The errors of few values are small by chance: two logits that cancel were seen with an eighth of the noise that other
# right computations of them have. So such a point's neighbours are measured with it.
_FEW_VALUES = 16
_NEIGHBOURS = 3


def floor_points(signature: Signature, weights_bytes: int, attention: Attention | None = None) -> tuple[GridPoint, ...]:
    """Where the floor of a part with so many bytes of weights in float32 is measured."""
    points = golden_points(signature, attention)
    if weights_bytes <= _LARGE_BYTES:
        return points
    return tuple(sorted(points, key=lambda point: point_bytes(signature, point.sizes))[:_LARGE_POINTS])


def measure_floor(reference: Reference, precision: str, inputs: Sequence[Arrays]) -> FloorJudge:
    """The floor of that precision's variant; what it takes in memory does not grow with the part's weights."""
    deviations = [measure_noise(reference, precision, arrays) for arrays in inputs]
    against = "in float64" if precision == FP32 else "with its weights and activations rounded to float16"
    count = f"{len(inputs)} points" if len(inputs) > 1 else "1 point"
    floor = Floor(precision, worst_by_output(deviations), f"the reference against itself {against}, at {count}")
    return FloorJudge(floor, partial(measure_noise_around, reference, precision))


def measure_noise(reference: Reference, precision: str, inputs: Arrays) -> dict[str, Deviation]:
    """Output name → the deviation of the noisier of two right computations from the other."""
    own = reference(inputs)
    # What remembers outputs would tell those of float32 again.
    plain = reference.reference if isinstance(reference, RememberedReference) else reference
    if precision == FP32:
        return _pairs(float64_outputs(plain, inputs), own)
    return _pairs(own, float16_outputs(plain, inputs))


def measure_noise_around(reference: Reference, precision: str, inputs: Arrays) -> dict[str, Deviation]:
    """As `measure_noise`; where an output has few values, the worst of it and of its neighbours.

    Those are the same inputs with each float a little larger: as well conditioned, and rounded otherwise.
    """
    noise = [measure_noise(reference, precision, inputs)]
    is_slow = isinstance(reference, RememberedReference)
    if not is_slow and any(array.size < _FEW_VALUES for array in reference(inputs).values()):
        neighbours = (_scaled(inputs, 1 + i / 1024) for i in range(1, _NEIGHBOURS + 1))
        noise += [measure_noise(reference, precision, arrays) for arrays in neighbours]
    return worst_by_output(noise)


def _scaled(inputs: Arrays, factor: float) -> dict[str, Array]:
    return {
        name: (array * factor).astype(array.dtype) if np.issubdtype(array.dtype, np.floating) else array
        for name, array in inputs.items()
    }


def _pairs(expected: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, Deviation]:
    """Without outputs that overflow or are noise alone, of which nothing but the fixed gates can be asked."""
    pairs = {name: measure_deviation(array, np.asarray(found[name])) for name, array in expected.items()}
    return {
        name: noise for name, noise in pairs.items() if noise.row_error < 1 and noise.max_abs < 1 and noise.scale < 1
    }
