"""Inputs to try a graph with: random values in the shapes that its inputs state, of sizes that it takes; or files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from vlm_export.errors import GraphError, UsageError, suggestion
from vlm_export.graph.core.names import all_graphs, subgraphs_of
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.graph.core.tensors import is_plain_number


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


def random_runs(
    inputs: Mapping[str, ir.Value], sizes: Mapping[str, int], size_inputs: set[str], attempt: Attempt
) -> Iterator[Run]:
    """Yields runs of a graph on random inputs: three, of other sizes where axes are open.

    Where inputs are integers, there is one more, in which each is as large as the graph takes, and so they are in those
    that follow if possible: an embedding reads rows far from its first, an image is not almost black.

    Args:
        inputs: those that need a feed.
        sizes: named axis → size, where the caller knows it.
        size_inputs: inputs that decide how large tensors are; they stay small.
    """
    exponents = {
        name: _LARGEST_SIZE if name in size_inputs else _LARGEST
        for name, value in inputs.items()
        if value.dtype is not None and value.dtype.is_integer()
    }
    count = 0
    large: dict[str, int] | None = None
    for number, (bound, choices) in enumerate(product(_FIRST_BOUNDS, _SIZES)):
        small = dict.fromkeys(exponents, bound)

        def tried(bounds: Mapping[str, int], choices: Sequence[int] = choices, number: int = number) -> Run | None:
            return attempt(draw_feeds(inputs, sizes, choices, bounds, number))

        run = (tried(large) if large else None) or tried(small)
        if run is None:
            continue
        yield run
        count += 1
        if count == _RUNS or not inputs:
            return
        if large is None:
            large, run = _largest(exponents, small, tried)
            if run is not None:
                yield run


def _largest(
    exponents: Mapping[str, int], small: Mapping[str, int], tried: Callable[[Mapping[str, int]], Run | None]
) -> tuple[dict[str, int], Run | None]:
    """The largest bounds that the graph takes, powers of two, and the run with them."""
    found = {name: 1 << exponent for name, exponent in exponents.items()}
    run = tried(found) if found else None
    if run is not None:
        return found, run
    found = dict(small)
    for name, exponent in exponents.items():
        low, high = small[name].bit_length() - 1, exponent
        while low < high:
            middle = (low + high + 1) // 2
            larger = tried({**found, name: 1 << middle})
            low, high, run = (low, middle - 1, run) if larger is None else (middle, high, larger)
        found[name] = 1 << low
    return found, run


def run_with_defaults_replaced(run: Run, names: Iterable[str], attempt: Attempt) -> Run | None:
    """Repeats the run with other values where these inputs had defaults; None where the graph takes none."""
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


_WORDS = ("a", "cat", "on", "two", "mats", "")
# Bounds above this are meant to reach every value that the graph takes.
_SMALL_BOUND = 16


def draw_feeds(
    inputs: Mapping[str, ir.Value],
    sizes: Mapping[str, int],
    choices: Sequence[int],
    bounds: Mapping[str, int],
    number: int,
) -> dict[str, Array]:
    """Draws random values for the inputs; equally named axes are of one size.

    Args:
        sizes: named axis → size, where the caller knows it.
        choices: sizes that the other open axes get, one after the other.
        bounds: of integers, by the name of the input: they are at least 0 and smaller. Where numbers of eight bits may
            be large, they take all of their values.
        number: of the draw, which decides the values.

    Raises:
        GraphError: an input is no tensor, or of a dtype that cannot be drawn.
    """
    rng = np.random.default_rng([0, number])
    known = dict(sizes)
    feeds = {
        name: _random_array(name, value, _shape(name, value, known, choices), rng, bounds.get(name, _SMALL_BOUND))
        for name, value in inputs.items()
    }
    # Flags that choose a branch take turns, so that each branch is seen.
    flags = [name for name, array in feeds.items() if array.dtype == bool and array.size == 1]
    for place, name in enumerate(flags):
        feeds[name] = np.full(feeds[name].shape, (number + place) % 2 == 0)
    return feeds


def draw_near(default: Array, rng: np.random.Generator) -> Array:
    """Draws other values in place of an input's default, of its sign and magnitude, so that variances stay positive."""
    if default.dtype.kind == "f":
        spread = float(np.abs(default.astype(np.float64)).mean()) if default.size else 0.0
        base = np.where(default == 0, (spread or 1.0) / 2, default)
        return np.asarray((base * rng.uniform(0.5, 1.5, default.shape)).astype(default.dtype))
    if default.dtype.kind == "b":
        return ~default
    return np.asarray(rng.integers(0, _SMALL_BOUND, default.shape).astype(default.dtype))


def _shape(name: str, value: ir.Value, known: dict[str, int], choices: Sequence[int]) -> list[int]:
    shape: list[int] = []
    for axis, size in enumerate(value.shape or ()):
        if isinstance(size, int):
            shape.append(size)
            continue
        key = str(size) if size.value is not None else f"{name}.{axis}"
        if key not in known:
            known[key] = choices[len(known) % len(choices)]
        shape.append(known[key])
    return shape


