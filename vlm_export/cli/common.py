"""Options that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_export.errors import UsageError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """--json and --quiet, which every verb has."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def add_engine_options(
    parser: argparse.ArgumentParser, precision_help: str = "variant of the graphs (default: fp32, or the only one)"
) -> None:
    """--provider, --threads and --precision, for verbs that run graphs."""
    parser.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help="execution provider of ONNX Runtime, in order of preference, repeatable (default: cpu)",
    )
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="threads of one operator")
    parser.add_argument("--precision", metavar="NAME", help=precision_help)


def positive_integer(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def providers(args: argparse.Namespace) -> tuple[str, ...]:
    """The providers asked for, or the CPU."""
    return tuple(args.provider or ("cpu",))


def existing_path(text: str) -> Path:
    """A path that exists; UsageError otherwise."""
    path = Path(text)
    if not path.exists():
        raise UsageError("there is no such file or directory", where=text)
    return path
