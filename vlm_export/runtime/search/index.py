"""What is searched: items, their vectors, and columns of texts, in memory or mapped from an index file.

A search is exact, or it compares the rows of the inverted lists nearest to the query. Scores are exact cosines in
either case, computed from the vectors as they were embedded. With conditions, every result meets all of them, and the
fewer items do, the more lists are compared: all of them where few do, so that the search is exact there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.search.filters import Column, Condition, column_of, parsed_condition, unknown_column
from vlm_export.runtime.search.index_file import LISTS, NAMES, VECTORS, IndexFile, ListsRecord, TextArray
from vlm_export.runtime.search.rows import ExactRows, Lists, Rows
from vlm_export.runtime.search.store import Embeddings, EmbeddingsMeta, require_model
from vlm_export.runtime.tasks.embed import unit_rows

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
        rows: Rows,
        columns: Mapping[str, Column],
        *,
        file: IndexFile | None = None,
    ) -> None:
        self.meta, self.columns = meta, tuple(columns)
        self._names, self._rows, self._columns, self._file = names, rows, columns, file

    @classmethod
    def of(cls, embeddings: Embeddings) -> SearchIndex:
        """Embeddings that are in memory."""
        columns = {name: column_of(texts) for name, texts in embeddings.columns.items()}
        return cls(embeddings.meta, embeddings.items, ExactRows(embeddings.vectors), columns)

    @classmethod
    def mapped(cls, path: Path) -> SearchIndex:
        """What `build_index` wrote, mapped.

        Raises:
            InputError: no index, or a damaged one.
            EnvironmentFailure: an approximate index needs faiss, which is not installed.
        """
        file = IndexFile(path)
        state = file.state
        names = TextArray(file.bytes_of(NAMES), state.rows, str(path))
        columns = {column.name: file.column(number) for number, column in enumerate(state.columns)}
        rows: Rows
        if state.lists is None:
            rows = ExactRows(file.array(VECTORS, "<f4", (state.rows, state.dimension)))
        else:
            count, probes = state.lists.count, state.lists.probes
            rows = Lists.mapped(path, file.first_bytes(LISTS), state.rows, state.dimension, count, probes)
            file.check_same()
        return cls(state.meta, names, rows, columns, file=file)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        how = "exact" if self.lists is None else "approximate"
        return f"<vlm_export.SearchIndex of {len(self)} {self.meta.kind}s by {self.meta.model!r}, {how}>"

    @property
    def dimension(self) -> int:
        """D of the vectors."""
        return self._rows.dimension

    @property
    def lists(self) -> ListsRecord | None:
        """Of an approximate index, what is known of its lists, the measured recall among it; None for an exact one."""
        return None if self._file is None else self._file.state.lists

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
        rows, scores = self._rows.nearest(vector, k, self._meeting(where))
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
