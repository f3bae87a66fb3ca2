"""The sessions and programs of docs/ do what their pages show; README's run in `test_readme.py`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "<!-- session -->" in page.read_text(encoding="utf-8")]


def test_pages_with_sessions_are_found() -> None:
    assert {page.stem for page in PAGES} == {
        "deploying",
        "doctor",
        "exporting",
        "graphs",
        "numerics",
        "packaging",
        "regression-testing",
        "search",
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sessions_and_programs_of_a_page(
    page: Path, sessions: ModuleType, replayed_readme: Any, run_python: Callable[[str, Path], str]
) -> None:
    text = page.read_text(encoding="utf-8")
    replayed = sessions.replayed(text, replayed_readme.folder)
    assert sessions.comparable(replayed) == sessions.comparable(text)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        assert run_python(code, replayed_readme.folder).strip() or "print" not in code
