"""Commands in this process and in others, and what they work on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vlm_export.cli.main import main

DATA = Path(__file__).parents[1] / "data"
KINDS = {1: "verification", 2: "usage", 3: "input", 4: "environment"}


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)

    def refused(self, status: int, *texts: str) -> Result:
        """Checks the status and that the message says these things, what to do, and nothing of our code."""
        assert self.status == status, self
        assert "Traceback" not in self.err
        assert self.err.count("vlm-export: ") == 1
        for text in texts:
            assert text in self.err, self.err
        return self


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Result(status, out, err)

    return run


@pytest.fixture
def refused_json(cli: Cli) -> Callable[..., dict[str, Any]]:
    """Runs a command with --json that must fail; returns the error object."""

    def run(status: int, *arguments: object) -> dict[str, Any]:
        result = cli(*arguments, "--json").refused(status)
        error: dict[str, Any] = result.data
        assert (error["error"], error["exit_status"]) == (KINDS[status], status)
        assert error["what"]
        assert set(error) <= {"error", "exit_status", "what", "where", "expected", "got", "fix"}
        return error

    return run


def command(*arguments: object) -> list[str]:
    """The command line of a process that runs the command line."""
    return [sys.executable, "-m", "vlm_export.cli.main", *map(str, arguments)]


@pytest.fixture(scope="session")
def spawn() -> Callable[..., Result]:
    """Runs a command in a process of its own; `code` runs before it."""

    def run(*arguments: object, code: str = "", cwd: Path | None = None, env: dict[str, str] | None = None) -> Result:
        line = command(*arguments)
        if code:
            script = f"import sys\n{code}\nfrom vlm_export.cli.main import main\nsys.exit(main(sys.argv[1:]))"
            line = [sys.executable, "-c", script, *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        done = subprocess.run(
            line, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240, check=False, errors="replace"
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The smallest checkpoint of the oracle."""
    return DATA / "clip" / "vit_p14" / "state_dict_fp16.pt"


@pytest.fixture(scope="session")
def image_path() -> Path:
    return DATA / "clip" / "vit_p14" / "image.png"


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A bundle with a tokenizer and seeded weights, for the verbs that use one."""
    return Path(shutil.copytree(DATA / "runtime" / "tiny_bundle", tmp_path / "pair"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A bundle that the export verb made, with its proof; tests must not change it."""
    target = tmp_path_factory.mktemp("exported") / "bundle"
    assert main(["export", str(checkpoint), "-o", str(target), "--quiet", *FAST]) == 0
    return target


FAST = ("--no-tokenizer", "--opset", "17", "--threads", "1")


@pytest.fixture(scope="session")
def fast() -> tuple[str, ...]:
    """Options of an export that takes a fraction of a second."""
    return FAST


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a directory, hidden ones included."""
    return content
