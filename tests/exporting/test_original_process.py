"""The original in a process of its own: the same proof, computed ahead, and an end whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_export.errors import Defect, EnvironmentFailure, InputError
from vlm_export.exporting import original_process, original_runs
from vlm_export.exporting.original_process import Call, OriginalProcess, start_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
Export = Callable[..., Any]
Ended = list[OriginalProcess]


class Counting:
    """Adds numbers, and writes down each call in a file, whichever process it is in."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def outputs(self, part: str, inputs: dict[str, Any]) -> dict[str, Any]:
        with self.log.open("a") as file:
            file.write(f"{part}\n")
        if part == "refused":
            raise InputError("an input is refused", where="here", got="nothing", fix="give another")
        if part == "slow":
            time.sleep(60)
        return {"y": inputs["x"] + 1}

    def pid(self) -> int:
        return os.getpid()

    def unsendable(self) -> Callable[[], None]:
        return lambda: None


@contextmanager
def started(log: Path, *expected: Call) -> Iterator[OriginalProcess]:
    with started_with(log, iter(expected)) as process:
        yield process


@contextmanager
def started_with(log: Path, expected: Iterator[Call]) -> Iterator[OriginalProcess]:
    process = start_process(Counting(log), expected)
    assert process is not None
    try:
        yield process
    finally:
        process.end()


def numbers(value: float) -> dict[str, Any]:
    return {"x": np.full((2, 3), value, np.float32)}


def logged(log: Path, count: int) -> list[str]:
    """The first lines of the file, once there are so many."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = log.read_text().split() if log.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.01)
    raise AssertionError(f"{count} calls expected, got {lines}")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_is_expected_is_computed_ahead_and_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(log, ("outputs", "a", numbers(1)), ("outputs", "b", numbers(2))) as process:
        assert logged(log, 2) == ["a", "b"]
        for _ in range(2):
            assert process.call("outputs", "b", numbers(2))["y"].tolist() == [[3.0] * 3] * 2
        assert process.misses == 0
        # The same inputs of another part, and other inputs of the same, are other calls.
        assert process.call("outputs", "c", numbers(2))["y"][0, 0] == 3
        assert process.call("outputs", "b", numbers(5))["y"][0, 0] == 6
        assert process.misses == 2
        assert log.read_text().split() == ["a", "b", "c", "b"]


def test_no_more_is_computed_ahead_than_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(original_process, "_HELD_BYTES", 2 * numbers(0)["x"].nbytes)
    log = tmp_path / "log"
    calls = [("outputs", f"p{i}", numbers(i)) for i in range(5)]
    with started(log, *calls) as process:
        logged(log, 2)
        time.sleep(0.2)
        assert log.read_text().split() == ["p0", "p1"]
        for call in calls:
            process.call(*call)
        assert log.read_text().split() == [f"p{i}" for i in range(5)]


def test_errors_come_as_what_they_are(tmp_path: Path) -> None:
    with started(tmp_path / "log", ("outputs", "refused", numbers(1))) as process:
        for value in (1, 2):  # Computed ahead, and when it is asked for.
            with pytest.raises(InputError, match="refused") as caught:
                process.call("outputs", "refused", numbers(value))
            assert caught.value.to_json()["fix"] == "give another"
        assert process.call("outputs", "a", numbers(1))["y"][0, 0] == 2


def test_a_process_that_was_killed_is_told(tmp_path: Path) -> None:
    with started(tmp_path / "log") as process:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFailure, match="has ended") as caught:
            process.call("pid")
        assert caught.value.got == "signal SIGKILL"


def test_an_answer_that_cannot_be_sent_is_a_defect(tmp_path: Path) -> None:
    with started(tmp_path / "log") as process, pytest.raises(Defect, match="has ended"):
        process.call("unsendable")


def test_an_expectation_that_fails_is_a_defect(tmp_path: Path) -> None:
    def expected() -> Iterator[Call]:
        yield ("pid",)
        raise ValueError("no further call")

    with started_with(tmp_path / "log", expected()) as process, pytest.raises(Defect, match="has ended"):
        process.call("outputs", "a", numbers(1))


def test_it_ends_at_once_while_it_computes(tmp_path: Path) -> None:
    with started(tmp_path / "log", ("outputs", "slow", numbers(1))) as process:
        logged(tmp_path / "log", 1)
        pid, start = process.pid, time.monotonic()
    assert time.monotonic() - start < 10
    assert not is_running(pid)


def test_it_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); from pathlib import Path; import time\n"
        "from test_original_process import Counting, numbers, start_process\n"
        f"process = start_process(Counting(Path({str(tmp_path / 'log')!r})), iter([('outputs', 'slow', numbers(1))]))\n"
        "print(process.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        with closing(parent.stdout):
            pid = int(parent.stdout.readline())
            logged(tmp_path / "log", 1)
            parent.kill()
            parent.wait()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Ended:
    """Every model's original goes to a process; those that have ended, with their misses."""
    ended: list[OriginalProcess] = []
    end = OriginalProcess.end

    def noted(process: OriginalProcess) -> None:
        ended.append(process)
        end(process)

    monkeypatch.setattr(original_runs, "LEAST_BYTES", 0)
    monkeypatch.setattr(OriginalProcess, "end", noted)
    return ended


def test_a_proof_is_the_same_and_was_computed_ahead(
    checkpoint: Path,
    tmp_path: Path,
    export_fast: Export,
    monkeypatch: pytest.MonkeyPatch,
    beside: list[OriginalProcess],
) -> None:
    precisions = ("fp32", "fp16")
    remote = export_fast(checkpoint, tmp_path / "beside", precisions=precisions).to_json()
    assert [process.pid for process in beside] == [0]
    # The bundle's files as other software reads them are not there before.
    assert beside[0].misses == 1
    monkeypatch.setattr(original_runs, "LEAST_BYTES", 1 << 40)
    here = export_fast(checkpoint, tmp_path / "here", precisions=precisions).to_json()
    assert len(beside) == 1
    for name in ("verification", "contract"):
        assert shape_of(remote[name]) == shape_of(here[name])


def shape_of(report: Any) -> Any:
    """A report without its measured numbers: another number of threads moves their last digits."""
    if isinstance(report, dict):
        return {name: shape_of(value) for name, value in report.items()}
    if isinstance(report, list):
        return [shape_of(value) for value in report]
    return "a number" if isinstance(report, float) else report


def test_an_interrupt_leaves_no_process(
    checkpoint: Path,
    tmp_path: Path,
    export_fast: Export,
    monkeypatch: pytest.MonkeyPatch,
    beside: list[OriginalProcess],
) -> None:
    pids: list[int] = []

    def interrupted(process: OriginalProcess, *call: Any) -> Any:
        pids.append(process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(OriginalProcess, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_fast(checkpoint, tmp_path / "bundle")
    assert [process.pid for process in beside] == [0]
    assert not is_running(pids[0])
    assert not list(tmp_path.iterdir())


def test_a_graph_that_differs_is_refused(
    checkpoint: Path,
    tmp_path: Path,
    export_fast: Export,
    monkeypatch: pytest.MonkeyPatch,
    beside: list[OriginalProcess],
) -> None:
    from vlm_export.errors import VerificationError

    call = OriginalProcess.call

    def moved(process: OriginalProcess, *asked: Any) -> Any:
        given = call(process, *asked)
        return {name: array + 0.1 for name, array in given.items()} if asked[0] == "outputs" else given

    monkeypatch.setattr(OriginalProcess, "call", moved)
    with pytest.raises(VerificationError):
        export_fast(checkpoint, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
