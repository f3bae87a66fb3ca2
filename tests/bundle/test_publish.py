"""Section C of the reliability table: faults while a bundle is written leave the old one or the new one, whole."""

from __future__ import annotations

import errno
import itertools
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

from vlm_export.bundle import publish, replacement
from vlm_export.bundle.environment import check_free_space, environment_errors
from vlm_export.bundle.manifest import MANIFEST_NAME, Manifest
from vlm_export.bundle.opened import open_bundle
from vlm_export.bundle.publish import publication
from vlm_export.bundle.target_lock import lock_path, locked
from vlm_export.errors import EnvironmentFailure, InputError, UsageError

DATA = "onnx/vision_model.onnx_data"
NOBODY = 65534
_STEPS_BEFORE_REPLACEMENT = 20
Publish = Callable[..., Manifest]


@pytest.fixture
def publish_generation(manifest: Manifest, graph_bytes: Callable[..., bytes]) -> Publish:
    """Publishes a bundle whose every file, and whose manifest, carry one number."""
    graph = graph_bytes({"location": "vision_model.onnx_data"})

    def run(target: Path, generation: int, overwrite: bool = True) -> Manifest:
        with publication(target, overwrite=overwrite) as staging:
            staging.file("onnx/vision_model.onnx").write_bytes(graph)
            staging.file(DATA).write_bytes(bytes([generation]) * 128)
            staging.file("config.json").write_text(str(generation))
            staging.file("golden/vision/test_data_set_0/input_0.pb").write_bytes(bytes([generation]) * 70_000)
            return staging.commit(replace(manifest, facts={"generation": generation}))

    return run


def read_generation(target: Path) -> int:
    """The number of a bundle, after checking that every file carries it and that no other file lies there."""
    bundle = open_bundle(target)
    bundle.verify(bundle.manifest.files)
    bundle.model_files(bundle.manifest.part("vision").variant("fp32"))
    generation = int(bundle.manifest.facts["generation"])
    assert bundle.file("config.json").read_text() == str(generation)
    assert set(bundle.file(DATA).read_bytes()) == {generation}
    assert set(bundle.file("golden/vision/test_data_set_0/input_0.pb").read_bytes()) == {generation}
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == {*bundle.manifest.files, MANIFEST_NAME}
    return generation


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


def test_publish_and_overwrite(tmp_path: Path, publish_generation: Publish) -> None:
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


def test_an_existing_bundle_needs_overwrite(tmp_path: Path, publish_generation: Publish) -> None:
    target = tmp_path / "bundle"
    publish_generation(target, 1)
    with pytest.raises(UsageError, match="--overwrite"):
        publish_generation(target, 2, overwrite=False)
    assert read_generation(target) == 1
    assert hidden(tmp_path) == []


def test_missing_parents_are_created_and_removed_after_a_failure(tmp_path: Path, publish_generation: Publish) -> None:
    with pytest.raises(RuntimeError), publication(tmp_path / "a" / "b" / "c", overwrite=False):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    publish_generation(tmp_path / "a" / "b" / "c", 1)
    assert read_generation(tmp_path / "a" / "b" / "c") == 1


def test_an_empty_directory_is_filled(tmp_path: Path, publish_generation: Publish) -> None:
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


def test_what_appears_during_an_export_is_not_replaced(tmp_path: Path, manifest: Manifest) -> None:

    def export() -> None:
        with publication(tmp_path / "t", overwrite=False) as staging:
            (tmp_path / "t").mkdir()
            (tmp_path / "t" / "mine").write_text("x")
            staging.commit(replace(manifest, parts=()))

    with pytest.raises(UsageError):
        export()
    assert (tmp_path / "t" / "mine").read_text() == "x"
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError, OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("exists", [True, False])
def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, publish_generation: Publish, error: Any, exists: bool
) -> None:
    """C5: Ctrl-C, exporter errors, out of memory, disk full in the middle of the work."""
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
def test_file_size_limit(tmp_path: Path, publish_generation: Publish, harness: ModuleType, exists: bool) -> None:
    """C1: writing stops in the middle; Python ignores SIGXFSZ, so the write fails with EFBIG."""
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
    assert "bytes free" in text
    assert os.listdir(tmp_path) == (["bundle"] if exists else [])
    assert not exists or read_generation(target) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_fault_in_any_call(
    tmp_path: Path, publish_generation: Publish, monkeypatch: pytest.MonkeyPatch, code: int, call: str
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


def test_free_space_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 900, 100))
    with pytest.raises(EnvironmentFailure) as caught, publication(tmp_path / "b", overwrite=False, needed_bytes=101):
        raise AssertionError("not reached")
    assert "101 bytes free" in caught.value.expected
    assert "100 bytes free" in caught.value.got
    assert os.listdir(tmp_path) == []
    check_free_space(tmp_path / "not" / "yet", 100)


