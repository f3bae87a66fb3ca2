"""`vlm-export search`: the nearest embeddings to a text or a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm_export.cli.common import IMAGE_SUFFIXES, add_common_options, add_engine_options, positive_integer, providers
from vlm_export.cli.output import print_json, print_table


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "search",
        help="find the nearest pictures or texts",
        description="The k nearest of a file of embeddings, to a text or to a picture.",
    )
    parser.add_argument("bundle", metavar="DIR", help="the bundle that made the embeddings")
    parser.add_argument("embeddings", metavar="EMBEDDINGS", help="a file that embed wrote")
    parser.add_argument("query", metavar="QUERY", help="what to look for: a text, or the path of a picture")
    parser.add_argument("-k", type=positive_integer, default=5, metavar="N", help="how many (default: 5)")
    add_engine_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlm_export.runtime.pair import load
    from vlm_export.runtime.search import read_embeddings, search_embeddings

    embeddings = read_embeddings(args.embeddings)
    pair = load(args.bundle, providers=providers(args), threads=args.threads)
    embeddings.require_model(pair.identity, pair.manifest.name)
    is_picture = _is_picture(args.query)
    vector = pair.encode_image([args.query])[0] if is_picture else pair.encode_text([args.query])[0]
    matches = search_embeddings(embeddings, vector, args.k)
    if args.json:
        found = [{"item": match.item, "cosine": match.score} for match in matches]
        kind = "image" if is_picture else "text"
        print_json({"query": args.query, "query_kind": kind, "matches": found})
    else:
        print_table(("cosine", embeddings.meta.kind), [(f"{match.score:.4f}", match.item) for match in matches])
    return 0


def _is_picture(query: str) -> bool:
    try:
        return Path(query).suffix.lower() in IMAGE_SUFFIXES and Path(query).is_file()
    except (OSError, ValueError):
        # A long text is no file name.
        return False
