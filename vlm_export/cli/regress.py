"""`vlm-export regress`: exports compared with their recorded state, and bundles verified on another runtime."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, check_output, existing_path, positive_integer
from vlm_export.cli.output import StagePrinter, print_json, print_line, print_table, terminal_width
from vlm_export.errors import UsageError, VerificationError
from vlm_export.text_display import size_text

if TYPE_CHECKING:
    from vlm_export.lab.figures import Figure
    from vlm_export.lab.regress import CaseResult
    from vlm_export.lab.regress_process import Progress

_GIB = 1 << 30
_SHOWN_RATIO = 2.0
_MOST_LINES = 40


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "regress",
        help="compare exports with their recorded state, or verify bundles on a new runtime",
        description=(
            "Export each case of a specification, verify it, and compare it with the state that was recorded beside "
            "the specification: structure, opset, weights, tokenizer, preparation, tolerances and figures. With "
            "--bundles, verify bundles by their own records, without PyTorch. Each case runs in a process of its own. "
            "The status is 1 where a case fails."
        ),
    )
    parser.add_argument("spec", metavar="SPEC", nargs="?", help="YAML file with the cases")
    parser.add_argument("--bundles", metavar="DIR", nargs="+", default=[], help="verify these bundles instead")
    parser.add_argument("--update", action="store_true", help="record what is found, in states/ or in the baseline")
    parser.add_argument("--strict", action="store_true", help="fail where an error grew tenfold above its floor")
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="only this case, repeatable (default: all)"
    )
    parser.add_argument(
        "--baseline",
        metavar="FILE",
        type=Path,
        help="figures of --bundles from another run (default: those that each export recorded)",
    )
    parser.add_argument("--max-memory", type=_gibibytes, metavar="GIB", help="most memory that one case may take")
    parser.add_argument("--junit", metavar="FILE", type=Path, help="also write the results as JUnit XML")
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="of --bundles: threads of one operator")
    add_common_options(parser)
    parser.set_defaults(run=run)


def _gibibytes(text: str) -> int:
    """An argparse type."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no size above 0")
    return int(value * _GIB)


def run(args: argparse.Namespace) -> int:
    from vlm_export.lab.regress import RegressOptions, raise_if_failed, regress, regress_bundles

    _check(args)
    options = RegressOptions(args.update, args.strict, args.max_memory, args.threads)
    told = (lambda result: None) if args.json else _print
    if args.bundles:
        results = regress_bundles(args.bundles, options, baseline=args.baseline, told=told)
    else:
        progress = None if args.quiet else _progress()
        results = regress(existing_path(args.spec), options, names=args.case, progress=progress, told=told)
    if args.junit is not None:
        from vlm_export.bundle.staging import staged_file
        from vlm_export.lab.junit import junit_xml

        with staged_file(args.junit, "JUnit XML", overwrite=True, wait=True) as staged:
            staged.write_bytes(junit_xml(results))
    if args.json:
        passed = all(result.passed for result in results)
        print_json({"passed": passed, "cases": [result.to_json() for result in results]})
        return 0 if passed else VerificationError.exit_status
    raise_if_failed(results)
    return 0


def _check(args: argparse.Namespace) -> None:
    if bool(args.spec) == bool(args.bundles):
        raise UsageError(
            "regress takes a specification or bundles",
            got="both" if args.spec else "neither",
            fix="vlm-export regress SPEC.yaml, or vlm-export regress --bundles DIR DIR",
        )
    for name, value, belongs in (
        ("--baseline", args.baseline, args.bundles),
        ("--threads", args.threads, args.bundles),
        ("--case", args.case, args.spec),
    ):
        if value and not belongs:
            raise UsageError(f"{name} goes with {'a specification' if args.bundles else '--bundles'}")
    if args.junit is not None:
        check_output(args.junit, overwrite=True)


def _progress() -> Progress:
    from vlm_export.exporting.stages import StageRecord

    printer = StagePrinter()
    return lambda name, seconds, peak: printer.finished(StageRecord(name, seconds, peak))


def _print(result: CaseResult) -> None:
    peak = "" if result.peak_bytes is None else f", peak {size_text(result.peak_bytes)}"
    verdict = "pass" if result.passed else "FAIL"
    print_line(f"{result.name}: {verdict} ({result.seconds:.1f} s{peak})")
    lines = [*result.failures, *(f"recorded: {change}" for change in result.changes)]
    for text in lines[:_MOST_LINES]:
        for line in text.splitlines():
            print_line(f"  {line}")
    if len(lines) > _MOST_LINES:
        print_line(f"  and {len(lines) - _MOST_LINES} more: see --json")
    if result.tools:
        print_line(f"  versions: {result.tools}")
    _print_figures(result.figures)


def _print_figures(figures: tuple[Figure, ...]) -> None:
    compared = [figure for figure in figures if figure.ratio is not None]
    grown = [figure for figure in compared if figure.failure or (figure.ratio or 0) > _SHOWN_RATIO]
    if compared:
        print_line(
            f"  {len(compared)} figures compared, {len(grown)} more than {_SHOWN_RATIO:g} times the recorded one"
        )
    if grown:
        rows = [
            (f"  {one.name}", f"{one.then:.3g}", f"{one.now:.3g}", f"{one.ratio:.3g}", "FAIL" if one.failure else "")
            for one in grown
        ]
        print_table(("  figure", "then", "now", "ratio", ""), rows, width=terminal_width())
