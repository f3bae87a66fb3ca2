"""`vlm-export search`: the nearest embeddings to a text or an image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm_export.cli.common import add_common_options, add_model_options, opened_model, positive_integer
from vlm_export.cli.output import print_json, print_table
from vlm_export.errors import InputError, UsageError

_PATH_BEGINNINGS = ("/", "./", "../", "~/")


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "search",
        help="find the nearest images or texts",
        description="The k nearest of a file of embeddings, to a text or to an image.",
    )
    parser.add_argument("bundle", metavar="DIR", help="the bundle that made the embeddings")
    parser.add_argument("embeddings", metavar="EMBEDDINGS", help="a file or folder that embed wrote")
    parser.add_argument("query", metavar="QUERY", help="what to look for: a text, or the path of an image")
    parser.add_argument("--text", action="store_true", help="QUERY is a text, also where it looks like a path")
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


def run(args: argparse.Namespace) -> int:
    if args.rerank:
        return _run_reranked(args)
    if args.candidates is not None:
        raise UsageError("--candidates is for a second stage", fix="add --rerank")
    from vlm_export.runtime.bulk.folder import embeddings_at
    from vlm_export.runtime.search.store import search_embeddings

    is_image = _is_image(args)
    embeddings = embeddings_at(args.embeddings)
    model = opened_model(args)
    task = model.embedding
    embeddings.require_model(model.identity, model.manifest.name)
    vectors = task.encode_image(args.query) if is_image else task.encode_text(args.query, truncate=args.truncate)
    matches = search_embeddings(embeddings, vectors[0], args.k)
    if args.json:
        found = [{"item": match.item, "cosine": match.score} for match in matches]
        print_json({"query": args.query, "query_kind": _kind(is_image), "matches": found})
    else:
        print_table(("cosine", embeddings.meta.kind), [(f"{match.score:.4f}", match.item) for match in matches])
    return 0


def _run_reranked(args: argparse.Namespace) -> int:
    from vlm_export.runtime.bulk.folder import embeddings_at
    from vlm_export.runtime.search.rerank import CANDIDATES, search_reranked

    is_image = _is_image(args)
    embeddings = embeddings_at(args.embeddings)
    model = opened_model(args)
    _ = model.matching  # Which says what the bundle can do instead.
    embeddings.require_model(model.identity, model.manifest.name)
    candidates = max(CANDIDATES, args.k) if args.candidates is None else args.candidates
    results = search_reranked(
        model,
        embeddings,
        args.query,
        args.k,
        is_image=is_image,
        candidates=candidates,
        truncate=args.truncate,
    )
    if args.json:
        found = [
            {
                "item": result.item,
                "score": result.score,
                "probability": result.match.probability,
                "cosine": result.match.cosine,
            }
            for result in results
        ]
        print_json({"query": args.query, "query_kind": _kind(is_image), "matches": found})
    else:
        rows = [
            (f"{100 * result.match.probability:6.2f} %", f"{result.match.cosine:.4f}", result.item)
            for result in results
        ]
        print_table(("probability", "cosine", embeddings.meta.kind), rows)
    return 0


def _kind(is_image: bool) -> str:
    return "image" if is_image else "text"


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
