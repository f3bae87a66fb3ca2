"""`export --for`: one command from a checkpoint to a package; the bundle in between is not kept."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import vlm_export
from vlm_export.cli.main import main
from vlm_export.errors import InputError, UsageError
from vlm_export.layouts.package import package


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary directories, which has nothing in it when the work has ended."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def _exports_the_demo(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_export.api.export", lambda _, bundle, **__: shutil.copytree(demo, bundle))


def test_the_command(tmp_path: Path, scratch: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same files as from `package`."""
    options = ["--opset", "18", "--exporter", "torchscript", "--threads", "1", "--quiet", "--json"]
    assert main(["export", "clip-demo", "--for", "immich", "-o", str(tmp_path / "out"), *options]) == 0
    stated = json.loads(capsys.readouterr().out)
    assert stated["package"] == str(tmp_path / "out")
    assert stated["export"]["contract"]["passed"]
    assert stated["manifest"]["export"]["packaged_for"] == "immich"
    assert [report["passed"] for report in stated["verification"]] == [True, True]
    expected = package(demo, tmp_path / "expected", "immich", threads=1).manifest.files
    found = stated["manifest"]["files"]
    assert set(found) == set(expected)
    for name in ("visual/model.onnx", "textual/model.onnx", "textual/tokenizer.json", "visual/preprocess_cfg.json"):
        assert found[name]["sha256"] == expected[name].sha256
    assert stated["manifest"]["name"] == "out"
    assert list(scratch.iterdir()) == []
    vlm_export.verify(tmp_path / "out", threads=1).raise_if_failed()


@pytest.mark.usefixtures("_exports_the_demo")
def test_an_older_package_is_replaced(tmp_path: Path, scratch: Path) -> None:
    made = vlm_export.export_package("clip-demo", tmp_path / "out", "triton", threads=1)
    assert made.package.manifest.export.packaged_for == "triton"
    with pytest.raises(UsageError, match="exists"):
        vlm_export.export_package("clip-demo", tmp_path / "out", "triton")
    vlm_export.export_package("clip-demo", tmp_path / "out", "immich", overwrite=True, threads=1)
    assert (tmp_path / "out" / "visual").is_dir()
    assert list(scratch.iterdir()) == []


@pytest.mark.usefixtures("_exports_the_demo")
def test_a_refusal_leaves_nothing_behind(tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(InputError, match="typesense cannot use this bundle"):
        vlm_export.export_package("clip-demo", tmp_path / "out", "typesense", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert list(scratch.iterdir()) == []


def test_mistakes_are_told_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Callable[..., None]:
        raise AssertionError("exported")

    monkeypatch.setattr("vlm_export.api.export", never)
    with pytest.raises(UsageError, match="no layout for 'immitch'"):
        vlm_export.export_package("clip-demo", tmp_path / "out", "immitch")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UsageError, match="not a bundle"):
        vlm_export.export_package("clip-demo", tmp_path / "mine", "immich", overwrite=True)
