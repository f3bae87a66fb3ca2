"""The verbs of `vlm-export graph` that read: show, find, check, verify."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_export.cli.output import print_json, print_line, print_table
from vlm_export.text_display import size_text


def add_parsers(verbs: Any) -> Iterator[argparse.ArgumentParser]:
    """One parser per verb."""
    show = verbs.add_parser("show", help="interface, operators, sizes, unknown shapes, custom domains")
    show.set_defaults(run=run_show)
    find = verbs.add_parser("find", help="nodes that match a pattern: 'MatMul -> Add -> *Gelu'")
    find.set_defaults(run=run_find)
    check = verbs.add_parser("check", help="ONNX's checks, and dtypes and shapes, at any size")
    check.set_defaults(run=run_check)
    for parser in (show, find, check):
        parser.add_argument("model", metavar="IN", help="an .onnx file")
    find.add_argument("pattern", metavar="PATTERN", help="OPERATOR[TERM, …] -> OPERATOR …; see below")
    verify = verbs.add_parser("verify", help="run two models in onnxruntime and compare every output")
    verify.set_defaults(run=run_verify)
    verify.add_argument("original", metavar="A", help="the original")
    verify.add_argument("changed", metavar="B", help="the changed model")
    add_proof_options(verify)
    find.formatter_class = argparse.RawDescriptionHelpFormatter
    find.epilog = _SYNTAX
    return iter((show, find, check, verify))


_SYNTAX = """A pattern is a chain of steps: `->` leads to a direct reader, `->>` to any node further down. A step is an
operator with wildcards and alternatives (Relu|*Gelu, com.microsoft:*), and terms in brackets, which all must hold:
  [name=blocks.0.*]  [@perm=(0,2,1,3)]  [!@axis]  [in0=const]  [in=input]  [out0=float16(batch,*,3)]  [in1=(...,64)]
"""


def add_proof_options(parser: argparse.ArgumentParser) -> None:
    """--inputs and --tolerance."""
    parser.add_argument(
        "--inputs", nargs="+", default=[], metavar="FILE", help="inputs: one .npz by name, or .pb files in order"
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=0.0,
        metavar="X",
        help="allowed difference, times max(1, largest value) of an output (default: none)",
    )


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return value


def run_show(args: argparse.Namespace) -> int:
    from vlm_export.graph.core.files import open_model
    from vlm_export.graph.look.show import describe_model

    data = describe_model(open_model(args.model))
    if args.json:
        print_json(data)
    else:
        _print_model(data)
    return 0


def _print_model(data: Mapping[str, Any]) -> None:
    opsets = ", ".join(f"{domain} {version}" for domain, version in data["opsets"].items())
    print_line(
        f"opsets: {opsets}; IR version {data['ir_version']}; made by {data['producer'] or 'an unnamed producer'}"
    )
    rows = [(kind, value["name"], value["dtype"] or "?", _shape_text(value["shape"])) for kind, value in _ends(data)]
    print_table(("", "name", "dtype", "shape"), rows)
    print_line("operators: " + ", ".join(f"{name} {count}" for name, count in data["operators"].items()))
    if data["functions"]:
        print_line("functions: " + ", ".join(data["functions"]))
    weights = data["weights"]
    sizes = ", ".join(f"{dtype} {size_text(size)}" for dtype, size in weights["bytes_by_dtype"].items())
    print_line(f"weights: {weights['count']} ({sizes or 'none'}); external: {', '.join(weights['files']) or 'none'}")
    for entry in weights["largest"][:3]:
        print_line(f"  {entry['name']}  {entry['dtype']} {tuple(entry['shape'])}  {size_text(entry['bytes'])}")
    unknown = data["unknown_shapes"]
    print_line(
        f"unknown: of {unknown['tensors']} tensors {len(unknown['without_dtype'])} have no dtype, "
        f"{len(unknown['without_shape'])} no shape, {len(unknown['with_unnamed_axes'])} unnamed axes"
    )
    if data["custom_domains"]:
        print_line("custom domains: " + ", ".join(f"{name} ({n} nodes)" for name, n in data["custom_domains"].items()))
    if data["missing_imports"]:
        print_line("not imported: " + ", ".join(data["missing_imports"]))


def _ends(data: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for kind in ("inputs", "outputs"):
        yield from ((kind.removesuffix("s"), value) for value in data[kind])


def _shape_text(shape: list[int | str | None] | None) -> str:
    return "(…)" if shape is None else f"({', '.join('?' if axis is None else str(axis) for axis in shape)})"


def run_find(args: argparse.Namespace) -> int:
    from vlm_export.graph.core.files import open_model
    from vlm_export.graph.look.find import find_nodes
    from vlm_export.graph.look.show import operator_name, type_text

    chains = find_nodes(open_model(args.model), args.pattern)
    found = [
        [
            {
                "operator": operator_name(node),
                "name": node.name or "",
                "inputs": ["" if value is None else str(value.name) for value in node.inputs],
                "outputs": {str(value.name): type_text(value) for value in node.outputs if value.name},
            }
            for node in chain
        ]
        for chain in chains
    ]
    if args.json:
        print_json({"count": len(found), "matches": found})
        return 0
    for chain in found:
        print_line(" -> ".join(f"{node['operator']} {', '.join(node['outputs'])}" for node in chain))
    print_line(f"{len(found)} found")
    return 0


def run_check(args: argparse.Namespace) -> int:
    from vlm_export.graph.core.files import open_model
    from vlm_export.graph.core.inference import validate

    validate(open_model(args.model))
    if args.json:
        print_json({"valid": True})
    else:
        print_line("valid")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from vlm_export.graph.core.files import open_model
    from vlm_export.graph.prove.prove import prove

    original, changed = open_model(args.original), open_model(args.changed)
    proof = prove(original, changed, inputs=list(map(Path, args.inputs)), tolerance=args.tolerance)
    if args.json:
        print_json({"passed": True, "proof": proof.to_json()})
    else:
        print_line(proof)
    return 0
