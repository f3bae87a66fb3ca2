"""Embeddings on disk, and the nearest of them.

`.npy` holds the vectors for any tool, with `<name>.npy.json` beside it for the items and the model; `.parquet` holds
columns `item` and `embedding`, and the model in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.machine_faults import machine_fault
from vlm_export.runtime.image import FloatArray

ItemKind: TypeAlias = Literal["image", "text"]
SCHEMA_VERSION = 1
SLICES_KIND = "slices"
"""What files of `slice_files` say instead of an ItemKind."""
METADATA_KEY = b"vlm_export"


@dataclass(frozen=True)
class EmbeddingsMeta:
    """Where embeddings come from.

    Attributes:
        kind: what the items are: paths of pictures, or texts.
        model: the bundle's name, for people.
        identity: `EncoderPair.identity`; only embeddings of equal identity may be compared.
        precision: the variant that computed them.
    """

    kind: ItemKind
    model: str
    identity: str
    precision: str = "fp32"


@dataclass(frozen=True)
class Embeddings:
    """Items and their vectors: float32 (N, D), rows of unit length."""

    items: tuple[str, ...]
    vectors: FloatArray
    meta: EmbeddingsMeta

    def require_model(self, identity: str, model: str) -> None:
        """InputError unless the embeddings were computed by the model of that identity."""
        if self.meta.identity != identity:
            raise InputError(
                "the embeddings were computed by another model",
                expected=f"{model} (identity {identity[:12]})",
                got=f"{self.meta.model} (identity {self.meta.identity[:12]})",
                fix="search with the bundle that made them, or embed again with this one",
            )


@dataclass(frozen=True)
class Match:
    """One result of a search; `score` is the cosine."""

    item: str
    score: float


def write_embeddings(path: str | Path, items: Sequence[str], vectors: FloatArray, meta: EmbeddingsMeta) -> None:
    """Write `path` (.npy or .parquet), replacing what is there once the new file is complete.

    Raises:
        UsageError: another suffix, or not one vector per item.
        EnvironmentFailure: the disk refuses, or Parquet is asked for without pyarrow.
        InputError: an item is no Unicode, which Parquet cannot hold.
    """
    target = Path(path)
    if vectors.ndim != 2 or len(vectors) != len(items):
        raise UsageError("one vector per item is needed", expected=f"({len(items)}, D)", got=str(vectors.shape))
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    write = {".npy": _write_npy, ".parquet": _write_parquet}[checked_suffix(target)]
    with replacing(target) as temporary:
        write(target, temporary, items, rows, meta)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Around the writing of a file, and of the sidecar that a `.npy` has: both get their names once they are complete.

    Yields the path to write to, beside the target and under a name that nothing has; the sidecar goes to
    `sidecar_path` of it. Neither stays behind.

    Raises:
        EnvironmentFailure: the disk refuses.
    """
    # Of any target's name only the beginning: the longest that a disk takes leaves no room.
    temporary = target.with_name(f"{target.name[:32]}.{secrets.token_hex(8)}.tmp")
    pairs = [(temporary, target), (sidecar_path(temporary), sidecar_path(target))]
    try:
        yield temporary
        for written, final in pairs:
            if written.exists():
                os.replace(written, final)
    except OSError as error:
        raise EnvironmentFailure(
            "embeddings cannot be written",
            where=str(target),
            got=str(error),
            fix="choose a directory that exists, can be written to and has room",
        ) from error
    finally:
        for written, _ in pairs:
            with suppress(OSError):
                written.unlink()


def read_embeddings(path: str | Path) -> Embeddings:
    """What `write_embeddings` wrote.

    Raises:
        InputError: missing, damaged, without its items, or not finite.
        EnvironmentFailure: Parquet without pyarrow.
    """
    source = Path(path)
    try:
        got = "" if source.is_file() else "no such file"
    except OSError as error:  # a name that is too long, a directory that may not be entered
        got = str(error)
    if got:
        raise InputError("there are no embeddings", where=str(source), got=got, fix="vlm-export embed … -o")
    read = {".npy": _read_npy, ".parquet": _read_parquet}[checked_suffix(source)]
    items, vectors, meta = read(source)
    fits = vectors.ndim == 2 and vectors.dtype == np.float32 and len(vectors) == len(items)
    if not fits or not all(map(_is_text, items)):
        raise InputError(
            "the embeddings are malformed",
            where=str(source),
            expected=f"float32 ({len(items)}, D) and {len(items)} strings",
            got=f"{vectors.dtype} {vectors.shape}",
        )
    if not np.isfinite(vectors).all():
        raise InputError("the embeddings hold NaN or infinity", where=str(source), fix="embed again")
    return Embeddings(tuple(items), vectors, meta)


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


def search_embeddings(embeddings: Embeddings, query: FloatArray, k: int) -> list[Match]:
    """The `k` items nearest to a query vector, best first; InputError when their vectors have another size."""
    if embeddings.vectors.shape[1:] != query.shape:
        raise InputError(
            "the embeddings have another size than the bundle's",
            expected=f"{query.shape[0]} numbers each",
            got=f"{embeddings.vectors.shape[1]}, made by {embeddings.meta.model}",
            fix="embed again with this bundle",
        )
    rows, scores = top_k(query, embeddings.vectors, k)
    return [Match(embeddings.items[row], float(score)) for row, score in zip(rows, scores, strict=True)]


def sidecar_path(path: Path) -> Path:
    """The file that holds the items of a `.npy`."""
    return path.with_name(path.name + ".json")


def checked_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".parquet"):
        raise UsageError("embeddings are .npy or .parquet", where=str(path), got=suffix or "no suffix")
    return suffix


