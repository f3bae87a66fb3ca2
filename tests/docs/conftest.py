"""Scripts of the pages as modules, and the sessions of README, run once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


def _load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """A module of scripts/, which is no package; its neighbours are importable while it loads."""
    return _load_script


@pytest.fixture(scope="session")
def sessions() -> ModuleType:
    return _load_script("doc_sessions")


@pytest.fixture(scope="session")
def tables() -> ModuleType:
    return _load_script("doc_tables")


@dataclass(frozen=True)
class Replayed:
    """README with what its sessions print now, and the folder in which they ran."""

    text: str
    folder: Path


@pytest.fixture(scope="session")
def replayed_readme(sessions: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    folder = tmp_path_factory.mktemp("sessions")
    text: str = sessions.replayed((ROOT / "README.md").read_text(encoding="utf-8"), folder)
    return Replayed(text, folder)


@pytest.fixture(scope="session")
def run_python() -> Callable[[str, Path], str]:
    """Runs a program as a file of its own in a folder, which worker processes can import, and returns its output."""

    def run(code: str, folder: Path) -> str:
        program = folder / "program.py"
        program.write_text(code, encoding="utf-8")
        command = [sys.executable, str(program)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        return done.stdout

    return run
