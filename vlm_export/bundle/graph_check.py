"""Checks of a variant's graph against the manifest, the same when a bundle is published and when it is opened."""

from __future__ import annotations

from pathlib import Path

from vlm_export.bundle.manifest import Manifest, VariantRecord
from vlm_export.bundle.onnx_locations import check_graph
from vlm_export.errors import InputError


def check_variant_files(manifest: Manifest, variant: VariantRecord, where: str) -> None:
    """InputError when the manifest lists no size and sha256 for one of the variant's files."""
    for name in (variant.file, *variant.external_data):
        if name not in manifest.files:
            raise InputError(
                "a variant names a file that the bundle does not list",
                where=where,
                expected=f"{name} under 'files'",
                fix="export the model again",
            )


def check_variant_graph(root: Path, manifest: Manifest, variant: VariantRecord) -> None:
    """InputError when the graph names other data files, or its tensors do not fit in them (see `check_graph`)."""
    check_variant_files(manifest, variant, str(root))
    sizes = {name: manifest.files[name].size_bytes for name in variant.external_data}
    check_graph(root, variant.file, sizes)
