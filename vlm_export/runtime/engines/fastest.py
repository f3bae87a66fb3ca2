"""`precision="fastest"`: the variant that is fastest by rule on this engine and machine, within its stated budget.

The order is what this project's benchmarks of encoders showed, and no measurement of this machine: `vlm-export bench
DIR` measures, and says which variant is faster here.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from vlm_export.bundle.manifest import Manifest
from vlm_export.runtime.engines.choice import ONNXRUNTIME, EngineChoice

FASTEST = "fastest"
"""The word for it in the place of a precision."""
_ON_OTHER_PROVIDERS = ("fp16",)
_IN_ONNXRUNTIME = ("int8", "int8-static")
_IN_OPENVINO = ("int8-static",)
_CPU_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
_CPUINFO = Path("/proc/cpuinfo")


def fastest_variant(manifest: Manifest, choice: EngineChoice) -> str:
    """The first of the engine's order that the bundle has within its budget; else the bundle's default.

    - On a provider other than the CPU: `fp16`, which its own gates judged.
    - ONNX Runtime: `int8`, then `int8-static`, whose products are faster than float32's where the processor
      multiplies 8 bits. `w8a16` and `int4` of encoders multiply in float32 and save room.
    - OpenVINO: `int8-static`. It computes `int8` slower than float32, since it fuses nothing of products whose ranges
      are taken in each run. bfloat16 is not chosen, since nothing in a bundle says what it loses.
    - Without such instructions (VNNI, AMX, the dot product of ARM), or where the system does not tell: only variants
      that were made with `--reduce-range`; others overflow on x86.
    """
    order: Sequence[str] = _IN_ONNXRUNTIME if choice.engine == ONNXRUNTIME else _IN_OPENVINO
    if not choice.is_on_cpu:
        order = _ON_OTHER_PROVIDERS
    is_fit = multiplies_bytes()
    for precision in order:
        variants = [variant for part in manifest.parts for variant in part.chosen_variants(precision)]
        losses = [variant.loss for variant in variants if variant.loss is not None]
        if variants and all(loss.is_within_budget and (is_fit or loss.reduce_range) for loss in losses):
            return precision
    return manifest.default_precision()


def multiplies_bytes() -> bool:
    """Whether the processor says that it has instructions for sums of products of 8 bits."""
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    stated = (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features")))
    return not _CPU_FLAGS.isdisjoint(next(stated, []))
