"""Runs the sessions that README and docs/ show, and writes their output into the pages; `--check` compares instead.

Numbers differ from machine to machine, so the check compares everything but them. The sessions of README run first;
those of every other page start with the bundle that they leave, and with nothing of any other page.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from doc_pages import README, ROOT, read_pages, write_or_check

SESSION = re.compile(r"(<!-- session -->\n```console\n)(.*?)(```\n<!-- /session -->\n)", re.DOTALL)
_PROMPT = "$ "
_STATUS = re.compile(r" # status (\d+)$")
_NUMBER = re.compile(r"[0-9][0-9.,]*(?:e[-+]?[0-9]+)?")
_HASH = re.compile(r"\b[0-9a-f]{16,64}\b")


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks; returns 1 when the check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("pages", nargs="*", type=Path, help="only these pages (default: all that have sessions)")
    args = parser.parse_args(arguments)
    chosen = [page.resolve() for page in args.pages]
    with TemporaryDirectory() as folder:
        new = replayed_pages(chosen, Path(folder))
    return write_or_check(new, check=args.check, script="doc_sessions.py", comparable=comparable)


def replayed_pages(chosen: Sequence[Path], folder: Path) -> dict[Path, str]:
    """The chosen pages with sessions, all where none is chosen, as their sessions print now."""
    pages = {page: text for page, text in read_pages().items() if SESSION.search(text)}
    first = replayed(pages.pop(README), folder)
    new = {README: first, **{page: replayed(text, folder) for page, text in pages.items() if page in (chosen or pages)}}
    return {page: text for page, text in new.items() if page in chosen or not chosen}


def replayed(page: str, folder: Path) -> str:
    """The page with the output of its sessions, which run one after the other in `folder`.

    Raises:
        RuntimeError: a command ended with another status.
    """
    shutil.copytree(ROOT / "configs" / "demo", folder / "configs" / "demo", dirs_exist_ok=True)

    def play(match: re.Match[str]) -> str:
        commands = [line for line in match[2].splitlines() if line.startswith(_PROMPT)]
        return match[1] + "".join(f"{line}\n{output_of(line, folder)}" for line in commands) + match[3]

    return SESSION.sub(play, page)


def output_of(line: str, folder: Path) -> str:
    """What `$ vlm-export …` prints, both streams together as a terminal shows them; `# status 1` tells how it ends."""
    program, *arguments = shlex.split(line.removeprefix(_PROMPT), comments=True)
    if program != "vlm-export":
        raise RuntimeError(f"sessions run vlm-export only: {line}")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "vlm_export", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    stated = _STATUS.search(line)
    if done.returncode != (int(stated[1]) if stated else 0):
        raise RuntimeError(f"{line}\nended with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def comparable(page: str) -> list[str]:
    """The sessions' lines without numbers, hashes and the spaces that align them."""
    lines = [line for match in SESSION.finditer(page) for line in match[2].splitlines()]
    return [" ".join(_NUMBER.sub("N", _HASH.sub("N", line)).replace("-", " ").split()) for line in lines]


if __name__ == "__main__":
    sys.exit(main())
