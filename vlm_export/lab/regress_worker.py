"""What a regression test runs in a process of its own: one export, or the verification of one bundle.

The job is a JSON document on stdin. What is said (`worker_answers`) is `stage` for each stage that has ended, and at
last `result` or `error`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from vlm_export.api import export, options_from_data, verify
from vlm_export.bundle.opened import open_bundle
from vlm_export.errors import VerificationError
from vlm_export.lab.figures import figures_of, recorded_figures
from vlm_export.lab.worker_answers import open_answers, say, told


def main() -> int:
    """Runs the job; the status is 0 where an answer was given."""
    answers = open_answers()
    job = json.load(sys.stdin)
    try:
        result = _JOBS[job["kind"]](job, answers)
    except Exception as error:
        known = told(error)
        if known is None:
            raise
        say(answers, error=known.to_json())
        return 0
    say(answers, result=result)
    return 0


def _check(job: Mapping[str, Any], _answers: TextIO) -> Any:
    for options in job["options"]:
        options_from_data(options)


def _export(job: Mapping[str, Any], answers: TextIO) -> Any:
    from vlm_export.lab.snapshot import state_of

    options, bundle = options_from_data(job["options"]), Path(job["folder"]) / "bundle"
    export(job["source"], bundle, progress=lambda record: say(answers, stage=vars(record)), **options)
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
