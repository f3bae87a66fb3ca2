"""Faults while the command line exports: the old bundle stays, and nothing is left beside it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlm_export.bundle.environment import environment_errors
from vlm_export.bundle.target_lock import locked
from vlm_export.exporting import pipeline

Cli = Callable[..., Any]
Spawn = Callable[..., Any]
Snapshot = Callable[[Path], dict[str, bytes]]
STAGES = ["read", "load weights"] + [
    f"{stage} {part}"
    for stage in ("export", "simplify", "write", "load reference of", "verify", "record golden of")
    for part in ("vision", "text")
]


@pytest.fixture
def old(tmp_path: Path, exported: Path) -> Path:
    """A bundle that is to be overwritten."""
    return Path(shutil.copytree(exported, tmp_path / "old" / "bundle"))


def test_file_size_limit(spawn: Spawn, old: Path, snapshot: Snapshot, checkpoint: Path, fast: tuple[str, ...]) -> None:
    before = snapshot(old.parent)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    result = spawn("export", checkpoint, "-o", old, "--overwrite", "--quiet", *fast, code=limit)
    result.refused(4, "stage: ", "fix: ")
    assert snapshot(old.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_too_little_space_is_told_before_anything_starts(
    cli: Cli,
    old: Path,
    snapshot: Snapshot,
    checkpoint: Path,
    fast: tuple[str, ...],
    overwrite: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = snapshot(old.parent)
    usage = shutil.disk_usage(old)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    target = (old, "--overwrite") if overwrite else (old.parent / "new",)
    result = cli("export", checkpoint, "-o", *target, *fast)
    result.refused(4, "not enough disk space", "got: 1000 bytes free", "fix: ")
    assert re.search(r"expected: \d+ bytes free", result.err)
    assert "export vision" not in result.err
    assert snapshot(old.parent) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_writing_a_graph_fails(
    cli: Cli,
    old: Path,
    snapshot: Snapshot,
    checkpoint: Path,
    fast: tuple[str, ...],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(model: object, path: Path, threshold_bytes: int) -> None:
        path.write_bytes(b"half a graph")
        raise OSError(number, os.strerror(number), str(path))

    before = snapshot(old.parent)
    monkeypatch.setattr(pipeline, "write_graph", fail)
    result = cli("export", checkpoint, "-o", old, "--overwrite", "--quiet", *fast)
    result.refused(4, "write vision", os.strerror(number), "fix: ")
    assert snapshot(old.parent) == before


def test_open_session_survives_an_overwrite(cli: Cli, old: Path, checkpoint: Path, fast: tuple[str, ...]) -> None:
    from vlm_export import load

    pair = load(old)
    before = pair.encode_ids([[1, 2, 199]])
    other = checkpoint.parents[1] / "rn_tiny" / "jit_archive.pt"
    assert cli("export", other, "-o", old, "--overwrite", "--quiet", *fast).status == 0
    assert (pair.encode_ids([[1, 2, 199]]) == before).all()
    assert not (load(old).encode_ids([[1, 2, 199]]) == before).all()


@pytest.mark.parametrize(
    ("stage", "kind"),
    [(stage, KeyboardInterrupt) for stage in STAGES]
    + [(stage, MemoryError) for stage in ("load weights", "export vision", "verify vision")],
)
def test_fault_in_each_stage(
    cli: Cli,
    old: Path,
    snapshot: Snapshot,
    checkpoint: Path,
    fast: tuple[str, ...],
    stage: str,
    kind: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal arrives, or memory ends, just as the stage does."""
    original = F.scaled_dot_product_attention
    before = snapshot(old.parent)

    def faulty(name: str) -> Any:
        return _Raising(environment_errors(name), kind) if name == stage else environment_errors(name)

    monkeypatch.setattr("vlm_export.exporting.stages.environment_errors", faulty)
    result = cli("export", checkpoint, "-o", old, "--overwrite", "--quiet", *fast)
    assert result.status == (130 if kind is KeyboardInterrupt else 4)
    assert stage in result.err
    assert "Traceback" not in result.err
    assert snapshot(old.parent) == before
    assert F.scaled_dot_product_attention is original
    assert torch.is_grad_enabled()


class _Raising:
    """A context that raises at the end of its block, as if the block had."""

    def __init__(self, inner: Any, kind: type[BaseException]) -> None:
        self.inner, self.kind = inner, kind

    def __enter__(self) -> Any:
        return self.inner.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        if error is None:
            error = self.kind()
        if self.inner.__exit__(type(error), error, trace):
            return True
        raise error


