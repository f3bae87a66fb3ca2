"""`vlm-export embed`: images of a folder, or lines of a text file, to a file of embeddings or of slices' features."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from vlm_export.cli.common import (
    IMAGE_SUFFIXES,
    add_common_options,
    add_model_options,
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
    from vlm_export.runtime.tasks.features import SliceFeatures

TEXT_SUFFIX = ".txt"
_BATCH_SIZE = 32
_SKIPPED_SHOWN = 5


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "embed",
        help="embeddings of images or texts",
        description="Unit-length embeddings of images (also of all in a folder), or of the lines of text files. "
        "An image of a folder that cannot be read is skipped, counted and named; an image named itself is an error. "
        "Of a bundle that cuts images into slices: the features of each slice, for a language "
        "model: .npy float32 (slices, features, width), then as a second array the JSON that names image, slice, "
        "rows and columns of patches of each row; .parquet with these as columns.",
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="images, folders of images, or .txt files")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=".npy or .parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument("--strict", action="store_true", help="skip no image of a folder: one is an error too")
    parser.add_argument("--batch-size", type=positive_integer, metavar="N", help="default: 32; of slices: 4")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of refusing them")
    add_model_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Inputs:
    """What the paths name.

    Attributes:
        images, texts: one of them is empty.
        in_folders: numbers of the images that a folder holds, which are skipped where they cannot be read.
        other_files: files of folders that are not named as images.
        unreadable: number of an image that was skipped → why; filled while images are read.
    """

    images: list[Path]
    texts: list[str]
    in_folders: frozenset[int]
    other_files: list[Path]
    unreadable: dict[int, InputError] = field(default_factory=dict)

    def skip(self, number: int, error: InputError) -> None:
        """Takes note of an image that cannot be read.

        Raises:
            InputError: it is named itself, or none can be read.
        """
        count = len(self.images)
        if number not in self.in_folders or count == 1:
            raise error
        self.unreadable[number] = error
        if len(self.unreadable) == count:
            got = f"of the last one: {_reason(error)}"
            raise InputError(f"none of the {count} images can be read", where=error.where, got=got, fix=error.fix)

    def read(self) -> list[str]:
        """The images without those that were skipped."""
        return [str(path) for number, path in enumerate(self.images) if number not in self.unreadable]

    def skipped_data(self) -> dict[str, Any]:
        """For --json: every file of a folder that has no embedding, and of those that cannot be read why."""
        reasons = {str(self.images[number]): error.to_json() for number, error in self.unreadable.items()}
        return {"skipped": [*map(str, self.other_files), *reasons], "unreadable": reasons}

    def print_skipped(self) -> None:
        """A warning with the number, and with the names and reasons of the first."""
        if not self.unreadable:
            return
        count, named = len(self.unreadable), list(self.unreadable.items())[:_SKIPPED_SHOWN]
        more = f"; and {count - len(named)} more (--json names all)" if count > len(named) else ""
        reasons = "; ".join(f"{self.images[number]}: {_reason(error)}" for number, error in named)
        files = "1 image of a folder" if count == 1 else f"{count} images of folders"
        print_warnings([f"{files} skipped, which cannot be read: {reasons}{more}"])


def run(args: argparse.Namespace) -> int:
    from vlm_export.runtime.search.store import checked_suffix, pyarrow_modules

    check_output(Path(args.output), overwrite=args.overwrite)
    if checked_suffix(Path(args.output)) == ".parquet":
        pyarrow_modules()
    inputs = _collect([existing_path(path) for path in args.paths], strict=args.strict)
    if inputs.other_files:
        print_warnings([_skipped_text(inputs.other_files)])
    model = opened_model(args)
    write = _write_features if "features" in model.tasks else _write_embeddings
    result, sentence = write(model, args, inputs)
    inputs.print_skipped()
    if args.json:
        print_json({**result, **inputs.skipped_data()})
    else:
        print_line(sentence)
    return 0


def _write_embeddings(model: Model, args: argparse.Namespace, inputs: Inputs) -> tuple[Mapping[str, Any], str]:
    """Writes the embeddings; what to print of it, as JSON data and as a sentence."""
    from vlm_export.runtime.search.store import EmbeddingsMeta, write_embeddings

    start = time.perf_counter()
    batch_size, progress = args.batch_size or _BATCH_SIZE, not args.quiet
    if inputs.images:
        images = list(inputs.images)
        vectors = model.encode_image(images, batch_size=batch_size, progress=progress, unreadable=inputs.skip)
        items = inputs.read()
    else:
        items = inputs.texts
        vectors = model.encode_text(items, truncate=args.truncate, batch_size=batch_size, progress=progress)
    seconds = time.perf_counter() - start
    kind: Literal["image", "text"] = "image" if inputs.images else "text"
    meta = EmbeddingsMeta(kind, model.manifest.name, model.identity, model.precision)
    write_embeddings(args.output, items, vectors, meta, overwrite=args.overwrite)
    result = {"output": args.output, "kind": kind, "count": len(items), "dimension": vectors.shape[1]}
    rate = len(items) / seconds if seconds else float("inf")
    sentence = f"{len(items)} {kind} embeddings of {vectors.shape[1]} numbers in {args.output} ({rate:.1f}/s)"
    return {**result, "seconds": round(seconds, 4)}, sentence


def _write_features(model: Model, args: argparse.Namespace, inputs: Inputs) -> tuple[Mapping[str, Any], str]:
    """Writes the features of slices; what to print of it, as JSON data and as a sentence."""
    from vlm_export.runtime.search.feature_files import SliceFileMeta, write_slice_features
    from vlm_export.runtime.tasks.features import SLICE_BATCH_SIZE

    task = model.slices
    if not inputs.images:
        raise InputError("this bundle takes no texts", where=model.manifest.name, fix="name images or folders")
    start = time.perf_counter()
    meta = SliceFileMeta(model.manifest.name, model.identity, task.feature_shape, model.precision)
    batch_size = args.batch_size or SLICE_BATCH_SIZE
    features = task.stream_slices(
        list(inputs.images), batch_size=batch_size, progress=not args.quiet, unreadable=inputs.skip
    )
    count, slices = write_slice_features(args.output, _named(inputs, features), meta, overwrite=args.overwrite)
    seconds = time.perf_counter() - start
    result = {"output": args.output, "kind": "slices", "count": count, "slices": slices}
    queries, width = meta.feature_shape
    rate = slices / seconds if seconds else float("inf")
    features_text = f"{slices} slices of {queries} x {width} numbers"
    sentence = f"{count} images, {features_text} in {args.output} ({rate:.1f} slices/s)"
    return {**result, "shape": list(meta.feature_shape), "seconds": round(seconds, 4)}, sentence


def _named(inputs: Inputs, features: Iterable[SliceFeatures]) -> Iterator[tuple[str, SliceFeatures]]:
    """Each image's name with its features, which come for those alone that can be read."""
    numbers = iter(range(len(inputs.images)))
    for found in features:
        number = next(number for number in numbers if number not in inputs.unreadable)
        yield str(inputs.images[number]), found


