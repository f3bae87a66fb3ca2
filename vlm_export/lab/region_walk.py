"""Runs the regions of two graphs in order, each on the left graph's values, and tells the error of each by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from vlm_export.errors import InputError
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.lab.alignment import Alignment
from vlm_export.lab.module_paths import constant_of, joined
from vlm_export.lab.regions import Arrays, Region, RegionPair, RunRegion, region_model, run_region
from vlm_export.proof.metrics import json_number, measure_deviation

# A region differs where its error is this many times what other orders of the same sums, or rounding to half, make.
MARGIN = 8.0
# Unit roundoff of float32: two ways to compute one operator differ by a few of these.
_ROUNDOFF = 2.0**-24
LEAST_FLOOR = 4 * _ROUNDOFF


@dataclass(frozen=True)
class RegionError:
    """One region of both graphs.

    Attributes:
        path: the module, in the names of the checkpoint's parameters.
        tensor: the left graph's tensor that the region ends at.
        own: relative error of the right region on the left graph's own values; infinite where it has none.
        total: relative error of the right graph's own value there, of all that came before it, too.
        floor: what other orders of the same sums, and rounding to the right side's dtype, make of the region; 0 where
            both have the same operators, which an engine computes alike to the last bit.
    """

    path: str
    tensor: str
    own: float
    total: float
    floor: float

    @property
    def parts(self) -> bool:
        """Whether the two differ here by more than rounding."""
        return not self.own <= MARGIN * self.floor

    def to_json(self) -> dict[str, Any]:
        """The figures as strict JSON data."""
        return {**{name: json_number(value) for name, value in asdict(self).items()}, "parts": self.parts}


class LeftSide(Protocol):
    """What computes the left graph's regions."""

    def run(self, model: ir.Model, feeds: Sequence[Arrays]) -> list[dict[str, Array]]:
        """A region's outputs by name, in every set of inputs."""

    def floor(self, model: ir.Model, feeds: Sequence[Arrays], expected: Sequence[Array]) -> float:
        """How far other orders of the same sums may be from what it expects."""


class ThisRuntime:
    """The installed ONNX Runtime without its optimisations; with them it sums in other orders."""

    def run(self, model: ir.Model, feeds: Sequence[Arrays]) -> list[dict[str, Array]]:
        return run_region(model, feeds)

    def floor(self, model: ir.Model, feeds: Sequence[Arrays], expected: Sequence[Array]) -> float:
        return max(LEAST_FLOOR, relative_error(expected, _only(run_region(model, feeds, optimised=True))))


class RegionWalk:
    """Runs the regions in order, and keeps the values that later ones read."""

    def __init__(
        self,
        left: ir.Model,
        right: ir.Model,
        alignment: Alignment,
        inputs: Sequence[Arrays],
        run_right: RunRegion | None = None,
        left_side: LeftSide | None = None,
    ) -> None:
        """
        Args:
            run_right: another engine for the right graph; None for the left one's.
            left_side: what computes the left graph; None for this ONNX Runtime.
        """
        self._left, self._right, self._side = left, right, left_side or ThisRuntime()
        self._run_right, self._one_engine = run_right or run_region, run_right is None
        self._partner = {other: value for value, other in alignment.values.items()}
        self._alignment = alignment
        self._count = len(inputs)
        self._values: dict[ir.Value, list[Array]] = {}
        self._own: dict[ir.Value, list[Array]] = {}
        for value in left.graph.inputs:
            if all(str(value.name) in feeds for feeds in inputs):
                self._values[value] = [feeds[str(value.name)] for feeds in inputs]
                partner = alignment.values.get(value)
                if partner is not None:
                    self._own[partner] = self._values[value]

    def left_values(self, pair: RegionPair) -> tuple[list[Array], float]:
        """What the left region gives in every set, kept for later regions, and its floor."""
        model, feeds, expected = self._run_left(pair.left)
        return expected, self._side.floor(model, feeds, expected)

    def compare(self, pair: RegionPair, where: str) -> RegionError:
        model, feeds, expected = self._run_left(pair.left)
        given = self._feeds_right(pair.right)
        own = self._feeds_own(pair.right) if all(value in self._own for value in pair.right.inputs) else None
        got, total = self._right_runs(pair.right, given, own)
        floor = 0.0
        if not (self._one_engine and self._has_same_operators(pair)):
            floor = self._side.floor(model, feeds, expected)
        if _is_half(pair.right, [*(given[0].values() if given else ()), *(got or ())]):
            rounded = [{name: _rounded(array) for name, array in feed.items()} for feed in feeds]
            held = [_rounded(array) for array in _only(run_region(_with_rounded_weights(model), rounded))]
            floor = max(floor, relative_error(expected, held))
        self._own[pair.right.output] = expected if total is None else total
        path, errors = joined(where, pair.path), (relative_error(expected, got), relative_error(expected, total))
        return RegionError(path, str(pair.left.output.name), *errors, floor)

    def _run_left(self, region: Region) -> tuple[ir.Model, list[dict[str, Array]], list[Array]]:
        """The left region as a model, its inputs, and its output, which later regions read."""
        feeds = self._feeds_left(region)
        model = region_model(self._left, region, feeds[0])
        expected = self._values[region.output] = _only(self._side.run(model, feeds))
        return model, feeds, expected

    def _has_same_operators(self, pair: RegionPair) -> bool:
        """Whether every node of either has its partner in the other; attributes and weights may differ."""
        mine, theirs = (
            [node for node in region.nodes if node.op_type != "Constant"] for region in (pair.left, pair.right)
        )
        partners = {self._alignment.nodes.get(node) for node in mine}
        return partners == set(theirs)

    def first_operator(self, pair: RegionPair) -> str:
        """The first operator in a region whose result differs, where both have it; "" where none is."""
        inside = [
            (mine, self._alignment.values[mine])
            for node in pair.left.nodes
            for mine in node.outputs
            if mine in self._alignment.values and self._alignment.values[mine].producer() in pair.right.nodes
        ]
        feeds, given = self._feeds_left(pair.left), self._feeds_right(pair.right)
        if given is None:
            return ""
        mine, theirs = [left for left, _ in inside], [right for _, right in inside]
        try:
            expected = self._side.run(region_model(self._left, pair.left, feeds[0], mine), feeds)
            got = self._run_right(region_model(self._right, pair.right, given[0], theirs), given)
        except InputError:
            return ""
        for left, right in inside:
            before = [run[str(left.name)] for run in expected]
            after = [run[str(right.name)] for run in got]
            if before[0].dtype.kind == "f" and relative_error(before, after) > MARGIN * LEAST_FLOOR:
                node = right.producer()
                assert node is not None
                return f"{node.op_type} {node.name or right.name!s}"
        return ""

    def saved(self, pair: RegionPair) -> tuple[ir.Model, Arrays, Array] | None:
        """The right region, its inputs in the first set, and what the left computes of them; None without inputs."""
        given = self._feeds_right(pair.right)
        if given is None:
            return None
        return region_model(self._right, pair.right, given[0]), given[0], self._values[pair.left.output][0]

    def forget(self, done: set[ir.Value]) -> None:
        for value in done:
            self._values.pop(value, None)
            self._own.pop(value, None)

    def _right_runs(self, region: Region, *groups: Sequence[Arrays] | None) -> list[list[Array] | None]:
        """What the right region gives for each group of inputs, None where it cannot be run on them."""
        feeds = [feed for group in groups for feed in group or ()]
        if not feeds:
            return [None for _ in groups]
        try:
            found = iter(_only(self._run_right(region_model(self._right, region, feeds[0]), feeds)))
        except InputError:
            # One of them; each alone tells which.
            return [None] if len(groups) == 1 else [self._right_runs(region, group)[0] for group in groups]
        return [None if group is None else [next(found) for _ in group] for group in groups]

    def _feeds_left(self, region: Region) -> list[dict[str, Array]]:
        return self._feeds(region, lambda value, number: self._values[value][number])

    def _feeds_right(self, region: Region) -> list[dict[str, Array]] | None:
        """The left graph's values in the dtypes that the right one has there; None where the left has none yet."""
        if any(self._partner.get(value) not in self._values for value in region.inputs):
            return None
        return self._feeds(region, lambda value, number: held_as(self._values[self._partner[value]][number], value))

    def _feeds_own(self, region: Region) -> list[dict[str, Array]]:
        return self._feeds(region, lambda value, number: held_as(self._own[value][number], value))

    def _feeds(self, region: Region, value_of: Any) -> list[dict[str, Array]]:
        numbers = range(self._count)
        return [{str(value.name): value_of(value, number) for value in region.inputs} for number in numbers]


