"""Vectors in rows, and the nearest of them: compared one by one, or in the inverted lists of FAISS.

Inverted lists are of the library faiss: its k-means finds the centres of so many lists, each row lies in the list of
the nearest centre, and a search compares the rows of the lists whose centres are nearest, all of them exactly. faiss
maps the file. What it follows there are sizes of lists; a file that was altered would lead it to memory that is not its
own. So `Lists.mapped` first holds all that stands around the vectors against what we would write, byte for byte. What
this cannot see is a file that is changed while it is mapped: who may write to it is trusted.

The form is that of `IndexIVFFlat` in `faiss/impl/index_write.cpp` of facebookresearch/faiss 1.15: a head, the centres
as an `IndexFlatIP`, the sizes of the lists, and of each list its vectors and their row numbers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from vlm_export.errors import EnvironmentFailure, InputError, install_fix
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.search.store import top_k

Met: TypeAlias = "npt.NDArray[np.bool_] | None"
"""Which rows meet conditions, (N,); None without any."""
Nearest: TypeAlias = "tuple[npt.NDArray[np.int64], FloatArray]"
"""Row numbers, best first, and their cosines."""

_ROWS_GATHERED = 1 << 14
# More iterations than these find no more of the nearest on the vectors of the benchmark.
_ITERATIONS, _POINTS_OF_CENTRE = 4, 40
_INNER_PRODUCT, _NO_MEANING = 0, 1 << 20
AGAIN = "build it again: vlm-export index EMBEDDINGS -o INDEX --overwrite"


class Rows(Protocol):
    """Vectors of unit length that can be searched."""

    def __len__(self) -> int: ...

    @property
    def dimension(self) -> int:
        """D of the vectors."""

    def nearest(self, vector: FloatArray, k: int, met: Met) -> Nearest:
        """The k nearest rows to a vector (D,) of unit length, of those that meet conditions."""


class ExactRows:
    """Rows that are compared one by one: float32 (N, D)."""

    def __init__(self, vectors: FloatArray) -> None:
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dimension(self) -> int:
        """D of the vectors."""
        return int(self.vectors.shape[1])

    def nearest(self, vector: FloatArray, k: int, met: Met) -> Nearest:
        """As `Rows.nearest`; equal ones in the order of the rows."""
        if met is None:
            return top_k(vector, self.vectors, k)
        rows, best, scores = np.flatnonzero(met), np.empty(0, np.int64), np.empty(0, np.float32)
        for first in range(0, len(rows), _ROWS_GATHERED):
            some = rows[first : first + _ROWS_GATHERED]
            order, found = top_k(vector, self.vectors[some], k)
            best, scores = np.concatenate([best, some[order]]), np.concatenate([scores, found])
            kept = np.argsort(-scores, kind="stable")[:k]
            best, scores = best[kept], scores[kept]
        return best, scores


def list_count(rows: int) -> int:
    """How many lists rows are divided into: to compare their centres costs about what comparing their rows does."""
    return max(1, min(2 * math.isqrt(rows), rows // _POINTS_OF_CENTRE))


def centres_of(sample: FloatArray, count: int) -> FloatArray:
    """Centres of so many lists, float32 (count, D) of unit length, by k-means of a sample."""
    faiss = _faiss()
    means = faiss.Kmeans(
        sample.shape[1], count, niter=_ITERATIONS, spherical=True, seed=0, max_points_per_centroid=_POINTS_OF_CENTRE
    )
    # Fewer points than it recommends are no news: `list_count` sees to it.
    means.cp.min_points_per_centroid = 1
    means.train(np.ascontiguousarray(sample))
    return np.ascontiguousarray(means.centroids, np.float32)


def sample_size(lists: int) -> int:
    """How many rows `centres_of` uses."""
    return _POINTS_OF_CENTRE * lists


def nearest_centres(vectors: FloatArray, centres: FloatArray) -> npt.NDArray[np.int64]:
    """The list of each row, (N,)."""
    _, found = _faiss().knn(vectors, centres, 1, metric=_faiss().METRIC_INNER_PRODUCT)
    return np.asarray(found[:, 0], np.int64)


def faiss_version() -> str:
    """The library that makes lists, and its version."""
    return f"faiss {_faiss().__version__}"


@contextmanager
def faiss_threads(threads: int | None) -> Iterator[None]:
    """So many threads for what faiss computes in the block; None leaves it as it is."""
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@dataclass(frozen=True)
class ListsLayout:
    """Where what stands in the file of inverted lists.

    Attributes:
        sizes: rows of each list.
    """

    sizes: npt.NDArray[np.uint64]
    dimension: int

    @property
    def rows(self) -> int:
        """Of all lists."""
        return int(self.sizes.sum())

    @property
    def head(self) -> bytes:
        """All up to the centres."""
        lists = len(self.sizes)
        begin = _index_head(b"IwFl", self.dimension, self.rows) + struct.pack("<2Q", lists, 1)
        return begin + _index_head(b"IxFI", self.dimension, lists) + struct.pack("<Q", lists * self.dimension)

    @property
    def middle(self) -> bytes:
        """All between the centres and the lists."""
        lists = len(self.sizes)
        begin = struct.pack("<BQ", 0, 0) + b"ilar" + struct.pack("<2Q", lists, 4 * self.dimension)
        return begin + b"full" + struct.pack("<Q", lists) + self.sizes.astype("<u8").tobytes()

    @property
    def lists_start(self) -> int:
        """Where the first list begins, in bytes."""
        return len(self.head) + 4 * len(self.sizes) * self.dimension + len(self.middle)

    @property
    def size(self) -> int:
        """Of the whole, in bytes."""
        return self.lists_start + self.rows * (4 * self.dimension + 8)


def _index_head(kind: bytes, dimension: int, rows: int) -> bytes:
    return kind + struct.pack("<iqqq?i", dimension, rows, _NO_MEANING, _NO_MEANING, True, _INNER_PRODUCT)


class Lists:
    """Inverted lists at the beginning of a file that is mapped.

    Args:
        probes: how many lists a search compares.
    """

    def __init__(self, index: Any, rows: int, dimension: int, probes: int, where: str) -> None:
        self._index, self._rows, self.dimension, self.probes, self._where = index, rows, dimension, probes, where

    @classmethod
    def mapped(
        cls, path: Path, content: npt.NDArray[np.uint8], rows: int, dimension: int, lists: int, probes: int
    ) -> Lists:
        """The lists at the beginning of a file.

        Args:
            content: their bytes, mapped, which are checked before faiss sees the file.
            rows, dimension, lists: what they must have.

        Raises:
            InputError: they are damaged.
            EnvironmentFailure: faiss is not installed.
        """
        faiss = _faiss()
        _check(content, rows, dimension, lists, str(path))
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        except RuntimeError as error:
            raise _damage(str(path), str(error)) from error
        # It would start threads for each search that read the lists through, also rows that do not meet conditions.
        faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
        return cls(index, rows, dimension, probes, str(path))

    def __len__(self) -> int:
        return self._rows

    @property
    def count(self) -> int:
        """How many lists there are."""
        return int(self._index.nlist)

    def nearest(self, vector: FloatArray, k: int, met: Met) -> Nearest:
        """As `Rows.nearest`, in the nearest lists: the fewer rows meet conditions, the more lists, and all of them
        where those were not enough."""
        left = self._rows if met is None else int(np.count_nonzero(met))
        if not left:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        k = min(k, left)
        probes = min(-(-self.probes * self._rows // left), self.count)
        (rows,), (scores,) = self.search(vector[None], k, probes, met)
        if (rows < 0).any() and probes < self.count:
            (rows,), (scores,) = self.search(vector[None], k, self.count, met)
        order = np.lexsort((rows, -scores))
        order = order[rows[order] >= 0]
        return rows[order], scores[order]

    def search(
        self, vectors: FloatArray, k: int, probes: int, met: Met = None
    ) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """The k nearest rows to each vector (Q, D) in so many lists: rows and scores (Q, k), -1 where they are fewer.

        Raises:
            InputError: a row number that the file holds is none.
        """
        faiss = _faiss()
        chosen = None if met is None else faiss.IDSelectorBitmap(np.packbits(met, bitorder="little"))
        parameters = faiss.SearchParametersIVF(nprobe=probes, sel=chosen)
        scores, rows = self._index.search(np.ascontiguousarray(vectors, np.float32), k, params=parameters)
        if rows.max(initial=-1) >= self._rows or rows.min(initial=-1) < -1:
            raise _damage(self._where, "a row number is none")
        return rows, scores


def written_lists(
    layout: ListsLayout, centres: FloatArray, file: npt.NDArray[np.uint8]
) -> Iterator[tuple[FloatArray, npt.NDArray[np.int64]]]:
    """Writes all but the lists into a mapped file of `layout.size` bytes; yields vectors and rows of each to fill."""
    head, middle = layout.head, layout.middle
    file[: len(head)] = np.frombuffer(head, np.uint8)
    file[len(head) : layout.lists_start - len(middle)] = np.frombuffer(centres.astype("<f4").tobytes(), np.uint8)
    file[layout.lists_start - len(middle) : layout.lists_start] = np.frombuffer(middle, np.uint8)
    start, width = layout.lists_start, 4 * layout.dimension
    for size in layout.sizes.tolist():
        vectors = np.ndarray((size, layout.dimension), "<f4", file, start)
        yield vectors, np.ndarray((size,), "<i8", file, start + size * width)
        start += size * (width + 8)


def _check(content: npt.NDArray[np.uint8], rows: int, dimension: int, lists: int, where: str) -> None:
    """InputError unless all around the vectors is what we would write."""
    empty = ListsLayout(np.zeros(lists, np.uint64), dimension) if lists * dimension <= len(content) // 4 else None
    if empty is None or len(content) < empty.lists_start:
        raise _damage(where, "it ends before its lists")
    sizes = content[empty.lists_start - 8 * lists : empty.lists_start].copy().view("<u8")
    if sizes.max() > rows or sizes.sum() != rows:
        raise _damage(where, f"its lists do not have {rows} rows")
    layout = ListsLayout(sizes, dimension)
    middle = slice(layout.lists_start - len(layout.middle), layout.lists_start)
    if len(content) != layout.size:
        raise _damage(where, f"it has {len(content)} bytes instead of {layout.size}")
    if content[: len(layout.head)].tobytes() != layout.head or content[middle].tobytes() != layout.middle:
        raise _damage(where, "its heads are of something else")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise EnvironmentFailure(
            "an approximate index needs faiss",
            got=str(error),
            fix=f"{install_fix('search')}; or build an exact one: --method exact",
        ) from error
    return faiss


def _damage(where: str, got: str) -> InputError:
    return InputError("the lists of an index are damaged", where=where, got=got, fix=AGAIN)
