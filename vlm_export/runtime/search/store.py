"""Embeddings on disk, and the nearest of them.

A file is whole or not there, and no second file belongs to it. `.npy` holds two arrays, one after the other, as
`numpy.save` writes them into one open file: the vectors, which `numpy.load(path)` gives, and bytes (uint8) of JSON that
name the items and the model (`npy_metadata`). `.parquet` holds columns `item` and `embedding`, and the model in the
file's metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vlm_export.bundle.staging import staged_file
from vlm_export.errors import EnvironmentFailure, InputError, UsageError, install_fix
from vlm_export.machine_faults import machine_fault
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.specs.codec import Spec

ItemKind: TypeAlias = Literal["image", "text"]
SCHEMA_VERSION = 1
SLICES_KIND = "slices"
"""What files of `slice_files` say instead of an ItemKind."""
METADATA_KEY = b"vlm_export"
COLUMNS = ("item", "embedding")
UNDECODABLE = "undecodable_items"
"""Of a Parquet file's metadata: names of files whose bytes are no UTF-8, in whose place the column shows U+FFFD."""


@dataclass(frozen=True)
class EmbeddingsMeta(Spec):
    """Where embeddings come from.

    Attributes:
        kind: what the items are: paths of images, or texts.
        model: the bundle's name, for people.
        identity: `Manifest.identity()`; only embeddings of equal identity may be compared.
        precision: the variant that computed them.
    """

    kind: ItemKind
    model: str
    identity: str
    precision: str = "fp32"


@dataclass(frozen=True)
class Embeddings:
    """Items and their vectors.

    Attributes:
        vectors: float32 (N, D), rows of unit length.
        columns: what else the file says of the items (`embed --keep`): name → a text for each item.
    """

    items: tuple[str, ...]
    vectors: FloatArray
    meta: EmbeddingsMeta
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def require_model(self, identity: str, model: str) -> None:
        """InputError unless the embeddings were computed by the model of that identity."""
        require_model(self.meta, identity, model)


def require_model(meta: EmbeddingsMeta, identity: str, model: str) -> None:
    """InputError unless embeddings come from the model of that identity, whose name is for the message."""
    if meta.identity != identity:
        raise InputError(
            "the embeddings were computed by another model",
            expected=f"{model} (identity {identity[:12]})",
            got=f"{meta.model} (identity {meta.identity[:12]})",
            fix="search with the bundle that made them, or embed again with this one",
        )


@dataclass(frozen=True)
class MoreColumns:
    """What stands beside items and vectors in a file.

    Attributes:
        columns: name → a text for each item.
        metadata: JSON data that stands beside the model.
    """

    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def write_embeddings(
    path: str | Path,
    items: Sequence[str],
    vectors: FloatArray,
    meta: EmbeddingsMeta,
    *,
    more: MoreColumns | None = None,
    overwrite: bool = False,
    is_result: bool = True,
) -> None:
    """Write `path` (.npy or .parquet), which has its name only once it is complete.

    Args:
        overwrite: replace a file that is there.
        is_result: as in `put_file`.

    Raises:
        UsageError: another suffix, not one vector per item, a column's name is taken, or the file exists.
        EnvironmentFailure: the disk refuses, or Parquet is asked for without pyarrow.
        InputError: a text that is no file's name is no Unicode, which Parquet cannot hold.
    """
    target = Path(path)
    if vectors.ndim != 2 or len(vectors) != len(items):
        raise UsageError("one vector per item is needed", expected=f"({len(items)}, D)", got=str(vectors.shape))
    more = more or MoreColumns()
    for name in more.columns:
        if name in COLUMNS:
            raise UsageError("a column has a name of ours", got=name, fix="rename it in the table")
    rows = np.ascontiguousarray(vectors, dtype="<f4")
    write = {".npy": _write_npy, ".parquet": _write_parquet}[checked_suffix(target)]
    with staged_embeddings(target, overwrite=overwrite, is_result=is_result) as staged:
        write(target, staged, items, rows, {"schema_version": SCHEMA_VERSION, **meta.to_json(), **more.metadata}, more)


