"""The one loader: a bundle's directory to a Model that can do all of the bundle's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm_export.bundle.opened import open_bundle
from vlm_export.runtime.engines.choice import EngineName
from vlm_export.runtime.inputs.images import MAX_PIXELS
from vlm_export.runtime.model import Model
from vlm_export.runtime.session import Session


def load(
    path: str | Path,
    *,
    precision: str | None = None,
    engine: EngineName | None = None,
    providers: str | Sequence[str] | None = None,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
    shared_weights: bool = False,
) -> Model:
    """Opens a bundle.

    Args:
        path: the bundle's directory.
        precision: the variant of all parts; None: float32, or the only one that the bundle has. With OpenVINO also
            "bf16", float32's graphs computed in bfloat16, and "NAME+bf16", another variant's. "fastest": the one that a
            rule calls fastest on this engine and processor, of those within their budget (`fastest_variant`); the
            model's `precision` says which.
        engine: what runs the graphs; "openvino" needs the extra of that name, and runs on the CPU. None: ONNX Runtime,
            or OpenVINO where the bundle was packaged for it.
        providers: ONNX Runtime's execution providers in order of preference, one name or several; the CPU by default.
        threads: threads of one operator and of image decoding; None for as many as there are cores (decoding: 4).
        max_pixels: images with more are refused before they are decoded; those that Pillow has opened are not.
        shared_weights: for several processes of one machine, which then hold a model's weights once: they map them,
            packed for ONNX Runtime's kernels, from files in the user's cache ($VLM_EXPORT_CACHE/prepacked, which may be
            deleted when nothing runs). The first use writes these. ONNX Runtime on the CPU alone; other engines hold
            their own.

    Raises:
        InputError: no bundle, or a damaged one. The graphs are checked when they are first used.
        UsageError: `path` is no path, the bundle has no variant of that precision, or an option is out of its range.
        EnvironmentFailure: on first use, where an engine or a provider is missing, or the processor has no bfloat16.
    """
    bundle = open_bundle(path)
    return Model(
        Session(
            bundle,
            precision=precision,
            engine=engine,
            providers=providers,
            threads=threads,
            max_pixels=max_pixels,
            shared_weights=shared_weights,
        )
    )
