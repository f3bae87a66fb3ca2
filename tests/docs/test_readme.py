"""What README says is so: its sessions, its Python, the quickstart, and that it fits a screen."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
MAX_BYTES = 10_000


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text(encoding="utf-8")


def test_readme_is_short() -> None:
    assert README.stat().st_size <= MAX_BYTES


def test_sessions_print_what_readme_shows(sessions: ModuleType, readme: str, replayed_readme: Any) -> None:
    assert sessions.comparable(replayed_readme.text) == sessions.comparable(readme)
    assert re.findall(r"^\$ vlm-export (\w+)", readme, re.MULTILINE) == ["export", "verify", "classify"]


def test_the_check_sees_changed_words_and_order(sessions: ModuleType, readme: str) -> None:
    shown = sessions.comparable(readme)
    assert sessions.comparable(readme.replace("compared with", "like")) != shown
    assert sessions.comparable(readme.replace("image_embeds  ", "embeds  ")) != shown
    assert len(shown) > 20


def test_python_of_readme_runs(readme: str, replayed_readme: Any, run_python: Callable[[str, Path], str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(code.split("\n\n", 1)[1].splitlines()) <= 10
    shapes = "assert image_embeds.shape == text_embeds.shape == (2, 128)\n"
    found = "assert (image_embeds @ text_embeds.T).argmax(axis=1).tolist() == [0, 1]\n"
    assert run_python(code + shapes + found, replayed_readme.folder).startswith("['embed']\n")


def test_quickstart_uses_the_bundle(
    load_script: Callable[[str], ModuleType], replayed_readme: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quickstart = load_script("quickstart")
    bundle = replayed_readme.folder / "out" / "clip-demo"
    assert quickstart.use_bundle(Path(sys.executable), bundle, tmp_path / "images.npy") == 0
    assert "$ vlm-export search" in capfd.readouterr().out


@pytest.mark.parametrize("failing", [None, "export", "classify"])
def test_quickstart_exports_first_and_stops_at_a_failure(
    load_script: Callable[[str], ModuleType], failing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickstart, calls = load_script("quickstart"), list[tuple[Path, str]]()

    def run(command: list[Any], show: str) -> int:
        calls.append((command[0], show.split()[1]))
        return 5 if show.split()[1] == failing else 0

    monkeypatch.setattr(quickstart, "run", run)
    made, used = Path("with-torch"), Path("without-torch")
    assert quickstart.run_job(made, used, tmp_path) == (0 if failing is None else 5)
    verbs = [verb for _, verb in calls if verb != "-c"]
    order = ["export", "verify", "classify", "embed", "search"]
    assert verbs == (order if failing is None else order[: order.index(failing) + 1])
    assert [python for python, _ in calls] == [made, *[used] * (len(calls) - 1)]
