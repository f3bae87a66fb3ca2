"""Errors that end a command: each kind has one exit status and says what, where, expected, got and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

from vlm_export.text_display import shown_field


class VlmExportError(Exception):
    """A failure that the user can act on; the command line prints it without a traceback.

    Fields may hold what untrusted files say. As a text the error shows them safely, a field on one line unless it is a
    `text_display.Lines`; the attributes and `to_json` have them as they are.

    Attributes:
        what: one sentence that says what is wrong.
        where: the file, tensor or stage, or "".
        expected: what would have been right, or "".
        got: what was there instead, or "".
        fix: what the user can do, or "".
    """

    exit_status: ClassVar[int] = 3
    kind: ClassVar[str] = "error"

    def __init__(self, what: str, *, where: str = "", expected: str = "", got: str = "", fix: str = "") -> None:
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix
        super().__init__(what)

    def __reduce__(self) -> tuple[Any, ...]:
        """As a pickle it is its class and its fields: another process may have raised it."""
        return _made_again, (type(self), self.what, self.where, self.expected, self.got, self.fix)

    def __str__(self) -> str:
        parts = [("where", self.where), ("expected", self.expected), ("got", self.got), ("fix", self.fix)]
        fields = (f"  {label}: {shown_field(text)}" for label, text in parts if text)
        return "\n".join([shown_field(self.what), *fields])

    def to_json(self) -> dict[str, str | int]:
        """The error as the object that `--json` prints."""
        fields = {"where": self.where, "expected": self.expected, "got": self.got, "fix": self.fix}
        return {
            "error": self.kind,
            "exit_status": self.exit_status,
            "what": self.what,
            **{key: text for key, text in fields.items() if text},
        }


def _made_again(kind: type[VlmExportError], what: str, where: str, expected: str, got: str, fix: str) -> VlmExportError:
    return kind(what, where=where, expected=expected, got=got, fix=fix)


class VerificationError(VlmExportError):
    """An exported graph does not compute what the original computes."""

    exit_status = 1
    kind = "verification"


class UsageError(VlmExportError):
    """The command or call contradicts itself or names something unknown."""

    exit_status = 2
    kind = "usage"


class InputError(VlmExportError):
    """A checkpoint, bundle, image or text is bad or unsafe."""

    exit_status = 3
    kind = "input"


class EnvironmentFailure(VlmExportError):
    """This machine lacks disk, memory, a package or the network."""

    exit_status = 4
    kind = "environment"


class Defect(VlmExportError):
    """A fault of this project: nothing that a user does should raise what was raised."""

    exit_status = 70
    kind = "defect"


def suggestion(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known word, or lists all known words; "" where none is known."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1)
    listed = f"known: {', '.join(choices)}" if choices else ""
    return f"did you mean {near[0]!r}?" if near else listed


_EXTRA_PACKAGES = {"torch", "transformers", "timm", "onnx", "onnx_ir", "onnxscript", "onnxsim", "safetensors"}
_EXTRA_PACKAGES |= {"huggingface_hub", "yaml", "torchvision", "google"}  # google: protobuf


def install_fix(extra: str = "") -> str:
    """The command that installs this project with an extra, as README has it."""
    wanted = f"'.[{extra}]'" if extra else "."
    return f"in your clone: pip install {wanted} -c constraints.txt"


def missing_package(error: ImportError, extra: str) -> EnvironmentFailure | None:
    """What to install: `extra`, the smallest of this project's that is needed; None for a module of our own."""
    name = (error.name or "").partition(".")[0]
    if name == "vlm_export":
        return None
    what = "is not installed" if isinstance(error, ModuleNotFoundError) else "cannot be loaded"
    return EnvironmentFailure(
        f"a package that this needs {what}",
        where=name,
        got=str(error),
        fix=install_fix(extra if name in _EXTRA_PACKAGES else ""),
    )


class GraphError(InputError):
    """A model, or a change of it, that cannot be: an unknown name, a cycle, a clash of dtypes or shapes."""

    kind = "graph"