@contextmanager
def staged_embeddings(target: Path, *, overwrite: bool, is_result: bool = True) -> Iterator[Path]:
    """A name to write to, which becomes `target` when the block ends (`vlm_export.bundle.staging`).

    Raises:
        UsageError: the target exists and may not be replaced.
        EnvironmentFailure: the disk refuses.
    """
    try:
        with staged_file(target, "writing embeddings", overwrite=overwrite, is_result=is_result) as staged:
            yield staged
    except OSError as error:
        raise machine_fault(error, str(target)) or EnvironmentFailure(
            "embeddings cannot be written",
            where=str(target),
            got=str(error),
            fix="choose a directory that exists, can be written to and has room",
        ) from error


def read_embeddings(path: str | Path) -> Embeddings:
    """What `write_embeddings` wrote.

    Raises:
        InputError: missing, damaged, without its items, or not finite.
        EnvironmentFailure: Parquet without pyarrow.
    """
    source = Path(path)
    try:
        got = "" if source.is_file() else "a directory" if source.is_dir() else "no such file"
    except OSError as error:  # a name that is too long, a directory that may not be entered
        fault = machine_fault(error, str(source))
        if fault is not None:
            raise fault from error
        got = str(error)
    if got:
        raise InputError(
            "there are no embeddings",
            where=str(source),
            expected="a file that 'vlm-export embed' wrote",
            got=got,
            fix="write one: vlm-export embed DIR IMAGES -o FILE.npy",
        )
    read = {".npy": _read_npy, ".parquet": _read_parquet}[checked_suffix(source)]
    items, vectors, meta, columns = read(source)
    fits = vectors.ndim == 2 and vectors.dtype == np.float32
    texts = (items, *columns.values())
    if not fits or not all(len(found) == len(vectors) and all(isinstance(t, str) for t in found) for found in texts):
        raise InputError(
            "the embeddings are malformed",
            where=str(source),
            expected=f"float32 ({len(items)}, D) and {len(items)} strings",
            got=f"{vectors.dtype} {vectors.shape}",
        )
    if not np.isfinite(vectors).all():
        raise InputError("the embeddings hold NaN or infinity", where=str(source), fix="embed again")
    return Embeddings(tuple(items), vectors, meta, columns)


def top_k(query: FloatArray, vectors: FloatArray, k: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """The rows nearest to a query by cosine.

    Args:
        query: float32 (D,), unit length.
        vectors: float32 (N, D), rows of unit length.

    Returns:
        Row numbers int64 (min(k, N),), best first, equal scores by row number; their scores, float32.

    Raises:
        UsageError: `k` is below 1, or the sizes differ.
    """
    if k < 1:
        raise UsageError("k must be at least 1", got=str(k))
    if query.shape != vectors.shape[1:]:
        raise UsageError("the query has another size", expected=str(vectors.shape[1:]), got=str(query.shape))
    scores: FloatArray = vectors @ query
    candidates = np.arange(len(scores))
    if k < len(scores):
        threshold = np.partition(scores, -k)[-k]
        candidates = np.flatnonzero(scores >= threshold)
    order = candidates[np.argsort(-scores[candidates], kind="stable")][:k].astype(np.int64)
    return order, scores[order]


def checked_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".parquet"):
        raise UsageError("embeddings are .npy or .parquet", where=str(path), got=suffix or "no suffix")
    return suffix


def _write_npy(
    _target: Path,
    staged: Path,
    items: Sequence[str],
    vectors: FloatArray,
    metadata: Mapping[str, Any],
    more: MoreColumns,
) -> None:
    data = {**metadata, "vectors_sha256": _sha256(vectors), "items": list(items)}
    if more.columns:
        data["columns"] = {name: list(texts) for name, texts in more.columns.items()}
    with staged.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
        append_metadata(file, data)


def append_metadata(file: BinaryIO, data: Mapping[str, Any]) -> None:
    """Writes JSON data as a second array of a `.npy`, at the file's end."""
    np.save(file, np.frombuffer(json.dumps(data).encode("ascii"), np.uint8), allow_pickle=False)


