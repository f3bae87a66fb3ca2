"""Environments of the scripts: made once, made again when their inputs change, with clear errors."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent
Installs = list[tuple[Path, list[str], "str | None"]]


@pytest.fixture
def bootstrap(tmp_path: Path) -> ModuleType:
    """The module, with a project of its own."""
    spec = importlib.util.spec_from_file_location("scripts_bootstrap", ROOT / "scripts" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\n")
    module.__dict__.update(ROOT=tmp_path, CONSTRAINTS=tmp_path / "constraints.txt", UV_FOLDER=tmp_path / ".venv-uv")
    return module


@pytest.fixture
def installs(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Installs:
    """What would have been installed; a Python appears as if it had been."""
    done: Installs = []

    def install(environment: Path, extras: list[str], uv: str | None) -> None:
        done.append((environment, list(extras), uv))
        python = bootstrap.script_in(environment, "python")
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()

    monkeypatch.setattr(bootstrap, "install_project", install)
    monkeypatch.setattr(bootstrap, "find_uv", lambda: "uv")
    return done


def test_environment_is_made_once(bootstrap: ModuleType, installs: Installs, tmp_path: Path) -> None:
    for _ in range(2):
        python = bootstrap.ensure_environment(tmp_path / "env", ("export",))
    assert python == bootstrap.script_in(tmp_path / "env", "python")
    assert installs == [(tmp_path / "env", ["export"], "uv")]


def test_extras_add_up(bootstrap: ModuleType, installs: Installs, tmp_path: Path) -> None:
    for extras in (("export",), ("dev",), ("export",), ()):
        bootstrap.ensure_environment(tmp_path / "env", extras)
    assert [extras for _, extras, _ in installs] == [["export"], ["dev", "export"]]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_inputs_make_it_anew(bootstrap: ModuleType, installs: Installs, tmp_path: Path, name: str) -> None:
    bootstrap.ensure_environment(tmp_path / "env", ("export",))
    (tmp_path / "env" / "old").touch()
    (tmp_path / name).write_text("changed\n")
    bootstrap.ensure_environment(tmp_path / "env", ())
    assert [extras for _, extras, _ in installs] == [["export"], []]
    assert not (tmp_path / "env" / "old").exists()


def test_a_failed_installation_is_tried_again(
    bootstrap: ModuleType, installs: Installs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap.ensure_environment(tmp_path / "env", ())
    works: Callable[..., None] = bootstrap.install_project

    def fail(*_: object) -> None:
        raise bootstrap.SetupError("no network")

    monkeypatch.setattr(bootstrap, "install_project", fail)
    with pytest.raises(bootstrap.SetupError):
        bootstrap.ensure_environment(tmp_path / "env", ("export",))
    monkeypatch.setattr(bootstrap, "install_project", works)
    bootstrap.ensure_environment(tmp_path / "env", ("export",))
    assert installs[-1][1] == ["export"]


def test_pip_is_used_where_uv_is_not_to_be_had(
    bootstrap: ModuleType, installs: Installs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "find_uv", lambda: None)
    bootstrap.ensure_environment(tmp_path / "env", ())
    assert installs == [(tmp_path / "env", [], None)]
    with pytest.raises(bootstrap.SetupError, match="uv"):
        bootstrap.ensure_environment(tmp_path / "other", (), "uv")


def test_uv_that_does_not_run_is_not_taken(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_answers", lambda command: False)
    assert bootstrap.find_uv() is None


def test_old_python_is_refused(bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(bootstrap.SetupError, match=r"3\.10 or newer"):
        bootstrap.ensure_environment(tmp_path / "env", ())


def test_a_failing_step_says_which(bootstrap: ModuleType) -> None:
    with pytest.raises(bootstrap.SetupError, match=r"status 3: .*raise SystemExit"):
        bootstrap.run_step([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("uv", ["uv", None])
def test_what_is_installed_is_compiled(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, uv: str | None) -> None:
    """uv does so when told, pip by itself."""
    steps: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "run_step", lambda command: steps.append([str(part) for part in command]))
    bootstrap.install_project(Path("env"), [], uv)
    assert "install" in steps[-1]
    assert ("--compile-bytecode" in steps[-1]) is (uv is not None)
    assert "--no-compile" not in steps[-1]
