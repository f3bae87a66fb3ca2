"""`vlm-export inspect`: what a checkpoint or a bundle is, and how a bundle cuts an image."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options
from vlm_export.cli.cutting_report import report_cutting
from vlm_export.cli.output import print_json, print_line, print_table, print_warnings, terminal_width
from vlm_export.errors import UsageError
from vlm_export.text_display import size_text

if TYPE_CHECKING:
    from vlm_export.bundle.manifest import Manifest
    from vlm_export.checkpoint.sources.known import KnownCheckpoint
    from vlm_export.family import Checkpoint, Description
    from vlm_export.specs import AnyImageSpec, Origins, TextSpec

_WIDE = 100
_RECORDED = "golden/"
_LAYER_NUMBER = re.compile(r"\.\d+\.")
# Where no file says it and no default of a library: what every checkpoint of the family has.
_UNTOLD = "the family's convention"


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "inspect",
        help="what a checkpoint or a bundle is, or how a bundle cuts an image; the known names",
        description="What SOURCE is, how it would be split, and what is hard about it. Reads no weights, and of a "
        "known name downloads none. Without SOURCE: the known names. With --bundle, SOURCE is an image: how it is cut "
        "into slices or tiles.",
    )
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="a checkpoint (as for export), a bundle's directory, or an image; none: list the known names",
    )
    parser.add_argument("--base", metavar="SOURCE", help="the model that a LoRA adapter was trained on")
    parser.add_argument("--revision", metavar="REV", help="commit, branch or tag of a Hub id")
    parser.add_argument("--bundle", metavar="DIR", help="the bundle that would cut the image")
    parser.add_argument("-o", "--output", metavar="FILE", help="of --bundle: draw the slices to this .png")
    parser.add_argument("--overwrite", action="store_true", help="of -o: replace FILE")
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.bundle is not None:
        if args.source is None:
            raise UsageError("--bundle cuts an image, and none is named", fix="name an image, or leave --bundle out")
        if args.revision is not None:
            raise UsageError("--revision is for checkpoints", fix="leave it out, or --bundle")
        report_cutting(args.source, args.bundle, args.output, overwrite=args.overwrite, as_json=args.json)
        return 0
    if args.output is not None or args.overwrite:
        raise UsageError("-o and --overwrite are for the slices of an image", fix="add --bundle DIR")
    if args.source is None:
        if args.revision is not None:
            raise UsageError("--revision is for checkpoints, and none is named", fix="name a Hub id, or leave it out")
        list_known(as_json=args.json)
        return 0
    from vlm_export.checkpoint.names import hidden_name

    if (Path(args.source) / "vlm_export.json").is_file():
        from vlm_export.bundle.opened import open_bundle

        data = _data_from_manifest(open_bundle(Path(args.source)).manifest)
    else:
        data = _data_from_source(args.source, args.revision, args.base)
    data["notes"] = [note for note in [hidden_name(args.source)] if note] + data["notes"]
    print_warnings(data["warnings"])
    if args.json:
        print_json(data)
    else:
        _print(data)
    return 0


def _data_from_source(source: str, revision: str | None, base: str | None) -> dict[str, Any]:
    from vlm_export.checkpoint.names import source_kind
    from vlm_export.checkpoint.sources.known import load_known

    named = source_kind(source) == "known"
    if named and find_spec("torch") is None:
        return _data_from_config(load_known(source))
    from vlm_export.checkpoint.open import open_checkpoint
    from vlm_export.checkpoint.sources.local import open_local
    from vlm_export.models.registry import read_prefixes

    if not named:
        checkpoint = open_checkpoint(source, base=base, revision=revision, reads=read_prefixes)
        return {**_data_from_checkpoint(checkpoint), "known": None}
    known = load_known(source)
    if revision is not None:
        # Another commit than the config speaks of.
        local: Checkpoint | None = open_checkpoint(source, revision=revision, reads=read_prefixes)
    else:
        local = open_local(known, read_prefixes)
    if local is None:
        data = {**_data_from_checkpoint(checkpoint_from_config(known)), "format": None}
    else:
        data = _data_from_checkpoint(local)
    return {**data, "known": known_data(known)}


def _data_from_config(known: KnownCheckpoint) -> dict[str, Any]:
    """What our config alone says of a known checkpoint, for a machine that has no PyTorch to plan an export with."""
    note = "how it would be split is told where the extra 'export' is installed"
    return {
        "what": "checkpoint",
        "source": known.name,
        "format": None if known.source.file is None else "part of this project",
        "family": known.family,
        "tensors": None,
        "files": [],
        "revision": known.revision,
        "architecture": dict(known.architecture),
        "parts": [],
        "preparation": preparation_data(known.image, known.text, known.origins),
        "notes": [note],
        "warnings": [],
        "known": known_data(known),
    }


def _data_from_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    from vlm_export.checkpoint.random import tensor_bytes
    from vlm_export.checkpoint.sources.known import is_pinned
    from vlm_export.models.reading.image_processor import assumed_preparation
    from vlm_export.models.recognition.claims import left_out_warnings
    from vlm_export.models.registry import identify
    from vlm_export.specs.codec import field_words

    family, checkpoint = identify(checkpoint)
    description = family.describe(checkpoint)
    dtypes = Counter(info.dtype for info in checkpoint.tensors.values())
    notes = [*description.notes, *checkpoint.notes]
    assumed = description.warnings if not is_pinned(checkpoint.files) else ()
    if dtypes["float16"] or dtypes["bfloat16"]:
        notes.append("half-precision weights are converted to float32, through a mapped file and not through memory")
    text, origins, warnings = _text_of_tokenizer(checkpoint, description)
    takes_text = any("input_ids" in part.signature.input_names for part in description.parts)
    # Of a checkpoint that is not here, nobody knows.
    if takes_text and checkpoint.files and not any("token" in name for name in checkpoint.side_files):
        notes.append("the checkpoint carries no tokenizer: pass --tokenizer, unless a package that is installed has it")
    return {
        "what": "checkpoint",
        "source": checkpoint.source,
        "format": checkpoint.format,
        "family": family.name,
        "tensors": {
            "count": len(checkpoint.tensors),
            "dtypes": dict(dtypes),
            "size_bytes": sum(map(tensor_bytes, checkpoint.tensors.values())),
        },
        "files": [{"name": f.name, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in checkpoint.files],
        "revision": checkpoint.revision,
        "architecture": dict(description.architecture),
        "parts": [
            {"name": part.name, "parameters": part.parameter_count, "signature": part.signature.to_json()}
            for part in description.parts
        ],
        "preparation": preparation_data(description.image, text, origins),
        "options": dict(field_words(family.options)),
        "notes": notes,
        "warnings": [
            *assumed,
            *assumed_preparation(checkpoint, origins),
            *left_out_warnings(checkpoint),
            *warnings,
        ],
    }


def _text_of_tokenizer(
    checkpoint: Checkpoint, description: Description
) -> tuple[TextSpec | None, Origins, tuple[str, ...]]:
    """The TextSpec with what the checkpoint's tokenizer says, its origins, and warnings."""
    from vlm_export.errors import UsageError, VlmExportError
    from vlm_export.exporting.tokenizers.files import resolve_tokenizer

    text, origins = description.text, description.origins
    if text is None or not checkpoint.files:
        return text, origins, ()
    try:
        found = resolve_tokenizer(checkpoint, None, text, reserved_rows=description.reserved_rows)
    except UsageError:  # There is none; a note says so.
        return text, origins, ()
    except VlmExportError as error:
        return text, origins, (f"export refuses the tokenizer: {error.what} ({error.where}: {error.got})",)
    return found.text, origins | found.origins, found.warnings


