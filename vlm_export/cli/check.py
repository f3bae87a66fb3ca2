"""`vlm-export check`: the checklist of a deployment, run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, add_engine_options, existing_path, positive_integer, providers
from vlm_export.cli.output import print_json, print_line, print_table
from vlm_export.errors import VerificationError

if TYPE_CHECKING:
    from vlm_export.lab.checklist import Checklist

_RUNS = 200
_SHOWN = 3


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "check",
        help="the checklist of a deployment, run",
        description=(
            "Look at what must hold of a bundle before it serves: graphs without training, control flow and leftovers, "
            "the proofs on record, several sizes and batches, boundary inputs, a long run, provider, latency, limits. "
            "Each item passes, fails or is not run, with its evidence. The status is 1 where one fails."
        ),
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("--items", metavar="FILE", help="further items, as YAML: max_size_mb, max_latency_ms, …")
    parser.add_argument(
        "--runs", type=positive_integer, default=_RUNS, metavar="N", help="of the long run (default: %(default)s)"
    )
    add_engine_options(parser, "only these variants (default: all; fp32, or the only one, where one is enough)")
    add_common_options(parser)
    parser.set_defaults(run=run, extra="graph")


def run(args: argparse.Namespace) -> int:
    from vlm_export.lab.check import CheckOptions, check
    from vlm_export.lab.checklist import OwnItems, read_items

    options = CheckOptions(
        precision=args.precision,
        providers=providers(args),
        threads=args.threads,
        runs=args.runs,
        items=OwnItems() if args.items is None else read_items(existing_path(args.items)),
    )
    found = check(args.bundle, options)
    if args.json:
        print_json(found.to_json())
        return VerificationError.exit_status if found.failed else 0
    _print(found)
    found.raise_if_failed()
    return 0


def _print(found: Checklist) -> None:
    rows = []
    for item in found.items:
        first, *others = item.evidence or ("",)
        rows += [(item.name, item.verdict, first), *(("", "", text) for text in others)]
    print_table(("item", "verdict", "evidence"), rows)
    for item in found.failed:
        for text in item.failures[:_SHOWN]:
            print_line(f"{item.name}: {text}")
        if len(item.failures) > _SHOWN:
            print_line(f"{item.name}: and {len(item.failures) - _SHOWN} more: see --json")
