"""What no export wrote is neither replaced nor deleted nor renamed, whatever its name; and what cannot be replaced."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_export.bundle import replacement
from vlm_export.bundle.environment import environment_errors
from vlm_export.bundle.manifest import MANIFEST_NAME, Manifest
from vlm_export.bundle.opened import open_bundle
from vlm_export.bundle.publish import check_target, publication
from vlm_export.bundle.replacement import aside_path
from vlm_export.bundle.target_lock import lock_path, locked
from vlm_export.errors import EnvironmentFailure, InputError, UsageError

Publish = Callable[..., Manifest]
Read = Callable[[Path], int]


@pytest.fixture
def target(tmp_path: Path, publish_generation: Publish) -> Path:
    """A published bundle, alone in its directory."""
    publish_generation(tmp_path / "out" / "bundle", 1)
    return tmp_path / "out" / "bundle"


def test_what_only_has_the_name_of_an_old_bundle_stays(
    read_generation: Read, target: Path, publish_generation: Publish
) -> None:
    aside = aside_path(target)
    aside.mkdir()
    (aside / "mine.txt").write_text("years of work")
    for place in (target, target.with_name("new")):
        if place != target:
            aside = aside.rename(aside_path(place))
        with pytest.raises(UsageError, match="old bundle gets") as caught:
            publish_generation(place, 2)
        assert str(aside) in caught.value.where
        assert (aside / "mine.txt").read_text() == "years of work"
    assert read_generation(target) == 1
    with pytest.raises(InputError, match="no bundle here"):
        open_bundle(target.with_name("new"))
    assert sorted(os.listdir(target.parent)) == sorted([aside.name, "bundle"])


def test_an_old_bundle_with_more_in_it_is_not_deleted(
    target: Path, publish_generation: Publish, read_generation: Read
) -> None:
    aside = Path(shutil.copytree(target, aside_path(target)))
    (aside / "notes").mkdir()
    with pytest.raises(UsageError, match="old bundle gets"):
        publish_generation(target, 2)
    (aside / "notes").rmdir()
    publish_generation(target, 2)
    assert read_generation(target) == 2
    assert os.listdir(target.parent) == ["bundle"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_refused_target_costs_no_old_bundle(
    target: Path, kind: str, read_generation: Read, publish_generation: Publish
) -> None:
    aside = target.rename(aside_path(target))
    if kind == "directory":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
    else:
        target.write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            publish_generation(target, 2, overwrite=overwrite)
    assert read_generation(aside) == 1


@pytest.mark.parametrize("name", [".a.vlm-export-1-0123456789ab.tmp", ".a.vlm-export.old", ".a.vlm-export.lock"])
def test_no_target_has_the_name_of_a_leftover(
    tmp_path: Path, name: str, publish_generation: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="leave behind"):
        publish_generation(tmp_path / name, 1)
    with pytest.raises(UsageError, match="leave behind"):
        check_target(Path(name), overwrite=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda root: (root / "mydata").symlink_to(root.parent), "mydata/"),
        (lambda root: (root / "notes").mkdir(), "notes/"),
        (lambda root: (root / "onnx" / "empty" / "deeper").mkdir(parents=True), "onnx/empty/"),
        (lambda root: (root / "dangling").symlink_to("nowhere"), "dangling"),
        (lambda root: _replaced_by_link(root / "onnx"), "onnx/"),
        (lambda root: _replaced_by_link(root / "config.json"), "config.json"),
    ],
)
def test_links_and_directories_in_a_bundle_are_somebodys(
    target: Path, make: Callable[[Path], object], named: str, publish_generation: Publish
) -> None:
    make(target)
    before = sorted(target.rglob("*"))
    with pytest.raises(UsageError, match="no export wrote") as caught:
        publish_generation(target, 2)
    assert caught.value.got == named
    assert sorted(target.rglob("*")) == before


def _replaced_by_link(path: Path) -> None:
    moved = path.rename(path.parent.parent / "moved")
    path.symlink_to(moved)


def test_a_directory_that_cannot_be_read_is_not_taken_for_empty(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: object) -> object:
        if str(path).endswith("onnx"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(EnvironmentFailure, match="Permission denied"), publication(target, overwrite=True):
        raise AssertionError("not reached")


@pytest.mark.parametrize("kind", ["directory", "link", "dangling link", "pipe", "file"])
def test_what_only_has_the_name_of_the_lock_stays(
    tmp_path: Path, kind: str, publish_generation: Publish, read_generation: Read
) -> None:
    path, other = lock_path(tmp_path / "bundle"), tmp_path / "other"
    other.write_text("12")
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.write_text("12 monkeys")
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(EnvironmentFailure, match="the name of its lock") as caught:
        publish_generation(tmp_path / "bundle", 1)
    assert caught.value.where == str(path)
    # A neighbour's export sweeps leftovers, for which it looks at that lock.
    (tmp_path / ".bundle.vlm-export-1-0123456789ab.tmp").mkdir()
    publish_generation(tmp_path / "neighbour", 3)
    assert read_generation(tmp_path / "neighbour") == 3
    assert os.path.lexists(path)
    assert other.read_text() == "12"
    assert kind != "file" or path.read_text() == "12 monkeys"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("content", ["", "4194304", "\0004194304"])
def test_locks_of_the_dead_are_taken_over(tmp_path: Path, content: str) -> None:
    lock_path(tmp_path / "bundle").write_text(content)
    with locked(tmp_path / "bundle"):
        assert lock_path(tmp_path / "bundle").read_text() == str(os.getpid())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_mount_points_are_refused_before_any_work(overwrite: bool) -> None:
    assert os.path.ismount("/proc")
    with pytest.raises(UsageError, match="mount point") as caught:
        check_target(Path("/proc"), overwrite)
    assert "/proc/bundle" in caught.value.fix


@pytest.mark.parametrize(
    "code",
    [errno.EBUSY, errno.EXDEV, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENOTEMPTY, errno.EEXIST, errno.ENXIO],
)
def test_other_faults_of_the_system(
    target: Path,
    code: int,
    publish_generation: Publish,
    read_generation: Read,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(replacement, "exchange", fail)
        with pytest.raises(EnvironmentFailure, match=os.strerror(code)) as caught:
            publish_generation(target, 2)
    assert caught.value.fix
    assert read_generation(target) == 1
    assert os.listdir(target.parent) == ["bundle"]


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "x"), OSError("a library's own")])
def test_other_errors_pass(error: OSError) -> None:
    with pytest.raises(type(error)) as caught, environment_errors("reading"):
        raise error
    assert caught.value is error


def test_a_manifest_that_is_a_link_is_no_manifest_of_ours(target: Path, publish_generation: Publish) -> None:
    _replaced_by_link(target / MANIFEST_NAME)
    with pytest.raises(UsageError, match="no export wrote"):
        publish_generation(target, 2)
