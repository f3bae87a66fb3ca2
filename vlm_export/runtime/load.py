"""The one loader: a bundle's directory to a Model that can do all of the bundle's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vlm_export.bundle.opened import open_bundle
from vlm_export.errors import UsageError
from vlm_export.runtime.engines.choice import EngineName, Weights
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
    weights: Weights = "packed",
    verify: Literal["full", "size"] = "full",
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
        weights: how ONNX Runtime holds them on the CPU; other engines hold their own. "packed": in memory, packed for
            its kernels, for the fastest runs. "mapped": as they lie in the bundle, for the earliest result: nothing is
            copied when a graph is opened, and each run takes longer. "shared": for several processes of one machine,
            which map packed ones from files in the user's cache ($VLM_EXPORT_CACHE/prepacked, which may be deleted when
            nothing runs); the first use writes these.
        verify: "full": the sha256 of every file is compared when it is first used. "size": of files of weights the size
            alone, where nobody can change them, as in an image that was verified when it was built.

    Raises:
        InputError: no bundle, or a damaged one. The graphs are checked when they are first used.
        UsageError: `path` is no path, the bundle has no variant of that precision, or an option is out of its range.
        EnvironmentFailure: on first use, where an engine or a provider is missing, or the processor has no bfloat16.
    """
    if verify not in ("full", "size"):
        raise UsageError(
            "a bundle's weights are verified in full or by size", expected="full or size", got=repr(verify)
        )
    bundle = open_bundle(path, hashes_weights=verify == "full")
    return Model(
        Session(
            bundle,
            precision=precision,
            engine=engine,
            providers=providers,
            threads=threads,
            max_pixels=max_pixels,
            weights=weights,
        )
    )
