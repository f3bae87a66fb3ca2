"""Embeddings in engines that spread a table over processes and machines: Ray Data, Daft, Spark.

`Embedder` maps a batch of columns to a batch of columns, and knows no engine. Ray Data takes the class as it is:

    dataset.map_batches(Embedder, fn_constructor_kwargs={"bundle": DIR}, batch_size=256, concurrency=2, num_cpus=1)

A worker has one thread, so that as many workers as a machine has cores keep them busy, and workers of one machine hold
the weights once (`weights="shared"` of `vlm_export.load`). The engine sees to it that each batch is taken once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.bulk.embed import BATCH_SIZES
from vlm_export.runtime.bulk.folder import reason_text
from vlm_export.runtime.engines.choice import EngineName, Weights
from vlm_export.runtime.inputs.images import MAX_PIXELS
from vlm_export.runtime.load import load

Column: TypeAlias = npt.NDArray[Any]
Columns: TypeAlias = Mapping[str, Sequence[Any] | Column]
"""Column → its values, one for each row of a batch."""

_LOG = logging.getLogger(__name__)


class Embedder:
    """Adds embeddings to batches of columns. It can be pickled, also after use.

    Args:
        bundle: the bundle's directory, which every machine has under this path.
        column: what is embedded. Of images: paths, the bytes of files, or arrays uint8 (H, W, 3); of texts: strings.
        kind: what the column holds.
        output: the column of embeddings that is added, float32 (rows, D), each of unit length.
        batch_size: rows of one run of the model, whatever the engine's batches are; None: as `embed` has them.
        on_error: what an image does that cannot be read. "skip" leaves its row out and logs a warning with its name and
            the reason; "keep" keeps it, with an embedding of NaN and the reason in the column `error`, which is empty
            in the other rows; "stop" raises.
        truncate: cut texts that are too long instead of raising.
        precision, engine, providers, threads, max_pixels, weights: as in `vlm_export.load`.

    Raises:
        InputError, UsageError: as `vlm_export.load`.
    """

    def __init__(
        self,
        bundle: str,
        *,
        column: str = "path",
        kind: Literal["image", "text"] = "image",
        output: str = "embedding",
        batch_size: int | None = None,
        on_error: Literal["skip", "keep", "stop"] = "skip",
        truncate: bool = False,
        precision: str | None = None,
        engine: EngineName | None = None,
        providers: str | Sequence[str] | None = None,
        threads: int | None = 1,
        max_pixels: int = MAX_PIXELS,
        weights: Weights = "shared",
    ) -> None:
        if kind not in ("image", "text"):
            raise UsageError("a column holds images or texts", expected="image or text", got=repr(kind))
        if on_error not in ("skip", "keep", "stop"):
            raise UsageError("an error skips, keeps or stops", expected="skip, keep or stop", got=repr(on_error))
        self.column, self.kind, self.output = column, kind, output
        self.batch_size = BATCH_SIZES[kind] if batch_size is None else batch_size
        self.on_error, self.truncate = on_error, truncate
        self.model = load(
            bundle,
            precision=precision,
            engine=engine,
            providers=providers,
            threads=threads,
            max_pixels=max_pixels,
            weights=weights,
        )

    def __call__(self, batch: Columns) -> dict[str, Column]:
        """All columns of a batch, and the embeddings.

        Raises:
            UsageError: the batch lacks the column, or has one of a name that is added.
            InputError: an image cannot be read and stops the run; or a text cannot be embedded.
        """
        columns = {name: _as_array(values) for name, values in batch.items()}
        self._check(columns)
        values = list(columns[self.column])
        if self.kind == "text":
            texts = [str(value) for value in values]
            rows = self.model.encode_text(texts, truncate=self.truncate, batch_size=self.batch_size)
            return {**columns, self.output: rows}
        errors = dict[int, InputError]()

        def unreadable(number: int, error: InputError) -> None:
            if self.on_error == "stop":
                raise error
            errors[number] = error

        rows = self.model.encode_image(values, batch_size=self.batch_size, unreadable=unreadable)
        read = np.array([number not in errors for number in range(len(values))], dtype=bool)
        if self.on_error == "keep":
            embeddings = np.full((len(values), rows.shape[1]), np.nan, dtype=np.float32)
            embeddings[read] = rows
            reasons = [reason_text(errors[number]) if number in errors else "" for number in range(len(values))]
            return {**columns, self.output: embeddings, "error": _as_array(reasons)}
        for error in errors.values():
            _LOG.warning("skipped: %s", error)
        return {**{name: column[read] for name, column in columns.items()}, self.output: rows}

    def _check(self, columns: Mapping[str, Column]) -> None:
        if self.column not in columns:
            raise UsageError(
                "a batch lacks the column that is embedded",
                expected=self.column,
                got=", ".join(columns) or "no columns",
                fix="name it: column=…",
            )
        added = {self.output, *(["error"] if self.on_error == "keep" and self.kind == "image" else [])}
        if taken := sorted(added & columns.keys()):
            raise UsageError(
                "a column has a name that is added", got=", ".join(taken), fix="rename it, or use output=…"
            )


def _as_array(values: Sequence[Any] | Column) -> Column:
    """A column as an array; one of objects where it is none: numpy would cut zeros from the end of bytes."""
    if isinstance(values, np.ndarray) and values.dtype.kind != "S":
        return values
    column = np.empty(len(values), dtype=object)
    for number, value in enumerate(values):
        column[number] = value
    return column
