"""`vlm-export inspect`: what a checkpoint or a bundle is, and how a bundle cuts a picture."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.chat_options import is_chat_bundle
from vlm_export.cli.common import add_common_options
from vlm_export.cli.output import print_json, print_table, print_warnings, size_text
from vlm_export.cli.slice_report import report_slices
from vlm_export.cli.tile_report import report_tiles
from vlm_export.errors import UsageError

if TYPE_CHECKING:
    from vlm_export.bundle.manifest import Manifest
    from vlm_export.family import Checkpoint


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "inspect",
        help="what a checkpoint or a bundle is, or how a bundle cuts a picture",
        description="What SOURCE is, how it would be split, and what is hard about it. Reads no weights. "
        "With --bundle, SOURCE is a picture: how it is cut into slices (MiniCPM-V, OmniLMM) or tiles (nanoVLM).",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="a checkpoint (as for export), a bundle's directory, or a picture"
    )
    parser.add_argument("--revision", metavar="REV", help="commit, branch or tag of a Hub id")
    parser.add_argument("--bundle", metavar="DIR", help="the bundle that would cut the picture")
    parser.add_argument("-o", "--output", metavar="FILE", help="of --bundle: draw the slices to this .png")
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.bundle is not None:
        if args.revision is not None:
            raise UsageError("--revision is for checkpoints", fix="leave it out, or --bundle")
        report = report_tiles if is_chat_bundle(args.bundle) else report_slices
        report(args.source, args.bundle, args.output, as_json=args.json)
        return 0
    if args.output is not None:
        raise UsageError("-o is for the slices of a picture", fix="add --bundle DIR")
    if (Path(args.source) / "vlm_export.json").is_file():
        from vlm_export.bundle.opened import open_bundle

        data = _data_from_manifest(open_bundle(Path(args.source)).manifest)
    else:
        from vlm_export.checkpoint.open import open_checkpoint
        from vlm_export.models.registry import read_prefixes

        data = _data_from_checkpoint(open_checkpoint(args.source, revision=args.revision, reads=read_prefixes))
    print_warnings(data["warnings"])
    if args.json:
        print_json(data)
    else:
        _print(data)
    return 0


def _data_from_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    from vlm_export.checkpoint.known import is_pinned
    from vlm_export.models.registry import recognise

    family = recognise(checkpoint)
    description = family.describe(checkpoint)
    dtypes = Counter(info.dtype for info in checkpoint.tensors.values())
    notes = list(description.notes)
    if dtypes["float16"] or dtypes["bfloat16"]:
        notes.append("half-precision weights are converted to float32, through a mapped file and not through memory")
    if not any("token" in name for name in checkpoint.side_files):
        notes.append("the checkpoint carries no tokenizer: pass --tokenizer, or install open_clip_torch for CLIP's own")
    return {
        "what": "checkpoint",
        "source": checkpoint.source,
        "format": checkpoint.format,
        "family": family.name,
        "tensors": {"count": len(checkpoint.tensors), "dtypes": dict(dtypes)},
        "files": [{"name": f.name, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in checkpoint.files],
        "revision": checkpoint.revision,
        "architecture": dict(description.architecture),
        "parts": [
            {"name": part.name, "parameters": part.parameter_count, "signature": part.signature.to_json()}
            for part in description.parts
        ],
        "notes": notes,
        "warnings": list(description.warnings) if description.warnings and not is_pinned(checkpoint.files) else [],
    }


def _data_from_manifest(manifest: Manifest) -> dict[str, Any]:
    warnings = manifest.facts.get("warnings")
    return {
        "what": "bundle",
        "source": manifest.source.name,
        "format": manifest.source.format,
        "family": manifest.family,
        "files": [
            {"name": name, "size_bytes": file.size_bytes, "sha256": file.sha256}
            for name, file in manifest.files.items()
        ],
        "architecture": dict(manifest.architecture),
        "parts": [
            {
                "name": part.name,
                "signature": part.signature.to_json(),
                "variants": [_data_from_variant(variant.to_json()) for variant in part.variants],
            }
            for part in manifest.parts
        ],
        "notes": [warning for part in manifest.parts for variant in part.variants for warning in variant.warnings],
        "warnings": warnings if isinstance(warnings, list) else [],
    }


def _data_from_variant(variant: Mapping[str, Any]) -> dict[str, Any]:
    verification = variant["verification"] or {}
    return {**variant, "verification": {"passed": verification.get("passed")}}


def _print(data: Mapping[str, Any]) -> None:
    print(f"{data['what']}: {data['source']} ({data['family']}, {data['format']})")
    for file in data["files"]:
        print(f"  {file['name']}  {size_text(file['size_bytes'])}  sha256 {file['sha256'][:16]}…")
    print("architecture:")
    for key, value in data["architecture"].items():
        print(f"  {key}: {value}")
    print("parts:")
    rows = [(part["name"], _signature_text(part["signature"]), _detail(part)) for part in data["parts"]]
    print_table(("  part", "inputs → outputs", ""), [(f"  {name}", text, detail) for name, text, detail in rows])
    for note in data["notes"]:
        print(f"note: {note}")


def _signature_text(signature: Mapping[str, Any]) -> str:
    def tensors(kind: str) -> str:
        return ", ".join(f"{t['name']} {t['dtype']} ({', '.join(map(str, t['shape']))})" for t in signature[kind])

    return f"{tensors('inputs')} → {tensors('outputs')}"


def _detail(part: Mapping[str, Any]) -> str:
    if "parameters" in part:
        return f"{part['parameters']:,} parameters"
    return ", ".join(f"{v['precision']} opset {v['opset']} ({v['exporter']})" for v in part["variants"])
