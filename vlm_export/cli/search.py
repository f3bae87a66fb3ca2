"""`vlm-export search`: the nearest embeddings to a text or a picture."""

from __future__ import annotations

import argparse
from typing import Any

from vlm_export.cli.common import add_common_options, add_engine_options, positive_integer, providers
from vlm_export.cli.output import print_json, print_table


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "search",
        help="find the nearest pictures or texts",
        description="The k nearest of a file of embeddings, to a text or (with --image) to a picture.",
    )
    parser.add_argument("bundle", metavar="DIR", help="the bundle that made the embeddings")
    parser.add_argument("embeddings", metavar="EMBEDDINGS", help="a file that embed wrote")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("query", metavar="QUERY", nargs="?", help="what to look for")
    query.add_argument("--image", metavar="FILE", help="a picture to look for instead")
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
    vector = pair.encode_image([args.image])[0] if args.image else pair.encode_text([args.query])[0]
    matches = search_embeddings(embeddings, vector, args.k)
    if args.json:
        found = [{"item": match.item, "cosine": match.score} for match in matches]
        print_json({"query": args.query, "image": args.image, "matches": found})
    else:
        print_table(("cosine", embeddings.meta.kind), [(f"{match.score:.4f}", match.item) for match in matches])
    return 0
