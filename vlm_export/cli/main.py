"""`vlm-export`: parses the command line, runs one verb, and turns every failure into a message and an exit status."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn

from vlm_export import __version__
from vlm_export.cli import ask, caption, classify, embed, export, graph, inspect, match, search, verify
from vlm_export.cli.output import print_json
from vlm_export.errors import EnvironmentFailure, VlmExportError

VERBS = (inspect, export, verify, classify, caption, ask, match, embed, search, graph)
_INTERRUPTED = 130
_EXTRA_PACKAGES = {"torch", "transformers", "timm", "onnx", "onnx_ir", "onnxscript", "onnxsim", "safetensors"}
_EXTRA_PACKAGES |= {"huggingface_hub", "yaml", "torchvision"}
_EPILOG = """exit status: 0 done; 1 verification failed; 2 usage; 3 bad or unsafe input; 4 environment
(disk, memory, missing package, no network); 130 interrupted"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all verbs; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="vlm-export",
        description="Vision-language checkpoints to verified ONNX encoders that run without PyTorch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vlm-export {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, TextIOWrapper):
        # Paths and texts that are not Unicode are printed as escapes, also in a terminal that lacks their letters.
        sys.stdout.reconfigure(errors="backslashreplace")
    status = 0
    try:
        status = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe (`| head`): not an error, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _run(args: argparse.Namespace) -> int:
    try:
        status: int = args.run(args)
        return status
    except KeyboardInterrupt as interrupt:
        print("interrupted", *(f"({stage})" for stage in interrupt.args), file=sys.stderr)
        return _INTERRUPTED
    except ImportError as error:
        return _fail(args, _missing_package(error))
    except MemoryError:
        return _fail(args, EnvironmentFailure("out of memory", fix="free memory, or use a machine with more"))
    except VlmExportError as error:
        return _fail(args, error)


def _fail(args: argparse.Namespace, error: VlmExportError) -> int:
    print(f"vlm-export: {error}", file=sys.stderr)
    if args.json:
        print_json(error.to_json())
    return error.exit_status


def _missing_package(error: ImportError) -> EnvironmentFailure:
    name = (error.name or "").partition(".")[0]
    if name not in _EXTRA_PACKAGES:
        raise error
    return EnvironmentFailure(
        "a package that this verb needs is not installed", got=str(error), fix="pip install 'vlm-export[export]'"
    )


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like Ctrl-C, so that temporary directories and locks are released."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
