"""`vlm-export classify`: zero-shot classification of an image."""

from __future__ import annotations

import argparse
from typing import Any

from vlm_export.cli.common import add_common_options, add_model_options, opened_model
from vlm_export.cli.output import print_json, print_table


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "classify",
        help="which label fits an image",
        description="Zero-shot classification: the probability of each label for an image.",
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("image", metavar="IMAGE", help="an image")
    parser.add_argument("labels", metavar="LABEL", nargs="+", help="what it could show")
    parser.add_argument(
        "--template", default="a photo of a {}", metavar="TEXT", help="sentence around a label (default: '%(default)s')"
    )
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of refusing them")
    add_model_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # One image and one run of the texts: matrices are packed for the next run.
    probabilities = opened_model(args, weights="mapped").classify(
        [args.image], args.labels, template=args.template, truncate=args.truncate
    )[0]
    ranked = sorted(zip(args.labels, map(float, probabilities), strict=True), key=lambda entry: -entry[1])
    if args.json:
        labels = [{"label": label, "probability": probability} for label, probability in ranked]
        print_json({"image": args.image, "template": args.template, "labels": labels})
    else:
        print_table(("probability", "label"), [(f"{100 * share:6.2f} %", label) for label, share in ranked])
    return 0
