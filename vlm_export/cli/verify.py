"""`vlm-export verify`: the numerical proof again, on this machine, with this engine."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, add_engine_options, providers
from vlm_export.cli.output import print_json, print_text
from vlm_export.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from vlm_export.api import VerificationResult


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "verify",
        help="prove again that a bundle computes what the original computes",
        description=(
            "Check every file of a bundle and run its graphs on the golden records. With --source, compare what it "
            "states and its graphs with the original itself, over the whole grid (needs the export extra)."
        ),
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("--source", metavar="SOURCE", help="the checkpoint that the bundle was made from")
    parser.add_argument("--base", metavar="SOURCE", help="the model that a LoRA adapter was trained on, with --source")
    add_engine_options(parser, "only this variant of each part (default: all)")
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlm_export.api import verify
    from vlm_export.cli.output import StagePrinter
    from vlm_export.proof.report import format_table

    if args.base and not args.source:
        raise UsageError("--base goes with --source", got="--base alone", fix="name the adapter with --source")
    result = verify(
        args.bundle,
        args.source,
        base=args.base,
        precision=args.precision,
        providers=providers(args),
        threads=args.threads,
        progress=None if args.quiet else StagePrinter(),
    )
    if args.json:
        return _print_json(result)
    with suppress(BrokenPipeError):
        print_text(format_table(result.reports, result.contract))
    result.raise_if_failed()
    return 0


def _print_json(result: VerificationResult) -> int:
    """One document in either case: a failure's is the error with the reports."""
    try:
        result.raise_if_failed()
    except VerificationError as error:
        print(f"vlm-export: {error}", file=sys.stderr)
        print_json({**error.to_json(), **result.to_json()})
        return error.exit_status
    print_json(result.to_json())
    return 0
