"""Distributions built from a copy of the tree, and environments to install them in; nothing asks a registry."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# What a distribution is built from.
SOURCES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt")
FOLDERS = ("configs", "docs", "models", "tests", "vlm_export")


def run_clean(command: list[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command without this process's Python settings; the caller judges its status."""
    keep = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))
    }
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=cwd, env=keep, capture_output=True, text=True, timeout=300, check=False)


def run_checked(command: list[str | Path], cwd: Path) -> str:
    """Runs a command that must succeed; returns its standard output."""
    done = run_clean(command, cwd)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@dataclass(frozen=True)
class Built:
    """A wheel built from the tree, a source distribution, and a wheel built from that."""

    wheel: Path
    sdist: Path
    wheel_from_sdist: Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the project and the distributions that its metadata ask for, and no others."""

    home: Path

    def run(self, name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment, away from the repository."""
        return run_clean([self.home / "bin" / name, *arguments], self.home)

    def check_dependencies(self) -> subprocess.CompletedProcess[str]:
        """`pip check`."""
        return run_clean([*uv(), "pip", "check", "--python", self.home / "bin" / "python"], self.home)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that builds leave nothing in the repository."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", *SOURCES):
        shutil.copy2(ROOT / name, copy / name)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "data")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="session")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Without build isolation: setuptools is this environment's."""
    out = tmp_path_factory.mktemp("dist")
    build: list[str | Path] = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    run_checked([*build, out / "direct", "--wheel"], tree)
    run_checked([*build, out / "indirect"], tree)
    (wheel,) = (out / "direct").glob("*.whl")
    (indirect,) = (out / "indirect").glob("*.whl")
    (sdist,) = (out / "indirect").glob("*.tar.gz")
    return Built(wheel, sdist, indirect)


@pytest.fixture(scope="session")
def install(
    tmp_path_factory: pytest.TempPathFactory, link_distributions: Callable[..., None]
) -> Callable[..., Environment]:
    """Makes an environment: `install(*arguments of uv pip install, metadata=wheel, also=distributions)`."""

    def make(*arguments: str | Path, metadata: Path, also: Sequence[str] = ()) -> Environment:
        home = tmp_path_factory.mktemp("environment") / "env"
        venv: list[str | Path] = [*uv(), "venv", "--quiet", "--offline", "--python", sys.executable, home]
        run_checked(venv, home.parent)
        site = next(home.glob("lib/python3*/site-packages"))
        link_distributions([*wheel_requirements(metadata), *also], site)
        options = ["--quiet", "--offline", "--no-deps", "--no-build-isolation", "--python", str(home / "bin/python")]
        run_checked([*uv(), "pip", "install", *options, *arguments], home.parent)
        return Environment(home)

    return make


def uv() -> list[str]:
    """The command line of uv: the environment's own, or the one on PATH."""
    if importlib.util.find_spec("uv"):
        return [sys.executable, "-m", "uv"]
    found = shutil.which("uv")
    assert found, "the dev extra brings uv"
    return [found]


def wheel_requirements(wheel: Path) -> list[str]:
    """What the wheel's metadata ask for, extras included as markers."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode()).get_all("Requires-Dist") or []
