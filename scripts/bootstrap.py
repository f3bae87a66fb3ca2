"""Environments for the scripts, from nothing but Python and pip: standard library only.

uv makes them where it can be had (on PATH, or installed by pip into a folder of its own); otherwise venv and pip do.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
MINIMUM_PYTHON = (3, 10)
UV_FOLDER = ROOT / ".venv-uv"
STAMP = "vlm-export.json"
_BIN = "Scripts" if os.name == "nt" else "bin"
_EXE = ".exe" if os.name == "nt" else ""


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def script_in(environment: Path, name: str) -> Path:
    """The path of a command in an environment."""
    return environment / _BIN / f"{name}{_EXE}"


def ensure_environment(environment: Path, extras: Sequence[str], tool: str = "auto") -> Path:
    """Makes or completes an environment with this project, editable, and the extras; returns its Python.

    Does nothing when it was made from the same pyproject.toml, constraints and Python, with at least these extras.

    Args:
        environment: its folder; made anew when it belongs to another Python.
        tool: "uv", "pip", or "auto" for uv where it can be had.

    Raises:
        SetupError: Python is too old, or an installation step failed.
    """
    if sys.version_info < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        raise SetupError(f"Python {wanted} or newer is needed, this is {platform.python_version()} ({sys.executable})")
    wanted_stamp = _stamp(extras)
    stamp = _read_stamp(environment)
    python = script_in(environment, "python")
    same = {key: stamp.get(key) for key in ("python", "inputs")} == {
        key: wanted_stamp[key] for key in ("python", "inputs")
    }
    if same and set(extras) <= set(stamp.get("extras", ())) and python.exists():
        return python
    if not same and environment.exists():
        shutil.rmtree(environment)
    # Extras that are there already stay: both scripts use one environment.
    extras = sorted({*extras, *(stamp.get("extras", ()) if same else ())})
    uv = None if tool == "pip" else find_uv()
    if uv is None and tool == "uv":
        raise SetupError("uv is not on PATH and pip cannot install it")
    print(
        f"setting up {environment.name} with {'uv' if uv else 'venv and pip'} (extras: {', '.join(extras) or 'none'})"
    )
    (environment / STAMP).unlink(missing_ok=True)
    install_project(environment, extras, uv)
    (environment / STAMP).write_text(json.dumps(_stamp(extras)) + "\n", encoding="utf-8")
    return python


def find_uv() -> str | None:
    """A uv that runs: on PATH, from an earlier call, or installed by pip now; None when pip cannot."""
    own = UV_FOLDER / _BIN / f"uv{_EXE}"
    for candidate in (shutil.which("uv"), str(own)):
        if candidate and _answers([candidate, "--version"]):
            return candidate
    # A folder as target needs neither the venv module nor the right to write into the system's packages.
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(UV_FOLDER), "uv"]
    if _answers([sys.executable, "-m", "pip", "--version"]) and _answers(install) and _answers([str(own), "--version"]):
        return str(own)
    return None


def installed_browser() -> str | None:
    """The path of Chromium, which opens pages in tests and draws pictures for docs/; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run(command: Sequence[str | Path], environment: dict[str, str] | None = None, show: str = "") -> int:
    """Runs a command in the project's folder after printing it; returns its exit status."""
    arguments = [str(part) for part in command]
    print(f"$ {show or shlex.join(arguments)}", flush=True)
    return subprocess.run(arguments, cwd=ROOT, env=environment, check=False).returncode


def install_project(environment: Path, extras: Sequence[str], uv: str | None) -> None:
    project = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    python = str(script_in(environment, "python"))
    # On a terminal the installers show the progress of their large downloads.
    options = [*([] if sys.stdout.isatty() else ["--quiet"]), "-c", str(CONSTRAINTS), "-e", project]
    if not Path(python).exists():
        make = [uv, "venv", "--quiet", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
        run_step([*make, str(environment)])
    # pip compiles what it installs, uv only when told. Where a shell forbids Python to write bytecode, every command
    # would otherwise compile PyTorch anew, for longer than a small export takes.
    install = (
        [uv, "pip", "install", "--compile-bytecode", "--python", python] if uv else [python, "-m", "pip", "install"]
    )
    run_step([*install, *options])


def run_step(command: Sequence[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise SetupError(
            f"this step failed with status {done.returncode}: {shlex.join(command)}\n"
            "  check the network and the free disk space (PyTorch takes several GB), then run the same command again"
        )


def _answers(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False, cwd=ROOT).returncode == 0
    except OSError:
        return False


def _stamp(extras: Sequence[str]) -> dict[str, object]:
    inputs = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes()).hexdigest()
    return {"python": f"{sys.executable} {sys.version}", "inputs": inputs, "extras": sorted(extras)}


def _read_stamp(environment: Path) -> dict[str, list[str]]:
    try:
        stamp: dict[str, list[str]] = json.loads((environment / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp
