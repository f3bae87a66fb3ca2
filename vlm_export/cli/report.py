"""`vlm-export report`: one page about a bundle: where it comes from, whether it holds, how to use it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm_export.cli.common import add_common_options, add_engine_options, check_output, providers
from vlm_export.cli.output import print_json, print_line
from vlm_export.errors import UsageError, VerificationError


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "report",
        help="one page about a bundle: origin, proof, images, weights, operators, sizes, usage",
        description=(
            "Prove a bundle again and write what is found, and what the bundle is, to one HTML page that requests "
            "nothing. What fails stands first. The page is written in any case; the status is 1 where something fails."
        ),
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="PAGE.html", help="the page")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a summary for merge requests too")
    parser.add_argument("--overwrite", action="store_true", help="replace PAGE.html and FILE")
    parser.add_argument(
        "--no-run", action="store_true", help="run no graph: check files and weights, and show the export's figures"
    )
    parser.add_argument("--latency", action="store_true", help="measure how long one run of each graph takes")
    add_engine_options(parser, "only this variant of each part (default: all)")
    add_common_options(parser)
    parser.set_defaults(run=run, extra="graph")


def run(args: argparse.Namespace) -> int:
    from vlm_export.bundle.staging import staged_file
    from vlm_export.lab.report.collect import ReportOptions, report
    from vlm_export.lab.report.markdown import markdown_summary
    from vlm_export.lab.report.page import html_page

    if args.output.suffix.lower() not in (".html", ".htm"):
        raise UsageError("the page is HTML", expected="a name that ends with .html", got=str(args.output))
    outputs = [args.output, *([args.markdown] if args.markdown else [])]
    for path in outputs:
        check_output(path, overwrite=args.overwrite)
    options = ReportOptions(
        run=not args.no_run,
        latency=args.latency,
        precision=args.precision,
        providers=providers(args),
        threads=args.threads,
    )
    found = report(args.bundle, options)
    for path, text in zip(outputs, (html_page(found), markdown_summary(found)), strict=False):
        with staged_file(path, "report", overwrite=args.overwrite) as staged:
            staged.write_text(text, encoding="utf-8", errors="backslashreplace")
    if args.json:
        print_json({**found.to_json(), "output": str(args.output)})
        return 0 if found.proof.passed else VerificationError.exit_status
    print_line("written: " + ", ".join(map(str, outputs)))
    found.proof.raise_if_failed()
    return 0
