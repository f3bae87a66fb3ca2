"""`vlm-export`: parses the command line, runs one verb, and turns every failure into a message and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vlm_export import __version__
from vlm_export.cli import ask, caption, classify, embed, export, graph, inspect, match, search, verify
from vlm_export.cli.output import print_json
from vlm_export.cli.streams import discard, standard_streams
from vlm_export.errors import EnvironmentFailure, UsageError, VlmExportError
from vlm_export.interrupts import remembered_interrupts

VERBS = (inspect, export, verify, classify, caption, ask, match, embed, search, graph)
_INTERRUPTED = 130
_EXTRA_PACKAGES = {"torch", "transformers", "timm", "onnx", "onnx_ir", "onnxscript", "onnxsim", "safetensors"}
_EXTRA_PACKAGES |= {"huggingface_hub", "yaml", "torchvision", "google"}  # google: protobuf
_DEFAULT_EXTRA = "export"
_EPILOG = """exit status: 0 done; 1 verification failed; 2 usage; 3 bad or unsafe input; 4 environment
(disk, memory, missing package, no network); 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, where=self.format_usage().strip(), fix=f"see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser with all verbs; imports nothing heavy."""
    parser = Parser(
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
    with standard_streams(), remembered_interrupts():
        return _flushed(_run(sys.argv[1:] if argv is None else argv))


def _run(arguments: Sequence[str]) -> int:
    as_json = "--json" in arguments
    args = argparse.Namespace()
    try:
        args = build_parser().parse_args(arguments)
        status: int = args.run(args)
        return status
    except KeyboardInterrupt as interrupt:
        print("interrupted", *(f"({stage})" for stage in interrupt.args), file=sys.stderr)
        return _INTERRUPTED
    except ImportError as error:
        return _fail(as_json, _missing_package(error, getattr(args, "extra", _DEFAULT_EXTRA)))
    except MemoryError:
        return _fail(as_json, EnvironmentFailure("out of memory", fix="free memory, or use a machine with more"))
    except BrokenPipeError:
        # stderr raises nothing, so it is stdout: its reader has read enough (`| head`), which is no error.
        return 0
    except OSError as error:
        return _fail(as_json, _refused_by_system(error))
    except VlmExportError as error:
        return _fail(as_json, error)


def _flushed(status: int) -> int:
    """The status, after the last of stdout is written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        if status == 0 and not isinstance(error, BrokenPipeError):
            return _fail(False, _refused_by_system(error))
    return status


def _fail(as_json: bool, error: VlmExportError) -> int:
    print(f"vlm-export: {error}", file=sys.stderr)
    if as_json:
        print_json(error.to_json())
    return error.exit_status


def _refused_by_system(error: OSError) -> EnvironmentFailure:
    """Of an operation that nothing expected to fail, such as printing to a full disk."""
    named = error.filename2 or error.filename
    return EnvironmentFailure(
        f"the system refused: {error.strerror or error}",
        where=os.fsdecode(named) if isinstance(named, str | bytes) else "",
        fix="check the paths of the command, and where its output goes",
    )


def _missing_package(error: ImportError, extra: str) -> EnvironmentFailure:
    """What to install: `extra`, the smallest of this project's that the verb needs, which it states beside `run`."""
    name = (error.name or "").partition(".")[0]
    if name not in _EXTRA_PACKAGES:
        raise error
    return EnvironmentFailure(
        "a package that this verb needs is not installed", got=str(error), fix=f"pip install 'vlm-export[{extra}]'"
    )


if __name__ == "__main__":
    sys.exit(main())
