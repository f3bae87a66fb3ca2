"""`vlm-export bisect`: in which module two graphs that should compute the same part."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, check_output, existing_path
from vlm_export.cli.output import print_json, print_line, print_table, terminal_width
from vlm_export.errors import UsageError, VerificationError
from vlm_export.text_display import size_text

if TYPE_CHECKING:
    from vlm_export.lab.bisect import Bisection

_MOST_ROWS = 12


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "bisect",
        help="in which module two graphs that should compute the same part",
        description=(
            "Compare two graphs, or two bundles, module by module: each on the first side's own values, so that no "
            "error hides another. Nodes are told by the weights that they read. Name one bundle to compare its "
            "variants. The status is 1 where the two part."
        ),
    )
    parser.add_argument("left", metavar="A", help="directory of a bundle, or a graph")
    parser.add_argument(
        "right",
        metavar="B",
        nargs="?",
        help="the same, a checkpoint, or a record of A; left out: A, at the precision of --against",
    )
    parser.add_argument("--part", metavar="NAME", help="only this part of bundles (default: all)")
    parser.add_argument("--precision", metavar="NAME", default="fp32", help="variant of A (default: fp32)")
    parser.add_argument(
        "--against", metavar="NAME", help="variant of B (default: that of A; fp16 with neither B nor --engine)"
    )
    parser.add_argument(
        "--inputs",
        nargs="+",
        default=[],
        metavar="FILE",
        help="inputs of graphs: one .npz by name, or .pb files in order",
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="write the first module that differs, as a model"
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write the errors along the depth as an SVG plot")
    parser.add_argument(
        "--record",
        metavar="FILE",
        type=Path,
        help="write what this ONNX Runtime makes of A's modules (.npz), to be B under another version",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --record")
    parser.add_argument("--engine", metavar="NAME", help="run B in onnxruntime with its optimisations, or in openvino")
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlm_export.bundle.staging import staged_file
    from vlm_export.lab.bisect import BisectOptions, bisect, bisection_plot, record_values
    from vlm_export.runtime.engines.choice import engine_choice

    if args.record is not None:
        others = ("right", "against", "inputs", "output", "plot", "engine")
        if given := [name for name in others if getattr(args, name)]:
            raise UsageError("--record compares nothing", got=f"also {', '.join(given)}", fix="leave it out")
        parts = record_values(
            args.left, args.record, part=args.part, precision=args.precision, overwrite=args.overwrite
        )
        if args.json:
            print_json({"record": str(args.record), "parts": list(parts), "bytes": args.record.stat().st_size})
        else:
            size = size_text(args.record.stat().st_size)
            print_line(f"recorded {', '.join(parts)}: {args.record} ({size})")
        return 0
    if args.plot is not None:
        check_output(args.plot, overwrite=True)
    if args.right is None and args.engine is None:
        _check_alone(args)
    options = BisectOptions(
        part=args.part,
        precision=args.precision,
        right_precision=args.against or ("fp16" if args.right is None and args.engine is None else None),
        inputs=[existing_path(name) for name in args.inputs],
        output=args.output,
        engine=None if args.engine is None else engine_choice(args.engine, None, 1),
    )
    found = bisect(args.left, args.right or args.left, options)
    if args.plot is not None:
        shown = next((one for one in found if one.first is not None), found[0])
        with staged_file(args.plot, "plot", overwrite=True, wait=True) as staged:
            staged.write_text(bisection_plot(shown), encoding="utf-8")
    if args.json:
        print_json(
            {"parted": any(one.first is not None for one in found), "bisections": [one.to_json() for one in found]}
        )
        return VerificationError.exit_status if any(one.first is not None for one in found) else 0
    for one in found:
        _print(one)
    for one in found:
        one.raise_if_parted()
    return 0


def _check_alone(args: argparse.Namespace) -> None:
    """UsageError where neither B nor an engine is named, and A holds no second variant to be compared with."""
    from vlm_export.bundle.opened import open_bundle

    fix = "name B, or --engine onnxruntime or openvino"
    if Path(args.left).is_file():
        raise UsageError(
            "one graph has nothing to be compared with", where=args.left, got="neither B nor --engine", fix=fix
        )
    parts, against = open_bundle(args.left).manifest.parts, args.against or "fp16"
    if against == args.precision:
        got = f"{against} on both sides"
        raise UsageError("a bundle's variant is not compared with itself", where=args.left, got=got, fix=fix)
    if not any(variant.precision == against for part in parts for variant in part.variants):
        known = sorted({variant.precision for part in parts for variant in part.variants})
        raise UsageError(
            "the bundle alone has nothing to be compared with",
            where=args.left,
            expected=f"graphs in {against} beside those in {args.precision}",
            got=f"graphs in {', '.join(known)}",
            fix=f"{fix}, or export again with --precision {args.precision} --precision {against}",
        )


def _print(found: Bisection) -> None:
    print_line(f"{found.left} against {found.right}: {len(found.regions)} modules on {found.samples} samples")
    parted = [region for region in found.regions if region.parts]
    last = found.regions[-1]
    if not parted:
        print_line(f"no module differs by more than rounding; at the end the error is {last.total:.1e}")
        return
    rows = [(region.path, f"{region.own:.1e}", f"{region.total:.1e}", f"{region.floor:.1e}") for region in parted]
    print_table(("module", "its own error", "with all before", "floor"), rows[:_MOST_ROWS], width=terminal_width())
    if len(rows) > _MOST_ROWS:
        print_line(f"and {len(rows) - _MOST_ROWS} more: see --json")
    for cause in found.causes[:_MOST_ROWS]:
        print_line(f"{cause.section}: {cause}")
    if found.subgraph:
        print_line(f"the module as a model: {found.subgraph}, with inputs.npz and expected.npz")
