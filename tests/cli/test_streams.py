"""Standard streams that are closed, full or lack letters: the work is done, and the status says what was."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from vlm_export.runtime.search.store import npy_metadata

LINUX = sys.platform == "linux"


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def shell(*arguments: object, streams: str, **environment: str) -> Ended:
    """A command with the shell's redirections."""
    words = [sys.executable, "-m", "vlm_export.cli.main", *arguments]
    line = f"exec {shlex.join(map(str, words))} {streams}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=env, timeout=240, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def with_closed_stderr(*arguments: object) -> Ended:
    """A command whose stderr is a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, "-m", "vlm_export.cli.main", *map(str, arguments)]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=write, text=True, timeout=240, check=False)
    os.close(write)
    return Ended(done.returncode, done.stdout, "")


def test_export_behind_a_closed_stderr_publishes(checkpoint: Path, fast: Sequence[str], tmp_path: Path) -> None:
    ended = with_closed_stderr("export", checkpoint, "-o", tmp_path / "bundle", *fast)
    assert ended.status == 0
    assert (tmp_path / "bundle" / "vlm_export.json").is_file()


def test_embed_behind_a_closed_stderr_writes(pair: Path, image_path: Path, tmp_path: Path) -> None:
    ended = with_closed_stderr("embed", pair, image_path, image_path, "-o", tmp_path / "x.npy")
    assert (ended.status, (tmp_path / "x.npy").is_file()) == (0, True)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_failures_keep_their_status_behind_a_closed_stderr(tmp_path: Path, options: Sequence[str]) -> None:
    ended = with_closed_stderr("verify", tmp_path / "none", *options)
    assert ended.status == 3
    assert not options or json.loads(ended.out)["exit_status"] == 3


@pytest.mark.skipif(not LINUX, reason="needs /dev/full")
def test_full_disk_behind_stdout(pair: Path) -> None:
    ended = shell("inspect", pair, streams="> /dev/full")
    assert ended.status == 4
    assert "No space left" in ended.err
    assert "Traceback" not in ended.err


def test_streams_that_are_closed(pair: Path, tmp_path: Path) -> None:
    assert shell("inspect", pair, streams=">&-") == (0, "", "")
    ended = shell("inspect", tmp_path / "none", "--json", streams="2>&-")
    assert ended.status == 2
    assert json.loads(ended.out)["error"] == "usage"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_json_holds_every_letter(pair: Path, image_path: Path, encoding: str) -> None:
    labels = ("caf\u00e9", "\U0001f600")
    ended = shell("classify", pair, image_path, *labels, "--json", streams="", PYTHONIOENCODING=encoding)
    data: dict[str, Any] = json.loads(ended.out)
    assert {entry["label"] for entry in data["labels"]} == set(labels)


def test_wrong_usage_as_json(refused_json: Any, pair: Path, image_path: Path) -> None:
    for options in (("--threads", "0"), ("--threads", "99999999999"), ("--nonsense",)):
        error = refused_json(2, "classify", pair, image_path, "cat", *options)
        assert options[0] in error["what"]
        assert error["where"].startswith("vlm-export")
        assert "usage:" not in error["where"]


def test_paths_that_the_system_refuses(cli: Any, pair: Path, tmp_path: Path) -> None:
    long = "a" * 300
    cli("embed", pair, long, "-o", tmp_path / "x.npy").refused(3, "File name too long")
    assert "Traceback" not in cli("classify", pair, long, "cat").err
    assert "Traceback" not in cli("inspect", long).err


def test_embed_looks_at_its_output_first(
    cli: Any, pair: Path, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_export.cli.embed.opened_model", lambda *_, **__: pytest.fail("work began"))
    (tmp_path / "folder.npy").mkdir()
    for output in (tmp_path / "none" / "x.npy", tmp_path / "folder.npy", image_path / "x.npy"):
        cli("embed", pair, image_path, "-o", output).refused(4, "the output cannot be written")
    (tmp_path / "old.npy").write_bytes(b"old")
    cli("embed", pair, image_path, "-o", tmp_path / "old.npy").refused(2, "the output exists", "--overwrite")
    assert (tmp_path / "old.npy").read_bytes() == b"old"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    cli("embed", pair, image_path, "-o", tmp_path / "x.parquet").refused(4, "parquet")


def test_embed_names_a_folder_that_it_may_not_read(
    cli: Any, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = tmp_path / "images" / "below"
    below.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    listing = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == below:
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    cli("embed", pair, tmp_path / "images", "-o", tmp_path / "x.npy").refused(4, str(below), "Permission denied")


def test_lines_of_a_text_file(cli: Any, pair: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_bytes("\ufeffa\u2028b\fc\r\n\r\n d \n".encode())
    assert cli("embed", pair, texts, "-o", tmp_path / "x.npy").status == 0
    assert npy_metadata(tmp_path / "x.npy")["items"] == ["a\u2028b\fc", "d"]


def test_classify_cuts_long_labels_when_asked(cli: Any, pair: Path, image_path: Path) -> None:
    long = "cat " * 100
    cli("classify", pair, image_path, long, "dog").refused(3, "too long")
    assert cli("classify", pair, image_path, long, "dog", "--truncate").status == 0
