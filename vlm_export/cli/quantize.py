"""`vlm-export quantize`: variants of fewer bits for a bundle, with what they lose."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, checked_depth, existing_path, positive_integer
from vlm_export.cli.output import print_json, print_line, print_table, print_warnings, terminal_width
from vlm_export.text_display import size_text

if TYPE_CHECKING:
    from vlm_export.quantizing.result import PartLoss, QuantizeResult


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "quantize",
        help="add variants of fewer bits to a bundle, with what they lose",
        description=(
            "Make variants of fewer bits of a bundle's float32 graphs, measure what they lose beside a naive recipe, "
            "and publish them if that is within the budget. The status is 1 where it is not, and nothing is changed."
        ),
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument(
        "--precision",
        required=True,
        choices=("int8", "int8-static", "w8a16", "int4"),
        help="int8: products of 8 bits; int8-static: with calibrated ranges; w8a16, int4: weights alone",
    )
    parser.add_argument("--part", action="append", default=[], metavar="NAME", help="only this part, repeatable")
    parser.add_argument(
        "--budget",
        metavar="KEY=NUMBER,…",
        help="least cosine, mean-cosine, top10 and exact-match (defaults: docs/numerics.md), and points that zero-shot "
        "and retrieval@1 may lose, as in cosine=0.999,exact-match=1pp,zero-shot=0.5pp",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="where a part is over budget, find the weights that must stay in float32",
    )
    _add_samples(parser)
    parser.add_argument("-o", "--output", metavar="DIR", help="a new bundle (default: DIR itself, in one step)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle at the output")
    parser.add_argument(
        "--reduce-range",
        action="store_true",
        help="8-bit weights use 7 bits, for CPUs without VNNI (int8, int8-static)",
    )
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="threads of one operator")
    add_common_options(parser)
    parser.set_defaults(run=run, extra="graph")


def _add_samples(parser: argparse.ArgumentParser) -> None:
    """What is measured on."""
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="images, or a folder of them, to measure on, repeatable",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="texts to measure on, one a line; NAME<tab>TEXT belongs to the image of that name, for retrieval@1",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="DIR",
        help="a folder of images for each label, named as the label, for zero-shot",
    )
    parser.add_argument(
        "--template", default="a photo of a {}", metavar="TEXT", help="sentence around a label (default: '%(default)s')"
    )


def run(args: argparse.Namespace) -> int:
    from vlm_export.cli.output import StagePrinter
    from vlm_export.quantizing.pipeline import quantize
    from vlm_export.quantizing.result import OverBudgetError

    output = None if args.output is None else checked_depth(Path(args.output))
    try:
        result = quantize(
            args.bundle,
            args.precision,
            parts=tuple(args.part),
            budget=args.budget,
            images=tuple(existing_path(path) for path in args.images),
            texts=None if args.texts is None else existing_path(args.texts),
            labels=None if args.labels is None else existing_path(args.labels),
            template=args.template,
            output=output,
            overwrite=args.overwrite,
            reduce_range=args.reduce_range,
            threads=args.threads,
            search=args.search,
            progress=None if args.quiet else StagePrinter(),
        )
    except OverBudgetError as error:
        if not args.json:
            _print_losses(error.losses)
        raise
    if args.json:
        print_json({"bundle": str(output or args.bundle), **result.to_json()})
    else:
        _print_result(str(output or args.bundle), result)
    return 0


def _print_losses(losses: Sequence[PartLoss]) -> None:
    from vlm_export.quantizing.result import HEADER, accuracy_lines, search_lines, table_rows

    print_table(HEADER, table_rows(losses), width=max(terminal_width(), 100))
    for line in (*accuracy_lines(losses), *search_lines(losses)):
        print_line(line)
    print_warnings(dict.fromkeys(note for loss in losses for note in loss.record.notes))


def _print_result(output: str, result: QuantizeResult) -> None:
    _print_losses(result.losses)
    for part, why in result.left_out.items():
        print_line(f"{part}: stays in float32: {why}")
    total = sum(file.size_bytes for file in result.manifest.files.values())
    print_line(f"bundle: {output} ({len(result.manifest.files) + 1} files, {size_text(total)})")
