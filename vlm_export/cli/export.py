"""`vlm-export export`: the main job."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, checked_depth, natural_number, positive_integer
from vlm_export.cli.output import print_json, print_line, print_text, print_warnings
from vlm_export.cli.package import print_package
from vlm_export.text_display import size_text

if TYPE_CHECKING:
    from vlm_export.exporting.pipeline import ExportResult


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "export",
        help="export a checkpoint to a verified bundle",
        description="Export a checkpoint to a bundle of ONNX graphs that compute the same, with the proof.",
    )
    parser.add_argument("source", metavar="SOURCE", help="file, directory, known name, or Hugging Face Hub id")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="directory of the bundle")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.add_argument(
        "--for", dest="consumer", metavar="NAME", help="write a package for other software instead, as `package` does"
    )
    graph = parser.add_argument_group("graphs")
    graph.add_argument("--opset", type=positive_integer, default=18, metavar="N", help="11 to 23 (default: 18)")
    graph.add_argument("--exporter", choices=("dynamo", "torchscript"), help="back end (default: what the opset needs)")
    graph.add_argument("--image-size", type=positive_integer, metavar="PIXELS", help="another image size (ViT)")
    graph.add_argument("--dynamic-image-size", action="store_true", help="height and width become axes (ViT)")
    graph.add_argument(
        "--with-preprocessing", action="store_true", help="add a graph that takes uint8 images of any size"
    )
    graph.add_argument(
        "--part", action="append", default=[], metavar="NAME", help="export only this part, repeatable (default: all)"
    )
    graph.add_argument(
        "--precision",
        action="append",
        choices=("fp32", "fp16"),
        help="variant of the graphs, repeatable (default: fp32); fp16 takes half the room",
    )
    targets = ("onnxruntime", "openvino", "tensorrt", "web")
    graph.add_argument("--target", choices=targets, help="runtime to write for (default: graphs that all of them take)")
    graph.add_argument("--no-simplify", action="store_true", help="publish the back end's own graphs")
    graph.add_argument(
        "--external-data-threshold",
        type=natural_number,
        default=64,
        metavar="MIB",
        help="weights above this go to a file of their own (default: 64)",
    )
    _add_source_options(parser)
    checks = parser.add_argument_group("verification")
    checks.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="also verify with this image, repeatable"
    )
    checks.add_argument("--threads", type=positive_integer, metavar="N", help="threads of one operator")
    add_common_options(parser)
    parser.set_defaults(run=run)


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json, BPE merges, WordPiece vocab.txt, SentencePiece spiece.model, or a directory with one",
    )
    tokenizer.add_argument("--no-tokenizer", action="store_true", help="a bundle that takes token ids only")
    source = parser.add_argument_group("source")
    source.add_argument("--sha256", metavar="HEX", help="expected sha256 of the weights file")
    source.add_argument("--base", metavar="SOURCE", help="the model that a LoRA adapter was trained on")
    source.add_argument("--revision", metavar="REV", help="commit, branch or tag of a Hub id")
    source.add_argument("--random-weights", type=int, metavar="SEED", help="seeded random weights for a known name")
    source.add_argument(
        "--set",
        action="append",
        default=[],
        type=_name_and_value,
        metavar="NAME=VALUE",
        help="what the weights do not say about themselves, repeatable; inspect SOURCE lists what its family takes",
    )


def _name_and_value(text: str) -> tuple[str, int | str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else value


def run(args: argparse.Namespace) -> int:
    from vlm_export.bundle.environment import environment_errors
    from vlm_export.bundle.publish import check_target
    from vlm_export.cli.output import StagePrinter

    # Refused before torch is imported; `publication` checks again under its lock.
    with environment_errors("checking the output directory"):
        check_target(checked_depth(Path(args.output)), overwrite=args.overwrite)
    from vlm_export.api import export, export_package
    from vlm_export.checkpoint.names import hidden_name

    print_warnings([note for note in [hidden_name(args.source)] if note])
    progress = None if args.quiet else StagePrinter()
    if args.consumer is not None:
        both = export_package(
            *(args.source, args.output, args.consumer),
            progress=progress,
            tell=lambda sentence: print_warnings([sentence]),
            **_options(args),
        )
        print_warnings(both.export.manifest.export.warnings)
        if args.json:
            print_json({"package": args.output, **both.to_json()})
        else:
            _print_proof(both.export)
            print_package(both.package, args, f"packaged for {args.consumer}")
        return 0
    result = export(args.source, args.output, progress=progress, **_options(args))
    print_warnings(result.manifest.export.warnings)
    if args.json:
        print_json({"bundle": args.output, **result.to_json()})
    else:
        _print_result(args.output, result)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `vlm_export.export`."""
    return {
        "opset": args.opset,
        "exporter": args.exporter,
        "target": args.target,
        "simplify": not args.no_simplify,
        "external_data_threshold_bytes": args.external_data_threshold << 20,
        "overwrite": args.overwrite,
        "tokenizer": args.tokenizer,
        "with_tokenizer": not args.no_tokenizer,
        "sha256": args.sha256,
        "revision": args.revision,
        "base": args.base,
        "random_weights_seed": args.random_weights,
        "with_preprocessing": args.with_preprocessing,
        "image_size": args.image_size,
        "dynamic_image_size": args.dynamic_image_size,
        "family_options": dict(args.set),
        "parts": tuple(args.part),
        "precisions": tuple(dict.fromkeys(args.precision or ["fp32"])),
        "images": tuple(Path(image) for image in args.image),
        "threads": args.threads,
    }


def _print_result(output: str, result: ExportResult) -> None:
    _print_proof(result)
    files = result.manifest.files
    total = sum(file.size_bytes for file in files.values())
    print_line(f"bundle: {output} ({len(files) + 1} files, {size_text(total)})")


def _print_proof(result: ExportResult) -> None:
    from vlm_export.proof.report import format_table

    manifest = result.manifest
    print_text(format_table(result.reports, result.contract))
    for part in manifest.parts:
        for variant in part.variants:
            for warning in variant.warnings:
                print_line(f"warning: {part.name} {variant.precision}: {warning}")
    for note in manifest.export.notes:
        print_line(f"note: {note}")
    print_line(f"compared with: {manifest.export.reference}")
