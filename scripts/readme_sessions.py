"""Runs the sessions that README shows and writes their output into it; `--check` compares instead.

Numbers differ from machine to machine, so the check compares everything but them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SESSION = re.compile(r"(<!-- session -->\n```console\n)(.*?)(```\n<!-- /session -->\n)", re.DOTALL)
_PROMPT = "$ "
_NUMBER = re.compile(r"[0-9][0-9.,]*(?:e[-+]?[0-9]+)?")
_HASH = re.compile(r"\b[0-9a-f]{16,64}\b")


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks; returns 1 when the check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    old = README.read_text(encoding="utf-8")
    with TemporaryDirectory() as folder:
        new = played(old, Path(folder))
    if not args.check:
        README.write_text(new, encoding="utf-8")
    elif comparable(old) != comparable(new):
        print("README.md shows other sessions: python scripts/readme_sessions.py", file=sys.stderr)
        return 1
    return 0


def played(readme: str, folder: Path) -> str:
    """The README with the output of its sessions, which run one after the other in `folder`.

    Raises:
        RuntimeError: a command failed.
    """
    shutil.copytree(ROOT / "configs" / "demo", folder / "configs" / "demo", dirs_exist_ok=True)

    def play(match: re.Match[str]) -> str:
        commands = [line for line in match[2].splitlines() if line.startswith(_PROMPT)]
        return match[1] + "".join(f"{line}\n{output_of(line, folder)}" for line in commands) + match[3]

    return SESSION.sub(play, readme)


def output_of(line: str, folder: Path) -> str:
    """What `$ vlm-export …` prints, both streams together as a terminal shows them."""
    program, *arguments = shlex.split(line.removeprefix(_PROMPT))
    if program != "vlm-export":
        raise RuntimeError(f"sessions run vlm-export only: {line}")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "vlm_export.cli.main", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{line}\nended with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def comparable(readme: str) -> list[str]:
    """The sessions' lines without numbers, hashes and the spaces that align them."""
    lines = [line for match in SESSION.finditer(readme) for line in match[2].splitlines()]
    return [" ".join(_NUMBER.sub("N", _HASH.sub("N", line)).replace("-", " ").split()) for line in lines]


if __name__ == "__main__":
    sys.exit(main())
