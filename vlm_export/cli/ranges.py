"""`vlm-export ranges`: what float16 and TensorRT would lose of a bundle's tensors, before anything is converted."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options
from vlm_export.cli.output import print_json, print_line, print_table, terminal_width
from vlm_export.errors import VerificationError

if TYPE_CHECKING:
    from vlm_export.lab.ranges import PartRanges, Ranges

_MOST_ROWS = 40


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "ranges",
        help="what float16 would lose of every tensor, and what to keep in float32",
        description=(
            "Run the float32 graphs on the bundle's own records, images and texts, and look at every tensor: beyond "
            "float16, denormals, zeros, constants, dead channels, saturation. Says which operators half precision must "
            "keep in float32. The status is 0 whatever is found, and 1 for kinds that --fail-on names."
        ),
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("--part", action="append", metavar="NAME", help="only this part, repeatable (default: all)")
    parser.add_argument(
        "--fail-on",
        action="append",
        default=[],
        metavar="KIND",
        help="end with status 1 where there is such a finding, repeatable: overflow, non-finite, …",
    )
    add_common_options(parser)
    parser.set_defaults(run=run, extra="graph")


def run(args: argparse.Namespace) -> int:
    from vlm_export.lab.ranges import checked_kinds, ranges

    kinds = checked_kinds(args.fail_on)
    found = ranges(args.bundle, parts=args.part)
    if args.json:
        print_json(found.to_json())
        return VerificationError.exit_status if found.of(kinds) else 0
    _print(found)
    found.raise_if_any(kinds)
    return 0


def _print(found: Ranges) -> None:
    for part in found.parts:
        print_line(f"{part.part}: {len(part.tensors)} tensors on {part.samples} samples")
    rows = list(_rows(found))
    if rows:
        print_table(("finding", "module", "operator", "what"), rows[:_MOST_ROWS], width=terminal_width())
    if len(rows) > _MOST_ROWS:
        print_line(f"and {len(rows) - _MOST_ROWS} more: see --json")
    for part in found.parts:
        for text in _plan_lines(part):
            print_line(text)


def _rows(found: Ranges) -> Iterator[tuple[str, str, str, str]]:
    """One row for each kind in each module: the worst tensor, and how many others there are."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, finding in enumerate(found.findings):
        groups.setdefault((finding.kind, finding.where), []).append(number)
    for (kind, where), numbers in groups.items():
        worst = found.findings[numbers[0]]
        others = f" (and {len(numbers) - 1} more)" if len(numbers) > 1 else ""
        yield kind, where, worst.operator, f"{worst.tensor} {worst.what}{others}"


def _plan_lines(part: PartRanges) -> Iterator[str]:
    if part.keep:
        yield f"{part.part}: half precision must keep {len(part.keep)} more operators in float32:"
        yield from (f"  {entry.where}: {entry.operator} {entry.reason}" for entry in part.keep)
    elif not part.not_run:
        yield f"{part.part}: half precision needs no more operators in float32 than its rules keep"
    yield from (f"not run: {part.part}: {text}" for text in part.not_run)
