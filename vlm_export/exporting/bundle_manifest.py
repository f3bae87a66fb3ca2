"""What a bundle says about itself: its manifest, from the checkpoint, the model and the user's choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from torch import nn

from vlm_export import __version__
from vlm_export.bundle import layout
from vlm_export.bundle.manifest import ExportRecord, Manifest, PartRecord, VariantRecord
from vlm_export.bundle.publish import manifest_content
from vlm_export.checkpoint.sources.known import KnownCheckpoint
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.source import source_record
from vlm_export.family import Checkpoint, Model, Part
from vlm_export.proof.contract import ContractReport
from vlm_export.specs import ImageSpec, PatchSpec

TOOLS = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "onnxsim", "torch", "transformers")
# Half the smallest positive float16: what is below becomes zero.
_SMALLEST_FLOAT16 = 2.0**-25


def manifest_from_model(
    name: str,
    checkpoint: Checkpoint,
    model: Model,
    known: KnownCheckpoint | None,
    records: Sequence[PartRecord],
    options: ExportOptions,
) -> Manifest:
    """The manifest of the model's bundle, but for `files`, which publication fills."""
    # Nobody's weights have nobody's licence.
    licence = known.licence if known is not None and options.random_weights_seed is None else None
    return Manifest(
        name=name,
        source=replace(source_record(checkpoint, options), licence=licence, dropped_keys=model.dropped_keys),
        family=model.family,
        architecture=model.architecture,
        image=model.image,
        text=model.text,
        tasks=model.tasks,
        parts=tuple(records),
        origins=model.origins,
        export=ExportRecord(
            reference=model.reference_name,
            build=options.build.to_json(),
            target=options.target,
            keep_fp32={part.name: names for part in model.parts if (names := fp32_operators(part))},
            warnings=model.warnings,
            notes=model.notes,
            image_processor_differs=_differences(model),
        ),
        tools=tool_versions(),
    )


def with_contract(manifest: Manifest, report: ContractReport) -> Manifest:
    """The manifest with what the proof of the contract found."""
    return replace(manifest, export=replace(manifest.export, contract=report.to_json()))


def _differences(model: Model) -> tuple[str, ...]:
    """Where readers of the published preprocessor_config.json make other pixels than the bundle."""
    return tuple(layout.preprocessor_differences(model.image)) if isinstance(model.image, ImageSpec | PatchSpec) else ()


def planned_manifest(
    name: str, checkpoint: Checkpoint, model: Model, known: KnownCheckpoint | None, options: ExportOptions
) -> Manifest:
    """The manifest before any graph exists: what only graphs tell is left at its default."""
    records = [
        PartRecord(
            part.name,
            part.signature,
            tuple(
                VariantRecord(precision, layout.graph_path(part.name, precision)) for precision in options.precisions
            ),
        )
        for part in model.parts
    ]
    return manifest_from_model(name, checkpoint, model, known, records, options)


def check_publishable(
    name: str, checkpoint: Checkpoint, model: Model, known: KnownCheckpoint | None, options: ExportOptions
) -> None:
    """InputError when publication would fail whatever the graphs are; found before minutes are spent on them."""
    manifest_content(planned_manifest(name, checkpoint, model, known, options))
    layout.hub_config(model.hub_config, ())


def tool_versions() -> dict[str, str]:
    """Versions of the packages that take part in an export."""
    versions = {"vlm-export": __version__}
    for tool in TOOLS:
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return versions


def fp32_operators(part: Part) -> tuple[str, ...]:
    """Names of the norms that float16 breaks.

    Layer norms whose epsilon is zero in float16: a constant row would be divided by zero. RMS norms: they square what
    they normalise, and a residual stream's outliers exceed 256. A name is a module's: the graph's LayerNormalization,
    or its parts, reads the initializer `<name>.weight`.
    """
    return tuple(
        name
        for name, module in part.module.named_modules()
        if isinstance(module, nn.RMSNorm) or (isinstance(module, nn.LayerNorm) and module.eps <= _SMALLEST_FLOAT16)
    )
