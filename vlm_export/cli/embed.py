"""`vlm-export embed`: images or texts to embeddings, or to features of slices."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import (
    add_common_options,
    add_model_options,
    check_output,
    existing_path,
    opened_model,
    positive_integer,
)
from vlm_export.cli.output import print_json, print_line, print_warnings
from vlm_export.errors import InputError, UsageError

if TYPE_CHECKING:
    from vlm_export.runtime.bulk.items import Item, Scan
    from vlm_export.runtime.model import Model
    from vlm_export.runtime.tasks.features import SliceFeatures

_SKIPPED_SHOWN = 5


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "embed",
        help="embeddings of images or texts",
        description="Unit-length embeddings of images (also of all in folders, archives, lists and tables), or of the "
        "lines of text files. An image among many that cannot be read is skipped, counted and named; one named itself "
        "is an error. A folder is filled shard by shard, and --resume goes on with it after an interruption. "
        "Of a bundle that cuts images into slices: the features of each slice, for a language "
        "model: .npy float32 (slices, features, width), then as a second array the JSON that names image, slice, "
        "rows and columns of patches of each row; .parquet with these as columns.",
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="*",
        help="images, folders of images, .tar archives, .csv or .parquet tables of paths; or .txt files",
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="a .npy or .parquet file, or a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--resume", action="store_true", help="go on with what an earlier run left in the folder OUT")
    parser.add_argument(
        "--on-error",
        choices=("skip", "stop"),
        default="skip",
        help="what an image among many does that cannot be read (default: skip)",
    )
    parser.add_argument(
        "--list", action="append", default=[], metavar="FILE", help="paths of images, one a line; repeatable"
    )
    parser.add_argument("--path-column", default="path", metavar="NAME", help="column of paths (default: path)")
    parser.add_argument("--name-column", metavar="NAME", help="column that names the images (default: their paths)")
    parser.add_argument(
        "--keep", action="append", default=[], metavar="COLUMN", help="column to write beside; repeatable"
    )
    parser.add_argument(
        "--shard-format", choices=("parquet", "npy"), help="of a folder (default: parquet, where it is installed)"
    )
    parser.add_argument("--shard-items", type=positive_integer, metavar="N", help="of a folder (default: 10000)")
    parser.add_argument(
        "--batch-size", type=positive_integer, metavar="N", help="default: 16; of texts: 32, of slices: 4"
    )
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of refusing them")
    parser.add_argument(
        "--progress", choices=("bar", "json"), default="bar", help="json: lines on stderr for machines (default: bar)"
    )
    add_model_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlm_export.runtime.bulk.embed import is_file
    from vlm_export.runtime.search.store import pyarrow_modules

    if not args.paths and not args.list:
        raise UsageError("there is nothing to embed", fix="name images, folders, tables, archives or .txt files")
    output = Path(args.output)
    if is_file(args.output):
        check_output(output, overwrite=args.overwrite)
        if output.suffix.lower() == ".parquet":
            pyarrow_modules()
    for path in (*args.paths, *args.list):
        existing_path(path)
    model = opened_model(args)
    write = _write_features if "features" in model.tasks else _write_embeddings
    result, sentence, scan = write(model, args)
    if scan.other_count:
        print_warnings([_others_text(scan)])
    _warn_of_skipped(result["unreadable"])
    if args.json:
        print_json(result)
    else:
        print_line(sentence)
    return 0


def _write_embeddings(model: Model, args: argparse.Namespace) -> tuple[Mapping[str, Any], str, Scan]:
    """Writes the embeddings; what to print of it, as JSON data and as a sentence."""
    from vlm_export.runtime.bulk.embed import EmbedOptions, embed
    from vlm_export.runtime.bulk.items import Inputs, TableColumns
    from vlm_export.runtime.inputs.progress import growing_bar, progress_lines

    chosen = {"batch_size": args.batch_size, "shard_items": args.shard_items}
    options = EmbedOptions(
        lists=[Path(path) for path in args.list],
        columns=TableColumns(args.path_column, args.name_column, tuple(args.keep)),
        on_error=args.on_error,
        resume=args.resume,
        overwrite=args.overwrite,
        shard_format=args.shard_format,
        truncate=args.truncate,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    kind = Inputs([Path(path) for path in args.paths], options.lists).kind
    shown = nullcontext() if args.quiet else progress_lines() if args.progress == "json" else growing_bar(kind)
    with shown as progress:
        found = embed(model, args.paths, args.output, options, progress=progress)
    rate = (found.scan.count - found.resumed) / found.seconds if found.seconds else float("inf")
    sentence = f"{found.rows} {found.scan.kind} embeddings of {found.dimension} numbers in {args.output}"
    more = f", {found.resumed} of an earlier run" if found.resumed else ""
    return found.to_json(), f"{sentence} ({rate:.1f}/s{more})", found.scan


def _write_features(model: Model, args: argparse.Namespace) -> tuple[Mapping[str, Any], str, Scan]:
    """Writes the features of slices; what to print of it, as JSON data and as a sentence."""
    from vlm_export.runtime.bulk.embed import is_file, none_readable
    from vlm_export.runtime.bulk.items import Inputs, TableColumns
    from vlm_export.runtime.search.feature_files import SliceFileMeta, write_slice_features
    from vlm_export.runtime.tasks.features import SLICE_BATCH_SIZE

    if args.keep or args.shard_items is not None or args.shard_format is not None:
        raise UsageError("features of slices have no further columns and no shards", fix="leave those options out")
    columns = TableColumns(args.path_column, args.name_column)
    inputs = Inputs([Path(path) for path in args.paths], [Path(path) for path in args.list], columns)
    if inputs.kind == "text":
        raise InputError("this bundle takes no texts", where=model.manifest.name, fix="name images or folders")
    if not is_file(args.output) or args.resume:
        raise UsageError("features of slices go to one file", where=args.output, fix="name a .npy or .parquet file")
    start, scan = time.perf_counter(), inputs.scan()
    items, unreadable = list(inputs.items()), dict[int, InputError]()

    def skip(number: int, error: InputError) -> None:
        if items[number].is_named or args.on_error == "stop":
            raise error
        unreadable[number] = error
        if len(unreadable) == len(items):
            raise none_readable(len(items), error)

    task = model.slices
    meta = SliceFileMeta(model.manifest.name, model.identity, task.feature_shape, model.precision)
    features = task.stream_slices(
        [item.image() for item in items],
        batch_size=args.batch_size or SLICE_BATCH_SIZE,
        progress=not args.quiet,
        unreadable=skip,
    )
    named = _named(items, unreadable, features)
    count, slices = write_slice_features(args.output, named, meta, overwrite=args.overwrite)
    seconds = time.perf_counter() - start
    reasons = {items[number].name: error.to_json() for number, error in unreadable.items()}
    result = {
        "output": args.output,
        "kind": "slices",
        "count": count,
        "slices": slices,
        "shape": list(meta.feature_shape),
        "seconds": round(seconds, 4),
        "skipped": [*scan.others, *reasons],
        "unreadable": reasons,
    }
    queries, width = meta.feature_shape
    rate = slices / seconds if seconds else float("inf")
    features_text = f"{slices} slices of {queries} x {width} numbers"
    return result, f"{count} images, {features_text} in {args.output} ({rate:.1f} slices/s)", scan


def _named(
    items: Sequence[Item], unreadable: Mapping[int, InputError], features: Iterable[SliceFeatures]
) -> Iterator[tuple[str, SliceFeatures]]:
    """Each image's name with its features, which come for those alone that can be read."""
    numbers = iter(range(len(items)))
    for found in features:
        number = next(number for number in numbers if number not in unreadable)
        yield items[number].name, found


def _warn_of_skipped(unreadable: Mapping[str, Mapping[str, Any]]) -> None:
    """A warning with the number, and with the names and reasons of the first."""
    if not unreadable:
        return
    count, named = len(unreadable), list(unreadable.items())[:_SKIPPED_SHOWN]
    more = f"; and {count - len(named)} more (--json names all)" if count > len(named) else ""
    reasons = "; ".join(f"{name}: {_reason(error)}" for name, error in named)
    print_warnings([f"{count} image{'' if count == 1 else 's'} skipped, which cannot be read: {reasons}{more}"])


def _reason(error: Mapping[str, Any]) -> str:
    return f"{error['what']} ({error['got']})" if error.get("got") else str(error["what"])


def _others_text(scan: Scan) -> str:
    named, count = scan.others[:_SKIPPED_SHOWN], scan.other_count
    more = f" and {count - len(named)} more" if count > len(named) else ""
    plural = "" if count == 1 else "s"
    names = ", ".join(Path(name).name for name in named)
    return f"{count} file{plural} skipped, not named as an image that is read: {names}{more}"
