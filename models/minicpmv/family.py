"""MiniCPM-V 1.0 to 4.5: the vision modules, from images' slices to what the language model reads.

Ports, each proven by the outputs of its original: MiniCPM-V-2 (84ce9b0 of HwwwwwwwH's copy), MiniCPM-Llama3-V-2_5,
MiniCPM-V-2_6, MiniCPM-V-4_5's resampler. The language model is left aside. `omnilmm` shares what stands here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from vlm_export.errors import UsageError
from vlm_export.family import (
    DEFAULT_BUILD,
    BuildOptions,
    Checkpoint,
    Description,
    Family,
    Model,
    NoOptions,
    StoredTensorInfo,
    WeightStore,
    outlines,
    reference_from_module,
)
from vlm_export.models.layers.vit import VitForm
from vlm_export.models.layers.vit_weights import eva_table
from vlm_export.models.minicpmv import weights as minicpmv_weights
from vlm_export.models.minicpmv.architecture import (
    VisionArchitecture,
    minicpmv_architecture,
    stated_slicing,
)
from vlm_export.models.minicpmv.modules import VisionModules, build_modules
from vlm_export.models.minicpmv.parts import build_parts
from vlm_export.models.minicpmv.slicing import slice_spec_from_version
from vlm_export.models.reading.shapes import config_integer
from vlm_export.models.reading.weights import Target, load_weights, published_tensors
from vlm_export.specs import Origins
from vlm_export.specs.codec import Spec
from vlm_export.specs.slices import SliceSpec
from vlm_export.specs.tasks import FeatureSpec

_MAX_SLICES = 9
_UNCUT = ("1.0", "omnilmm")
_PACKED_NOTE = (
    "images of different shapes share a batch: each is a row of patches, and tgt_sizes tells its rows and columns"
)


class MiniCpmVFamily:
    """`vpm.*` and `resampler.*`; whatever else the files hold belongs to the language model."""

    name = "minicpmv"
    reads: tuple[str, ...] = ("vpm.", "resampler.")
    options: type[Spec] = NoOptions
    marks: tuple[str, ...] = ("resampler.query",)
    roots: tuple[str, ...] = ()
    config_types: Mapping[str, tuple[str, ...]] = {"minicpmv": ("MiniCPMV",)}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.tensors
        vision = ("vpm.pos_embed", "vpm.embeddings.position_embedding.weight")
        return "resampler.query" in keys and any(key in keys for key in vision)

    def describe(self, checkpoint: Checkpoint) -> Description:
        return describe_vision(minicpmv_architecture(checkpoint), checkpoint)

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        refuse_sizes(options)
        return build_vision(self, minicpmv_architecture(checkpoint), checkpoint, store)

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        return vision_tensors(VisionArchitecture.from_config(architecture))

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        return config_from_architecture(VisionArchitecture.from_config(architecture))


def refuse_sizes(options: BuildOptions) -> None:
    """UsageError when the user asks for another size: the sizes are axes here."""
    if options.image_size is not None or options.dynamic_image_size:
        raise UsageError("this family takes images of any size already", fix="leave the size options out")


def describe_vision(
    architecture: VisionArchitecture, checkpoint: Checkpoint, warnings: tuple[str, ...] = ()
) -> Description:
    """`Family.describe` of both families."""
    parts = outlines(build_parts(architecture, _modules(architecture)))
    return Description(
        architecture.to_json(),
        parts,
        tuple(_notes(architecture, checkpoint)),
        warnings,
        image=_slicing(architecture, checkpoint),
        origins=_origins(architecture, checkpoint),
    )


def build_vision(
    family: Family,
    architecture: VisionArchitecture,
    checkpoint: Checkpoint,
    store: WeightStore,
    warnings: tuple[str, ...] = (),
) -> Model:
    """`Family.build` of both families."""
    modules = _modules(architecture)
    aside = {key: None for key in checkpoint.tensors if not key.startswith(family.reads)}
    dropped = load_weights(modules, checkpoint, {**_table(architecture), **aside}, store)
    parts = tuple(build_parts(architecture, modules))
    return Model(
        family=family.name,
        architecture=architecture.to_json(),
        parts=parts,
        image=_slicing(architecture, checkpoint),
        text=None,
        hub_config=checkpoint.config or {},
        tasks=(FeatureSpec("vision"),),
        dropped_keys=dropped,
        references={part.name: partial(reference_from_module, part) for part in parts},
        reference_name="unpatched eager module",
        warnings=warnings,
        origins=_origins(architecture, checkpoint),
    )


def vision_tensors(architecture: VisionArchitecture) -> dict[str, StoredTensorInfo]:
    """`Family.published_tensors` of both families, without the language model's."""
    dtype = "float16" if architecture.version == "2.5" else "bfloat16"
    return published_tensors(_modules(architecture), _table(architecture), dtype)


