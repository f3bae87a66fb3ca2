"""`vlm-export page`: a folder of static files that searches and classifies images in a browser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm_export.cli.common import add_common_options
from vlm_export.cli.output import print_line
from vlm_export.cli.package import print_package


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "page",
        help="write a page that searches images in a browser",
        description=(
            "Write static files that search and classify images in a browser, on the user's own device. Images are "
            "prepared by the bundle's own graph, so that vectors are the runtime's. npm fetches the packages that the "
            "page runs on, once; their versions and digests are pinned. Any server of files serves the folder."
        ),
    )
    parser.add_argument("bundle", metavar="DIR", help="bundle that was exported with --with-preprocessing")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="directory of the page")
    parser.add_argument("--precision", metavar="NAME", help="variant of the graphs (default: fp32)")
    parser.add_argument(
        "--packages", metavar="FOLDER", type=Path, help="archives that `npm pack` made, where there is no network"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the engine that proves the graphs")
    parser.add_argument("--overwrite", action="store_true", help="replace a page, a package or a bundle")
    add_common_options(parser)
    parser.set_defaults(run=run, extra="graph")


def run(args: argparse.Namespace) -> int:
    from vlm_export.layouts.page import page

    made = page(
        args.bundle,
        args.output,
        precision=args.precision,
        packages=args.packages,
        overwrite=args.overwrite,
        threads=args.threads,
    )
    status = print_package(made, args, "page")
    if not args.json:
        print_line(f"open it with: python -m http.server --directory {args.output}")
    return status