def npy_metadata(path: str | Path) -> dict[str, Any]:
    """What a `.npy` of embeddings, or of features of slices, says about its rows and its model.

    Raises:
        InputError: the file is damaged, or says nothing.
    """
    with _reading_npy(Path(path)) as file:
        _, data = _npy_header_and_metadata(file, Path(path))
    return data


def embeddings_metadata(path: Path) -> dict[str, Any]:
    """What a file of embeddings says about itself, without its vectors; InputError where it is damaged."""
    if checked_suffix(path) == ".npy":
        return npy_metadata(path)
    _, pq = pyarrow_modules()
    with _reading_parquet(path):
        data = json.loads(pq.read_schema(path).metadata[METADATA_KEY])
        if not isinstance(data, dict):
            raise ValueError("what names the model is no JSON object")
        return data


def embeddings_meta(path: Path) -> EmbeddingsMeta:
    """Where the embeddings of a file come from, without its vectors; InputError where it is damaged."""
    return _meta_from_json(embeddings_metadata(path), str(path))


_Read: TypeAlias = tuple[list[str], FloatArray, EmbeddingsMeta, dict[str, list[str]]]
"""Items, vectors, where they come from, and further columns."""


def _read_npy(source: Path) -> _Read:
    with _reading_npy(source) as file:
        header, data = _npy_header_and_metadata(file, source)
        _refuse_slices(data, source)
        file.seek(header.start)
        vectors = np.fromfile(file, header.dtype, math.prod(header.shape)).reshape(header.shape)
    items = data.get("items")
    if not isinstance(items, list):
        raise InputError("the items of the embeddings are malformed", where=str(source), expected="a list of strings")
    if data.get("vectors_sha256") != _sha256(vectors):
        raise InputError("the embeddings and their items do not belong together", where=str(source), fix="embed again")
    columns = data.get("columns", {})
    if not isinstance(columns, dict) or not all(isinstance(column, list) for column in columns.values()):
        raise InputError("the columns of the embeddings are malformed", where=str(source), expected="lists of strings")
    return items, vectors, _meta_from_json(data, str(source)), columns


@contextmanager
def _reading_npy(source: Path) -> Iterator[BinaryIO]:
    try:
        with source.open("rb") as file:
            yield file
    # numpy's reader of headers is Python's parser: it fails in all of these ways.
    except (OSError, ValueError, EOFError, RecursionError, MemoryError, SyntaxError, TypeError, TokenError) as error:
        fault = machine_fault(error, str(source)) if isinstance(error, OSError) else None
        raise fault or InputError(
            "the embeddings cannot be read",
            where=str(source),
            expected="a file of `vlm-export embed`",
            got=f"{type(error).__name__}: {error}",
        ) from error


@dataclass(frozen=True)
class _NpyHeader:
    """Where the values of an array lie in a file, in bytes, and what they are."""

    start: int
    end: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _npy_header_and_metadata(file: BinaryIO, source: Path) -> tuple[_NpyHeader, dict[str, Any]]:
    size = os.fstat(file.fileno()).st_size
    header = _npy_header(file, size)
    if header.end == size:
        side = source.with_name(f"{source.name}.json")
        raise InputError(
            "the embeddings do not name their items and their model",
            where=str(source),
            expected="a second array in the file, as `vlm-export embed` writes",
            got=f"one array; {side.name} beside it is of an older version" if side.exists() else "one array",
            fix="embed again with this version",
        )
    file.seek(header.end)
    second = _npy_header(file, size)
    if second.end != size or second.dtype != np.uint8:
        raise ValueError("what stands behind the vectors is not what names their items")
    file.seek(second.start)
    data = json.loads(file.read())
    if not isinstance(data, dict):
        raise ValueError("what names the items is no JSON object")
    return header, data


