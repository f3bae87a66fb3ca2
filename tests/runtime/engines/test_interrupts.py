"""Signals end what an engine computes, in the command line and in a user's own program, whatever the machine's load."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from vlm_export.interrupts import run_interruptibly
from vlm_export.runtime.engines.onnxruntime import OrtEngine

# The graphs are made with onnx.
pytestmark = pytest.mark.needs_torch
TIMEOUT = 120
# Says when the engine starts to compute; what `stop` then does comes from the engine or from the test.
PRELUDE = """
import sys, time
import onnxruntime
from vlm_export import interrupts

run = onnxruntime.InferenceSession.run
def announced(self, *arguments):
    print("running", flush=True)
    return run(self, *arguments)
onnxruntime.InferenceSession.run = announced
"""
DEAF = """
def deaf(self, *arguments):
    print("running", flush=True)
    while True:
        time.sleep(1)
onnxruntime.InferenceSession.run = deaf
"""
COMMAND = "from vlm_export.cli.main import main\nsys.exit(main(sys.argv[1:]))"
# A command that does nothing but compute, and starts sooner than a verb.
LIGHT = """
from vlm_export.cli import inspect
from vlm_export.cli.main import main
from vlm_export.runtime.engines.onnxruntime import OrtEngine
import numpy as np
inspect.run = lambda args: OrtEngine(args.source, threads=1).run({"x": np.zeros(1, np.float32)})
sys.exit(main(["inspect", sys.argv[1]]))
"""
LIBRARY = """
from vlm_export.runtime.engines.onnxruntime import OrtEngine
import numpy as np
engine = OrtEngine(sys.argv[1], threads=1)
try:
    engine.run({"x": np.zeros(1, np.float32)})
except KeyboardInterrupt:
    print("caught", flush=True)
    print(engine.path.name)
"""


def endless(path: Path) -> Path:
    """A loop that takes 2^63 - 1 turns."""
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["carried", "one"], ["next"]),
        ],
        "body",
        [
            value("turn", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("carried", TensorProto.FLOAT, [1]),
        ],
        [value("go_on", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, [1])],
        [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["turns", "yes", "x"], ["y"], body=body)],
        "g",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
        [
            helper.make_tensor("turns", TensorProto.INT64, [], [2**63 - 1]),
            helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that has begun to compute."""
    line = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    return process


@pytest.mark.usefixtures("default_interrupts")
def test_one_ctrl_c_ends_a_running_graph(tmp_path: Path) -> None:
    model = endless(tmp_path / "m.onnx")
    process = started(PRELUDE + COMMAND, "graph", "store", model, "-o", tmp_path / "out.onnx", "--verify")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert (out, err) == ("", "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.usefixtures("default_interrupts")
def test_sigterm_ends_a_running_graph_before_its_grace_time(tmp_path: Path) -> None:
    process = started(PRELUDE + "interrupts.GRACE_SECONDS = 1e6\n" + LIGHT, endless(tmp_path / "m.onnx"))
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=TIMEOUT) == ("", "interrupted\n")
    assert process.returncode == 130


@pytest.mark.usefixtures("default_interrupts")
def test_a_program_keeps_its_own_handlers(tmp_path: Path) -> None:
    process = started(PRELUDE + LIBRARY, endless(tmp_path / "m.onnx"))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=TIMEOUT) == ("caught\nm.onnx\n", "")
    assert process.returncode == 0


@pytest.mark.usefixtures("default_interrupts")
def test_a_second_ctrl_c_ends_what_does_not_stop(tmp_path: Path) -> None:
    process = started(PRELUDE + DEAF + LIGHT, endless(tmp_path / "m.onnx"))
    for _ in range(TIMEOUT):
        process.send_signal(signal.SIGINT)
        try:
            process.wait(0.5)
            break
        except subprocess.TimeoutExpired:
            continue
    assert process.communicate(timeout=TIMEOUT)[1] == "interrupted\n"
    assert process.returncode == 130


@pytest.mark.usefixtures("default_interrupts")
def test_sigterm_ends_what_does_not_stop_after_a_grace_time(tmp_path: Path) -> None:
    process = started(PRELUDE + DEAF + "interrupts.GRACE_SECONDS = 0.5\n" + LIGHT, endless(tmp_path / "m.onnx"))
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=TIMEOUT)[1] == "interrupted\n"
    assert process.returncode == 130


@pytest.mark.usefixtures("default_interrupts")
def test_work_is_stopped_before_the_interrupt_goes_on() -> None:
    stopped, begun = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        assert stopped.wait(TIMEOUT)
        return "late"

    def press() -> None:
        begun.wait(TIMEOUT)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work, stopped.set)
    assert stopped.is_set()
    assert run_interruptibly(lambda: "next") == "next"
    with pytest.raises(ZeroDivisionError):
        run_interruptibly(lambda: 1 / 0)


def test_nothing_of_work_that_has_ended_stays_in_memory() -> None:
    """An engine that was closed must leave before the next one is opened: the worker remembers its last job."""

    class Session:
        pass

    held = [run_interruptibly(Session)]
    assert run_interruptibly(lambda: held[0]) is held[0]
    gone = weakref.ref(held.pop())
    gc.collect()
    assert gone() is None


def test_other_threads_run_their_engines_themselves(data: Path) -> None:
    engine = OrtEngine(data / "runtime" / "tiny_bundle" / "onnx" / "vision_model.onnx", threads=1)
    feeds = {"pixel_values": np.zeros((1, 3, 24, 24), np.float32)}
    expected = engine.run(feeds)["image_embeds"]
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(engine.run(feeds)["image_embeds"])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all((array == expected).all() for array in found)
