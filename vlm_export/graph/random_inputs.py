"""Inputs to try a graph with: random values in the shapes that its inputs state, or those of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from vlm_export.errors import UsageError, suggestion
from vlm_export.graph.errors import GraphError

Array = npt.NDArray[Any]
# Sizes that open axes get, one after the other, and the bound of random integers: graphs differ in what they take.
_SIZES = ((2, 3, 5, 4, 7, 6), (2,), (1,), (4,), (8,), (16,), (32,), (64,), (224,))
_BOUNDS = (2, 1, 16)
_WORDS = ("a", "cat", "on", "two", "mats", "")


def random_feeds(inputs: Sequence[ir.Value], sizes: Mapping[str, int], seed: int = 0) -> Iterator[dict[str, Array]]:
    """Feeds to try in turn until the graph takes them; equally named axes are of one size.

    Args:
        sizes: named axis → size, where the caller knows it.

    Raises:
        GraphError: an input is no tensor, or of a dtype that numpy lacks.
    """
    for number, (bound, choices) in enumerate(product(_BOUNDS, _SIZES)):
        rng = np.random.default_rng([seed, number])
        known = dict(sizes)
        feeds = {}
        for value in inputs:
            feeds[str(value.name)] = _random_array(value, _shape(value, known, choices), rng, bound)
        # Flags that choose a branch take turns, so that each branch is seen.
        flags = [name for name, array in feeds.items() if array.dtype == bool and array.size == 1]
        for place, name in enumerate(flags):
            feeds[name] = np.full(feeds[name].shape, (number + place) % 2 == 0)
        yield feeds


def _shape(value: ir.Value, known: dict[str, int], choices: Sequence[int]) -> list[int]:
    shape: list[int] = []
    for axis, size in enumerate(value.shape or ()):
        name = str(size) if isinstance(size, int) or size.value is not None else f"{value.name}.{axis}"
        is_new = not isinstance(size, int) and name not in known
        if is_new:
            known[name] = choices[len(known) % len(choices)]
        shape.append(size if isinstance(size, int) else known[name])
    return shape


def _random_array(value: ir.Value, shape: list[int], rng: np.random.Generator, bound: int) -> Array:
    if not isinstance(value.type, ir.TensorType):
        raise GraphError(
            f"input {value.name!r} is no tensor: random values cannot be made for it", fix="give inputs with --inputs"
        )
    dtype = value.type.dtype
    if dtype == ir.DataType.STRING:
        return rng.choice(np.array(_WORDS, dtype=object), shape)
    kind = dtype.numpy()
    if kind.kind == "b":
        return np.asarray(rng.integers(0, 2, shape).astype(bool))
    if kind.kind in "iu":
        return np.asarray(rng.integers(0, bound, shape).astype(kind))
    if kind.kind == "f":
        # Values that float16 holds too, so that the same inputs serve a graph of another precision.
        return np.asarray(rng.standard_normal(shape).astype(np.float16).astype(kind))
    raise GraphError(f"input {value.name!r} is {dtype.name}, which numpy lacks", fix="change the input's dtype first")


def load_feeds(paths: Sequence[Path], inputs: Sequence[ir.Value]) -> dict[str, Array]:
    """Feeds from one .npz with arrays by input name, or from .pb files (ONNX TensorProto) in the order of the inputs.

    Raises:
        UsageError: a file that is neither, or names and numbers that are not the inputs'.
    """
    names = [str(value.name) for value in inputs]
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
        if name not in names:
            raise UsageError(f"the model has no input {name!r}", where=str(paths[0]), fix=suggestion(name, names))
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