def _data_from_manifest(manifest: Manifest) -> dict[str, Any]:
    return {
        "what": "bundle",
        "source": manifest.source.name,
        "format": manifest.source.format,
        "family": manifest.family,
        "licence": manifest.source.licence,
        "tasks": [task.to_json() for task in manifest.tasks],
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
        "preparation": preparation_data(manifest.image, manifest.text, manifest.origins),
        "notes": [
            *manifest.export.notes,
            *(warning for part in manifest.parts for variant in part.variants for warning in variant.warnings),
        ],
        "warnings": list(manifest.export.warnings),
    }


def _data_from_variant(variant: Mapping[str, Any]) -> dict[str, Any]:
    verification = variant["verification"] or {}
    return {**variant, "verification": {"passed": verification.get("passed")}}


def _print(data: Mapping[str, Any]) -> None:
    print_line(f"{data['what']}: {data['source']} ({data['family']}, {data['format'] or 'not on this machine'})")
    if data.get("known"):
        print_known(data["known"])
    if data.get("licence"):
        print_line(f"  licence: {data['licence']}")
    if data["format"] is None and data["tensors"] is not None:
        tensors = data["tensors"]
        print_line(f"  as published: {tensors['count']} tensors, {size_text(tensors['size_bytes'])}")
    if data.get("tasks"):
        tasks = (task["kind"] + (" with a score" if task.get("score") else "") for task in data["tasks"])
        print_line(f"tasks: {', '.join(tasks)}")
    _print_files(data["files"])
    print_line("architecture:")
    architecture = [(f"  {key}", _value_text(value)) for key, value in data["architecture"].items()]
    print_table(("  field", "value"), architecture, width=terminal_width())
    if data["parts"]:
        print_line("parts:")
    rows = [(f"  {part['name']}", _signature_text(part["signature"]), _detail(part)) for part in data["parts"]]
    if rows:
        print_table(("  part", "inputs → outputs", ""), rows, width=terminal_width())
    print_preparation(data["preparation"])
    for name, words in data.get("options", {}).items():
        print_line(f"option: --set {name}=…: {words}")
    for note in data["notes"]:
        print_line(f"note: {note}")