def _npy_header(file: BinaryIO, size: int) -> _NpyHeader:
    """The header at the file's position; ValueError where its array does not fit in the file, or is none of numbers."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    shape, is_fortran, dtype = readers[version](file)
    start = file.tell()
    end = start + math.prod(shape) * dtype.itemsize
    if is_fortran or dtype.kind not in "biuf" or min(shape, default=0) < 0 or end > size:
        raise ValueError(f"{dtype} {shape} in a file of {size} bytes")
    return _NpyHeader(start, end, shape, dtype)


def _write_parquet(
    target: Path,
    staged: Path,
    items: Sequence[str],
    vectors: FloatArray,
    metadata: Mapping[str, Any],
    more: MoreColumns,
) -> None:
    pa, pq = pyarrow_modules()
    try:
        names, undecodable = _unicode_names(items)
        texts = {name: pa.array(column, pa.string()) for name, column in {"item": names, **more.columns}.items()}
    except (UnicodeEncodeError, pa.ArrowException) as error:
        raise InputError(
            "a text is not Unicode, which Parquet cannot hold", where=str(target), got=str(error), fix="write .npy"
        ) from error
    rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = pa.table({**texts, "embedding": rows})
    data = {**metadata, UNDECODABLE: undecodable} if undecodable else metadata
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(data)}), staged)


def _unicode_names(items: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names as Parquet holds them, and for those of files whose bytes are no UTF-8: row → the bytes in hexadecimal."""
    names, undecodable = list(items), dict[str, str]()
    for row, item in enumerate(items):
        try:
            item.encode("utf-8")
        except UnicodeEncodeError:
            raw = item.encode("utf-8", "surrogateescape")
            names[row], undecodable[str(row)] = raw.decode("utf-8", "replace"), raw.hex()
    return names, undecodable


def _read_parquet(source: Path) -> _Read:
    pa, pq = pyarrow_modules()
    # The schema first: features of slices are large.
    data = embeddings_metadata(source)
    _refuse_slices(data, source)
    with _reading_parquet(source):
        schema = pq.read_schema(source)
        texts = [name for name in schema.names if name not in COLUMNS and pa.types.is_string(schema.field(name).type)]
        table = pq.read_table(source, columns=[*COLUMNS, *texts])
        items = table.column("item").to_pylist()
        for row, raw in data.get(UNDECODABLE, {}).items():
            items[int(row)] = bytes.fromhex(raw).decode("utf-8", "surrogateescape")
        column = table.column("embedding").combine_chunks()
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
        columns = {name: [text or "" for text in table.column(name).to_pylist()] for name in texts}
    return items, vectors, _meta_from_json(data, str(source)), columns


@contextmanager
def _reading_parquet(source: Path) -> Iterator[None]:
    pa, _ = pyarrow_modules()
    try:
        yield
    # LookupError: a column, or a row of a name that is no UTF-8, is missing.
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise machine_fault(error, str(source)) or InputError(
            "the embeddings cannot be read",
            where=str(source),
            expected="a Parquet file of `vlm-export embed`",
            got=f"{type(error).__name__}: {error}",
        ) from error


def pyarrow_modules() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`; EnvironmentFailure when they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EnvironmentFailure(
            "Parquet needs pyarrow", got=str(error), fix=f"{install_fix('parquet')}; or use .npy"
        ) from error
    return pyarrow, pyarrow.parquet


def _refuse_slices(data: Mapping[str, Any], source: Path) -> None:
    if data.get("kind") == SLICES_KIND:
        raise InputError(
            "the file holds features of slices, for a language model: there is nothing in it to search",
            where=str(source),
            expected="unit-length embeddings, one for each image or text",
            got=f"several features for each slice, made by {data.get('model')}",
            fix="embed the images with a bundle that has the task embed",
        )


def _meta_from_json(data: Mapping[str, Any], where: str) -> EmbeddingsMeta:
    fix = "embed again with this version"
    if data.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            "the embeddings were made by another version",
            where=where,
            expected=f"schema_version {SCHEMA_VERSION}",
            got=f"schema_version {data.get('schema_version')!r:.80}",
            fix=fix,
        )
    stated = {known.name: data[known.name] for known in fields(EmbeddingsMeta) if known.name in data}
    return EmbeddingsMeta.from_json(stated, where, fix=fix)


def _sha256(vectors: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(vectors).data).hexdigest()
