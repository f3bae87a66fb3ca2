"""The one way in which this project writes: staged beside the target under its lock, synced, put in place at once.

- A writer holds the target's lock (`target_lock`). What it writes lies under a staged name beside the target, which
  tells whose it is: only who holds that lock may delete it. So the next run sweeps what a killed one left, and nothing
  of a running process is swept.
- Everything is synced before it gets its name. One file or directory gets it by one rename.
- Several files that belong together are first staged in one directory, which one rename declares to be the new
  state (`commit_files`). From there on the work can only be finished, by this process or by the next one that takes
  the lock, and its order is such that each file that names others finds them whole at every instant.

Names beside the target NAME: `.NAME.vlm-export.lock`, `.NAME.vlm-export-PID-HEX.tmp` (staged),
`.NAME.vlm-export.commit` (declared, not finished), and `.NAME.vlm-export.old` (see `replacement`).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from vlm_export.bundle.environment import environment_errors
from vlm_export.bundle.target_lock import locked, locked_if_free, short_name
from vlm_export.errors import EnvironmentFailure, UsageError
from vlm_export.interrupts import point_of_no_return

_STAGED = re.compile(r"\.(?P<target>.+)\.vlm-export-\d+-[0-9a-f]{12}\.tmp", re.DOTALL)
_COMMITTED = re.compile(r"\.(?P<target>.+)\.vlm-export\.commit", re.DOTALL)
_RESERVED = re.compile(rf"{_STAGED.pattern}|\..+\.vlm-export\.(old|lock|commit)".replace("?P<target>", ""), re.DOTALL)
STEPS = ("1", "2", "3", "4")
"""Directories of a commit: their files are put in place in this order."""
REMOVE = "remove"
"""Directory of a commit: empty files that name what is deleted at the end."""
NEW = "new"
"""Directory of a commit: empty files that name those of the targets where nothing was before."""


def new_staging_path(target: Path) -> Path:
    """A fresh staged name beside the target; who uses it holds the target's lock."""
    return target.parent / f".{short_name(target)}.vlm-export-{os.getpid()}-{secrets.token_hex(6)}.tmp"


def commit_path(target: Path) -> Path:
    """Where several files that are to be put in place together lie once they are complete."""
    return target.parent / f".{short_name(target)}.vlm-export.commit"


def check_name(target: Path) -> None:
    """UsageError when the target has a name that this protocol sweeps."""
    if _RESERVED.fullmatch(target.absolute().name):
        raise UsageError(
            "the output path has a name that exports use for what they leave behind, so it would be swept away",
            where=str(target),
            fix="choose another name",
        )


@dataclass(frozen=True)
class Staged:
    """A place to write to, under the lock of what it is for.

    Attributes:
        path: the staged name, which nothing has yet; a file or a directory.
        targets: what it is for, the first of which names it.
        replaceable: those of the targets that may stand there by now; None for all.
    """

    path: Path
    targets: tuple[Path, ...]
    replaceable: frozenset[Path] | None = None

    def check_targets(self) -> None:
        """UsageError where something stands at a target that may not be replaced."""
        for target in self.targets:
            if self.replaceable is not None and target not in self.replaceable and os.path.lexists(target):
                raise _exists(target)


@contextmanager
def staging(
    target: Path, others: Sequence[Path] = (), *, overwrite: bool = True, wait: bool = False
) -> Iterator[Staged]:
    """Holds the targets' locks, cleans up after killed runs, and yields a fresh staged name; nothing has it afterwards.

    Args:
        target: an absolute path in a directory that exists.
        others: in the same directory, and put in place together with it.
        overwrite: False: none of the targets may exist. What a killed run had begun to put there does not count.
        wait: until the lock is free, instead of failing.

    Raises:
        UsageError: a target exists, has one of the protocol's own names, or something else has the name of a commit.
        EnvironmentFailure: another process holds a target.
    """
    targets = (target, *others)
    for each in targets:
        check_name(each)
    with _all_locked(targets, wait):
        replaceable = None if overwrite else frozenset(each for each in targets if is_unfinished(each))
        Staged(target, targets, replaceable).check_targets()
        sweep(target)
        if os.path.lexists(commit_path(target)):
            raise UsageError(
                "what stands beside the output has the name that its files get for a moment",
                where=str(commit_path(target)),
                fix="move it away, or choose another output",
            )
        staged = new_staging_path(target)
        try:
            yield Staged(staged, targets, replaceable)
        finally:
            delete(staged)


