"""`vlm-export quantize` on the command line: its table, its statuses, its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_export.bundle.loss import over_budget
from vlm_export.bundle.opened import open_bundle
from vlm_export.cli.main import main


def test_over_budget_ends_with_status_1_and_shows_both_recipes(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", str(demo), "--precision", "int4", "--part", "text", "--budget", "cosine=1", "--threads", "1"]
    assert main([*words, "-o", str(tmp_path / "out"), "--quiet"]) == 1
    shown = capsys.readouterr()
    assert "naive" in shown.out
    assert "over: cosine" in shown.out
    assert "nothing was published" in shown.err
    assert "expected: at least 1" in shown.err
    assert not (tmp_path / "out").exists()


def test_a_search_leaves_the_costliest_weights_in_float32(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "quantize",
        str(demo),
        "--precision",
        "int4",
        "--part",
        "text",
        "--budget",
        "cosine=0.99",
        "--threads",
        "1",
    ]
    words += ["-o", str(tmp_path / "out"), "--quiet"]
    assert main([*words, "--json"]) == 1
    plain = json.loads(capsys.readouterr().out)["losses"][0]["loss"]
    assert plain["searched"] is None
    assert main([*words, "--search"]) == 0
    assert "stay in float32 for the budget" in capsys.readouterr().out
    loss = open_bundle(tmp_path / "out").manifest.part("text").variant("int4").loss
    assert loss is not None
    assert loss.searched is not None
    costs = loss.searched.costs
    assert list(costs.values()) == sorted(costs.values(), reverse=True)
    assert 0 < loss.searched.nodes < loss.searched.of_nodes
    assert costs.keys() <= loss.kept.keys()
    assert loss.measured.size_share < 1
    assert over_budget(loss.measured, {"cosine": 0.99}) == []
    assert plain["measured"]["outputs"]["text_embeds"]["cosine"] < 0.99
    assert main(["verify", str(tmp_path / "out"), "--precision", "int4", "--quiet"]) == 0


def test_json_is_one_document_in_either_case(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(demo), "--precision", "w8a16", "--part", "text", "--threads", "1", "--json", "--quiet"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["losses"][0]["over_budget"] == []
    assert main([*words, "-o", str(tmp_path / "other"), "--budget", "mean-cosine=1"]) == 1
    refused = json.loads(capsys.readouterr().out)
    assert refused["exit_status"] == 1
    assert refused["losses"][0]["over_budget"]


@pytest.mark.parametrize("budget", ["cosin=0.9", "cosine=2", "\x1b[2J=1", "=" * 5000])
def test_a_bad_budget_is_status_2(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: str) -> None:
    assert main(["quantize", str(demo), "--precision", "int8", "--budget", budget, "-o", str(tmp_path / "out")]) == 2
    assert "\x1b" not in capsys.readouterr().err
