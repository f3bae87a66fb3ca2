"""Faults while a bundle is written leave the old one or the new one, whole."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlm_export.bundle import replacement
from vlm_export.bundle.environment import check_free_space, environment_errors
from vlm_export.bundle.manifest import MANIFEST_NAME, Manifest
from vlm_export.bundle.opened import open_bundle
from vlm_export.bundle.publish import Staging, publication
from vlm_export.errors import EnvironmentFailure, InputError, UsageError

DATA = "onnx/vision_model.onnx_data"
NOBODY = 65534
Publish = Callable[..., Manifest]
Read = Callable[[Path], int]


def hidden(parent: Path) -> list[str]:
    return sorted(entry.name for entry in parent.iterdir() if entry.name.startswith("."))


@contextmanager
def without_root() -> Iterator[None]:
    """Root passes every permission check; another effective user does not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_publish_and_overwrite(read_generation: Read, tmp_path: Path, publish_generation: Publish) -> None:
    target = tmp_path / "bundle"
    written = publish_generation(target, 1, overwrite=False)
    assert read_generation(target) == 1
    assert open_bundle(target).manifest == written
    publish_generation(target, 2)
    assert read_generation(target) == 2
    assert os.listdir(tmp_path) == ["bundle"]


def test_two_exports_of_the_same_are_the_same_bytes(tmp_path: Path, publish_generation: Publish) -> None:
    for name in ("a", "b"):
        publish_generation(tmp_path / name, 1)
    first, second = ((tmp_path / name / MANIFEST_NAME).read_bytes() for name in ("a", "b"))
    assert first == second


