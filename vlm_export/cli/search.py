"""`vlm-export search`: the nearest embeddings to a text, an image, or both."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import (
    add_common_options,
    add_model_options,
    check_output,
    opened_model,
    positive_integer,
    share,
)
from vlm_export.cli.output import print_json, print_table
from vlm_export.errors import InputError, UsageError

if TYPE_CHECKING:
    from vlm_export.runtime.model import Model
    from vlm_export.runtime.search.index import SearchIndex

_PATH_BEGINNINGS = ("/", "./", "../", "~/")


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "search",
        help="find the nearest images or texts",
        description="The k nearest of an index or of embeddings, to a text, to an image, or to both.",
    )
    parser.add_argument("bundle", metavar="DIR", help="the bundle that made the embeddings")
    parser.add_argument("embeddings", metavar="INDEX", help="an index, or a file or folder that embed wrote")
    parser.add_argument("query", metavar="QUERY", nargs="?", help="what to look for: a text, or the path of an image")
    parser.add_argument("--text", action="store_true", help="QUERY is a text, also where it looks like a path")
    parser.add_argument("--image", metavar="FILE", help="an image to look for, beside QUERY or instead of it")
    parser.add_argument("--weight", type=share, metavar="W", help="share of the image beside a text (default: 0.5)")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="what every result meets, as colour=red, colour=red|green, size>=3; repeatable",
    )
    parser.add_argument("--html", metavar="FILE", help="write the results with their images as one page")
    parser.add_argument("--overwrite", action="store_true", help="replace the page")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of refusing them")
    parser.add_argument("-k", type=positive_integer, default=5, metavar="N", help="how many (default: 5)")
    parser.add_argument(
        "--rerank", action="store_true", help="order the nearest by what looks at image and text together (task match)"
    )
    parser.add_argument(
        "--candidates",
        type=positive_integer,
        metavar="N",
        help="of --rerank: how many of the nearest are compared (default: 16, and at least as many as -k)",
    )
    add_model_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Query:
    """What is looked for: a text, the path of an image, or both."""

    text: str | None
    image: str | None

    @property
    def kind(self) -> str:
        if self.image is None:
            return "text"
        return "image" if self.text is None else "image and text"


@dataclass(frozen=True)
class _Found:
    """A result: what JSON says of it, and the cells of its row in the table; the item comes last."""

    item: str
    data: Mapping[str, Any]
    cells: tuple[str, ...]
    columns: Mapping[str, str]


def run(args: argparse.Namespace) -> int:
    from vlm_export.runtime.bulk.indexing import open_index

    if not args.rerank and args.candidates is not None:
        raise UsageError("--candidates is for a second stage", fix="add --rerank")
    query = _query(args)
    if args.html is not None:
        check_output(Path(args.html), overwrite=args.overwrite)
    index = open_index(args.embeddings)
    model = opened_model(args)
    header, find = (("probability", "cosine"), _reranked) if args.rerank else (("cosine",), _nearest)
    # Which says what the bundle can do instead.
    _ = model.matching if args.rerank else model.embedding
    index.require_model(model.identity, model.manifest.name)
    results = find(args, model, index, query)
    if args.html is not None:
        _write_page(args, index, query, header, results)
    if args.json:
        found = [
            {"item": result.item, **result.data, **({"columns": result.columns} if result.columns else {})}
            for result in results
        ]
        asked = {"query": args.query} | ({"image": args.image} if args.image else {})
        print_json({**asked, "query_kind": query.kind, "matches": found})
    else:
        rows = [(*result.cells, *result.columns.values(), result.item) for result in results]
        print_table((*header, *index.columns, index.meta.kind), rows)
    return 0


def _nearest(args: argparse.Namespace, model: Model, index: SearchIndex, query: _Query) -> list[_Found]:
    from vlm_export.runtime.search.index import combined_vector

    task = model.embedding
    vectors = []
    if query.text is not None:
        vectors.append(task.encode_text(query.text, truncate=args.truncate)[0])
    if query.image is not None:
        vectors.append(task.encode_image(query.image)[0])
    vector = vectors[0]
    if len(vectors) == 2:
        vector = combined_vector(vectors[0], vectors[1], 0.5 if args.weight is None else args.weight)
    matches = index.search(vector, args.k, where=args.where)
    return [_Found(one.item, {"cosine": one.score}, (f"{one.score:.4f}",), one.columns) for one in matches]


def _reranked(args: argparse.Namespace, model: Model, index: SearchIndex, query: _Query) -> list[_Found]:
    from vlm_export.runtime.search.rerank import CANDIDATES, search_reranked

    if query.text is not None and query.image is not None:
        raise UsageError("a match is that of an image and a text", got="an image and a text as the query")
    results = search_reranked(
        model,
        index,
        query.image if query.image is not None else query.text or "",
        args.k,
        is_image=query.image is not None,
        candidates=max(CANDIDATES, args.k) if args.candidates is None else args.candidates,
        truncate=args.truncate,
        where=args.where,
    )
    found = []
    for one in results:
        data = {"score": one.score, "probability": one.match.probability, "cosine": one.match.cosine}
        cells = (f"{100 * one.match.probability:6.2f} %", f"{one.match.cosine:.4f}")
        found.append(_Found(one.item, data, cells, one.columns))
    return found


def _write_page(
    args: argparse.Namespace, index: SearchIndex, query: _Query, header: Sequence[str], results: Sequence[_Found]
) -> None:
    from vlm_export.bundle.staging import staged_file
    from vlm_export.runtime.search.results_page import PageResult, results_page

    notes = [f"The {len(results)} nearest of {len(index)} {index.meta.kind}s, by {index.meta.model}."]
    if args.where:
        notes.append(f"With {' and '.join(args.where)}.")
    shown = [
        PageResult(result.item, ", ".join(map(" ".join, zip(header, result.cells, strict=True))), result.columns)
        for result in results
    ]
    of_images = index.meta.kind == "image"
    page = results_page(shown, of_images=of_images, text=query.text or "", image=query.image, notes=notes)
    with staged_file(args.html, "writing a page", overwrite=args.overwrite) as staged:
        staged.write_text(page, encoding="utf-8")


def _query(args: argparse.Namespace) -> _Query:
    """What the command looks for; UsageError where that is nothing, or two images."""
    if args.query is None and args.image is None:
        raise UsageError("there is nothing to look for", fix="give a text, the path of an image, or --image FILE")
    if args.weight is not None and (args.query is None or args.image is None):
        raise UsageError("a weight is for a text and an image", fix="give both, or leave out --weight")
    if args.query is None or not _is_image(args):
        return _Query(args.query, args.image)
    if args.image is not None:
        raise UsageError("there are two images to look for", got=args.query, fix="name one; --text makes QUERY a text")
    return _Query(None, args.query)


def _is_image(args: argparse.Namespace) -> bool:
    """Whether the query is an image's path; InputError when it looks like one and there is no such file."""
    from vlm_export.runtime.inputs.sources import IMAGE_SUFFIXES

    query = args.query
    if args.text:
        return False
    try:
        named_as_image, exists = Path(query).suffix.lower() in IMAGE_SUFFIXES, Path(query).is_file()
        got = "a directory" if Path(query).is_dir() else "no such file"
    except (OSError, ValueError):
        # A long text is no file name.
        return False
    if exists:
        return named_as_image
    one_word = len(query.split()) == 1
    if (named_as_image and (one_word or "/" in query)) or (one_word and query.startswith(_PATH_BEGINNINGS)):
        raise InputError(
            "the query looks like the path of an image, and there is no such file",
            where=query,
            expected="an image's path, or a text",
            got=got,
            fix="check the path; to search for these words themselves, add --text",
        )
    return False