def _write_npy(target: Path, temporary: Path, items: Sequence[str], vectors: FloatArray, meta: EmbeddingsMeta) -> None:
    with temporary.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
    # The sidecar names its vectors, so that a crash between the two renames is noticed, not searched.
    data = {"schema_version": SCHEMA_VERSION, **asdict(meta), "vectors_sha256": _sha256(vectors), "items": list(items)}
    sidecar_path(temporary).write_text(json.dumps(data, indent=0), encoding="ascii")


def _read_npy(source: Path) -> tuple[list[str], FloatArray, EmbeddingsMeta]:
    side = sidecar_path(source)
    try:
        data = json.loads(side.read_text(encoding="utf-8"))
        if isinstance(data, dict):
            _refuse_slices(data, source)
        vectors = _npy_array(source)
    except FileNotFoundError as error:
        raise InputError(
            "the embeddings lack the file that names their items", where=str(source), expected=str(side)
        ) from error
    except (OSError, ValueError, EOFError, RecursionError, MemoryError) as error:
        damaged = InputError("the embeddings cannot be read", where=str(source), got=str(error), fix="embed again")
        raise machine_fault(error, str(source)) or damaged from error
    items = data.get("items") if isinstance(data, dict) else None
    if not isinstance(items, list):
        raise InputError("the items of the embeddings are malformed", where=str(side), expected="a list of strings")
    if not isinstance(vectors, np.ndarray) or data.get("vectors_sha256") != _sha256(vectors):
        raise InputError(
            "the embeddings and their items do not belong together", where=f"{source}, {side}", fix="embed again"
        )
    return items, vectors, _meta_from_json(data, str(side))


def _npy_array(source: Path) -> npt.NDArray[Any]:
    """The array of a `.npy`, whose header is compared with the file's size before memory is taken.

    Raises:
        OSError, ValueError: the file cannot be read, or is no array of plain numbers and nothing else.
    """
    with source.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else _read_npy_header_2
            shape, _, dtype = read_header(file)
        except OSError:
            raise
        except Exception as error:
            # numpy reads the header as Python source: damage raises what Python's parsers raise, MemoryError too.
            raise ValueError(f"no .npy header: {type(error).__name__}: {error}") from None
        stated, found = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - file.tell()
        if dtype.hasobject or stated != found:
            raise ValueError(f"the header states {dtype} {shape}, {stated} bytes, and {found} bytes follow it")
        file.seek(0)
        array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _read_npy_header_2(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    header: tuple[tuple[int, ...], bool, np.dtype[Any]] = np.lib.format.read_array_header_2_0(file)
    return header


def _write_parquet(
    target: Path, temporary: Path, items: Sequence[str], vectors: FloatArray, meta: EmbeddingsMeta
) -> None:
    pa, pq = pyarrow_modules()
    try:
        texts = pa.array(items, pa.string())
    except (UnicodeEncodeError, pa.ArrowException) as error:
        raise InputError(
            "a path is not Unicode, which Parquet cannot hold", where=str(target), got=str(error), fix="write .npy"
        ) from error
    rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = pa.table({"item": texts, "embedding": rows})
    metadata = {METADATA_KEY: json.dumps({"schema_version": SCHEMA_VERSION, **asdict(meta)})}
    pq.write_table(table.replace_schema_metadata(metadata), temporary)


def _read_parquet(source: Path) -> tuple[list[str], FloatArray, EmbeddingsMeta]:
    pa, pq = pyarrow_modules()
    try:
        # The schema first: features of slices are large.
        data = json.loads(pq.read_schema(source).metadata[METADATA_KEY])
        _refuse_slices(data, source)
        table = pq.read_table(source)
        items = table.column("item").to_pylist()
        column = table.column("embedding").combine_chunks()
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise machine_fault(error, str(source)) or InputError(
            "the embeddings cannot be read",
            where=str(source),
            expected="a Parquet file of `vlm-export embed`",
            got=f"{type(error).__name__}: {error}",
        ) from error
    return items, vectors, _meta_from_json(data, str(source))


def pyarrow_modules() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`; EnvironmentFailure when they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EnvironmentFailure(
            "Parquet needs pyarrow", got=str(error), fix="pip install 'vlm-export[parquet]', or use .npy"
        ) from error
    return pyarrow, pyarrow.parquet


def _refuse_slices(data: Mapping[str, Any], source: Path) -> None:
    if data.get("kind") == SLICES_KIND:
        raise InputError(
            "the file holds features of slices, for a language model: there is nothing in it to search",
            where=str(source),
            expected="unit-length embeddings, one for each picture or text",
            got=f"several features for each slice, made by {data.get('model')}",
            fix="embed the pictures with a bundle of CLIP or BLIP",
        )


def _meta_from_json(data: Mapping[str, Any], where: str) -> EmbeddingsMeta:
    fields = {name: data.get(name) for name in ("kind", "model", "identity", "precision")}
    known_schema = data.get("schema_version") == SCHEMA_VERSION
    if not known_schema or fields["kind"] not in get_args(ItemKind) or not all(map(_is_text, fields.values())):
        raise InputError(
            "the embeddings do not say what model made them",
            where=where,
            expected=f"schema_version {SCHEMA_VERSION} with kind, model, identity and precision",
            got=repr({"schema_version": data.get("schema_version"), **fields}),
            fix="embed again with this version",
        )
    return EmbeddingsMeta(
        cast(ItemKind, fields["kind"]), str(fields["model"]), str(fields["identity"]), str(fields["precision"])
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _sha256(vectors: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(vectors).data).hexdigest()
