"""Engines as verification wants them, also for graphs that are larger than the memory that is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from vlm_export.bundle.manifest import Manifest, VariantRecord, is_ir
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import EnvironmentFailure
from vlm_export.proof.points import EngineRun
from vlm_export.runtime.engines.choice import OPENVINO, engine_choice
from vlm_export.runtime.engines.onnxruntime import CPU, Engine, OrtEngine

MAPPED_NOTE = "the engine's own graph optimisations: off, so that the weights stay in their file"
_GIB = 1 << 30
# With mapped weights the process took 2.8 GiB more than before to verify EVA-02 enormous in float16, its Reference
# included, at its largest images (docs/benchmarks/export-omnilmm).
_ROOM_BYTES = 3 * _GIB
# What smaller graphs compute with fits wherever their weights do.
_CHECKED_ABOVE_BYTES = _GIB
_SYSTEM = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_MAP_ABOVE_BYTES = 4 << 30
# What an engine may hold beyond a graph's weights: a second, repacked copy, and room to compute in.
_COPIES = 2.5


def verifying_engine(
    path: Path, *, weights_bytes: int, threads: int | None = None, providers: Sequence[str] = (CPU,)
) -> OrtEngine:
    """An exact engine, with mapped weights if they would fill the memory of the CPU that runs them.

    Args:
        weights_bytes: of the graph's weights.

    Raises:
        EnvironmentFailure: too little memory even so.
    """
    on_cpu = all(name.lower().removesuffix("executionprovider") == "cpu" for name in providers)
    if on_cpu:
        _check_memory(path, weights_bytes)
    mapped = on_cpu and keeps_weights_mapped(weights_bytes)
    return OrtEngine(path, providers=providers, threads=threads, exact=True, mapped=mapped)


def verifying_openvino(
    path: Path, *, weights_bytes: int, threads: int | None = None, providers: Sequence[str] = (CPU,)
) -> Engine:
    """OpenVINO, computing in float32, for graphs in its own form.

    Raises:
        EnvironmentFailure: it is not installed, or there is too little memory.
        UsageError: it has none of these providers.
    """
    _check_memory(path, weights_bytes)
    return engine_choice(OPENVINO, providers, threads).open(path)


def verifying_start(
    bundle: OpenBundle, providers: Sequence[str], threads: int | None
) -> Callable[[str, str], EngineRun]:
    """What starts the engine of a part's variant, once its files are found to be the manifest's."""

    def start(part: str, precision: str) -> EngineRun:
        variant = bundle.manifest.part(part).variant(precision)
        path, size_bytes = bundle.model_files(variant), variant_bytes(bundle.manifest, variant)
        if is_ir(path):
            return verifying_openvino(path, weights_bytes=size_bytes, threads=threads, providers=providers).run
        return verifying_engine(path, weights_bytes=size_bytes, threads=threads, providers=providers).run

    return start


def variant_bytes(manifest: Manifest, variant: VariantRecord) -> int:
    """What a published variant's weights take in the engine, which converts float16 on most CPUs."""
    stored = sum(manifest.files[name].size_bytes for name in (variant.file, *variant.external_data))
    return 2 * stored if variant.precision == "fp16" else stored


def engine_label(providers: Sequence[str], *, mapped: bool = False) -> str:
    """The engine's name, version, providers and mode, for the report."""
    mode = "; weights mapped, not optimised" if mapped else ""
    return f"onnxruntime {version('onnxruntime')} ({', '.join(providers)}{mode})"


def openvino_label() -> str:
    """As `engine_label`, for OpenVINO."""
    return f"openvino {version('openvino')} (CPU)"


def _check_memory(path: Path, weights_bytes: int) -> None:
    available = available_bytes()
    if weights_bytes > _CHECKED_ABOVE_BYTES and available is not None and available < _ROOM_BYTES:
        raise EnvironmentFailure(
            "not enough memory to verify a graph",
            where=path.name,
            expected=f"{_ROOM_BYTES / _GIB:.1f} GiB available, with {weights_bytes / _GIB:.1f} GiB of weights on disk",
            got=f"{available / _GIB:.1f} GiB available",
            fix="close other programs, or use a machine with more memory; nothing is published unverified",
        )


def available_bytes() -> int | None:
    """Memory that this process may still take without swapping: the system's, or its control group's (version 2) if
    that is less; None where the system does not tell (outside Linux)."""
    try:
        fields = dict(line.split(":", 1) for line in _SYSTEM.read_text(encoding="ascii").splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    left = _left_in_group()
    return available if left is None else min(available, left)


def keeps_weights_mapped(weights_bytes: int) -> bool:
    """Whether an engine should read such weights from their file instead of taking them into memory."""
    available = available_bytes()
    return weights_bytes > _MAP_ABOVE_BYTES or (available is not None and available < _COPIES * weights_bytes)


def _left_in_group() -> int | None:
    try:
        limit = int((_GROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        counts = dict(line.split() for line in (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = int(counts["inactive_file"]) + int(counts["active_file"])
    except (OSError, KeyError, ValueError):  # "max" is no number: no limit.
        return None
    return max(limit - used + cached, 0)
