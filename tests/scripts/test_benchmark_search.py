"""The benchmark of an index measures what it says; its figures are not judged here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmarks.search")


def test_a_small_index_is_measured(search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = importlib.import_module("benchmark")
    options = ["--rows", "3000", "--dimension", "16", "--queries", "12", "--threads", "1"]
    # 1: on a machine that is busy it may miss its goal.
    assert benchmark.main(["--output", str(tmp_path), "search", *options]) in (0, 1)
    data = json.loads((tmp_path / "search.json").read_text(encoding="utf-8"))
    assert (data["rows"], data["dimension"], data["lists"]["recall"]["of"]) == (3000, 16, "items")
    for kind in ("drawn", "aside"):
        side = data["sides"][kind]
        assert side["recall"] > 0.8
        assert [len(side[name]["seconds"]) for name in ("all", "1 %", "50 %")] == [12, 12, 12]
    assert data["sizes"]["index"] > data["sizes"]["vectors"] == 4 * 3000 * 16
    page = (tmp_path / "search.md").read_text(encoding="utf-8")
    assert "| faiss flat, all vectors |" in page
    assert f"scripts/benchmark.py search {' '.join(options)}" in page


def test_what_is_drawn_has_neighbours(search: Any) -> None:
    """Unlike uniform vectors, whose nearest are no nearer than any."""
    drawn = search.Drawn(3000, 64)
    vectors, queries = drawn.vectors(3000, 1000), drawn.vectors(20, 1)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.array_equal(queries, search.Drawn(3000, 64).vectors(20, 1))
    scores = np.sort(queries @ vectors.T, axis=1)
    assert (scores[:, -10] > scores[:, 1500] + 0.3).mean() > 0.9
    aside = drawn.vectors(20, 1, aside=True)
    assert ((aside @ drawn.offset.T) > (queries @ drawn.offset.T) + 0.3).all()
