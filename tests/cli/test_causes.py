"""Each failure ends with the status of its true cause: a defect of ours, the machine, or the input."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_export.cli import inspect
from vlm_export.errors import InputError
from vlm_export.machine_faults import CAUSES, machine_fault

Cli = Callable[..., Any]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Makes `inspect` raise an exception."""

    def fail_with(error: Exception) -> None:
        def run(*_: object) -> Any:
            raise error

        monkeypatch.setattr(inspect, "_data_from_source", run)

    return fail_with


def test_a_defect_has_its_own_status_and_asks_for_a_report(cli: Cli, failing: Callable[[Exception], None]) -> None:
    failing(KeyError("a\x1b[2J\nvlm-export: all good"))
    result = cli("inspect", "x\ny", "--json")
    assert result.status == 70
    assert result.err.startswith("  Traceback (most recent call last):")
    assert "\nvlm-export: this is a defect of vlm-export" in result.err
    assert "please report it" in result.err
    assert "vlm-export inspect 'x\\ny' --json" in result.err
    assert "Python 3." in result.err
    assert "\x1b" not in result.err
    assert not [line for line in result.err.splitlines() if line.startswith("vlm-export: all good")]
    assert (result.data["error"], result.data["exit_status"]) == ("defect", 70)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EROFS, errno.EIO])
def test_what_the_system_refuses_is_no_bad_input(cli: Cli, failing: Callable[[Exception], None], number: int) -> None:
    what, fix = CAUSES[number]
    refused = OSError(number, os.strerror(number), "a.pt")
    wrapped = InputError("the file is damaged", where="a.pt", fix="export it again")
    wrapped.__cause__ = refused
    for error in (refused, wrapped):
        failing(error)
        result = cli("inspect", "x").refused(4, what, "where: a.pt", fix)
        assert "export it again" not in result.err


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory"),
        (RuntimeError("can't start new thread"), "no more threads"),
        (RuntimeError("mmap: Too many open files"), "open files"),
    ],
)
def test_what_libraries_say_of_the_machine(
    cli: Cli, failing: Callable[[Exception], None], error: Exception, what: str
) -> None:
    failing(error)
    cli("inspect", "x").refused(4, what, "fix: ")


def test_faults_are_found_behind_other_exceptions() -> None:
    behind = ValueError("cannot be decoded")
    behind.__cause__ = MemoryError()
    fault = machine_fault(behind, "a.onnx")
    assert fault is not None
    assert fault.what == "out of memory"
    assert machine_fault(ValueError("damaged"), "a.onnx") is None
    assert machine_fault(FileNotFoundError(errno.ENOENT, "no such file")) is None
    # The words of an error of ours may be those of a file.
    assert machine_fault(InputError("a node is called std::bad_alloc")) is None


def test_a_full_disk_and_a_limit_are_told_apart(cli: Cli, failing: Callable[[Exception], None], tmp_path: Path) -> None:
    causes = {}
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        failing(OSError(number, os.strerror(number), str(tmp_path)))
        causes[number] = cli("inspect", "x").refused(4, os.strerror(number)).err
    assert "free disk space" in causes[errno.ENOSPC]
    assert "quota" in causes[errno.EDQUOT]
    assert "ulimit -f" in causes[errno.EFBIG]
    assert "free" not in causes[errno.EFBIG]


@pytest.mark.parametrize("source", ["./none", "a/b/c", "none/", "model.pt", "~none", "x.safetensors", "C:\\none"])
def test_a_path_that_is_not_there_is_told_as_that(cli: Cli, source: str) -> None:
    result = cli("inspect", source).refused(2, "there is no such file or directory", f"where: {source}")
    assert "clip-vit" not in result.err


def test_a_word_that_is_no_known_name_gets_the_nearest(cli: Cli) -> None:
    cli("inspect", "clip-dem").refused(2, "did you mean 'clip-demo'?")
    result = cli("inspect", "zzz").refused(2, "vlm-export inspect lists the known names")
    assert len(result.err) < 300


def test_an_output_below_thousands_of_directories(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli("export", "clip-demo", "-o", "a/" * 2000 + "b", "--quiet").refused(4, "too many directories", "got: 2001")
    assert not list(tmp_path.iterdir())
