"""What a bench runs: sides (who computes) and loads (on what), from what the user chose and what this machine has."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_export.bundle.manifest import Manifest, PartRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import UsageError, suggestion
from vlm_export.lab.real_inputs import real_inputs
from vlm_export.proof.grid import BATCH_AXIS, SEQUENCE_AXIS
from vlm_export.proof.points import Arrays
from vlm_export.runtime.engines.choice import BF16, ONNXRUNTIME, OPENVINO, chosen_precision, engine_choice
from vlm_export.runtime.engines.openvino import computes_in_bf16

TORCH, TRANSFORMERS, FASTEMBED = "torch", "transformers", "fastembed"
TORCH_FORMS = ("eager", "compiled", "bf16")
# Of a task that writes: torch.compile would compile anew for each token that a cache grows by, and not every decoder's
# module runs in bfloat16.
TORCH_WRITING_FORMS = ("eager",)
EXACT = "fp32"


@dataclass(frozen=True)
class Side:
    """Who computes.

    Attributes:
        engine: "onnxruntime", "openvino" or "torch"; of files of images also "transformers" or "fastembed".
        precision: as in `vlm_export.load`; of torch one of `TORCH_FORMS`; of a graph its file's name.
        threads: of one operator.
        graph: a file beside the bundle, None for the bundle's own.
    """

    engine: str
    precision: str
    threads: int
    graph: str | None = None

    @property
    def in_bf16(self) -> bool:
        """Whether a graph of its own is computed in bfloat16."""
        return self.graph is not None and self.precision.endswith(f"+{BF16}")

    @property
    def is_of_bundle(self) -> bool:
        """Whether `vlm_export.load` gives it."""
        return self.engine in (ONNXRUNTIME, OPENVINO) and self.graph is None

    @property
    def name(self) -> str:
        """`openvino bf16`; the number of threads stands beside it."""
        return f"{self.engine} {self.precision}"

    @property
    def label(self) -> str:
        """The name with the number of threads."""
        return f"{self.name}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Load:
    """On what: the sizes of one run of a part, or of a task; None where it has no such axis.

    Attributes:
        part: its name, or the kind of the task.
        length: tokens of a row: of what is fed to a part, of what a task writes.
        step: of a task that writes: "first token" or "next tokens".
        files: how many images a task encodes in one run.
    """

    part: str
    batch: int | None
    length: int | None
    step: str | None = None
    files: int | None = None

    @property
    def label(self) -> str:
        sizes = [("batch", self.batch), ("length", self.length), ("images", self.files)]
        name = self.part if self.step is None else f"{self.part}, {self.step}"
        return ", ".join([name, *(f"{name} {size}" for name, size in sizes if size is not None)])

    @property
    def unit(self) -> str:
        """What `rows` counts."""
        return "images" if self.files is not None else "rows" if self.step is None else "tokens"

    @property
    def rows(self) -> int:
        """What one run computes, for a throughput."""
        if self.files is not None:
            return self.files
        return (self.batch or 1) * (1 if self.step is None else self.length or 1)


@dataclass(frozen=True)
class BenchOptions:
    """What the user may choose.

    Attributes:
        parts, precisions, engines: only these; none for all that the bundle and this machine have. No part is measured
            by itself where images or tasks are named, unless parts are named too.
        images: files of images, or folders of them, that tasks are measured on, from the file on.
        tasks: kinds of tasks to measure; none for "embed" where there are images.
        new_tokens: how many a task that writes adds to each row.
        prompt: how captions begin, or the question; None for the bundle's own.
        batches: rows of one run.
        threads: of one operator; none for as many as this process has cores.
        lengths: tokens of a row, of parts whose axis is free; none for as many as the recorded inputs have.
        rounds: how often each side runs.
        against: the bundle's source, which PyTorch then runs beside it, first of all.
        graphs: files with the interface of the one part in `parts`, which run beside the bundle's variants.
        least_cosine: what `recommend` still takes.
    """

    parts: Sequence[str] = ()
    images: Sequence[str | Path] = ()
    tasks: Sequence[str] = ()
    new_tokens: int = 32
    prompt: str | None = None
    precisions: Sequence[str] = ()
    engines: Sequence[str] = ()
    batches: Sequence[int] = (1, 8)
    threads: Sequence[int] = ()
    lengths: Sequence[int] = ()
    rounds: int = 9
    against: str | None = None
    graphs: Sequence[str | Path] = ()
    least_cosine: float = 0.999

    def __post_init__(self) -> None:
        for name in ("batches", "threads", "lengths"):
            if any(size < 1 for size in getattr(self, name)):
                raise UsageError(f"{name} are numbers from 1", got=str(list(getattr(self, name))))
        if self.graphs and len(self.parts) != 1:
            raise UsageError("graphs stand for one part", got=f"{len(self.parts)} parts", fix="name it: --part NAME")
        if self.graphs and (self.images or self.tasks):
            raise UsageError("graphs stand for one part, and no task runs them", fix="leave out images and tasks")
        if self.new_tokens < 2:
            raise UsageError(
                "a first token and next ones are measured", expected="at least 2", got=str(self.new_tokens)
            )
        if self.rounds < 1:
            raise UsageError("there is at least one round", got=str(self.rounds))


def chosen_parts(manifest: Manifest, names: Sequence[str]) -> list[PartRecord]:
    """The parts of those names, all where there is none; UsageError for an unknown one."""
    known = [part.name for part in manifest.parts]
    for name in names:
        if name not in known:
            raise UsageError(f"the bundle has no part {name!r}", where=manifest.name, fix=suggestion(name, known))
    return [part for part in manifest.parts if not names or part.name in names]


def sides_of(manifest: Manifest, options: BenchOptions, task: str | None = None) -> list[Side]:
    """Other software first, PyTorch where it is asked for, then each engine with each precision that it computes.

    Args:
        task: the kind of the task that they do; None for sides of a part.

    Raises:
        UsageError: an engine or a precision that there is not, or that no engine computes.
    """
    engines = list(options.engines) or [ONNXRUNTIME, *([OPENVINO] if importlib.util.find_spec(OPENVINO) else [])]
    found: list[Side] = []
    for threads in options.threads or (available_cores(),):
        found += _other_sides(options, task, threads)
        for engine in engines:
            engine_choice(engine, None, threads)
            found += [Side(engine, name, threads) for name in _precisions(manifest, options.precisions, engine)]
            found += [side for graph in options.graphs for side in _graph_sides(str(graph), engine, threads)]
    for name in options.precisions:
        chosen = chosen_precision(manifest, name)
        if name not in {side.precision for side in found}:
            engine_choice(engines[0], None, None, in_bf16=chosen.in_bf16)
    return found


def _other_sides(options: BenchOptions, task: str | None, threads: int) -> Iterator[Side]:
    if options.against is not None:
        if task == "embed":
            yield Side(TRANSFORMERS, "eager", threads)
        for form in TORCH_FORMS if task in (None, "embed") else TORCH_WRITING_FORMS:
            yield Side(TORCH, form, threads)
    if task == "embed" and importlib.util.find_spec(FASTEMBED):
        yield Side(FASTEMBED, EXACT, threads)


def _precisions(manifest: Manifest, wanted: Sequence[str], engine: str) -> Iterator[str]:
    known = list(dict.fromkeys(variant.precision for part in manifest.parts for variant in part.variants))
    every = [*known, *([BF16] if engine == OPENVINO and EXACT in known and computes_in_bf16() else [])]
    for name in wanted or every:
        if engine == OPENVINO or not chosen_precision(manifest, name).in_bf16:
            yield name


def _graph_sides(path: str, engine: str, threads: int) -> Iterator[Side]:
    name, suffix = Path(path).stem, Path(path).suffix
    if engine == OPENVINO:
        yield Side(engine, name, threads, path)
        if computes_in_bf16():
            yield Side(engine, f"{name}+{BF16}", threads, path)
    elif suffix == ".onnx":
        yield Side(engine, name, threads, path)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loads_of(bundle: OpenBundle, part: PartRecord, options: BenchOptions) -> dict[Load, Arrays]:
    """The sizes to run a part at, from small to large, each with inputs: rows of recorded ones, cut or repeated.

    They are none where the bundle has no inputs for the part on record.
    """
    recorded = real_inputs(bundle, part)
    if not recorded:
        return {}
    # The last ones are images and texts where the part takes them.
    inputs = recorded[-1]
    axes = {axis.name for axis in part.signature.axes}
    given = _sizes(part, inputs)
    found: dict[Load, Arrays] = {}
    for length in sorted(set(options.lengths)) if SEQUENCE_AXIS in axes and options.lengths else [None]:
        for batch in sorted(set(options.batches)) if BATCH_AXIS in axes else [None]:
            wanted = {BATCH_AXIS: batch, SEQUENCE_AXIS: length}
            sizes = {**given, **{name: size for name, size in wanted.items() if size is not None}}
            _check_sizes(part, sizes)
            load = Load(part.name, batch, sizes.get(SEQUENCE_AXIS))
            found[load] = _resized(part, inputs, part.signature.related(sizes))
    return found


def _sizes(part: PartRecord, inputs: Arrays) -> dict[str, int]:
    return {
        entry: size
        for tensor in part.signature.inputs
        for entry, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
        if isinstance(entry, str)
    }


def _check_sizes(part: PartRecord, sizes: Mapping[str, int]) -> None:
    for axis in part.signature.axes:
        size = sizes.get(axis.name, axis.minimum)
        if size < axis.minimum or (axis.maximum is not None and size > axis.maximum):
            most = "" if axis.maximum is None else f" to {axis.maximum}"
            raise UsageError(
                f"part {part.name!r} does not take this size of the axis {axis.name!r}",
                expected=f"{axis.minimum}{most}",
                got=str(size),
            )


def _resized(part: PartRecord, inputs: Arrays, sizes: Mapping[str, int]) -> Arrays:
    """Each symbolic axis cut or repeated to its size; what stood last stays last, as the end of a text must."""
    found = {}
    for tensor in part.signature.inputs:
        array = inputs[tensor.name]
        for position, entry in enumerate(tensor.shape):
            if isinstance(entry, str) and array.shape[position] != sizes[entry]:
                array = np.take(array, _places(array.shape[position], sizes[entry]), axis=position)
        found[tensor.name] = array
    return found


def _places(given: int, wanted: int) -> list[int]:
    """Positions of what there is, for each of the wanted ones."""
    return [i % max(given - 1, 1) for i in range(wanted - 1)] + [given - 1] if given and wanted else []


def save_arrays(path: str | Path, arrays: Arrays) -> None:
    """A `.npz` with the arrays by name."""
    given: Any = arrays  # numpy's own annotation takes the names for its options.
    np.savez(path, **given)
