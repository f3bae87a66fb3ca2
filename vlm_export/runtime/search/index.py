"""What is searched: items, their vectors, and columns of texts, in memory or mapped from an index file.

A search is exact, or it compares the candidates that a graph proposes. Scores are exact cosines in either case,
computed from the vectors as they were embedded. With conditions, every result meets all of them: up to `FILTERED_ROWS`
items that meet them are compared one by one; of more, the graph proposes so many candidates that enough of them should
meet the conditions, and where too few do, all items that meet them are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.search.filters import Column, Condition, column_of, parsed_condition, unknown_column
from vlm_export.runtime.search.graph import Graph
from vlm_export.runtime.search.index_file import (
    GRAPH,
    NAMES,
    VECTORS,
    GraphRecord,
    IndexFile,
    TextArray,
)
from vlm_export.runtime.search.store import Embeddings, EmbeddingsMeta, require_model, top_k
from vlm_export.runtime.tasks.embed import unit_rows

EXACT_ROWS = 50_000
"""So many items are compared one by one: 50,000 x 512 numbers are read from memory in about ten milliseconds."""
FILTERED_ROWS = 10_000
"""So many that meet conditions are compared one by one, since they lie scattered; of more, the graph is asked."""
MAX_CANDIDATES = 4096
"""Of a graph; beyond that, comparing all is not much slower."""
_ROWS_GATHERED = 1 << 14
_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Match:
    """One result of a search.

    Attributes:
        score: the cosine.
        columns: what else is known of the item.
    """

    item: str
    score: float
    columns: Mapping[str, str] = field(default_factory=dict)


class SearchIndex:
    """Items and their vectors, to be searched. Made by `vlm_export.open_index`.

    Attributes:
        meta: what the items are, and the model whose vectors they have.
        columns: names of what else is known of each item.
    """

    def __init__(
        self,
        meta: EmbeddingsMeta,
        names: Sequence[str],
        vectors: FloatArray,
        columns: Mapping[str, Column],
        graph: Graph | None = None,
        *,
        file: IndexFile | None = None,
    ) -> None:
        self.meta, self.columns = meta, tuple(columns)
        self._names, self._vectors, self._columns, self._graph, self._file = names, vectors, columns, graph, file

    @classmethod
    def of(cls, embeddings: Embeddings) -> SearchIndex:
        """Embeddings that are in memory."""
        columns = {name: column_of(texts) for name, texts in embeddings.columns.items()}
        return cls(embeddings.meta, embeddings.items, embeddings.vectors, columns)

    @classmethod
    def mapped(cls, path: Path) -> SearchIndex:
        """What `build_index` wrote, mapped.

        Raises:
            InputError: no index, or a damaged one.
            EnvironmentFailure: its graph needs usearch, which is not installed.
        """
        file = IndexFile(path)
        state = file.state
        names = TextArray(file.bytes_of(NAMES), state.rows, str(path))
        vectors = file.array(VECTORS, "<f4", (state.rows, state.dimension))
        columns = {column.name: file.column(number) for number, column in enumerate(state.columns)}
        graph = None
        if state.graph is not None:
            content, expansion = file.bytes_of(GRAPH), state.graph.expansion
            graph = Graph.mapped(path, content, state.rows, state.dimension, expansion)
        return cls(state.meta, names, vectors, columns, graph, file=file)

    def __len__(self) -> int:
        return len(self._vectors)

    def __repr__(self) -> str:
        how = "exact" if self._graph is None else "approximate"
        return f"<vlm_export.SearchIndex of {len(self)} {self.meta.kind}s by {self.meta.model!r}, {how}>"

    @property
    def dimension(self) -> int:
        """D of the vectors."""
        return int(self._vectors.shape[1])

    @property
    def vectors(self) -> FloatArray:
        """The vectors of all items, float32 (N, D), of an index file mapped; not to be changed."""
        return self._vectors

    @property
    def graph(self) -> GraphRecord | None:
        """What is known of the graph, its measured recall among it; None: every search is exact."""
        return None if self._file is None else self._file.state.graph

    def require_model(self, identity: str, model: str) -> None:
        """InputError unless the vectors were computed by the model of that identity."""
        require_model(self.meta, identity, model)

    def verify(self) -> None:
        """Reads a whole index file; InputError where it is not what was written."""
        if self._file is not None:
            self._file.check_hashes()

    def search(self, vector: FloatArray, k: int = 10, *, where: Sequence[str | Condition] = ()) -> list[Match]:
        """The `k` items nearest to a vector, best first, equal ones in the order of the items.

        Args:
            vector: float32 (D,) of unit length, as a row of `encode_text` or `encode_image`.
            where: conditions that every result meets, as "colour=red", "colour=red|green", "colour!=red", "size>=3".

        Raises:
            InputError: the vector has another size, or the index is damaged.
            UsageError: `k` is below 1, or a condition names no column.
        """
        if vector.shape != (self.dimension,):
            raise InputError(
                "the embeddings have another size than the bundle's",
                expected=f"{vector.shape[-1]} numbers each",
                got=f"{self.dimension}, made by {self.meta.model}",
                fix="embed again with this bundle",
            )
        if k < 1:
            raise UsageError("k must be at least 1", got=str(k))
        rows, scores = self._nearest(vector, k, self._meeting(where))
        if not np.isfinite(scores).all():
            raise InputError("the vectors of an index hold NaN or infinity", where=self._where, fix="build it again")
        return [self._match(int(row), float(score)) for row, score in zip(rows, scores, strict=True)]

    def _meeting(self, where: Sequence[str | Condition]) -> npt.NDArray[np.bool_] | None:
        """Which items meet the conditions; None without any."""
        met: npt.NDArray[np.bool_] | None = None
        for each in where:
            condition = parsed_condition(each) if isinstance(each, str) else each
            if condition.column not in self._columns:
                raise unknown_column(condition.column, self.columns)
            found = self._columns[condition.column].rows_of(condition)
            met = found if met is None else met & found
        return met

    def _nearest(
        self, vector: FloatArray, k: int, met: npt.NDArray[np.bool_] | None
    ) -> tuple[npt.NDArray[np.int64], FloatArray]:
        count = len(self) if met is None else int(np.count_nonzero(met))
        if self._graph is not None and (met is None or count > FILTERED_ROWS):
            # Of so many candidates about 2 k meet the conditions, if those are spread evenly.
            wanted = max(self._graph.expansion, math.ceil(2 * k * len(self) / count))
            if wanted <= MAX_CANDIDATES:
                candidates = self._graph.nearest(vector, min(wanted, len(self)))
                if met is not None:
                    candidates = candidates[met[candidates]]
                if len(candidates) >= min(k, count):
                    return self._compared(vector, k, candidates)
        return top_k(vector, self._vectors, k) if met is None else self._compared(vector, k, np.flatnonzero(met))

    def _compared(
        self, vector: FloatArray, k: int, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """The nearest of these rows, which are sorted."""
        best = np.empty(0, np.int64)
        scores = np.empty(0, np.float32)
        for first in range(0, len(rows), _ROWS_GATHERED):
            some = rows[first : first + _ROWS_GATHERED]
            order, found = top_k(vector, self._vectors[some], k)
            best, scores = np.concatenate([best, some[order]]), np.concatenate([scores, found])
            kept = np.argsort(-scores, kind="stable")[:k]
            best, scores = best[kept], scores[kept]
        return best, scores

    def _match(self, row: int, score: float) -> Match:
        try:
            columns = {name: column.text(row) for name, column in self._columns.items()}
        except IndexError as error:
            raise InputError("a column of an index is damaged", where=self._where, fix="build it again") from error
        return Match(self._names[row], score, columns)

    @property
    def _where(self) -> str:
        return "" if self._file is None else str(self._file.path)


def combined_vector(text: FloatArray, image: FloatArray, weight: float = 0.5) -> FloatArray:
    """What is near to a text and to an image: the mean of their vectors (D,), of unit length.

    Args:
        weight: the image's share, 0 to 1.

    Raises:
        UsageError: another weight, or vectors that cancel out.
    """
    if not 0 <= weight <= 1:
        raise UsageError("the weight is the image's share", expected="from 0 to 1", got=str(weight))
    mean = (1 - weight) * text + weight * image
    if not np.linalg.norm(mean) > _UNIT_TOLERANCE:
        raise UsageError("text and image cancel out", got=f"weight {weight}", fix="choose another weight")
    vector: FloatArray = unit_rows(mean[None].astype(np.float32))[0]
    return vector
