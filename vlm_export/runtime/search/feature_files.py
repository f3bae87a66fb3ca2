"""Features of slices on disk, written image by image: they are too large to be held for many.

`.npy` is float32 (slices, Q, D) for any tool; behind it in the file stands what tells of each row the image, the
number of the slice in it (0: the whole image) and its rows and columns of patches (`search.npy_metadata`). `.parquet`
holds the same as columns `item`, `slice`, `rows`, `columns` and `features` (Arrow's fixed-shape tensor), and the model
in its metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.search.store import (
    METADATA_KEY,
    SCHEMA_VERSION,
    SLICES_KIND,
    append_metadata,
    checked_suffix,
    pyarrow_modules,
    staged_embeddings,
)
from vlm_export.runtime.tasks.features import SliceFeatures


@dataclass(frozen=True)
class SliceFileMeta:
    """Where features come from.

    Attributes:
        model: the bundle's name, for people.
        identity: `Model.identity`.
        feature_shape: (Q, D) of each slice.
        precision: the variant that computed them.
    """

    model: str
    identity: str
    feature_shape: tuple[int, int]
    precision: str = "fp32"

    def to_json(self) -> dict[str, Any]:
        names = {"model": self.model, "identity": self.identity, "precision": self.precision}
        return {"schema_version": SCHEMA_VERSION, "kind": SLICES_KIND, **names, "shape": list(self.feature_shape)}


def write_slice_features(
    path: str | Path, images: Iterable[tuple[str, SliceFeatures]], meta: SliceFileMeta, *, overwrite: bool = False
) -> tuple[int, int]:
    """Write `path` (.npy or .parquet), which has its name only once it is complete.

    Args:
        images: names and features; taken one by one.
        overwrite: replace a file that is there.

    Returns:
        How many images and slices were written.

    Raises:
        UsageError: another suffix, features of another shape, or the file exists.
        EnvironmentFailure: the disk refuses, or Parquet is asked for without pyarrow.
        InputError: a name is no Unicode, which Parquet cannot hold.
    """
    target = Path(path)
    write = {".npy": _write_npy, ".parquet": _write_parquet}[checked_suffix(target)]
    with staged_embeddings(target, overwrite=overwrite) as staged:
        return write(target, staged, _checked(images, meta.feature_shape), meta)


def _checked(
    images: Iterable[tuple[str, SliceFeatures]], shape: tuple[int, int]
) -> Iterator[tuple[str, SliceFeatures]]:
    for item, features in images:
        if features.image_features.shape != (len(features.tgt_sizes), *shape):
            expected = str((len(features.tgt_sizes), *shape))
            raise UsageError("features of another shape", expected=expected, got=str(features.image_features.shape))
        yield item, features


def _write_npy(
    target: Path, staged: Path, images: Iterator[tuple[str, SliceFeatures]], meta: SliceFileMeta
) -> tuple[int, int]:
    digest, rows, count = hashlib.sha256(), [], 0
    with staged.open("wb") as file:
        _write_header(file, 0, meta)
        for item, features in images:
            block = np.ascontiguousarray(features.image_features, dtype="<f4").data
            file.write(block)
            digest.update(block)
            rows += _rows(item, features)
            count += 1
        # numpy leaves room in the header for any number of rows.
        file.seek(0)
        _write_header(file, len(rows), meta)
        file.seek(0, os.SEEK_END)
        append_metadata(file, {**meta.to_json(), "features_sha256": digest.hexdigest(), "rows": rows})
    return count, len(rows)


def _write_header(file: BinaryIO, rows: int, meta: SliceFileMeta) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, *meta.feature_shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _rows(item: str, features: SliceFeatures) -> list[dict[str, Any]]:
    return [
        {"item": item, "slice": number, "rows": rows, "columns": columns}
        for number, (rows, columns) in enumerate(features.tgt_sizes.tolist())
    ]


def _write_parquet(
    target: Path, staged: Path, images: Iterator[tuple[str, SliceFeatures]], meta: SliceFileMeta
) -> tuple[int, int]:
    pa, pq = pyarrow_modules()
    tensor = pa.fixed_shape_tensor(pa.float32(), meta.feature_shape)
    numbers = [(name, pa.int32()) for name in ("slice", "rows", "columns")]
    schema = pa.schema([("item", pa.string()), *numbers, ("features", tensor)])
    schema = schema.with_metadata({METADATA_KEY: json.dumps(meta.to_json())})
    count = slices = 0
    with pq.ParquetWriter(staged, schema) as writer:
        for item, features in images:
            writer.write_table(_table(pa, schema, item, features, target))
            count, slices = count + 1, slices + len(features.tgt_sizes)
    return count, slices


def _table(pa: Any, schema: Any, item: str, features: SliceFeatures, target: Path) -> Any:
    rows = _rows(item, features)
    try:
        columns = [pa.array([row[name] for row in rows], schema.field(name).type) for name in schema.names[:-1]]
    except (UnicodeEncodeError, pa.ArrowException) as error:
        raise InputError(
            "a path is not Unicode, which Parquet cannot hold", where=str(target), got=str(error), fix="write .npy"
        ) from error
    tensor = schema.field("features").type
    flat = pa.array(np.ascontiguousarray(features.image_features, dtype=np.float32).reshape(-1))
    stored = pa.FixedSizeListArray.from_arrays(flat, features.image_features[0].size)
    return pa.Table.from_arrays([*columns, pa.ExtensionArray.from_storage(tensor, stored)], schema=schema)
