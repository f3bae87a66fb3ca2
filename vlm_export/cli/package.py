"""`vlm-export package`: a bundle as transformers.js, immich and other software load it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options
from vlm_export.cli.output import print_json, print_line, print_table, print_warnings, terminal_width
from vlm_export.text_display import size_text

if TYPE_CHECKING:
    from vlm_export.layouts.package import Package

NAMES = (
    "transformers.js",
    "optimum",
    "immich",
    "immich-uint8",
    "fastembed",
    "typesense",
    "modern-onnx-clip",
    "clip-as-service",
    "sentence-transformers",
    "triton",
    "openvino",
)


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "package",
        help="write a bundle as other software loads it",
        description=(
            "Write the files, names and dtypes that a consumer loads, unchanged. Every graph that is made for it is "
            "proved by the bundle's golden records before the directory is there, and `verify` proves it again."
        ),
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("--for", dest="consumer", metavar="NAME", required=True, help=", ".join(NAMES))
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="directory of the package")
    parser.add_argument("--precision", metavar="NAME", help="variant of the graphs that are made (default: fp32)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the engine that proves them")
    parser.add_argument("--overwrite", action="store_true", help="replace a package or a bundle")
    add_common_options(parser)
    parser.set_defaults(run=run, extra="graph")


def run(args: argparse.Namespace) -> int:
    from vlm_export.layouts.package import package

    made = package(
        args.bundle,
        args.output,
        args.consumer,
        precision=args.precision,
        overwrite=args.overwrite,
        threads=args.threads,
        tell=lambda sentence: print_warnings([sentence]),
    )
    return print_package(made, args, f"packaged for {args.consumer}")


def print_package(made: Package, args: argparse.Namespace, done: str) -> int:
    """Prints the graphs, the notes and the size of what was written; returns the exit status."""
    if args.json:
        print_json(made.to_json())
        return 0
    rows = []
    for part in made.manifest.parts:
        signature, variant = part.signature, part.variants[0]
        interface = f"{', '.join(signature.input_names)} → {', '.join(signature.output_names)}"
        size = sum(made.manifest.files[name].size_bytes for name in (variant.file, *variant.external_data))
        rows.append((variant.file, interface, size_text(size)))
    print_table(("file", "inputs → outputs", "size"), rows, width=terminal_width())
    for note in made.notes:
        print_line(f"note: {note}")
    total = sum(file.size_bytes for file in made.manifest.files.values())
    print_line(f"{done}: {args.output} ({len(made.manifest.files)} files, {size_text(total)})")
    return 0