def _only(runs: Sequence[Mapping[str, Array]]) -> list[Array]:
    return [list(run.values())[-1] for run in runs]


def held_as(array: Array, value: ir.Value) -> Array:
    """The array in the dtype of a graph's tensor, where both are floats."""
    if value.dtype is None or not value.dtype.is_floating_point() or array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):
        return array.astype(value.dtype.numpy())


def relative_error(expected: Sequence[Array], got: Sequence[Array] | None) -> float:
    """The largest relative error of a row; infinite where there is no number on one side only."""
    if got is None or any(left.shape != right.shape for left, right in zip(expected, got, strict=True)):
        return float("inf")
    errors = [0.0]
    for left, right in zip(expected, got, strict=True):
        first, second = (array.astype(np.float64) for array in (left, right))
        same = (first == second) | (np.isnan(first) & np.isnan(second))
        # Masks hold infinities, which are no error where both sides have them.
        finite = np.where(same & ~np.isfinite(first), 0.0, first), np.where(same & ~np.isfinite(second), 0.0, second)
        error = measure_deviation(*finite).row_error
        errors.append(float("inf") if np.isnan(error) else error)
    return max(errors)


def _is_half(region: Region, held: Sequence[Array]) -> bool:
    """Whether float16 occurs in a region: in what it is given and gives, in a weight, or behind a Cast."""
    if any(array.dtype == np.float16 for array in held):
        return True
    weights = (constant_of(value) for node in region.nodes for value in node.inputs)
    halves = any(tensor is not None and tensor.dtype == ir.DataType.FLOAT16 for tensor in weights)
    return halves or any(node.op_type == "Cast" and _casts_to_half(node) for node in region.nodes)


def _casts_to_half(node: ir.Node) -> bool:
    target = node.attributes.get("to")
    return target is not None and target.as_int() == ir.DataType.FLOAT16


def _rounded(array: Array) -> Array:
    """What rounding to float16 makes of an array; an overflow is no rounding."""
    if array.dtype.kind != "f":
        return array
    largest = float(np.finfo(np.float16).max)
    return np.where(np.isfinite(array), array.clip(-largest, largest), array).astype(np.float16).astype(array.dtype)


def _with_rounded_weights(model: ir.Model) -> ir.Model:
    """A copy whose weights are what float16 makes of them."""
    copy = ir.Model(model.graph.clone(), ir_version=model.ir_version)
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            value.const_value = ir.LazyTensor(
                partial(_rounded_tensor, tensor),
                dtype=tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name,
            )
    return copy


def _rounded_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(_rounded(np.asarray(tensor.numpy())), name=tensor.name)
