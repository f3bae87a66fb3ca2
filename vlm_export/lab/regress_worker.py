"""What a regression test runs in a process of its own: one export, or the verification of one bundle.

The job is a JSON document on stdin. What is said to stdout is one JSON document a line: `stage` for each stage that has
ended, and at last `result` or `error`. Nothing else is printed there, whatever libraries print.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from vlm_export.api import export, options_from_data, verify
from vlm_export.bundle.opened import open_bundle
from vlm_export.errors import InputError, VerificationError, VlmExportError
from vlm_export.lab.figures import figures_of, recorded_figures
from vlm_export.machine_faults import machine_fault


def main() -> int:
    """Runs the job; the status is 0 where an answer was given."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    try:
        result = _JOBS[job["kind"]](job, answers)
    except Exception as error:
        told = _told(error)
        if told is None:
            raise  # A defect, whose traceback the parent shows the end of.
        _say(answers, error=told.to_json())
        return 0
    _say(answers, result=result)
    return 0


def _told(error: Exception) -> VlmExportError | None:
    """What to tell about an exception; what the machine refused also where a reader took it for damage of a file."""
    if isinstance(error, VlmExportError) and not isinstance(error, InputError):
        return error
    return machine_fault(error) or (error if isinstance(error, InputError) else None)


def _say(answers: TextIO, **answer: Any) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def _check(job: Mapping[str, Any], _answers: TextIO) -> Any:
    for options in job["options"]:
        options_from_data(options)


def _export(job: Mapping[str, Any], answers: TextIO) -> Any:
    from vlm_export.lab.snapshot import state_of

    options, bundle = options_from_data(job["options"]), Path(job["folder"]) / "bundle"
    export(job["source"], bundle, progress=lambda record: _say(answers, stage=vars(record)), **options)
    verify(bundle, threads=options.get("threads")).raise_if_failed()
    return state_of(open_bundle(bundle), job["name"], job["tolerances"]).to_json()


def _verify(job: Mapping[str, Any], _answers: TextIO) -> Any:
    found, manifest = verify(job["bundle"], threads=job["threads"]), open_bundle(job["bundle"]).manifest
    before, now = manifest.tools.get("onnxruntime", "unknown"), version("onnxruntime")
    failure, data = "", found.to_json()
    try:
        found.raise_if_failed()
    except VerificationError as error:
        failure = str(error)
    return {
        "then": recorded_figures(manifest),
        "now": figures_of(data["verification"], data["contract"]),
        "tools": "" if before == now else f"onnxruntime {before} → {now}",
        "failure": failure,
    }


_JOBS = {"check": _check, "export": _export, "verify": _verify}

if __name__ == "__main__":
    sys.exit(main())
