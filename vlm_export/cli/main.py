"""`vlm-export`: parses the command line, runs one verb, and turns every failure into a message and an exit status."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from vlm_export import __version__
from vlm_export.cli.examples import help_with_examples
from vlm_export.cli.output import print_json
from vlm_export.cli.streams import discard, standard_streams
from vlm_export.errors import (
    Defect,
    EnvironmentFailure,
    InputError,
    UsageError,
    VlmExportError,
    missing_package,
    suggestion,
)
from vlm_export.interrupts import INTERRUPTED, remembered_interrupts
from vlm_export.machine_faults import machine_fault
from vlm_export.runtime.inputs.panic_text import own_process
from vlm_export.text_display import Lines, shown

VERBS = (
    "inspect",
    "export",
    "verify",
    "quantize",
    "package",
    "page",
    "classify",
    "caption",
    "ask",
    "match",
    "embed",
    "index",
    "search",
    "diff",
    "bisect",
    "regress",
    "ranges",
    "check",
    "bench",
    "doctor",
    "report",
    "graph",
)
"""Each is a module of `vlm_export.cli`, in the order of the help."""

_DEFAULT_EXTRA = "export"
_LONGEST_FIX = 100
_EPILOG = """exit status: 0 done; 1 verification failed, or a difference found; 2 usage;
3 bad or unsafe input; 4 environment (disk, memory, missing package, no network);
70 a defect of vlm-export; 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of leaving the process, and shows examples in its help."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, where=self.prog, fix=f"see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """A word that is none of an option's: the nearest of them, instead of argparse's list of all."""
        if action.choices is not None and value not in action.choices:
            name = action.metavar or "/".join(action.option_strings)
            known = list(map(str, action.choices))
            told = suggestion(str(value), known)
            fix = f"{told}; see {self.prog} --help" if len(told) <= _LONGEST_FIX else f"see {self.prog} --help"
            raise UsageError(f"{name}: no such word: {str(value)!r}", where=self.prog, fix=fix)

    def format_help(self) -> str:
        return help_with_examples(self)


def build_parser(verbs: Sequence[str] = VERBS) -> argparse.ArgumentParser:
    """The parser with these verbs; imports nothing heavy."""
    parser = Parser(
        prog="vlm-export",
        description="Vision-language checkpoints to verified ONNX encoders that run without PyTorch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vlm-export {__version__}")
    parsers = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for verb in verbs:
        import_module(f"vlm_export.cli.{verb}").add_parser(parsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    with standard_streams(), remembered_interrupts(), own_process():
        return _flushed(_run(sys.argv[1:] if argv is None else argv))


def console() -> NoReturn:
    """`vlm-export` as a process of its own.

    It makes millions of objects that live until its end, so Python's collector walks over them far less often than by
    default. At its end it frees nothing, which torch and the engines take their time for.
    """
    gc.set_threshold(50_000, 20, 100)
    status = main()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
    os._exit(status)


def _run(arguments: Sequence[str]) -> int:
    as_json = "--json" in arguments
    args = argparse.Namespace()
    try:
        args = build_parser(_needed_verbs(arguments)).parse_args(arguments)
        status: int = args.run(args)
        return status
    except KeyboardInterrupt as interrupt:
        print("interrupted", *(f"({shown(stage)})" for stage in interrupt.args), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # stderr raises nothing, so it is stdout: its reader has read enough (`| head`), which is no error.
        return 0
    except Exception as error:
        told = _told(error, getattr(args, "extra", _DEFAULT_EXTRA))
        return _defect(as_json, error, arguments) if told is None else _fail(as_json, told)


def _needed_verbs(arguments: Sequence[str]) -> Sequence[str]:
    """The verb that the command names, without the other verbs' parsers; all where it names none, for the help."""
    return arguments[:1] if arguments and arguments[0] in VERBS else VERBS


def _told(error: Exception, extra: str) -> VlmExportError | None:
    """What to tell the user about an exception; None for a defect.

    What the machine refused is told as that, also where code that read a file took it for damage of the file.
    """
    if isinstance(error, InputError):
        return machine_fault(error, error.where) or error
    if isinstance(error, VlmExportError):
        return error
    fault = machine_fault(error)
    if fault is not None:
        return fault
    if isinstance(error, ImportError):
        return missing_package(error, extra)
    return _refused_by_system(error) if isinstance(error, OSError) else None


def _defect(as_json: bool, error: Exception, arguments: Sequence[str]) -> int:
    """Prints the traceback, which may quote what a file says, and asks for a report."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    print(Lines.of(lines, indent="  ").removeprefix("\n"), file=sys.stderr)
    command = shlex.join(["vlm-export", *arguments])
    told = Defect(
        "this is a defect of vlm-export, not of your files: please report it with the lines above",
        where=command,
        got=f"{type(error).__name__}: {error}",
        fix=f"report it with these versions: {_versions()}; leave out of it what must stay private",
    )
    return _fail(as_json, told)


def _versions() -> str:
    names = ("numpy", "onnxruntime", "onnx", "onnx_ir", "torch", "transformers")
    loaded = [f"{name} {getattr(sys.modules[name], '__version__', '?')}" for name in names if name in sys.modules]
    own = [f"vlm-export {__version__}", f"Python {platform.python_version()}", platform.platform()]
    return ", ".join([*own, *loaded])


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


if __name__ == "__main__":
    console()
