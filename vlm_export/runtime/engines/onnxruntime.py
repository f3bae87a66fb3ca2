"""Engines: what executes a graph. ONNX Runtime is the first."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from vlm_export.bundle.memory import return_freed_memory
from vlm_export.bundle.oldest_engine import BY_OPSET, oldest_onnxruntime
from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.interrupts import run_session, start_session
from vlm_export.machine_faults import machine_fault
from vlm_export.text_display import shown

Array: TypeAlias = npt.NDArray[Any]
CPU = "CPUExecutionProvider"

# Folds a zero Pad into the MaxPool after it, which then pads with minus infinity: wrong for negative inputs.
# Seen in onnxruntime 1.31, at the optimisation level BASIC, too.
WRONG_OPTIMIZERS = ("Pad_Fusion",)

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}
# Its log goes past Python to stderr, and quotes names of the graph; errors come as exceptions.
_LOG_FATAL_ONLY = 4

_NO_PACKING = "session.disable_prepacking"
_LONGEST_CAUSE = 600

MAX_THREADS = 1024
"""More than any machine has cores for, and few enough for every system to start."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph: dtype name, and its axes as sizes, names or None for unnamed dynamic ones."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Engine(Protocol):
    """Runs one graph."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by name; InputError when the feeds do not fit the inputs."""
        ...


class OrtEngine:
    """A graph in ONNX Runtime.

    Args:
        path: the `.onnx` file; its external data is found beside it.
        providers: execution providers in order of preference, by ONNX Runtime's names or their short forms ("cpu",
            "cuda"). What they cannot run falls to the CPU.
        threads: of one operator; None leaves the number to ONNX Runtime.
        exact: float32 stays float32 on accelerators (no TF32), as verification needs it, and no memory is kept between
            runs. Optimisers known to compute something else are off in either case, so that what is verified is what
            runs.
        mapped: weights stay in their file and are read where they are used, for graphs that fill the memory: the
            engine then makes no optimised copy of them, and keeps no memory between runs.
        profile: where the engine's profile begins to be written, for `profiled_nodes`; None: no profile.
        prepacked_to: where the graph is written as it is computed here, optimised and with packed weights in a file
            beside it (`runtime/engines/prepacked.py`); None: nowhere.
        prepacked: the graph is such a one.
        packs: matrices are packed for the kernels when the graph is opened; False: they stay as they lie in the file.

    Attributes:
        providers: execution providers that started, by ONNX Runtime's names, in order of preference.

    Raises:
        InputError: the file is no valid graph.
        EnvironmentFailure: a provider is not available, or does not start.
        UsageError: `threads` is out of its range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        providers: Sequence[str] = (CPU,),
        threads: int | None = None,
        exact: bool = False,
        mapped: bool = False,
        profile: str | None = None,
        prepacked_to: Path | None = None,
        prepacked: bool = False,
        packs: bool = True,
    ) -> None:
        import onnxruntime

        self.path, self.mapped = Path(path), mapped
        wanted = [_resolved_provider(name, onnxruntime.get_available_providers()) for name in providers]
        options = _session_options(checked_threads(threads), exact=exact, mapped=mapped, prepacked=prepacked)
        if not packs:
            options.add_session_config_entry(_NO_PACKING, "1")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        if prepacked_to is not None:
            _write_prepacked(options, prepacked_to)
        try:
            self._session = start_session(
                str(self.path),
                options,
                providers=[(name, _provider_options(name, exact)) for name in wanted],
                disabled_optimizers=list(WRONG_OPTIMIZERS),
            )
        except Exception as error:  # onnxruntime's own classes share no base but Exception.
            fault = machine_fault(error, str(self.path)) or _too_old(self.path, onnxruntime.__version__, error)
            raise fault or InputError(
                "a graph cannot be loaded",
                where=str(self.path),
                expected="a valid ONNX model with its external data beside it",
                got=_cause(error),
                fix="export it again",
            ) from error
        if prepacked:
            # It packs each matrix once more, and lets go of it.
            return_freed_memory()
        self.providers = tuple(self._session.get_providers())
        _check_started(wanted, self.providers)
        self.inputs = tuple(_tensor_info(entry) for entry in self._session.get_inputs())
        self.outputs = tuple(_tensor_info(entry) for entry in self._session.get_outputs())
        # Prepared once: a decoder with 60 caches is fed for every token.
        self._names = frozenset(info.name for info in self.inputs)
        self._forms = tuple((info, *_form(info)) for info in self.inputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by name.

        Raises:
            InputError: a name, dtype, rank or fixed size does not fit, or the graph fails on these values.
        """
        self._check(feeds)
        try:
            values = run_session(self._session, feeds)
        except Exception as error:  # As above.
            shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feeds.items())
            raise machine_fault(error, str(self.path)) or InputError(
                "a graph failed while running", where=str(self.path), got=f"{_cause(error)} (inputs: {shapes})"
            ) from error
        return {info.name: np.asarray(value) for info, value in zip(self.outputs, values, strict=True)}

    def profiled_nodes(self) -> dict[str, int]:
        """Execution provider → how many nodes of the runs so far it ran, of an engine with `profile`; ends that."""
        path = Path(self._session.end_profiling())
        events = json.loads(path.read_text(encoding="utf-8"))
        ran = (event["args"].get("provider", "") for event in events if event.get("cat") == "Node")
        return dict(Counter(provider for provider in ran if provider))

    def _check(self, feeds: Mapping[str, Array]) -> None:
        if feeds.keys() != self._names:
            raise InputError(
                "the graph takes other inputs",
                where=str(self.path),
                expected=", ".join(sorted(self._names)),
                got=", ".join(sorted(feeds)) or "none",
            )
        for info, dtype, rank, fixed in self._forms:
            array = feeds[info.name]
            fits = array.dtype == dtype and array.ndim == rank
            for axis, size in fixed if fits else ():
                fits &= array.shape[axis] == size
            if not fits:
                raise InputError(
                    f"input {info.name!r} does not fit the graph",
                    where=str(self.path),
                    expected=f"{info.dtype} {shape_text(info.shape)}",
                    got=f"{array.dtype} {shape_text(array.shape)}",
                )