def _reason(error: InputError) -> str:
    return f"{error.what} ({error.got})" if error.got else error.what


def _skipped_text(skipped: list[Path]) -> str:
    names = ", ".join(path.name for path in skipped[:_SKIPPED_SHOWN])
    more = f" and {len(skipped) - _SKIPPED_SHOWN} more" if len(skipped) > _SKIPPED_SHOWN else ""
    plural = "" if len(skipped) == 1 else "s"
    return f"{len(skipped)} file{plural} skipped, not named as an image that is read: {names}{more}"


def _collect(paths: list[Path], *, strict: bool) -> Inputs:
    """Images, or lines of text, never both; with `strict` no image may be skipped."""
    skipped: list[Path] = []
    in_folders: set[int] = set()
    images: list[Path] = []
    texts: list[str] = []
    for path in paths:
        if path.is_dir():
            found, others = _files_below(path)
            skipped += others
            if not found:
                raise InputError(
                    "the folder holds no images", where=str(path), expected=", ".join(sorted(IMAGE_SUFFIXES))
                )
            in_folders |= set(range(len(images), len(images) + len(found)))
            images += found
        elif path.suffix.lower() == TEXT_SUFFIX:
            texts += _lines(path)
        else:
            images.append(path)
    if images and texts:
        raise UsageError("images and texts go to files of their own", fix="run embed twice")
    return Inputs(images, texts, frozenset() if strict else frozenset(in_folders), skipped)


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