def _random_array(name: str, value: ir.Value, shape: list[int], rng: np.random.Generator, bound: int) -> Array:
    if not isinstance(value.type, ir.TensorType):
        raise GraphError(
            f"input {name!r} is no tensor: random values cannot be made for it", fix="give inputs with --inputs"
        )
    dtype = value.type.dtype
    if dtype == ir.DataType.STRING:
        return rng.choice(np.array(_WORDS, dtype=object), shape)
    kind = dtype.numpy()
    if kind.kind == "b":
        return np.asarray(rng.integers(0, 2, shape).astype(bool))
    if kind.kind in "iu" and is_plain_number(kind):
        return _random_integers(kind, shape, rng, bound)
    if kind.kind == "c":
        raise GraphError(f"input {name!r} is {dtype.name}: random values cannot be made for it", fix="give --inputs")
    # Values that float16 holds too, so that the same inputs serve a graph of another precision. Of floats that numpy
    # lacks, as float32.
    wanted = kind if is_plain_number(kind) else np.dtype(np.float32)
    return np.asarray(rng.standard_normal(shape).astype(np.float16).astype(wanted))


def _random_integers(kind: np.dtype[Any], shape: list[int], rng: np.random.Generator, bound: int) -> Array:
    info = np.iinfo(kind)
    low, high = 0, min(bound, int(info.max) + 1)
    if bound > _SMALL_BOUND and kind.itemsize == 1:
        low, high = int(info.min), int(info.max) + 1
    array = np.asarray(rng.integers(low, high, shape).astype(kind))
    if array.size > 1 and bound > 2:
        # The ends of the range are always seen.
        array.flat[0], array.flat[-1] = high - 1, low
    return array


def load_feeds(paths: Sequence[Path], inputs: Mapping[str, ir.Value]) -> dict[str, Array]:
    """Reads feeds from one .npz with arrays by input name, or from .pb files (ONNX TensorProto) in the order of the
    inputs.

    Inputs with a default may be left out, and are not counted in the order.

    Raises:
        UsageError: a file that is neither, or names and numbers that are not the inputs'.
    """
    names = [name for name, value in inputs.items() if not value.is_initializer()]
    if len(paths) == 1 and paths[0].suffix == ".npz":
        feeds = _load_npz(paths[0])
    elif paths and all(path.suffix == ".pb" for path in paths):
        tensors = [_load_tensor(path) for path in paths]
        if len(tensors) > len(names):
            raise UsageError("there are more files than inputs", expected=str(names), got=f"{len(tensors)} files")
        feeds = dict(zip(names, tensors, strict=False))
    else:
        raise UsageError("inputs are one .npz file or several .pb files", got=", ".join(map(str, paths)))
    for name in feeds:
        if name not in inputs:
            raise UsageError(f"the model has no input {name!r}", where=str(paths[0]), fix=suggestion(name, inputs))
    missing = [name for name in names if name not in feeds]
    if missing:
        raise UsageError("inputs are missing", where=str(paths[0]), expected=str(names), got=f"without {missing}")
    return feeds


def _load_npz(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as data:
            feeds = {name: data[name] for name in data.files}
    # zipfile, zlib and numpy raise classes of their own.
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise UsageError("the file is no .npz of plain arrays", where=str(path), got=got[:200]) from error
    # What is no array in the archive comes as bytes.
    strange = [name for name, array in feeds.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise UsageError("the file is no .npz of plain arrays", where=str(path), got=", ".join(strange))
    return feeds


def _load_tensor(path: Path) -> Array:
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        return np.asarray(numpy_helper.to_array(tensor))
    # protobuf's parser and onnx raise classes of their own.
    except Exception as error:
        raise UsageError("the file is no ONNX tensor", where=str(path), got=str(error)[:200]) from error


def as_dtype(array: Array, value: ir.Value | None) -> Array:
    """Converts values to that tensor's dtype; programs take and give as float32 what numpy lacks."""
    if value is None or value.dtype is None or not isinstance(array, np.ndarray) or not is_plain_number(array.dtype):
        return array
    wanted = value.dtype.numpy()
    if array.dtype == wanted:
        return array
    with np.errstate(invalid="ignore", over="ignore"):
        held = array.astype(wanted)
    return np.asarray(held if is_plain_number(wanted) else held.astype(np.float32))


def bounds_of(dtype: ir.DataType) -> tuple[float, float]:
    """Returns the smallest and the largest finite number of an integer or floating point dtype."""
    return float(dtype.min), float(dtype.max)


def held_by_both(array: Array, old: ir.Value, new: ir.Value | None) -> Array:
    """Values of the old dtype that the new one holds exactly: clipped to its range, and rounded as it rounds.

    Args:
        array: of the dtype of `old`, which is returned, or of that of `new` (None: they do not differ).
    """
    if new is None or new.dtype is None or old.dtype is None or new.dtype == old.dtype:
        return array
    if not isinstance(array, np.ndarray) or not is_plain_number(array.dtype):
        return array
    if new.dtype.is_integer() or new.dtype.is_floating_point():
        low, high = bounds_of(new.dtype)
        if array.dtype.kind == "f" or array.astype(np.float64).max(initial=0.0) > high:
            array = np.clip(array.astype(np.float64), low, high)
    rounded = as_dtype(array, new)
    return as_dtype(rounded, old)
