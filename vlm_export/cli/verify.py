"""`vlm-export verify`: the numerical proof again, on this machine, with this engine."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, add_engine_options, providers
from vlm_export.cli.output import print_json, print_text
from vlm_export.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from vlm_export.bundle.opened import OpenBundle
    from vlm_export.verify.contract import ContractReport
    from vlm_export.verify.report import PartReport


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
    from vlm_export.bundle.opened import open_bundle

    if args.base and not args.source:
        raise UsageError("--base goes with --source", got="--base alone", fix="name the adapter with --source")
    bundle = open_bundle(Path(args.bundle))
    reports, contract = _against_source(args, bundle) if args.source else _against_golden(args, bundle)
    if not reports:
        raise VerificationError(
            "nothing was compared, so nothing is proved", where=args.bundle, fix="export the model again"
        )
    if args.json:
        return _print_json(reports, contract)
    from vlm_export.verify.table import format_table

    with suppress(BrokenPipeError):
        print_text(format_table(reports, contract))
    _raise_if_failed(reports, contract)
    return 0


def _raise_if_failed(reports: list[PartReport], contract: ContractReport) -> None:
    """VerificationError for the first that failed; the contract's names the file, so it comes first."""
    contract.raise_if_failed()
    for report in reports:
        report.raise_if_failed()


def _print_json(reports: list[PartReport], contract: ContractReport) -> int:
    """One document in either case: a failure's is the error with the reports."""
    result: dict[str, Any] = {
        "passed": True,
        "verification": [report.to_json() for report in reports],
        "contract": contract.to_json(),
    }
    try:
        _raise_if_failed(reports, contract)
    except VerificationError as error:
        print(f"vlm-export: {error}", file=sys.stderr)
        print_json({**error.to_json(), **result, "passed": False})
        return error.exit_status
    print_json(result)
    return 0


def _against_golden(args: argparse.Namespace, bundle: OpenBundle) -> tuple[list[PartReport], ContractReport]:
    from vlm_export.verify.contract import replay
    from vlm_export.verify.engine import variant_bytes, verifying_engine
    from vlm_export.verify.points import EngineRun
    from vlm_export.verify.recheck import verify_bundle

    bundle.verify(bundle.manifest.files)

    def start_engine(part: str, precision: str) -> EngineRun:
        variant = bundle.manifest.part(part).variant(precision)
        path, size_bytes = bundle.model_files(variant), variant_bytes(bundle.manifest, variant)
        return verifying_engine(path, weights_bytes=size_bytes, threads=args.threads, providers=providers(args)).run

    engine_name = ", ".join(providers(args))
    contract = replay(bundle, start_engine, precision=args.precision)
    reports = verify_bundle(bundle, engine_factory=start_engine, engine_name=engine_name, precision=args.precision)
    return reports, contract


def _against_source(args: argparse.Namespace, bundle: OpenBundle) -> tuple[list[PartReport], ContractReport]:
    from vlm_export.cli.progress import StagePrinter
    from vlm_export.export.reverify import verify_against_source
    from vlm_export.export.stages import Stages

    stages = Stages(None if args.quiet else StagePrinter())
    return verify_against_source(bundle, args.source, providers(args), args.threads, stages, args.precision, args.base)
