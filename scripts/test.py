"""All checks on a machine that has Python and pip only: `python3 scripts/test.py [pytest arguments]`."""

from __future__ import annotations

import os
import subprocess
import sys

from bootstrap import ROOT, SetupError, ensure_environment, installed_browser, run, script_in

ENVIRONMENT = ROOT / ".venv"
EXTRAS = ("dev", "export", "parquet")
CHECKS = (("ruff", "check", "."), ("ruff", "format", "--check", "."))


def main(pytest_arguments: list[str]) -> int:
    """Sets up the development environment, runs every check, and returns 0 when all passed."""
    try:
        python = ensure_environment(ENVIRONMENT, EXTRAS)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failed = [" ".join(check[:2]) for check in CHECKS if run([script_in(ENVIRONMENT, check[0]), *check[1:]]) != 0]
    # While pytest's workers start, one core is idle.
    typing = subprocess.Popen([script_in(ENVIRONMENT, "mypy"), "--strict"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    # Two workers with one thread each; more would fight for the cores. A file's tests share their fixtures. Files keep
    # their order: by their number of tests, those with few long ones would come last, and one worker wait for minutes.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    # The tests start hundreds of processes; without bytecode each compiles this project and its libraries anew.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    marks = "not slow"
    if installed_browser() is None:
        print("not run: tests marked browser, since there is no Chromium on PATH", flush=True)
        marks += " and not browser"
    workers = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
    status = run([python, "-m", "pytest", *workers, "-m", marks, *pytest_arguments], environment)
    print("$ mypy --strict\n" + typing.communicate()[0], end="", flush=True)
    failed += ["mypy"] if typing.returncode else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return status or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