def test_errors_that_are_not_the_machines_pass() -> None:
    with pytest.raises(FileNotFoundError), environment_errors("reading"):
        raise FileNotFoundError(errno.ENOENT, "x")


def test_read_only_parent(publish_generation: Publish) -> None:
    """C6; not below `tmp_path`, which only its owner may enter."""
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
        publish_generation(tmp_path / ("x" * 250), 1)
    assert os.listdir(tmp_path) == []


def test_the_working_directory_is_left_alone(
    tmp_path: Path, publish_generation: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    publish_generation(Path("../bundle"), 1)
    assert Path.cwd() == tmp_path / "cwd"
    assert os.listdir(".") == []
    assert read_generation(tmp_path / "bundle") == 1


def test_a_change_of_directory_during_the_work(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with publication(Path("bundle"), overwrite=False) as staging:
        monkeypatch.chdir("/")
        staging.commit(replace(manifest, parts=()))
    assert (tmp_path / "bundle" / MANIFEST_NAME).is_file()


def test_a_second_export_to_one_target_is_refused(
    tmp_path: Path, publish_generation: Publish, harness: ModuleType
) -> None:
    """C6."""
    target = tmp_path / "bundle"
    publish_generation(target, 1)

    def hold(ready: Callable[[], None]) -> None:
        with publication(target, overwrite=True) as staging:
            staging.file("half").write_bytes(b"half")
            ready()
            os.read(os.pipe()[0], 1)

    with harness.running(hold) as pid:
        with pytest.raises(EnvironmentFailure, match=f"held by process {pid}"):
            publish_generation(target, 2)
        assert read_generation(target) == 1
        publish_generation(tmp_path / "neighbour", 3)
        # The live export's directory is not swept by its neighbour.
        assert len([name for name in hidden(tmp_path) if name.startswith(f".bundle.vlm-export-{pid}-")]) == 1
    publish_generation(target, 2)
    assert read_generation(target) == 2
    assert hidden(tmp_path) == []


def test_concurrent_exports_end_with_one_whole_bundle(
    tmp_path: Path, publish_generation: Publish, harness: ModuleType
) -> None:
    target = tmp_path / "bundle"

    def loop(first: int) -> None:
        for generation in range(first, first + 10):
            try:
                publish_generation(target, generation)
            except EnvironmentFailure as error:
                if "another export" not in error.what:
                    raise

    pids = [harness.forked(lambda first=first: loop(first)) for first in (0, 100, 200)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    read_generation(target)
    assert os.listdir(tmp_path) == ["bundle"]


def test_leftovers_of_a_dead_export_are_swept(tmp_path: Path, publish_generation: Publish) -> None:
    """C2, also those of another target in the same directory; what only looks alike is left."""
    dead = [tmp_path / f".{name}.vlm-export-4194304-0123456789ab.tmp" for name in ("bundle", "other")]
    for directory in dead:
        (directory / "onnx").mkdir(parents=True)
        (directory / "onnx" / "half").write_bytes(b"x")
    alike = tmp_path / ".bundle.vlm-export-notes.tmp"
    alike.mkdir()
    link = tmp_path / ".bundle.vlm-export-1-0123456789ab.tmp"
    link.symlink_to(alike)
    lock_path(tmp_path / "bundle").write_text("4194304")
    publish_generation(tmp_path / "bundle", 1)
    assert sorted(os.listdir(tmp_path)) == sorted([alike.name, link.name, "bundle"])


def test_the_lock_is_released_and_leaves_no_file(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for _ in range(2):
        with locked(target):
            assert lock_path(target).read_text() == str(os.getpid())
            with pytest.raises(EnvironmentFailure, match=f"process {os.getpid()}"), locked(target):
                raise AssertionError("not reached")
        assert os.listdir(tmp_path) == []


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
            staging.commit(replace(manifest, parts=()))

    for make in makers:
        with pytest.raises(InputError):
            export(make)
        assert os.listdir(tmp_path) == ["outside"]
        assert outside.read_text() == "secret"


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


def test_an_open_bundle_survives_being_overwritten(tmp_path: Path, publish_generation: Publish) -> None:
    """C4: what was opened before keeps its content; what is opened after is new, and nothing is mixed."""
    target = tmp_path / "bundle"
    publish_generation(target, 1)
    bundle = open_bundle(target)
    with bundle.file(DATA).open("rb") as file:
        publish_generation(target, 2)
        assert set(file.read()) == {1}
    with pytest.raises(InputError, match="replaced while it was being opened"):
        bundle.file("config.json")
    assert read_generation(target) == 2


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote; only a lost machine does, and syncing is slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a directory."""
    if request.param == "two renames":
        monkeypatch.setattr(replacement, "exchange", lambda new, old: False)
    return str(request.param)


def test_killed_at_random_points(tmp_path: Path, publish_generation: Publish, harness: ModuleType, way: str) -> None:
    """C2 and C3: a loop of overwriting exports is killed 60 times; the bundle is one generation, whole."""
    target = tmp_path / "bundle"
    publish_generation(target, 0)
    seen: list[int] = []
    generations = itertools.cycle(range(1, 251))

    def loop() -> None:
        for generation in itertools.chain([next(generations)], range(251, 256)):
            publish_generation(target, generation)

    def start() -> int:
        pid: int = harness.forked(loop)
        next(generations)
        return pid

    kills = harness.kill_at_random_points(
        start,
        lambda: seen.append(read_generation(target)),
        kills=60,
        shortest_seconds=0.002,
        longest_seconds=0.1,
    )
    assert len(kills) == len(seen) == 60
    assert len(set(seen)) > 10
    publish_generation(target, 250)
    assert os.listdir(tmp_path) == ["bundle"]


def test_killed_at_each_file_operation(
    tmp_path: Path, publish_generation: Publish, harness: ModuleType, way: str, no_sync: None
) -> None:
    target = tmp_path / "out" / "bundle"
    publish_generation(target, 1)
    shutil.copytree(target.parent, tmp_path / "before")
    seen = []

    def check() -> None:
        seen.append(read_generation(target))
        shutil.rmtree(target.parent)
        shutil.copytree(tmp_path / "before", target.parent)

    killed = harness.kill_at_each_step(lambda: publish_generation(target, 2), check)
    assert killed > 20
    assert seen[0] == 1
    assert seen == sorted(seen)
    assert seen[-1] == 2


def test_naive_overwriting_would_be_caught(
    tmp_path: Path, publish_generation: Publish, harness: ModuleType, monkeypatch: pytest.MonkeyPatch, no_sync: None
) -> None:
    """The control: a writer that writes file by file does not pass the two tests above."""
    target = tmp_path / "bundle"
    publish_generation(target, 1)
    monkeypatch.setattr(publish, "replace_directory", lambda new, old: shutil.copytree(new, old, dirs_exist_ok=True))
    with pytest.raises(InputError, match="not the one that was exported"):
        harness.kill_at_each_step(
            lambda: publish_generation(target, 2), lambda: read_generation(target), first=_STEPS_BEFORE_REPLACEMENT
        )


def test_first_export_killed_at_each_file_operation(
    tmp_path: Path, publish_generation: Publish, harness: ModuleType, no_sync: None
) -> None:
    target = tmp_path / "bundle"

    def check() -> None:
        if target.exists():
            assert read_generation(target) == 1
            shutil.rmtree(target)

    assert harness.kill_at_each_step(lambda: publish_generation(target, 1), check) > 20
    publish_generation(target, 2)
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_bundle_moved_aside_comes_back(tmp_path: Path, publish_generation: Publish) -> None:
    target = tmp_path / "bundle"
    publish_generation(target, 1)
    target.rename(replacement.aside_path(target))
    assert read_generation(target) == 1
    target.rename(replacement.aside_path(target))
    target.mkdir()
    publish_generation(target, 2, overwrite=True)
    assert read_generation(target) == 2
    assert os.listdir(tmp_path) == ["bundle"]


def test_exchange_needs_no_second_step_here(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if replacement.exchange(tmp_path / "a", tmp_path / "b"):
        assert os.listdir(tmp_path / "a") == ["b"]
        assert os.listdir(tmp_path / "b") == ["a"]
    else:
        assert os.listdir(tmp_path / "a") == ["a"]


def test_bundles_import_no_torch_and_no_onnx() -> None:
    code = "import sys, vlm_export.bundle.publish, vlm_export.bundle.opened, vlm_export.bundle.layout\n"
    code += "sys.exit(bool({'torch', 'onnx', 'numpy', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_harness_kills_commands(harness: ModuleType) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    (kill,) = harness.kill_at_random_points(
        lambda: harness.spawned(command), lambda: None, kills=1, longest_seconds=0.01
    )
    assert not kill.ended_before
    with pytest.raises(AssertionError, match="failed by itself with exit status 3"):
        harness.kill_at_random_points(
            lambda: harness.spawned([sys.executable, "-c", "raise SystemExit(3)"]),
            lambda: None,
            kills=1,
            shortest_seconds=2.0,
            longest_seconds=2.0,
        )
