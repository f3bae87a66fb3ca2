"""`vlm-export index`: embeddings to an index that is opened without being read."""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, check_output, positive_integer, share
from vlm_export.cli.output import print_json, print_line, print_warnings
from vlm_export.errors import UsageError

if TYPE_CHECKING:
    from vlm_export.runtime.search.index import SearchIndex


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "index",
        help="an index of embeddings, to search in many at once",
        description="Builds an index of what embed wrote: one file that search maps instead of reading it. Up to "
        "50,000 items are compared one by one; of more, those in the nearest of faiss's inverted lists. What share of "
        "the nearest that finds is measured, and stands in the index.",
    )
    parser.add_argument("embeddings", metavar="EMBEDDINGS", help="a file or folder that embed wrote; or an index")
    parser.add_argument("-o", "--output", metavar="INDEX", help="the file to write")
    parser.add_argument("--verify", action="store_true", help="read a whole index and compare it with its hashes")
    parser.add_argument("--overwrite", action="store_true", help="replace INDEX")
    parser.add_argument(
        "--method",
        choices=("auto", "exact", "approximate"),
        default="auto",
        help="default: auto, by the number of items",
    )
    parser.add_argument(
        "--recall", type=share, metavar="R", help="share of the 10 nearest that a search is to find (default: 0.97)"
    )
    parser.add_argument(
        "--queries", metavar="FILE", help="embeddings to measure the recall with, as of texts (default: items)"
    )
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="of the building (default: all cores)")
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlm_export.runtime.search.index import SearchIndex

    if args.verify == (args.output is not None):
        raise UsageError("an index is either built or verified", fix="pass -o INDEX, or --verify")
    start = time.perf_counter()
    if args.verify:
        index = SearchIndex.mapped(Path(args.embeddings))
        index.verify()
    else:
        index = _built(args)
    seconds = time.perf_counter() - start
    path = args.embeddings if args.verify else args.output
    if args.json:
        print_json({"index": path, **_facts(index), "seconds": round(seconds, 4)})
        return 0
    how = "exact" if index.lists is None else f"approximate, {_recall_text(index)}"
    size = f"{len(index)} {index.meta.kind} embeddings of {index.dimension} numbers"
    print_line(f"{path}: {size}, {how}{', as it was written' if args.verify else ''} ({seconds:.1f} s)")
    return 0


def _built(args: argparse.Namespace) -> SearchIndex:
    from vlm_export.runtime.bulk.indexing import RECALL_TARGET, build_index
    from vlm_export.runtime.inputs.progress import growing_bar

    check_output(Path(args.output), overwrite=args.overwrite)
    target = RECALL_TARGET if args.recall is None else args.recall
    with nullcontext() if args.quiet else growing_bar("vector") as progress:
        index = build_index(
            args.embeddings,
            args.output,
            method=args.method,
            recall=target,
            queries=args.queries,
            overwrite=args.overwrite,
            threads=args.threads,
            progress=progress,
        )
    if index.lists is not None and index.lists.recall.value < target:
        print_warnings([f"the index finds less than --recall {target}: {_recall_text(index)}"])
    return index


def _recall_text(index: SearchIndex) -> str:
    assert index.lists is not None
    recall = index.lists.recall
    asked = "of its own items" if recall.of == "items" else "given"
    return f"recall@{recall.k} {recall.value:.3f} ({recall.queries} queries {asked})"


def _facts(index: SearchIndex) -> dict[str, Any]:
    return {
        "kind": index.meta.kind,
        "model": index.meta.model,
        "count": len(index),
        "dimension": index.dimension,
        "columns": list(index.columns),
        "lists": None if index.lists is None else index.lists.to_json(),
    }
