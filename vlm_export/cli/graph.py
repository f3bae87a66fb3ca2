"""`vlm-export graph`: surgery on ONNX models, each verb one operation."""

from __future__ import annotations

import argparse
from typing import Any

from vlm_export.cli import graph_edit, graph_look
from vlm_export.cli.common import add_common_options

_EPILOG = """verbs that change a model write OUT in one step, or nothing; they share these options:
  -o OUT, --overwrite              where to write; it must not exist without --overwrite
  --verify                         run both models in onnxruntime first and compare every output
  --inputs FILE.npz, --tolerance X on these inputs, within this difference (default: random, equal to the last bit)
  --external, --embedded, --shard-size SIZE   where weights go (default: beside the graph above 64 MiB)
`vlm-export graph VERB --help` describes a verb; every verb has --json and --quiet."""


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "graph",
        help="look at, change and compare ONNX models",
        description="Surgery on ONNX models of any size: subgraphs, functions and external data included.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    graph_verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for module in (graph_look, graph_edit):
        for verb in module.add_parsers(graph_verbs):
            add_common_options(verb)
            verb.set_defaults(extra="graph")
