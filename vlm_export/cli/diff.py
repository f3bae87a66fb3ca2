"""`vlm-export diff`: what differs between two bundles, two graphs, or a bundle and its source."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, existing_path, positive_integer
from vlm_export.cli.graph_look import add_proof_options
from vlm_export.cli.output import StagePrinter, print_json, print_line, print_table, terminal_width
from vlm_export.errors import VerificationError
from vlm_export.text_display import size_text

if TYPE_CHECKING:
    from vlm_export.lab.differences import Diff, Measurement

_MOST_LINES = 60


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "diff",
        help="what differs between two bundles, two graphs, or a bundle and its source",
        description=(
            "Compare two bundles, two .onnx files, or a bundle and a checkpoint, which is exported again: interface, "
            "preparation, tokenizer, tasks, opset, structure, weights, and outputs on the same inputs. Names of nodes "
            "and tensors, the order of nodes and how weights are stored are no difference. The status is 0 where "
            "nothing differs, and 1 where something does."
        ),
    )
    parser.add_argument("left", metavar="A", help="directory of a bundle, or a graph")
    parser.add_argument("right", metavar="B", help="the same, or the checkpoint that the bundle was made from")
    add_proof_options(parser)
    parser.add_argument("--precision", metavar="NAME", help="only this variant of bundles (default: all)")
    parser.add_argument("--latency", action="store_true", help="measure how long one run takes on either side")
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="threads of one operator")
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlm_export.lab.diff import DiffOptions, diff

    options = DiffOptions(
        tolerance=args.tolerance,
        precision=args.precision,
        inputs=[existing_path(name) for name in args.inputs],
        latency=args.latency,
        threads=args.threads,
    )
    found = diff(args.left, args.right, options, progress=None if args.quiet else StagePrinter())
    if args.json:
        print_json(found.to_json())
        return 0 if found.equal else VerificationError.exit_status
    _print(found)
    found.raise_if_different()
    return 0


def _print(found: Diff) -> None:
    section = ""
    for difference in found.differences[:_MOST_LINES]:
        if difference.section != section:
            section = difference.section
            print_line(section)
        print_line(f"  {difference}")
    if len(found.differences) > _MOST_LINES:
        print_line(f"  and {len(found.differences) - _MOST_LINES} more: see --json")
    if found.equal:
        print_line("no difference")
    if found.outputs:
        rows = [
            (entry.where, str(entry.samples), f"{entry.max_abs:.1e}", f"{entry.bound:.1e}", f"{entry.cosine:.6f}")
            for entry in found.outputs
        ]
        print_table(("output", "samples", "max-abs", "allowed", "cosine"), rows, width=terminal_width())
    for entry in found.measured:
        print_line(_measured_text(entry))
    for text in found.not_run:
        print_line(f"not run: {text}")


def _measured_text(entry: Measurement) -> str:
    sides = [
        size_text(int(side)) if entry.unit == "bytes" else f"{side:.3g} {entry.unit}"
        for side in (entry.left, entry.right)
    ]
    ratio = "" if entry.ratio is None else f" ({entry.ratio:.2f} times)"
    return f"{entry.name}: {sides[0]} → {sides[1]}{ratio}"