def _print_files(files: Sequence[Mapping[str, Any]]) -> None:
    """Graphs first; what a bundle's verification recorded as one line."""
    recorded = [file["size_bytes"] for file in files if file["name"].startswith(_RECORDED)]
    listed = [file for file in files if not file["name"].startswith(_RECORDED)]
    for file in sorted(listed, key=lambda file: not file["name"].endswith((".onnx", ".onnx_data"))):
        print_line(f"  {file['name']}  {size_text(file['size_bytes'])}  sha256 {file['sha256'][:16]}…")
    if recorded:
        print_line(f"  {_RECORDED}  {len(recorded)} files, {size_text(sum(recorded))}: what verify repeats")


def _signature_text(signature: Mapping[str, Any]) -> str:
    def tensors(kind: str) -> str:
        # A cache's tensors differ in the number of their layer alone.
        names = ((_LAYER_NUMBER.sub(".N.", t["name"]), t) for t in signature[kind])
        texts = Counter(f"{name} {t['dtype']} ({', '.join(map(str, t['shape']))})" for name, t in names)
        return ", ".join(text if count == 1 else f"{count} x {text}" for text, count in texts.items())

    return f"{tensors('inputs')} → {tensors('outputs')}"


def _detail(part: Mapping[str, Any]) -> str:
    if "parameters" in part:
        return f"{part['parameters']:,} parameters"
    return ", ".join(
        f"{v['precision']} opset {v['opset']} ({v['exporter']}), "
        + (f"ONNX Runtime ≥ {v['oldest_onnxruntime']}" if v["oldest_onnxruntime"] else "OpenVINO alone")
        for v in part["variants"]
    )


def preparation_data(image: AnyImageSpec | None, text: TextSpec | None, origins: Origins) -> dict[str, Any]:
    """JSON data: for "image" and "text", field → its value and where it comes from; None where there is no such input.

    A field of an object is `outer.inner`. "ignored_files" holds the names of files that were found and not read, with
    the reason.
    """
    return {
        "image": None if image is None else _with_origins("image", image.to_json(), origins),
        "text": None if text is None else _with_origins("text", text.to_json(), origins),
        "ignored_files": dict(origins.ignored_files),
    }


def print_preparation(data: Mapping[str, Any]) -> None:
    """The same as a table on stdout; nothing where no input is described and no file was ignored."""
    rows = [
        (f"  {kind}.{name}", _value_text(entry["value"]), entry["from"])
        for kind in ("image", "text")
        for name, entry in (data.get(kind) or {}).items()
    ]
    if rows:
        print_line("preparation:")
        print_table(("  field", "value", "from"), rows, width=terminal_width())
    for name, reason in data["ignored_files"].items():
        print_line(f"not read: {name}: {reason}")


def _with_origins(kind: str, fields: Mapping[str, Any], origins: Origins) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        inside = value if isinstance(value, Mapping) else {"": value}
        for key, entry in inside.items():
            path = f"{name}.{key}".removesuffix(".")
            origin = origins.values.get(f"{kind}.{path}", origins.values.get(f"{kind}.{name}", _UNTOLD))
            found[path] = {"value": list(entry) if isinstance(entry, tuple) else entry, "from": origin}
    return found


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value_text, value)) or "none"
    if value is None or value == "":
        return "none" if value is None else '""'
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def list_known(*, as_json: bool) -> None:
    """Print all known names with their family, and with their title where there is room; as JSON all about them."""
    from vlm_export.checkpoint.sources.known import known_names, load_known

    entries = [known_data(load_known(name)) for name in known_names()]
    if as_json:
        print_json({"what": "known checkpoints", "checkpoints": entries})
    else:
        # A name is there to be copied, so it is never broken; a terminal of 80 columns has no room beside the longest.
        columns = ("name", "family", "title") if terminal_width() >= _WIDE else ("name", "family")
        print_table(columns, [[entry[column] for column in columns] for entry in entries], width=terminal_width())
        print_line("vlm-export inspect NAME tells source and licence of one, --json those of all")


def known_data(known: KnownCheckpoint) -> dict[str, Any]:
    """What a config says for the reader."""
    return {
        "name": known.name,
        "family": known.family,
        "title": known.title,
        "source": str(known.source),
        "revision": known.revision,
        "sha256": known.sha256,
        "licence": known.licence,
        "paper": known.paper,
        "notes": known.notes,
    }


def checkpoint_from_config(known: KnownCheckpoint) -> Checkpoint:
    """Names and shapes as the checkpoint's authors publish them, without a file; enough for `Family.describe`."""
    from vlm_export.family import Checkpoint
    from vlm_export.models.registry import load_family

    family = load_family(known.family)
    tensors = family.published_tensors(known.architecture)
    return Checkpoint(known.name, "random", (), tensors, _refuse, family.published_config(known.architecture))


def print_known(entry: Mapping[str, Any]) -> None:
    """The lines of `known_data` that say something, below a heading."""
    print_line(f"  {entry['title']}")
    for key in ("source", "revision", "sha256", "licence", "paper", "notes"):
        if entry[key]:
            print_line(f"  {key}: {entry[key]}")


def _refuse(key: str) -> Any:
    raise AssertionError(f"a description needs no weights: {key}")
