"""The graph of an approximate index: HNSW (Malkov and Yashunin, arXiv 1603.09320) of the library usearch.

The graph proposes candidates, and who asks compares them by their exact cosines. So it holds the vectors in 8 bits, for
which it needs a quarter of the bytes, and what it loses by that is a part of the recall that is measured.

usearch maps the file and follows the numbers in it without asking whether they lie inside: a graph that was altered
would lead it to memory that is not its own. So each opening first reads every number that it follows, in numpy
(`_check`); the layout is that of `index_dense.hpp` and `index.hpp` of unum-cloud/USearch, release 2. What the check
cannot see is a file that is changed while it is mapped: who may write to it is trusted.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_export.errors import EnvironmentFailure, InputError, install_fix
from vlm_export.runtime.inputs.images import FloatArray

CONNECTIVITY, EXPANSION_ADD = 16, 64
_MAJOR = 2
# Of metric, numbers, keys and rows: the cosine, int8, uint64 and uint32, as `index_plugins.hpp` numbers them.
_KINDS = (99, 23, 14, 15)
_DENSE_HEAD = struct.Struct("<7s3H4B3QB")
_DENSE_HEAD_BYTES = 64
_GRAPH_HEAD = struct.Struct("<5Q")
_NODES_CHECKED = 1 << 14


def _list_type(room: int) -> np.dtype[Any]:
    return np.dtype([("count", "<u4"), ("rows", "<u4", (room,))])


_NODE = np.dtype([("key", "<u8"), ("level", "<i2"), ("list", _list_type(2 * CONNECTIVITY))])


class Graph:
    """A graph over vectors of one size; row numbers are its keys.

    Args:
        expansion: how many candidates a search keeps.
    """

    def __init__(self, dimension: int, expansion: int) -> None:
        self.dimension = dimension
        self._index = _usearch().index.Index(
            ndim=dimension,
            metric="cos",
            dtype="i8",
            connectivity=CONNECTIVITY,
            expansion_add=EXPANSION_ADD,
            expansion_search=expansion,
            enable_key_lookups=False,
        )

    @classmethod
    def mapped(cls, path: Path, content: npt.NDArray[np.uint8], rows: int, dimension: int, expansion: int) -> Graph:
        """The graph at the beginning of a file.

        Args:
            content: its bytes, mapped, which are checked before the library sees the file.
            rows: how many vectors it must have.

        Raises:
            InputError: it is damaged, or of another version.
            EnvironmentFailure: usearch is not installed.
        """
        graph = cls(dimension, expansion)
        _check(content, rows, dimension, str(path))
        graph._index.view(str(path))
        return graph

    @property
    def library(self) -> str:
        """Who made it, and in which version."""
        return f"usearch {_usearch().__version__}"

    @property
    def expansion(self) -> int:
        """How many candidates a search keeps."""
        return int(self._index.expansion_search)

    @expansion.setter
    def expansion(self, value: int) -> None:
        self._index.expansion_search = value

    def add(self, first: int, vectors: FloatArray, threads: int) -> None:
        """Adds vectors, float32 (N, D), as the rows from `first` on; 0 threads are as many as there are cores."""
        self._index.add(np.arange(first, first + len(vectors), dtype=np.uint64), vectors, threads=threads)

    def save(self, path: Path) -> None:
        """Writes it to a new file."""
        self._index.save(str(path))

    def nearest(self, vector: FloatArray, count: int) -> npt.NDArray[np.int64]:
        """About the `count` nearest rows to a vector (D,), sorted by their numbers."""
        found = self._index.search(vector, count, threads=1)
        return np.unique(found.keys).astype(np.int64)


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError as error:
        raise EnvironmentFailure(
            "an approximate index needs usearch",
            got=str(error),
            fix=f"{install_fix('search')}; or build an exact one: --method exact",
        ) from error
    return usearch


def _check(content: npt.NDArray[np.uint8], rows: int, dimension: int, where: str) -> None:
    """InputError unless every number that the library follows leads to what is in the file.

    The file has the vectors, rows and columns of which stand before them; a head of 64 bytes; the graph's own head; the
    level of each node; and the nodes, each with its key, its level, and a list of neighbours for level 0 and for each
    above: a number of neighbours, and as many row numbers as there is room for.
    """
    vectors_end = 8 + rows * dimension
    levels_start = vectors_end + _DENSE_HEAD_BYTES + _GRAPH_HEAD.size
    nodes_start = levels_start + 2 * rows
    if len(content) < nodes_start:
        raise _damage(where, "it ends before its nodes")
    if struct.unpack("<2I", content[:8].tobytes()) != (rows, dimension):
        raise _damage(where, "it has other vectors")
    head = _DENSE_HEAD.unpack_from(content[vectors_end : vectors_end + _DENSE_HEAD_BYTES].tobytes())
    if head[0] != b"usearch" or head[1] != _MAJOR or head[4:] != (*_KINDS, rows, 0, dimension, 0):
        raise _damage(where, f"its head is {head}")
    size, connectivity, base, top, entry = _GRAPH_HEAD.unpack(
        content[levels_start - _GRAPH_HEAD.size : levels_start].tobytes()
    )
    if (size, connectivity, base) != (rows, CONNECTIVITY, 2 * CONNECTIVITY):
        raise _damage(where, f"it has {size} nodes of {connectivity} and {base} neighbours")
    levels = content[levels_start:nodes_start].view("<i2")
    if levels.min() < 0 or entry >= rows or levels[entry] != top or levels.max() > top:
        raise _damage(where, "its levels contradict one another")
    _check_nodes(content[nodes_start:], levels, where)


def _check_nodes(nodes: npt.NDArray[np.uint8], levels: npt.NDArray[np.int16], where: str) -> None:
    rows, base, upper = len(levels), _NODE, _list_type(CONNECTIVITY)
    ends = np.cumsum(base.itemsize + upper.itemsize * levels.astype(np.int64))
    if ends[-1] != len(nodes):
        raise _damage(where, f"its nodes have {len(nodes)} bytes instead of {ends[-1]}")
    starts = ends - base.itemsize - upper.itemsize * levels.astype(np.int64)
    # Sizes of nodes are even, so that every second byte is where one may begin.
    anywhere = np.ndarray(((len(nodes) - base.itemsize) // 2 + 1,), base, nodes, strides=(2,))
    for first in range(0, rows, _NODES_CHECKED):
        chosen = slice(first, first + _NODES_CHECKED)
        found = anywhere[starts[chosen] // 2]
        if found["key"].max() >= rows:
            raise _damage(where, "a key is no row")
        if not np.array_equal(found["level"], levels[chosen]):
            raise _damage(where, "levels of nodes are not those that it lists")
        _check_list(found["list"], 2 * CONNECTIVITY, None, rows, where)
    for level in range(1, int(levels.max()) + 1):
        places = starts[levels >= level] + base.itemsize + upper.itemsize * (level - 1)
        lists = np.ndarray(((len(nodes) - upper.itemsize) // 2 + 1,), upper, nodes, strides=(2,))
        _check_list(lists[places // 2], CONNECTIVITY, levels >= level, rows, where)


def _check_list(
    lists: npt.NDArray[Any], room: int, reached: npt.NDArray[np.bool_] | None, rows: int, where: str
) -> None:
    """Of a level above 0, the neighbours must be nodes that reach it: they have a list there, which is read next."""
    counts, neighbours = lists["count"], np.ascontiguousarray(lists["rows"])
    if counts.max(initial=0) > room:
        raise _damage(where, "a node has more neighbours than there is room for")
    used = np.arange(room) < counts[:, None]
    if neighbours.max(initial=0, where=used) >= rows:
        raise _damage(where, "a neighbour is no row")
    if reached is not None and not reached[neighbours[used]].all():
        raise _damage(where, "a neighbour does not reach the level")


def _damage(where: str, got: str) -> InputError:
    return InputError(
        "the graph of an index is damaged",
        where=where,
        got=got,
        fix="build it again: vlm-export index EMBEDDINGS -o INDEX --overwrite",
    )