def test_permissions_follow_the_umask(tmp_path: Path, publish_generation: Publish) -> None:
    before = os.umask(0o022)
    try:
        publish_generation(tmp_path / "bundle", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o755


def test_an_existing_bundle_needs_overwrite(read_generation: Read, tmp_path: Path, publish_generation: Publish) -> None:
    target = tmp_path / "bundle"
    publish_generation(target, 1)
    with pytest.raises(UsageError, match="--overwrite"):
        publish_generation(target, 2, overwrite=False)
    assert read_generation(target) == 1
    assert hidden(tmp_path) == []


def test_missing_parents_are_created_and_removed_after_a_failure(
    read_generation: Read, tmp_path: Path, publish_generation: Publish
) -> None:
    with pytest.raises(RuntimeError), publication(tmp_path / "a" / "b" / "c", overwrite=False):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    publish_generation(tmp_path / "a" / "b" / "c", 1)
    assert read_generation(tmp_path / "a" / "b" / "c") == 1


def test_an_empty_directory_is_filled(read_generation: Read, tmp_path: Path, publish_generation: Publish) -> None:
    (tmp_path / "bundle").mkdir()
    publish_generation(tmp_path / "bundle", 1, overwrite=False)
    assert read_generation(tmp_path / "bundle") == 1


@pytest.mark.parametrize("kind", ["directory", "file", "link", "foreign file", "damaged"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_not_ours_is_never_replaced(
    tmp_path: Path, publish_generation: Publish, kind: str, overwrite: bool
) -> None:
    target = tmp_path / "target"
    if kind == "directory":
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    elif kind == "file":
        target.write_text("years of work")
    elif kind == "link":
        publish_generation(tmp_path / "real", 1)
        target.symlink_to(tmp_path / "real")
    else:
        publish_generation(target, 1)
        victim = target / ("onnx/embeddings.npy" if kind == "foreign file" else MANIFEST_NAME)
        victim.write_text("years of work")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as caught:
        publish_generation(target, 2, overwrite=overwrite)
    assert caught.value.fix
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_appears_during_an_export_is_not_replaced(
    tmp_path: Path, manifest: Manifest, write_graph: Callable[[Staging], None]
) -> None:
    def export() -> None:
        with publication(tmp_path / "t", overwrite=False) as staging:
            (tmp_path / "t").mkdir()
            (tmp_path / "t" / "mine").write_text("x")
            write_graph(staging)
            staging.commit(manifest)

    with pytest.raises(UsageError):
        export()
    assert (tmp_path / "t" / "mine").read_text() == "x"
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError, OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("exists", [True, False])
def test_an_interrupted_export_leaves_nothing(
    read_generation: Read, tmp_path: Path, publish_generation: Publish, error: Any, exists: bool
) -> None:
    """Ctrl-C, exporter errors, out of memory, disk full in the middle of the work."""
    target = tmp_path / "bundle"
    if exists:
        publish_generation(target, 1)

    def export() -> None:
        with publication(target, overwrite=True) as staging:
            staging.file("onnx/half.onnx").write_bytes(b"half")
            raise error

    with pytest.raises(EnvironmentFailure if error is MemoryError or isinstance(error, OSError) else error):
        export()
    assert os.listdir(tmp_path) == (["bundle"] if exists else [])
    assert not exists or read_generation(target) == 1


@pytest.mark.parametrize("exists", [True, False])
def test_file_size_limit(
    read_generation: Read, tmp_path: Path, publish_generation: Publish, harness: ModuleType, exists: bool
) -> None:
    """Writing stops in the middle; Python ignores SIGXFSZ, so the write fails with EFBIG."""
    target = tmp_path / "bundle"
    if exists:
        publish_generation(target, 1)

    def limited() -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        return publish_generation(target, 2)

    name, status, text = harness.in_child(limited)
    assert (name, status) == ("EnvironmentFailure", 4)
    assert "File too large" in text
    assert "ulimit -f" in text
    assert "bytes free" not in text  # The disk is not what is full.
    assert os.listdir(tmp_path) == (["bundle"] if exists else [])
    assert not exists or read_generation(target) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_fault_in_any_call(
    read_generation: Read,
    tmp_path: Path,
    publish_generation: Publish,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    call: str,
) -> None:
    target = tmp_path / "bundle"
    publish_generation(target, 1)
    monkeypatch.setattr(replacement, "exchange", lambda new, old: False)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(EnvironmentFailure) as caught:
            publish_generation(target, 2)
    assert caught.value.exit_status == 4
    assert caught.value.fix
    assert read_generation(target) == 1
    assert hidden(tmp_path) == []


def test_free_space_is_that_of_the_nearest_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 900, 100))
    with pytest.raises(EnvironmentFailure) as caught:
        check_free_space(tmp_path / "not" / "yet", 101)
    assert "101 bytes free" in caught.value.expected
    assert "100 bytes free" in caught.value.got
    assert os.listdir(tmp_path) == []
    check_free_space(tmp_path / "not" / "yet", 100)


def test_errors_that_are_not_the_machines_pass() -> None:
    with pytest.raises(FileNotFoundError), environment_errors("reading"):
        raise FileNotFoundError(errno.ENOENT, "x")


def test_read_only_parent(publish_generation: Publish) -> None:
    """Not below `tmp_path`, which only its owner may enter."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o555)
        with without_root(), pytest.raises(EnvironmentFailure, match="Permission denied") as caught:
            publish_generation(Path(parent, "bundle"), 1)
        assert os.listdir(parent) == []
    assert caught.value.exit_status == 4


def test_parent_is_a_file(tmp_path: Path, publish_generation: Publish) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "bundle", tmp_path / "file" / "deeper" / "bundle"):
        with pytest.raises(UsageError, match="no directory"):
            publish_generation(target, 1)


def test_names_that_cannot_be(tmp_path: Path, publish_generation: Publish) -> None:
    with pytest.raises(UsageError, match="not valid UTF-8"):
        publish_generation(tmp_path / os.fsdecode(b"caf\xe9"), 1)
    with pytest.raises(UsageError, match="no directory of its own"):
        publish_generation(Path("/"), 1)
    with pytest.raises(EnvironmentFailure, match="shorter"):
        publish_generation(tmp_path / ("x" * 256), 1)
    assert os.listdir(tmp_path) == []


def test_the_working_directory_is_left_alone(
    read_generation: Read, tmp_path: Path, publish_generation: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    publish_generation(Path("../bundle"), 1)
    assert Path.cwd() == tmp_path / "cwd"
    assert os.listdir(".") == []
    assert read_generation(tmp_path / "bundle") == 1


def test_a_change_of_directory_during_the_work(
    tmp_path: Path, manifest: Manifest, write_graph: Callable[[Staging], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with publication(Path("bundle"), overwrite=False) as staging:
        monkeypatch.chdir("/")
        write_graph(staging)
        staging.commit(manifest)
    assert (tmp_path / "bundle" / MANIFEST_NAME).is_file()


def test_links_and_special_files_are_not_published(tmp_path: Path, manifest: Manifest) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    makers: list[Callable[[Path], object]] = [
        lambda path: path.symlink_to(outside),
        lambda path: path.hardlink_to(outside),
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to(tmp_path),
        lambda path: path.with_name("back\\slash").write_text("x"),
    ]

    def export(make: Callable[[Path], object]) -> None:
        with publication(tmp_path / "b", overwrite=False) as staging:
            make(staging.path / "file")
            staging.commit(manifest)

    for make in makers:
        with pytest.raises(InputError, match=r"a file of the bundle (is|has)|not a plain path"):
            export(make)
        assert os.listdir(tmp_path) == ["outside"]
        assert outside.read_text() == "secret"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda manifest: replace(manifest, architecture={"eps": float("nan")}), "not JSON compliant"),
        (lambda manifest: replace(manifest, architecture={"end": 10**80}), "81 characters"),
        (lambda manifest: replace(manifest, architecture={"text": "x" * (17 << 20)}), "too large"),
    ],
)
def test_what_could_not_be_opened_again_replaces_nothing(
    read_generation: Read,
    tmp_path: Path,
    manifest: Manifest,
    publish_generation: Publish,
    write_graph: Callable[[Staging], None],
    change: Callable[[Manifest], Manifest],
    field: str,
) -> None:
    publish_generation(tmp_path / "bundle", 1)

    def export() -> None:
        with publication(tmp_path / "bundle", overwrite=True) as staging:
            write_graph(staging)
            staging.commit(change(manifest))

    with pytest.raises(InputError, match="could not be opened again") as caught:
        export()
    assert field in caught.value.got
    assert "--overwrite" not in caught.value.fix
    assert read_generation(tmp_path / "bundle") == 1
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_graph_that_names_other_files_is_not_published(
    tmp_path: Path, manifest: Manifest, graph_bytes: Callable[..., bytes]
) -> None:
    def export(with_data: bool) -> None:
        with publication(tmp_path / "b", overwrite=False) as staging:
            staging.file("onnx/vision_model.onnx").write_bytes(graph_bytes({"location": "elsewhere"}))
            if with_data:
                staging.file(DATA).write_bytes(bytes(128))
            staging.commit(manifest)

    with pytest.raises(InputError, match="the bundle does not list"):
        export(with_data=False)
    with pytest.raises(InputError, match="the manifest does not list"):
        export(with_data=True)
    assert os.listdir(tmp_path) == []


def test_an_open_bundle_survives_being_overwritten(
    read_generation: Read, tmp_path: Path, publish_generation: Publish
) -> None:
    """What was opened before keeps its content; what is opened after is new, and nothing is mixed."""
    target = tmp_path / "bundle"
    publish_generation(target, 1)
    bundle = open_bundle(target)
    with bundle.file(DATA).open("rb") as file:
        publish_generation(target, 2)
        assert set(file.read()) == {1}
    with pytest.raises(InputError, match="replaced while it was being opened"):
        bundle.file("config.json")
    assert read_generation(target) == 2


def test_bundles_import_no_torch_and_no_onnx() -> None:
    code = "import sys, vlm_export.bundle.publish, vlm_export.bundle.opened, vlm_export.bundle.layout\n"
    code += "sys.exit(bool({'torch', 'onnx', 'numpy', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
