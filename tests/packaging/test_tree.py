"""What may not stand in the repository: traces of machines and registries, and notes to self."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent.parent
_SKIPPED_FOLDERS = {".git", "__pycache__", "build", "data", "dist", "node_modules", "out"}
_TEXT_SUFFIXES = {"", ".in", ".json", ".md", ".py", ".svg", ".toml", ".txt", ".yaml"}
# Written in pieces, so that this file does not match itself.
_FORBIDDEN = {
    "a note to self": r"\bTO" r"DO\b|\bFIX" r"ME\b",
    "a registry's host": r"pypi\." r"org|python" r"hosted|npm" r"js\.|deb\." r"debian",
    "a path of one machine": r"(?<![\w./])/(?:wo" r"rk|opt/dev|ro" r"ot|ho" r"me/\w+)/",
}


def text_files() -> Iterator[Path]:
    """The files that a person wrote, without what Git ignores."""
    for folder, folders, names in os.walk(ROOT):
        hidden = {name for name in folders if name.startswith(".") and name != ".ci"}
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS - hidden - {n for n in folders if n.endswith(".egg-info")})
        # In a worktree of Git, `.git` is a file that names the clone's folder.
        own = sorted(name for name in names if name != ".git" and Path(name).suffix in _TEXT_SUFFIXES)
        yield from (Path(folder, name) for name in own)


@pytest.mark.parametrize("what", _FORBIDDEN)
def test_nothing_in_the_tree_names(what: str) -> None:
    pattern = re.compile(_FORBIDDEN[what])
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def _constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_constraints_are_pins_without_addresses() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert " @ " not in text
    assert not re.search(r"^\s*-", text, re.MULTILINE)
    for requirement in _constraints():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), str(requirement)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_pin_every_dependency_within_its_bounds(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.4", "sys_platform": "linux"}
    pins: dict[str, str] = {}
    for requirement in _constraints():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"{name} is pinned twice for Python {python}"
            pins[name] = str(requirement.specifier).removeprefix("==")
    stated = [Requirement(text) for text in requires("vlm-export") or []]
    assert len({requirement.name for requirement in stated}) > 25
    for requirement in stated:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_ci_runs_the_readmes_test_command() -> None:
    command = "python3 scripts/test.py"
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert command in readme
    last = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert last == f"exec {command}"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
