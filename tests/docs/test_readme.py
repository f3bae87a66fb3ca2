"""What README says is so: its sessions, its Python, its tables and its commands."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from vlm_export.cli.main import VERBS, build_parser

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"


def load_script(name: str) -> ModuleType:
    """A module of scripts/, which is no package; its neighbours are importable while it loads."""
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


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sessions() -> ModuleType:
    return load_script("readme_sessions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def played(sessions: ModuleType, readme: str, folder: Path) -> str:
    text: str = sessions.played(readme, folder)
    return text


def test_sessions_print_what_readme_shows(sessions: ModuleType, readme: str, played: str) -> None:
    assert sessions.comparable(played) == sessions.comparable(readme)
    verbs = re.findall(r"^\$ vlm-export (\w+)", readme, re.MULTILINE)
    assert set(verbs) == set(VERBS)


def test_the_check_sees_changed_words_and_order(sessions: ModuleType, readme: str) -> None:
    shown = sessions.comparable(readme)
    assert sessions.comparable(readme.replace("compared with", "like")) != shown
    assert sessions.comparable(readme.replace("image_embeds", "embeds")) != shown
    assert len(shown) > 40


def test_python_of_readme_runs(readme: str, played: str, folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    checks = "\nassert cosines.shape == (2, 2)\nassert abs(float(probabilities.sum()) - 1) < 1e-5\n"
    done = subprocess.run(
        [sys.executable, "-c", code + checks], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "float32" in done.stdout
    assert played


def test_quickstart_job_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quickstart = load_script("quickstart")
    python = Path(sys.executable)
    assert quickstart.run_job(python, python, tmp_path) == 0
    out = capfd.readouterr().out
    assert "$ vlm-export search" in out
    assert (tmp_path / "clip-demo" / "vlm_export.json").is_file()


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The script, which describes each checkpoint once."""
    module = load_script("readme_tables")
    module.__dict__["table"] = cache(module.table)
    return module


def test_table_of_checkpoints_is_up_to_date(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0


def test_table_check_sees_a_missing_row(tables: ModuleType, readme: str) -> None:
    without = "\n".join(line for line in readme.splitlines() if "`clip-rn50`" not in line) + "\n"
    assert without != readme
    assert tables.updated(without) == readme


def test_every_verb_and_exit_status_is_named(readme: str) -> None:
    for verb in VERBS:
        assert f"| `{verb} " in readme
    epilog = build_parser().epilog or ""
    for status in re.findall(r"\b(\d+) [a-z]", epilog):
        assert f"\n| {status} |" in readme


def test_links_lead_somewhere() -> None:
    for page in [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
