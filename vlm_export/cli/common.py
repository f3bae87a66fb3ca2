"""Options that several verbs share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.machine_faults import machine_fault
from vlm_export.text_display import shown

if TYPE_CHECKING:
    from vlm_export.runtime.engines.choice import Weights
    from vlm_export.runtime.model import Model

MAX_DEPTH = 500
"""Directories of an output's path: Python makes and compares them recursively."""

_MOST = 2**31 - 1  # what ONNX Runtime holds a number of threads in


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """--json and --quiet, which every verb has."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def add_engine_options(parser: argparse.ArgumentParser, precision_help: str) -> None:
    """--provider, --threads and --precision, for verbs that run graphs."""
    parser.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help="execution provider of ONNX Runtime, in order of preference, repeatable (default: cpu)",
    )
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="threads of one operator")
    parser.add_argument("--precision", metavar="NAME", help=precision_help)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--engine and the engine's options, for verbs that ask a model something (`opened_model`)."""
    add_engine_options(parser, "variant, or fastest (default: fp32, or the only one); with openvino also bf16")
    parser.add_argument(
        "--engine", metavar="NAME", help="onnxruntime or openvino (default: onnxruntime, unless packaged for openvino)"
    )


def positive_integer(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if not 1 <= value <= _MOST:
        raise argparse.ArgumentTypeError(f"{text} is not 1 to {_MOST}")
    return value


def natural_number(text: str) -> int:
    """An argparse type: 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def share(text: str) -> float:
    """An argparse type: from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def opened_model(args: argparse.Namespace, *, weights: Weights = "packed") -> Model:
    """The bundle that the command names, opened with the engine's options; weights as in `load`."""
    from vlm_export.runtime.load import load

    return load(
        args.bundle,
        precision=args.precision,
        engine=args.engine,
        providers=providers(args),
        threads=args.threads,
        weights=weights,
    )


def providers(args: argparse.Namespace) -> tuple[str, ...]:
    """The providers asked for, or the CPU."""
    return tuple(args.provider or ("cpu",))


def existing_path(name: str | Path) -> Path:
    """A path that exists; UsageError otherwise, InputError where the system does not say."""
    path = Path(name)
    try:
        found = path.exists()
    except OSError as error:
        raise machine_fault(error, str(name)) or InputError(
            "a path cannot be looked at", where=str(name), got=error.strerror or str(error)
        ) from error
    if not found:
        raise UsageError("there is no such file or directory", where=str(name))
    return path


def checked_depth(path: Path) -> Path:
    """The path; EnvironmentFailure when it names more directories than are made one inside the other."""
    if len(path.parts) > MAX_DEPTH:
        raise EnvironmentFailure(
            "the output's path names too many directories",
            where=shown(path),
            expected=f"at most {MAX_DEPTH}",
            got=str(len(path.parts)),
            fix="choose a shorter output path",
        )
    return path


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuses an output before long work is done for it.

    Raises:
        EnvironmentFailure: no file can be written there.
        UsageError: something is there that may not be replaced.
    """
    from vlm_export.bundle.staging import check_name, check_not_there

    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        raise EnvironmentFailure(
            "the output cannot be written",
            where=str(path),
            got="a directory" if path.is_dir() else f"{folder} is no directory",
            fix="name a file in an existing directory",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise EnvironmentFailure("the output cannot be written", where=str(folder), fix="choose a directory of yours")
    check_name(path)
    check_not_there(path.absolute(), overwrite=overwrite)
