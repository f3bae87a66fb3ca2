"""The second engine: OpenVINO, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from vlm_export.errors import EnvironmentFailure, InputError, install_fix
from vlm_export.interrupts import run_interruptibly
from vlm_export.machine_faults import machine_fault
from vlm_export.runtime.engines.onnxruntime import Array, TensorInfo, checked_threads

_DTYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "i64": "int64", "i32": "int32", "u8": "uint8"}


class OpenVinoEngine:
    """A graph in OpenVINO; what `Engine` states. Safe to use from several threads, which take turns.

    Args:
        path: the `.onnx` file, whose external data is found beside it, or a `.xml` file of OpenVINO itself.
        threads: of one inference; None leaves the number to OpenVINO.
        in_bf16: multiply and add in bfloat16 what the graph has in float32, inputs and outputs excepted.

    Raises:
        EnvironmentFailure: the package is not installed, or the processor does not compute in bfloat16.
        InputError: OpenVINO does not read the graph.
        UsageError: `threads` is out of its range.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, in_bf16: bool = False) -> None:
        openvino = _openvino()
        self.path = Path(path)
        if in_bf16 and not computes_in_bf16():
            raise EnvironmentFailure(
                "this processor does not compute in bfloat16",
                expected="one with AVX-512 BF16 or AMX",
                fix="leave out the precision 'bf16'",
            )
        # On processors that have it, OpenVINO would compute in bfloat16 by itself.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32"}
        if checked_threads(threads) is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = run_interruptibly(lambda: openvino.Core().compile_model(str(self.path), "CPU", settings))
        except RuntimeError as error:
            raise machine_fault(error, str(self.path)) or InputError(
                "a graph cannot be loaded", where=str(self.path), expected="a graph for OpenVINO", got=_last_line(error)
            ) from error
        self._request, self._busy = compiled.create_infer_request(), Lock()
        self.inputs = tuple(_tensor_info(entry) for entry in compiled.inputs)
        self.outputs = tuple(_tensor_info(entry) for entry in compiled.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by name.

        Raises:
            InputError: the feeds do not fit the inputs, or the graph fails on these values.
        """
        names = {info.name for info in self.inputs}
        if set(feeds) != names:
            # OpenVINO would run with whatever an input held before.
            raise InputError(
                "the graph takes other inputs",
                where=str(self.path),
                expected=", ".join(sorted(names)),
                got=", ".join(sorted(feeds)) or "none",
            )
        # A request takes one run at a time, and reuses its outputs' memory in the next.
        with self._busy:
            try:
                values = run_interruptibly(lambda: self._request.infer(dict(feeds)), self._request.cancel)
            except (RuntimeError, TypeError) as error:
                raise machine_fault(error, str(self.path)) or InputError(
                    "a graph failed while running", where=str(self.path), got=_last_line(error)
                ) from error
            return {info.name: np.array(values[info.name]) for info in self.outputs}


def write_ir(graph: Path, target: Path) -> None:
    """Writes an ONNX graph in OpenVINO's own form, with each constant in the dtype that it has.

    Args:
        target: the `.xml` file; the constants lie beside it in a `.bin` file of the same name.

    Raises:
        EnvironmentFailure: the package is not installed.
        InputError: OpenVINO does not read the graph, such as one of ONNX Runtime's own operators.
    """
    openvino = _openvino()
    try:
        run_interruptibly(
            lambda: openvino.save_model(openvino.Core().read_model(graph), target, compress_to_fp16=False)
        )
    except RuntimeError as error:
        raise machine_fault(error, str(target)) or InputError(
            "OpenVINO does not convert a graph",
            where=str(graph),
            expected="operators that it has",
            got=_last_line(error),
        ) from error


def _openvino() -> Any:
    # Unless this package is missing, OpenVINO reports each use to a host outside, from a process that may outlive ours.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # Python's way to say: not there
    try:
        import openvino
    except ImportError as error:
        raise EnvironmentFailure("OpenVINO is not installed", got=str(error), fix=install_fix("openvino")) from error
    return openvino


def computes_in_bf16() -> bool:
    """Whether OpenVINO is installed and finds a processor with instructions for bfloat16.

    Without them it would take the hint and compute in float32.
    """
    try:
        openvino = _openvino()
    except EnvironmentFailure:
        return False
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _tensor_info(entry: Any) -> TensorInfo:
    dtype = entry.element_type.get_type_name()
    shape = tuple(None if axis.is_dynamic else axis.get_length() for axis in entry.partial_shape)
    return TensorInfo(entry.any_name, _DTYPES.get(dtype, dtype), shape)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