def _session_options(threads: int | None, *, exact: bool, mapped: bool, prepacked: bool) -> Any:
    """ONNX Runtime's options for the arguments of `OrtEngine`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    # Engines run in turn: image, prompt, token. Idle threads would spin on and take cores from the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if exact or mapped:
        # An arena keeps what the largest point took, and more; a proof runs many sizes beside the Reference.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        # Nor are cores left to it alone: the original computes at the same time.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if mapped or prepacked:
        # Optimised graphs hold computed copies (float16 weights as float32); one that is prepacked is optimised.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if mapped:
        # Prepacking makes another copy of each matrix.
        options.add_session_config_entry(_NO_PACKING, "1")
        # By default a CPU first converts all float16 weights to float32, then computes; this order converts each
        # where it is used.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return options


def _write_prepacked(options: Any, path: Path) -> None:
    """Lets a session write its graph, and its weights to a file beside it, named as the graph with `.data` behind."""
    options.optimized_model_filepath = str(path)
    for name, value in (
        ("save_external_prepacked_constant_initializers", "1"),
        ("optimized_model_external_initializers_file_name", f"{path.name}.data"),
        # Smaller ones stay in the graph.
        ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
    ):
        options.add_session_config_entry(f"session.{name}", value)


def checked_threads(threads: int | None) -> int | None:
    """A number of threads, or None; UsageError unless it is a whole number from 1 to MAX_THREADS."""
    if threads is None:
        return None
    if isinstance(threads, bool) or not isinstance(threads, Integral) or not 1 <= threads <= MAX_THREADS:
        raise UsageError("threads is out of its range", expected=f"1 to {MAX_THREADS}, or None", got=repr(threads))
    return int(threads)


def _resolved_provider(name: str, available: Sequence[str]) -> str:
    for candidate in available:
        if name.lower() in (candidate.lower(), candidate.lower().removesuffix("executionprovider")):
            return candidate
    raise EnvironmentFailure(
        f"execution provider {name!r} is not available",
        expected=", ".join(available),
        got=name,
        fix="install the onnxruntime build that has it (onnxruntime-gpu for CUDA), or use CPUExecutionProvider",
    )


def _provider_options(name: str, exact: bool) -> dict[str, str]:
    return {"use_tf32": "0"} if exact and name == "CUDAExecutionProvider" else {}


def _check_started(wanted: Sequence[str], started: Sequence[str]) -> None:
    # ONNX Runtime falls back to the CPU with a line in its log when a provider's libraries are missing.
    missing = [name for name in wanted if name not in started]
    if missing:
        raise EnvironmentFailure(
            "an execution provider did not start",
            expected=", ".join(wanted),
            got=f"only {', '.join(started)}",
            fix="install the driver and libraries that it needs, or use CPUExecutionProvider",
        )


def _too_old(path: Path, installed: str, error: Exception) -> EnvironmentFailure | None:
    """Why a graph did not load, where the installed ONNX Runtime is older than what it needs."""
    try:
        needed, opset = oldest_onnxruntime(path)
    except (InputError, OSError, ValueError):
        return None
    numbers = [tuple(int(number) for number in re.findall(r"\d+", text)[:3]) for text in (installed, needed)]
    if numbers[0] >= numbers[1]:
        return None
    lower = ", or export with a lower --opset" if opset >= BY_OPSET[0][0] else ""
    return EnvironmentFailure(
        "the installed ONNX Runtime is too old for this graph",
        where=str(path),
        expected=f"onnxruntime {needed} or newer, for its opset {opset} and its operators",
        got=f"onnxruntime {installed}: {_cause(error)}",
        fix=f"pip install -U 'onnxruntime>={needed}'{lower}",
    )


def _tensor_info(entry: Any) -> TensorInfo:
    return TensorInfo(entry.name, _DTYPES.get(entry.type, entry.type), tuple(entry.shape))


def _form(info: TensorInfo) -> tuple[np.dtype[Any], int, tuple[tuple[int, int], ...]]:
    """What an array for a info must have: dtype (void where numpy has none), rank, and (axis, size) of fixed sizes."""
    dtype = np.dtype(info.dtype if info.dtype in _DTYPES.values() else np.void)
    fixed = tuple((axis, size) for axis, size in enumerate(info.shape) if isinstance(size, int))
    return dtype, len(info.shape), fixed


def shape_text(shape: Sequence[int | str | None]) -> str:
    """An error's words for a shape; None is an axis of any size."""
    return f"({', '.join('?' if axis is None else str(axis) for axis in shape)})"


def _cause(error: Exception) -> str:
    return shown(f"{type(error).__name__}: {str(error).strip()}", _LONGEST_CAUSE)


def batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`items` in runs of at most `size`; UsageError unless that is a whole number, at least 1."""
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
        raise UsageError("batch_size must be at least 1", expected="a whole number", got=repr(size))
    return (items[start : start + size] for start in range(0, len(items), size))


def run_in_float32(engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """A graph's outputs by name; floats go in at each input's own precision, and come out as float32."""
    dtypes = {port.name: port.dtype for port in engine.inputs}
    fitted = {
        name: array.astype(dtypes.get(name), copy=False) if array.dtype.kind == "f" else array
        for name, array in feeds.items()
    }
    return {
        name: array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array
        for name, array in engine.run(fitted).items()
    }