@contextmanager
def _all_locked(targets: Sequence[Path], wait: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(locked(target, wait=wait))
        yield


@contextmanager
def staged_file(
    target: Path | str, stage: str, *, overwrite: bool, wait: bool = False, is_result: bool = True
) -> Iterator[Path]:
    """A name to write one file to, which becomes `target` when the block ends without an error.

    Args:
        stage: what is being done, for messages.
        overwrite: whether a file may be replaced.
        is_result: as in `put_file`.

    Raises:
        UsageError: the target exists and may not be replaced.
        EnvironmentFailure: the disk refuses, or another process writes the same target.
    """
    target = Path(os.path.abspath(target))
    with (
        environment_errors(stage, target.parent),
        staging(target, overwrite=overwrite, wait=wait) as staged,
    ):
        yield staged.path
        staged.check_targets()
        put_file(staged.path, target, is_result=is_result)


def check_not_there(target: Path, *, overwrite: bool) -> None:
    """UsageError when something stands at the target and may not be replaced."""
    if not overwrite and os.path.lexists(target) and not is_unfinished(target):
        raise _exists(target)


def _exists(target: Path) -> UsageError:
    return UsageError("the output exists", where=str(target), fix="choose another name, or pass --overwrite")


def is_unfinished(target: Path) -> bool:
    """Whether a killed run had begun to put something at the target, where nothing was before."""
    commits = (entry for entry, _ in _left(target.parent, _COMMITTED) if _is_commit(entry))
    return any(os.path.lexists(commit / NEW / target.name) for commit in commits)


def _left(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, str]]:
    """Entries of the directory whose names are the protocol's own, with the short names of their targets."""
    names = [name for name in os.listdir(folder) if ".vlm-export" in name] if folder.is_dir() else []
    found = [(name, pattern.fullmatch(name)) for name in names]
    return [(folder / name, match["target"]) for name, match in found if match is not None]


def put_file(staged: Path, target: Path, *, is_result: bool = True) -> None:
    """Syncs a finished file and gives it its name in one step; the caller holds the target's lock.

    Args:
        is_result: the command is done with it, so that an interrupt comes too late.
    """
    sync_file(staged)
    with point_of_no_return() if is_result else nullcontext():
        os.replace(staged, target)
        with suppress(OSError):
            # It is in place; what may be lost is only that this survives a power cut.
            sync_directory(target.parent)


def commit_files(staged: Staged) -> None:
    """Puts the files in the directories `STEPS` of a staged directory in place beside it, then deletes those in REMOVE.

    Killed before the one rename that declares the new state, nothing has changed; killed after it, `sweep` finishes
    the work.

    Raises:
        OSError: before the rename: nothing has changed. After it, where a second attempt fails too: the next run
            finishes.
    """
    commit = commit_path(staged.targets[0])
    (staged.path / NEW).mkdir()
    for target in staged.targets:
        if not os.path.lexists(target) or is_unfinished(target):
            (staged.path / NEW / target.name).touch()
    for folder, _, names in os.walk(staged.path):
        for name in names:
            sync_file(Path(folder, name))
        sync_directory(Path(folder))
    staged.check_targets()
    with point_of_no_return():
        os.rename(staged.path, commit)
        try:
            sync_directory(commit.parent)
            _finish(commit)
        except OSError:
            _finish(commit)


def sweep(target: Path) -> None:
    """Finishes what killed runs declared, and deletes what they only staged, for all targets of a directory.

    The caller holds the lock of `target`; those of its neighbours are tried.
    """
    for entry, owner in _left(target.parent, _STAGED) + _left(target.parent, _COMMITTED):
        if entry.is_symlink():
            continue
        # First under a name of this process's own, and deleted without the lock of its owner, who may start meanwhile.
        doomed = new_staging_path(target)
        if owner == short_name(target):
            _end(entry, doomed)
        else:
            with suppress(OSError, EnvironmentFailure), locked_if_free(target.with_name(owner)) as free:
                if free:
                    _end(entry, doomed)
        delete(doomed)


def _end(entry: Path, doomed: Path) -> None:
    """Finishes a commit, renames what was only staged; the caller holds the lock of whose name the entry has."""
    if _COMMITTED.fullmatch(entry.name) is None:
        entry.rename(doomed)
    elif _is_commit(entry):
        _finish(entry)


def finish_commits(folder: Path) -> None:
    """Finishes what killed runs declared in a directory, before something in it is read; as far as that is allowed."""
    with suppress(OSError, EnvironmentFailure):
        for entry, owner in _left(folder, _COMMITTED):
            with locked_if_free(folder / owner) as free:
                if free and _is_commit(entry):
                    _finish(entry)


def _is_commit(path: Path) -> bool:
    """Whether a directory holds what `commit_files` put there and nothing else; anything else is somebody's."""
    if path.is_symlink() or not path.is_dir():
        return False
    steps = list(path.iterdir())
    known = all(step.name in (*STEPS, REMOVE, NEW) and step.is_dir() and not step.is_symlink() for step in steps)
    return known and all(not file.is_symlink() and file.is_file() for step in steps for file in step.iterdir())


def _finish(commit: Path) -> None:
    """Does what is left of a commit. Each step is on the disk before the next begins; all of it may be repeated."""
    for name in (*STEPS, REMOVE):
        step = commit / name
        if not step.is_dir():
            continue
        for file in sorted(step.iterdir()):
            place = commit.parent / file.name
            if name == REMOVE:
                place.unlink(missing_ok=True)
                file.unlink()
            else:
                os.replace(file, place)
        sync_directory(commit.parent)
        step.rmdir()
    shutil.rmtree(commit)
    with suppress(OSError):
        sync_directory(commit.parent)


def delete(path: Path) -> None:
    """Deletes a staged file or directory, as far as the system lets it; the next run finds the rest."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Waits until the content of a file is on the disk."""
    # Windows flushes only what is open for writing; elsewhere a file without write permission must do.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Waits until the names in a directory are on the disk; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