@pytest.mark.usefixtures("default_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_a_stage_runs(
    old: Path, snapshot: Snapshot, checkpoint: Path, fast: tuple[str, ...], number: signal.Signals
) -> None:
    before = snapshot(old.parent)
    line = [sys.executable, "-m", "vlm_export.cli.main", "export", str(checkpoint), "-o", str(old), "--overwrite"]
    process = subprocess.Popen([*line, "--no-tokenizer"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for text in process.stderr:
        if text.startswith("load weights"):
            # The next stage takes seconds at its first run.
            time.sleep(0.3)
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=120)
    # Python itself ends by SIGINT, which shells show as 130, when the exception crossed an exec() of source text.
    assert process.returncode in (130, -signal.SIGINT)
    assert out == ""
    assert "interrupted (stage: export vision)" in err
    assert "Traceback" not in err
    assert snapshot(old.parent) == before


def test_two_exports_to_one_target(
    cli: Cli, old: Path, snapshot: Snapshot, checkpoint: Path, fast: tuple[str, ...]
) -> None:
    before = snapshot(old.parent)
    with locked(old):
        result = cli("export", checkpoint, "-o", old, "--overwrite", "--quiet", *fast)
        result.refused(4, "another process", str(os.getpid()), "fix: ")
    assert snapshot(old.parent) == before


def test_target_that_exists(cli: Cli, old: Path, snapshot: Snapshot, checkpoint: Path, fast: tuple[str, ...]) -> None:
    (old.parent / "photos").mkdir()
    (old.parent / "photos" / "holiday.jpg").write_bytes(b"dear")
    before = snapshot(old.parent)
    cli("export", checkpoint, "-o", old, *fast).refused(2, str(old), "--overwrite")
    for overwrite in ((), ("--overwrite",)):
        cli("export", checkpoint, "-o", old.parent / "photos", *overwrite, *fast).refused(2, "not a bundle")
    (old / "notes.txt").write_text("mine")
    cli("export", checkpoint, "-o", old, "--overwrite", *fast).refused(2, "notes.txt")
    (old / "notes.txt").unlink()
    assert snapshot(old.parent) == before


def test_read_only_target(
    cli: Cli, tmp_path: Path, checkpoint: Path, fast: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that refuses; permissions alone do not stop every user that tests run as."""
    mkdir = Path.mkdir

    def refuse(path: Path, *rest: Any, **options: Any) -> None:
        if ".vlm-export-" in path.name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = cli("export", checkpoint, "-o", tmp_path / "out" / "bundle", *fast)
    result.refused(4, os.strerror(errno.EROFS), "writable")
    assert not list(tmp_path.iterdir())


def test_path_that_is_not_utf8(cli: Cli, tmp_path: Path, checkpoint: Path, fast: tuple[str, ...]) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    cli("export", checkpoint, "-o", folder, *fast).refused(2, "UTF-8", r"caf\xe9")
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    source = Path(shutil.copy(checkpoint, folder / "model.pt"))
    for verb in (("export", source, "-o", tmp_path / "bundle", *fast), ("inspect", source), ("inspect", folder)):
        cli(*verb).refused(2, "UTF-8", r"caf\xe9", "fix: ")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_images_whose_names_are_not_utf8(spawn: Spawn, tmp_path: Path, pair: Path, image_path: Path) -> None:
    path = Path(shutil.copy(image_path, tmp_path / os.fsdecode(b"caf\xe9.png")))
    result = spawn("classify", pair, path, "cat", "--template", "{}", "--json")
    assert (result.status, result.err) == (0, "")
    assert result.data["image"] == str(path)
    assert spawn("embed", pair, path, "-o", tmp_path / "x.npy", "--quiet").status == 0
    assert "caf\\udce9.png" in spawn("search", pair, tmp_path / "x.npy", "cat").out


def test_other_working_directory(
    cli: Cli, tmp_path: Path, checkpoint: Path, fast: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(checkpoint, tmp_path / "model.pt")
    relative = cli("export", "../model.pt", "-o", "../there/bundle", "--quiet", *fast, "--external-data-threshold", "0")
    assert relative.status == 0
    assert not list((tmp_path / "here").iterdir())
    monkeypatch.chdir(tmp_path / "there")
    assert cli("verify", "bundle").status == 0
    assert cli("verify", tmp_path / "there" / "bundle").status == 0
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["bundle"]


BLOCK = "for name in ('torch', 'onnx', 'onnx_ir', 'transformers'): sys.modules[name] = None"


def test_missing_extra(spawn: Spawn, tmp_path: Path, checkpoint: Path, pair: Path, image_path: Path) -> None:
    missing = str(tmp_path / "missing.pt")
    result = spawn("export", checkpoint, "-o", tmp_path / "bundle", "--json", code=BLOCK)
    result.refused(4, "pip install '.[export]' -c constraints.txt")
    assert result.data["exit_status"] == 4
    assert not (tmp_path / "bundle").exists()
    spawn("inspect", checkpoint, code=BLOCK).refused(4, "'.[export]'")
    for arguments in (
        ("inspect", missing),
        ("export", missing, "-o", tmp_path / "b"),
        ("verify", pair, "--source", missing),
    ):
        spawn(*arguments, code=BLOCK).refused(2, "there is no such file or directory", missing)
    for verb in (("classify", pair, image_path, "cat", "--template", "{}"), ("inspect", pair)):
        assert spawn(*verb, code=BLOCK).status == 0


def test_each_verb_names_its_own_extra(spawn: Spawn, tmp_path: Path, pair: Path) -> None:
    """Of `graph` the small one; protobuf's package is called google."""
    graph = pair / "onnx" / "text_model.onnx"
    spawn("graph", "show", graph, code=BLOCK).refused(4, "pip install '.[graph]' -c constraints.txt")
    code = "sys.modules['google'] = None; sys.modules['google.protobuf'] = None"
    spawn("graph", "check", graph, code=code).refused(4, "pip install '.[graph]' -c constraints.txt", "google")


def test_closed_pipe(tmp_path: Path, pair: Path) -> None:
    """As behind `| head`: no traceback, and a failure keeps its status."""
    for arguments, expected in ((["inspect", str(pair)], 0), (["verify", str(tmp_path / "none")], 3)):
        process = subprocess.Popen(
            [sys.executable, "-m", "vlm_export.cli.main", *arguments, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read().decode()
        status = process.wait(timeout=60)
        process.stderr.close()
        assert "Traceback" not in err
        assert "BrokenPipe" not in err
        assert status == expected, err
