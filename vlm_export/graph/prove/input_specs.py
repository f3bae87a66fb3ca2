"""Random inputs that a graph takes: sizes that fit, and integers as large as it can do with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from vlm_export.graph.core.names import all_graphs, subgraphs_of
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.graph.prove.random_inputs import draw_feeds, draw_near


@dataclass(frozen=True)
class Run:
    """What a graph was fed, by input, and what it gave, by tensor."""

    feeds: Mapping[str, Array]
    found: Mapping[str, Array]


# Runs the graph; None where it does not take the feeds.
Attempt: TypeAlias = Callable[[Mapping[str, Array]], "Run | None"]

_RUNS = 3
# Sizes that open axes get, one after the other, and bounds of integers to begin with: graphs differ in what they take.
_SIZES = ((2, 3, 5, 4, 7, 6), (2,), (1,), (4,), (8,), (16,), (32,), (64,), (224,))
_FIRST_BOUNDS = (2, 1, 16)
# Exponents of the largest bound: beyond any vocabulary; of what decides sizes, so that tensors stay small.
_LARGEST, _LARGEST_SIZE = 18, 4


class RandomRuns:
    """Runs of a graph on random inputs: three, of other sizes where axes are open.

    Where inputs are integers, there is one more, in which each is as large as the graph takes, and so they are in those
    that follow if possible: an embedding reads rows far from its first, an image is not almost black.
    """

    def __init__(
        self, inputs: Mapping[str, ir.Value], sizes: Mapping[str, int], size_inputs: set[str], attempt: Attempt
    ) -> None:
        """
        Args:
            inputs: those that need a feed.
            sizes: named axis → size, where the caller knows it.
            size_inputs: inputs that decide how large tensors are; they stay small.
        """
        self._inputs, self._sizes, self._attempt = inputs, sizes, attempt
        self._exponents = {
            name: _LARGEST_SIZE if name in size_inputs else _LARGEST
            for name, value in inputs.items()
            if value.dtype is not None and value.dtype.is_integer()
        }

    def __iter__(self) -> Iterator[Run]:
        count = 0
        large: dict[str, int] | None = None
        for number, (bound, choices) in enumerate(product(_FIRST_BOUNDS, _SIZES)):
            small = dict.fromkeys(self._exponents, bound)
            run = self._tried(choices, large, number) if large else None
            run = run or self._tried(choices, small, number)
            if run is None:
                continue
            yield run
            count += 1
            if count == _RUNS or not self._inputs:
                return
            if large is None:
                large, run = self._largest(choices, small, number)
                if run is not None:
                    yield run

    def _largest(
        self, choices: tuple[int, ...], small: dict[str, int], number: int
    ) -> tuple[dict[str, int], Run | None]:
        """The largest bounds that the graph takes, powers of two, at these sizes, and the run with them."""
        largest = {name: 1 << exponent for name, exponent in self._exponents.items()}
        run = self._tried(choices, largest, number) if largest else None
        if run is not None:
            return largest, run
        found = dict(small)
        for name, exponent in self._exponents.items():
            low, high = small[name].bit_length() - 1, exponent
            while low < high:
                middle = (low + high + 1) // 2
                larger = self._tried(choices, {**found, name: 1 << middle}, number)
                low, high, run = (low, middle - 1, run) if larger is None else (middle, high, larger)
            found[name] = 1 << low
        return found, run

    def _tried(self, choices: tuple[int, ...], bounds: Mapping[str, int], number: int) -> Run | None:
        return self._attempt(draw_feeds(self._inputs, self._sizes, choices, bounds, number))


def run_with_defaults_replaced(run: Run, names: Iterable[str], attempt: Attempt) -> Run | None:
    """Repeats the run with other values where inputs had their defaults; returns None where the graph takes none.

    Args:
        names: inputs that have defaults, all of them in `run.found`.
    """
    rng = np.random.default_rng(0)
    near = {name: draw_near(run.found[name], rng) for name in names if run.found[name].dtype.kind in "biuf"}
    floats = {name: array for name, array in near.items() if array.dtype.kind == "f"}
    # Integers among them may be shapes, which have to be what they are.
    for replaced in (near, floats):
        again = attempt({**run.feeds, **replaced}) if replaced else None
        if again is not None:
            return again
    return None


# Operator → inputs whose values decide the size of what it makes, or how often it runs.
_SIZE_ARGUMENTS: Mapping[str, Sequence[int]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1,),
    "ConstantOfShape": (0,),
    "DFT": (1,),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "Loop": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Resize": (2, 3),
    "STFT": (1, 3),
    "Tile": (1,),
    "Upsample": (1,),
}
_SIZE_ONLY = frozenset({"Shape", "Size"})


def inputs_that_decide_sizes(model: ir.Model) -> set[str]:
    """Returns names of inputs whose values, through whatever nodes, decide sizes: large values would take all
    memory."""
    holders = {inner: node for graph in all_graphs(model) for node in graph for inner in subgraphs_of(node)}
    return {str(value.name) for value in model.graph.inputs if _decides_sizes(value, model, holders)}


def _decides_sizes(start: ir.Value, model: ir.Model, holders: Mapping[ir.Graph, ir.Node]) -> bool:
    seen = {start}
    waiting = [start]
    while waiting:
        for node, index in waiting.pop().uses():
            if node.domain == "" and index in _SIZE_ARGUMENTS.get(node.op_type, ()):
                return True
            if node.domain == "" and node.op_type in _SIZE_ONLY:
                continue
            reached = list(node.outputs)
            for inner in subgraphs_of(node):
                reached.extend(inner.inputs)
            if node.op_identifier() in model.functions:
                reached.extend(model.functions[node.op_identifier()].graph.inputs)
            # What a subgraph computes leaves it through the node that holds it.
            holder = holders.get(node.graph) if node.graph is not None else None
            if holder is not None:
                reached.extend(holder.outputs)
            waiting += [value for value in reached if value not in seen]
            seen.update(reached)
    return False
