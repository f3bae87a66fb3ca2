"""What a process that works for another one says to it: one JSON document a line, on what was its stdout."""

from __future__ import annotations

import json
import os
from typing import Any, TextIO

from vlm_export.errors import InputError, VlmExportError
from vlm_export.machine_faults import machine_fault


def open_answers() -> TextIO:
    """Where answers go. Whatever libraries print to stdout goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def say(answers: TextIO, **answer: Any) -> None:
    """One answer."""
    print(json.dumps(answer), file=answers, flush=True)


def told(error: Exception) -> VlmExportError | None:
    """What to tell about an exception, None for a defect, whose traceback the parent shows the end of.

    What the machine refused is told as that, also where a reader took it for damage of a file.
    """
    if isinstance(error, VlmExportError) and not isinstance(error, InputError):
        return error
    return machine_fault(error) or (error if isinstance(error, InputError) else None)