def config_from_architecture(architecture: VisionArchitecture) -> dict[str, Any]:
    """`Family.published_config` of both families: what they read of `config.json`."""
    sizes, version = architecture.resampler, architecture.version
    if version == "omnilmm":
        names = {"model_type": "omnilmm", "num_query": sizes.queries, "hidden_size": sizes.width}
        return {**names, "image_size": architecture.image_size}
    config = {"model_type": "minicpmv", "query_num": sizes.queries, "hidden_size": sizes.width}
    if version == "1.0":
        return {**config, "image_size": architecture.image_size}
    slicing = {"max_slice_nums": _MAX_SLICES, "scale_resolution": architecture.image_size}
    if version == "2.0":
        return {**config, "slice_mode": True, **slicing}
    vision = {"num_attention_heads": architecture.vision.heads, "patch_size": architecture.vision.patch_size}
    return {**config, "version": float(version), "slice_mode": True, "slice_config": slicing, "vision_config": vision}


def _modules(architecture: VisionArchitecture) -> VisionModules:
    return build_modules(architecture.vision, architecture.resampler)


def _slicing(architecture: VisionArchitecture, checkpoint: Checkpoint) -> SliceSpec:
    """How images are cut: config.json's numbers, or the defaults of the version's own code."""
    section, _, _ = stated_slicing(architecture.version, checkpoint)
    return slice_spec_from_version(
        architecture.version,
        queries=architecture.resampler.queries,
        size_pixels=architecture.image_size,
        patch_size=architecture.vision.patch_size,
        max_slices=config_integer(section, "max_slice_nums", _MAX_SLICES),
    )


def _origins(architecture: VisionArchitecture, checkpoint: Checkpoint) -> Origins:
    """What states each value of `_slicing`."""
    version = architecture.version
    code = "OmniLMM's published code" if version == "omnilmm" else f"MiniCPM-V {version}'s published code"
    section, before, size_key = stated_slicing(version, checkpoint)
    values = dict.fromkeys(_slicing(architecture, checkpoint).to_json(), code)
    for name, key in (("size_pixels", size_key), ("max_slices", "max_slice_nums")):
        if name == "size_pixels" or version not in _UNCUT:
            values[name] = f"config.json: {before}{key}" if key in section else f"default of {code}"
    values |= {"patch_size": "shape of the encoder's weights", "placeholder.queries": "shape of the resampler's query"}
    return Origins({f"image.{name}": origin for name, origin in values.items()})


def _table(architecture: VisionArchitecture) -> dict[str, Target]:
    vision, sizes = architecture.vision, architecture.resampler
    resampler = minicpmv_weights.resampler_table(
        has_projection=sizes.states_width != sizes.width, has_positions=sizes.query_positions
    )
    if not isinstance(vision, VitForm):
        return minicpmv_weights.vision_table(minicpmv_weights.navit_table(vision.layers), resampler, "vpm.", "")
    if architecture.version == "omnilmm":
        return minicpmv_weights.vision_table(eva_table(vision.layers), resampler, "model.vision_tower.", "model.")
    return minicpmv_weights.vision_table(minicpmv_weights.siglip_table(vision.layers), resampler, "vpm.", "")


def _notes(architecture: VisionArchitecture, checkpoint: Checkpoint) -> Iterator[str]:
    yield f"MiniCPM-V {architecture.version}" if architecture.version != "omnilmm" else "OmniLMM-12B"
    yield f"the encoder has {architecture.vision.layers} layers: what the file holds, not what config.json says"
    if architecture.is_packed:
        yield _PACKED_NOTE
    else:
        yield "positions are resampled in the graph, with antialiasing also where they are enlarged, as timm does"
    if architecture.version == "2.5":
        yield (
            "the encoder's positions are those of one long row, as in the original; there, padding is not hidden, so "
            "that slices of one batch change one another: exported as if each were alone, and vision_tokens with "
            "tgt_sizes (1, longest) before resampler repeats the original's batches"
        )
    yield "the language model is neither read nor exported"
    if checkpoint.shards_left_aside:
        yield f"shards of the language model alone, not opened: {', '.join(checkpoint.shards_left_aside)}"
