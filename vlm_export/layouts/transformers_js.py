"""transformers.js and optimum: the bundle itself, with both encoders in one more graph, `onnx/model.onnx`.

Facts: transformers.js 4.3.2, `src/models/session_config.js` (one session named "model" for CLIPModel, SiglipModel and
what has their interface), `src/utils/dtypes.js` (suffixes; without a `dtype` browsers ask for `_quantized`);
optimum-onnx 0.1, `ORTModelForZeroShotImageClassification` (the same file, outputs by name).
"""

from __future__ import annotations

from typing import Any

from vlm_export.bundle import layout
from vlm_export.bundle.manifest import MANIFEST_NAME
from vlm_export.layouts.consumer_graph import in_order, paired
from vlm_export.layouts.packing import Packing
from vlm_export.specs.tasks import EmbedSpec

PART = "model"
_INPUTS = ("input_ids", "pixel_values", "attention_mask")
_OUTPUTS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
_SETTINGS = "transformers.js_config"
_Q8 = "_quantized"


def lay_out(packing: Packing) -> None:
    """The bundle's own files, the combined graph where the bundle scores texts against images, and its config."""
    for name in packing.bundle.manifest.files:
        if not name.startswith(("onnx/", "golden/")) and name not in (MANIFEST_NAME, layout.LEDGER_NAME):
            packing.copy({name: name})
    for part in packing.bundle.manifest.parts:
        packing.keep(part)
    task = packing.bundle.manifest.task(EmbedSpec)
    if task is not None and task.score is not None:
        graph = paired(packing.text(), packing.image(), task.score)
        names = [
            name for name in ("input_ids", "pixel_values", "attention_mask") if name in graph.signature.input_names
        ]
        packing.add(PART, layout.graph_path(PART, packing.precision), in_order(graph, tuple(names), _OUTPUTS))
    variants = [variant for part in packing.parts for variant in part.variants]
    config = layout.hub_config(packing.json(layout.CONFIG_NAME), variants)
    packing.write_json(layout.CONFIG_NAME, _with_dtype(config, packing))


def _with_dtype(config: dict[str, Any], packing: Packing) -> dict[str, Any]:
    """Where a bundle has no 8-bit graphs, the dtype that a browser is to take instead."""
    files = [variant.file for part in packing.parts for variant in part.variants]
    if any(_Q8 in file for file in files):
        return config
    return {**config, _SETTINGS: {**config.get(_SETTINGS, {}), "dtype": packing.precision}}
