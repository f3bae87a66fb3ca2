"""Which model a bundle holds: what files of embeddings and features remember of the bundle that made them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from vlm_export.bundle.manifest import Manifest


def model_identity(manifest: Manifest) -> str:
    """sha256 that names the model: equal for bundles of one checkpoint, whatever their opset or precision."""
    source = manifest.source
    stated: dict[str, Any] = {
        "family": manifest.family,
        "architecture": dict(manifest.architecture),
        "image": None if manifest.image is None else manifest.image.to_json(),
        "text": None if manifest.text is None else manifest.text.to_json(),
        "weights": sorted(file.sha256 for file in source.files),
        "seed": source.random_weights_seed,
    }
    if not source.files and source.random_weights_seed is None:
        graphs = [part.variant("fp32") for part in manifest.parts]
        names = [name for graph in graphs for name in (graph.file, *graph.external_data)]
        stated["weights"] = sorted(manifest.files[name].sha256 for name in names)
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
