"""What a bundle declares, against what its source says, what the contract recorded, and what its graphs are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_export import __version__
from vlm_export.bundle.manifest import MANIFEST_NAME, Manifest, VariantRecord, is_ir
from vlm_export.bundle.oldest_engine import oldest_onnxruntime
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import VerificationError
from vlm_export.proof.contract_files import Difference, differences

_FIELDS = ("family", "architecture", "image", "text", "tasks", "origins", "export")
_CHOSEN = ("target", "contract", "packaged_for")


def check_declared(bundle: OpenBundle, rebuilt: Manifest) -> None:
    """Compares what the runtime goes by: family, architecture, preprocessing, tasks, and each part's signature.

    Args:
        rebuilt: the manifest that an export of the same parts with the same options would write.

    Raises:
        VerificationError: names the first field that differs.
    """
    found = first_difference(declared(rebuilt), bundle.manifest)
    if found is None:
        return
    made_by = bundle.manifest.tools.get("vlm-export", __version__)
    fix = "do not use this bundle; export the model again"
    raise VerificationError(
        "the manifest declares something else about the model than its source",
        where=f"{bundle.root / MANIFEST_NAME}: {found.field}",
        expected=found.expected,
        got=found.got,
        fix=fix if made_by == __version__ else f"verify with vlm-export {made_by!r}, which made the bundle, or {fix}",
    )


def first_difference(expected: Mapping[str, Any], manifest: Manifest) -> Difference | None:
    """The first field in which a manifest declares something else.

    Args:
        expected: from `declared`.
    """
    return next(differences(_by_name(expected), _by_name(declared(manifest))), None)


def declared(of: Manifest) -> dict[str, Any]:
    """What the runtime goes by, as plain JSON data.

    Which runtime the graphs are written for is the user's choice alone, and a licence belongs to the name that was
    exported: the same file under another name has none. What was proved is proved again.
    """
    manifest = of.to_json()
    data = {field: manifest[field] for field in _FIELDS}
    data["export"] = {key: value for key, value in data["export"].items() if key not in _CHOSEN}
    data["source"] = {key: manifest["source"][key] for key in ("dropped_keys", "shards_left_aside")}
    data["signature"] = {part["name"]: part["signature"] for part in manifest["parts"]}
    return data


def version_difference(bundle: OpenBundle, variant: VariantRecord) -> str | None:
    """Where the manifest declares another opset or oldest ONNX Runtime than the graph has, None where it does not."""
    if is_ir(variant.file):
        # No release loads it, which the manifest is held to where it is read.
        return None
    release, opset = oldest_onnxruntime(bundle.file(variant.file))
    if variant.opset != opset:
        return f"opset: expected {opset}, as the graph has it, got {variant.opset}"
    if variant.oldest_onnxruntime != release:
        return f"oldest_onnxruntime: expected {release}, as the graph needs it, got {variant.oldest_onnxruntime}"
    return None


def _by_name(value: Any) -> Any:
    """JSON data with each list of named objects, as axes and tasks are, made an object by their names."""
    if isinstance(value, Mapping):
        return {key: _by_name(entry) for key, entry in value.items()}
    if not isinstance(value, list | tuple):
        return value
    for key in ("name", "kind"):
        named = {entry[key]: _by_name(entry) for entry in value if isinstance(entry, Mapping) and key in entry}
        if value and len(named) == len(value):
            return named
    return [_by_name(entry) for entry in value]
