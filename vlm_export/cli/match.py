"""`vlm-export match`: whether texts fit an image."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, add_model_options, opened_model
from vlm_export.cli.generation_options import refuse_options
from vlm_export.cli.output import print_json, print_table

if TYPE_CHECKING:
    from vlm_export.runtime.inputs.images import FloatArray


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "match",
        help="whether texts fit an image",
        description="For each text the cosine of its embedding and the image's, and, where the bundle has the task "
        "match, the probability that it describes the image. A bundle of the task chat has untrained cosines, of the "
        "means of what its decoder reads.",
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("image", metavar="IMAGE", help="an image")
    parser.add_argument("texts", metavar="TEXT", nargs="+", help="what it may show")
    parser.add_argument(
        "--first-token",
        choices=("cls", "enc"),
        help="what a text starts with: enc as in the original's training, cls as in its demo and in transformers "
        "(default: what the bundle says)",
    )
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of refusing them")
    add_model_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    model = opened_model(args)
    if "match" not in model.tasks and "embed" in model.tasks:
        refuse_options(args, ["first_token"], args.bundle, "it is for the task match")
        return _print_cosines(
            args, model.encode_image(args.image), model.encode_text(args.texts, truncate=args.truncate)
        )
    matches = model.match(args.image, args.texts, first_token=args.first_token, truncate=args.truncate)
    found = sorted(zip(args.texts, matches, strict=True), key=lambda entry: -entry[1].probability)
    if args.json:
        fits = [
            {"text": text, "probability": match.probability, "match_logit": match.match_logit, "cosine": match.cosine}
            for text, match in found
        ]
        print_json({"image": args.image, "first_token": matches[0].first_token, "matches": fits})
    else:
        rows = [(f"{100 * match.probability:6.2f} %", f"{match.cosine:.4f}", text) for text, match in found]
        print_table(("probability", "cosine", "text"), rows)
    return 0


def _print_cosines(args: argparse.Namespace, image: FloatArray, texts: FloatArray) -> int:
    """Without the task match there are cosines alone."""
    found = sorted(zip(args.texts, map(float, texts @ image[0]), strict=True), key=lambda entry: -entry[1])
    if args.json:
        print_json({"image": args.image, "matches": [{"text": text, "cosine": cosine} for text, cosine in found]})
    else:
        print_table(("cosine", "text"), [(f"{cosine:.4f}", text) for text, cosine in found])
    return 0
