"""`vlm-export embed`: pictures of a folder, or lines of a text file, to a file of embeddings or of slices' features."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from vlm_export.cli.common import (
    IMAGE_SUFFIXES,
    add_common_options,
    add_engine_options,
    check_output,
    existing_path,
    opened_model,
    positive_integer,
)
from vlm_export.cli.output import print_json, print_line, print_warnings
from vlm_export.errors import InputError, UsageError
from vlm_export.machine_faults import machine_fault

if TYPE_CHECKING:
    from vlm_export.runtime.model import Model

TEXT_SUFFIX = ".txt"
_BATCH_SIZE = 32
_SKIPPED_SHOWN = 5


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "embed",
        help="embeddings of pictures or texts",
        description="Unit-length embeddings of pictures (also of all in a folder), or of the lines of text files. "
        "Of a bundle that cuts images into slices: the features of each slice, for a language "
        "model: .npy float32 (slices, features, width), then as a second array the JSON that names picture, slice, "
        "rows and columns of patches of each row; .parquet with these as columns.",
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="pictures, folders of pictures, or .txt files")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=".npy or .parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument("--batch-size", type=positive_integer, metavar="N", help="default: 32; of slices: 4")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of refusing them")
    add_engine_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlm_export.runtime.search.store import checked_suffix, pyarrow_modules

    check_output(Path(args.output), overwrite=args.overwrite)
    if checked_suffix(Path(args.output)) == ".parquet":
        pyarrow_modules()
    pictures, texts, skipped = _collect([existing_path(path) for path in args.paths])
    if skipped:
        print_warnings([_skipped_text(skipped)])
    model = opened_model(args)
    if "features" in model.tasks:
        return _write_features(model, args, pictures, skipped)
    return _write_embeddings(model, args, pictures, texts, skipped)


def _write_embeddings(
    model: Model, args: argparse.Namespace, pictures: list[Path], texts: list[str], skipped: list[Path]
) -> int:
    from vlm_export.runtime.search.store import EmbeddingsMeta, write_embeddings

    start = time.perf_counter()
    batch_size, progress = args.batch_size or _BATCH_SIZE, not args.quiet
    if pictures:
        items = [str(path) for path in pictures]
        vectors = model.encode_image(items, batch_size=batch_size, progress=progress)
    else:
        items = texts
        vectors = model.encode_text(items, truncate=args.truncate, batch_size=batch_size, progress=progress)
    seconds = time.perf_counter() - start
    kind: Literal["image", "text"] = "image" if pictures else "text"
    meta = EmbeddingsMeta(kind, model.manifest.name, model.identity, model.precision)
    write_embeddings(args.output, items, vectors, meta, overwrite=args.overwrite)
    if args.json:
        result = {"output": args.output, "kind": kind, "count": len(items), "dimension": vectors.shape[1]}
        print_json({**result, "seconds": round(seconds, 4), "skipped": [str(path) for path in skipped]})
    else:
        rate = len(items) / seconds if seconds else float("inf")
        print_line(f"{len(items)} {kind} embeddings of {vectors.shape[1]} numbers in {args.output} ({rate:.1f}/s)")
    return 0


def _write_features(model: Model, args: argparse.Namespace, pictures: list[Path], skipped: list[Path]) -> int:
    from vlm_export.runtime.search.feature_files import SliceFileMeta, write_slice_features
    from vlm_export.runtime.tasks.features import SLICE_BATCH_SIZE

    task = model.slices
    if not pictures:
        raise InputError("this bundle takes no texts", where=model.manifest.name, fix="name pictures or folders")
    start = time.perf_counter()
    items = [str(path) for path in pictures]
    meta = SliceFileMeta(model.manifest.name, model.identity, task.feature_shape, model.precision)
    batch_size = args.batch_size or SLICE_BATCH_SIZE
    features = task.stream_slices(items, batch_size=batch_size, progress=not args.quiet)
    count, slices = write_slice_features(args.output, zip(items, features, strict=True), meta, overwrite=args.overwrite)
    seconds = time.perf_counter() - start
    if args.json:
        result = {"output": args.output, "kind": "slices", "count": count, "slices": slices}
        result |= {"shape": list(meta.feature_shape), "seconds": round(seconds, 4)}
        print_json({**result, "skipped": [str(path) for path in skipped]})
    else:
        queries, width = meta.feature_shape
        rate = slices / seconds if seconds else float("inf")
        print_line(
            f"{count} pictures, {slices} slices of {queries} x {width} numbers in {args.output} ({rate:.1f} slices/s)"
        )
    return 0


def _skipped_text(skipped: list[Path]) -> str:
    names = ", ".join(path.name for path in skipped[:_SKIPPED_SHOWN])
    more = f" and {len(skipped) - _SKIPPED_SHOWN} more" if len(skipped) > _SKIPPED_SHOWN else ""
    plural = "" if len(skipped) == 1 else "s"
    return f"{len(skipped)} file{plural} skipped, not named as an image that is read: {names}{more}"


def _collect(paths: list[Path]) -> tuple[list[Path], list[str], list[Path]]:
    """Images, or lines of text, never both; and the files of folders that are not named as images."""
    skipped: list[Path] = []
    pictures: list[Path] = []
    texts: list[str] = []
    for path in paths:
        if path.is_dir():
            found, others = _files_below(path)
            skipped += others
            if not found:
                raise InputError(
                    "the folder holds no pictures", where=str(path), expected=", ".join(sorted(IMAGE_SUFFIXES))
                )
            pictures += found
        elif path.suffix.lower() == TEXT_SUFFIX:
            texts += _lines(path)
        else:
            pictures.append(path)
    if pictures and texts:
        raise UsageError("pictures and texts go to files of their own", fix="run embed twice")
    return pictures, texts, skipped


def _files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Those named as images and all others, sorted.

    Raises:
        InputError: a folder in it cannot be read: its images would be missing without a word.
    """

    def refuse(error: OSError) -> NoReturn:
        where = os.fsdecode(error.filename or folder)
        raise InputError("a folder cannot be read", where=where, got=error.strerror or str(error)) from error

    below = sorted(Path(where, name) for where, _, names in os.walk(folder, onerror=refuse) for name in names)
    images = [path for path in below if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    read = set(images)
    return images, [path for path in below if path not in read]


def _lines(path: Path) -> list[str]:
    try:
        # Only line ends divide texts; `splitlines` would also cut at form feeds and the like.
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise InputError("a text file is not UTF-8", where=str(path), got=str(error)) from error
    except OSError as error:
        raise machine_fault(error, str(path)) or InputError(
            "a text file cannot be read", where=str(path), got=error.strerror or str(error)
        ) from error
    kept = [line for line in lines if line]
    if not kept:
        raise InputError("the text file has no lines", where=str(path))
    return kept
