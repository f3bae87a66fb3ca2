"""OpenVINO: every graph of the bundle in its own form, which its programs read without a converter.

Facts: openvino 2026.4, `openvino.save_model` (with `compress_to_fp16=False` constants keep their dtype; by default it
rounds them to float16) and `Core.read_model`, which finds the `.bin` file by the name of the `.xml` file.
"""

from __future__ import annotations

from vlm_export.bundle import layout
from vlm_export.errors import UsageError
from vlm_export.layouts.packing import Packing
from vlm_export.runtime.engines.choice import BF16


def lay_out(packing: Packing) -> None:
    """The bundle's own files, with each part at the package's precision in `openvino/`; proved by OpenVINO.

    Raises:
        UsageError: bfloat16, which is no form of a file.
    """
    if packing.precision == BF16:
        raise UsageError(
            "bfloat16 is how OpenVINO computes, and no form of its files",
            expected="a variant of the bundle",
            got=packing.precision,
            fix="leave out --precision, and open the package with the precision 'bf16'",
        )
    known = {variant.precision for part in packing.bundle.manifest.parts for variant in part.variants}
    if packing.precision not in known:
        # Parts without the variant would be written in float32 without a word.
        fix = f"known: {', '.join(sorted(known))}; vlm-export quantize makes others"
        raise UsageError(f"the bundle has no variant {packing.precision!r}", where="--precision", fix=fix)
    packing.copy_side_files()
    for part in packing.bundle.manifest.parts:
        packing.add_for_openvino(part)
    if layout.CONFIG_NAME in packing.bundle.manifest.files:
        # What it says of files with weights is about ONNX graphs.
        packing.write_json(layout.CONFIG_NAME, layout.hub_config(packing.json(layout.CONFIG_NAME), ()))
    packing.notes.append(
        "OpenVINO computes in bfloat16 by itself where a processor can: ask it for INFERENCE_PRECISION_HINT f32"
    )
