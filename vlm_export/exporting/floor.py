"""Measures the floor of a part's variant on its Reference (`proof/floor.py` says what it is for).

The Reference stays what it is, a function that others wrote: every operation of torch's that it calls is caught on the
way. What an operation reads becomes float64, or is rounded to float16, when it runs: one weight at a time, so that
memory stays flat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from vlm_export.exporting.options import FP32
from vlm_export.family import Array, Arrays, Reference
from vlm_export.precision.fp16_ranges import MOST
from vlm_export.proof.cached_reference import CachedReference
from vlm_export.proof.floor import Floor, FloorJudge
from vlm_export.proof.golden import golden_points
from vlm_export.proof.grid import Attention, GridPoint, point_bytes
from vlm_export.proof.metrics import Deviation, measure_deviation, worst_by_output
from vlm_export.specs.signature import Signature

# The points of the records are few and small. Of a large part, which takes seconds at each, the smallest two do.
_LARGE_POINTS = 2
_LARGE_BYTES = 1 << 30
# The errors of few values are small by chance: two logits that cancel were seen with an eighth of the noise that other
# right computations of them have. So such a point's neighbours are measured with it.
_FEW_VALUES = 16
_NEIGHBOURS = 3
# They only move rows: taken from a table in its own precision, lest a vocabulary becomes float64 for a few ids.
_LOOKUPS = frozenset({"embedding", "gather", "index", "index_select"})
# What `precision/fp16_rules.py` keeps in float32, by torch's names: norms, softmax, sums, powers, resampling.
_FLOAT32 = frozenset(
    {
        *("layer_norm", "native_layer_norm", "batch_norm", "native_batch_norm", "group_norm", "rms_norm"),
        *("_native_batch_norm_legit_no_training", "softmax", "_softmax", "cumsum", "mean", "sum", "var"),
        *("exp", "log", "pow", "reciprocal", "rsqrt", "sqrt", "square", "_to_copy", "grid_sampler_2d"),
        *("upsample_bicubic2d", "upsample_bilinear2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"),
    }
)
# What comes out of them are activations, whatever went in, as in `precision/fp16_rules.py`; rows of a table as well.
_ACTIVATION_STARTS = frozenset(
    {
        *("layer_norm", "native_layer_norm", "batch_norm", "native_batch_norm", "group_norm", "rms_norm"),
        *("_native_batch_norm_legit_no_training", "softmax", "_softmax", "convolution", "conv1d", "conv2d"),
        "embedding",
    }
)
_MARK = "_is_activation"


@runtime_checkable
class RemoteReference(Protocol):
    """A Reference of another process, which measures itself where torch runs."""

    def __call__(self, inputs: Arrays) -> dict[str, Array]: ...

    def noise(self, precision: str, inputs: Arrays) -> dict[str, Deviation]:
        """`measure_noise` of it."""
        ...

    def noise_around(self, precision: str, inputs: Arrays) -> dict[str, Deviation]:
        """`measure_noise_around` of it."""
        ...


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
    if isinstance(reference, RemoteReference):
        return reference.noise(precision, inputs)
    own = reference(inputs)
    # What remembers outputs would tell those of float32 again.
    plain = reference.reference if isinstance(reference, CachedReference) else reference
    if precision == FP32:
        return _pairs(float64_outputs(plain, inputs), own)
    return _pairs(own, float16_outputs(plain, inputs))


def measure_noise_around(reference: Reference, precision: str, inputs: Arrays) -> dict[str, Deviation]:
    """As `measure_noise`; where an output has few values, the worst of it and of its neighbours.

    Those are the same inputs with each float a little larger: as well conditioned, and rounded otherwise.
    """
    if isinstance(reference, RemoteReference):
        return reference.noise_around(precision, inputs)
    noise = [measure_noise(reference, precision, inputs)]
    is_slow = isinstance(reference, CachedReference)
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


def float64_outputs(reference: Reference, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """What the Reference gives where every float32 number is a float64 one; floats come as float64."""
    with _Double():  # type: ignore[no-untyped-call]
        return reference(_contiguous(inputs))


def float16_outputs(reference: Reference, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """What the Reference gives with weights and activations rounded to float16 as a float16 graph rounds them."""
    arrays = _contiguous(inputs)
    with _Half({array.ctypes.data for array in arrays.values() if array.dtype == np.float32}):
        return reference(arrays)


def _contiguous(inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.ascontiguousarray(array) for name, array in inputs.items()}


class _Caught(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Calls `compute` for each operation, outside of inference mode, whose tensors take no new views of plain ones."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return self.compute(func, args, dict(kwargs or {}))

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class _Double(_Caught):  # type: ignore[no-untyped-call]
    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _name(func) in _LOOKUPS:
            return tree_map(_widened, func(*args, **kwargs))
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs))


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.double()
    return torch.float64 if value is torch.float32 else value


class _Half(_Caught):  # type: ignore[no-untyped-call]
    """Rounds as a float16 graph does: what an operation reads and makes, unless the rules keep it in float32.

    What comes from integers, shapes and weights alone is no activation, and stays as it is.
    """

    def __init__(self, inputs: set[int]) -> None:
        """inputs: where the memory of the float inputs begins."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs = inputs

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = _name(func)
        read = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if name not in _ACTIVATION_STARTS and not any(map(self._is_activation, read)):
            return func(*args, **kwargs)
        if "scaled_dot_product" in name:
            made = _attention(name, *args, **kwargs)
        elif name in _FLOAT32 or func._schema.is_mutable:
            made = func(*args, **kwargs)
        elif name in _LOOKUPS:
            made = tree_map(_rounded, func(*args, **kwargs))
        else:
            made = tree_map(_rounded, func(*tree_map(_rounded, args), **tree_map(_rounded, kwargs)))
        return tree_map(_marked, made)

    def _is_activation(self, value: Tensor) -> bool:
        return getattr(value, _MARK, False) or (value.dtype == torch.float32 and value.data_ptr() in self._inputs)


def _marked(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        setattr(value, _MARK, True)
    return value


def _rounded(value: Any) -> Any:
    """To float16, unless it holds what a graph keeps in float32 for its range (`precision/fp16_ranges.py`)."""
    if isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel():
        low, high = torch.aminmax(value)
        return value if max(-float(low), float(high)) > MOST else value.half().float()
    return value


def _attention(
    name: str, query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: float | None = None, **options: Any
) -> Any:
    """torch's fused operators hide what a graph rounds between their steps: the scores and their softmax."""
    mask = options.get("attn_mask", next((item for item in rest if isinstance(item, Tensor)), None))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = _rounded(_rounded(_rounded(query) * factor) @ _rounded(key).transpose(-1, -2))
    if mask is not None:
        scores = _rounded(scores + _rounded(mask))
    attended = _rounded(_rounded(torch.softmax(scores, dim=-1)) @ _rounded(value))
    # The operators of one back end return statistics beside the result, which only their gradients read.
    return (attended, scores.new_zeros(1)) if name.startswith("_") else attended


def _name(func: Any) -> str:
    return str(func._overloadpacket.__name__)
