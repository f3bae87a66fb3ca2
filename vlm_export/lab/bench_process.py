"""The parent's end of a side of a bench (`bench_worker`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any

from vlm_export.lab.regress_process import ended, error_from_json

_COMMAND = [sys.executable, "-m", "vlm_export.lab.bench_worker"]


class SideProcess:
    """A process that has opened one side, so that its threads and its memory are its own.

    Attributes:
        load_seconds: from the imports to the opened part.

    Raises:
        VlmExportError: what the side raised when it opened.
        Defect: the process ended.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        # It lives as long as the process.
        self._errors = TemporaryFile()  # noqa: SIM115
        # A library that asks for its number of threads before it is told gets the same.
        environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
        self._process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        try:
            self.load_seconds: float = self.ask(**job)["seconds"]
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request; errors as the side raised them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # A process that has ended says so by its status.
            print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise ended(self._process.wait(), self._errors)
        answer = json.loads(line)
        if "error" in answer:
            raise error_from_json(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def close(self) -> None:
        """Ends the process, whatever it does; nothing of it is needed any more."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
