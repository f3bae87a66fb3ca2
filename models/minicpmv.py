"""MiniCPM-V 1.0 to 4.5 and OmniLMM-12B: the vision modules, from pictures' slices to what the language model reads.

Ports, each proven by the outputs of its original: MiniCPM-V-2 (84ce9b0 of HwwwwwwwH's copy), MiniCPM-Llama3-V-2_5,
MiniCPM-V-2_6, MiniCPM-V-4_5's resampler, OpenBMB/OmniLMM (08ae772). The language model is left aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from vlm_export.errors import UsageError
from vlm_export.family import (
    DEFAULT_BUILD,
    BuildOptions,
    Checkpoint,
    Description,
    Model,
    PartOutline,
    TensorInfo,
    WeightStore,
    reference_from_module,
)
from vlm_export.models import minicpmv_weights
from vlm_export.models.minicpmv_architecture import (
    VisionArchitecture,
    architecture_from_json,
    minicpmv_architecture,
    omnilmm_architecture,
)
from vlm_export.models.minicpmv_modules import VisionModules, build_modules
from vlm_export.models.minicpmv_parts import build_parts
from vlm_export.models.shapes import config_integer, config_section
from vlm_export.models.vit import VitForm
from vlm_export.models.vit_weights import eva_table
from vlm_export.models.weights import Target, load_weights, published_tensors
from vlm_export.slice_spec import SliceSpec, slice_spec_from_version

# Whatever else the file holds is the language model.
_VISION_PREFIXES = ("vpm.", "resampler.", "model.vision_tower.", "model.resampler.")
_PACKED_NOTE = (
    "pictures of different shapes share a batch: each is a row of patches, and tgt_sizes tells its rows and columns"
)


class MiniCpmVFamily:
    """`vpm.*` and `resampler.*`."""

    name = "minicpmv"
    derive: Callable[[Checkpoint], VisionArchitecture] = staticmethod(minicpmv_architecture)

    def recognises(self, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.tensors
        vision = ("vpm.pos_embed", "vpm.embeddings.position_embedding.weight")
        return "resampler.query" in keys and any(key in keys for key in vision)

    def describe(self, checkpoint: Checkpoint) -> Description:
        architecture = self.derive(checkpoint)
        parts = tuple(
            PartOutline(part.name, part.signature, sum(p.numel() for p in part.module.parameters()))
            for part in build_parts(architecture, _modules(architecture))
        )
        return Description(architecture.to_json(), parts, tuple(_notes(architecture)))

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        if options != DEFAULT_BUILD:
            raise UsageError("this family takes pictures of any size already", fix="leave the size options out")
        architecture = self.derive(checkpoint)
        modules = _modules(architecture)
        table = _table(architecture)
        aside = {key: None for key in checkpoint.tensors if not key.startswith(_VISION_PREFIXES)}
        dropped = load_weights(modules, checkpoint, {**table, **aside}, store)
        parts = tuple(build_parts(architecture, modules))
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=None,
            text=None,
            hub_config=checkpoint.config or {},
            facts={"version": architecture.version, "slicing": _slicing(architecture, checkpoint).to_json()},
            dropped_keys=dropped,
            references={part.name: partial(reference_from_module, part) for part in parts},
            reference_name="unpatched eager module",
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, TensorInfo]:
        parsed = architecture_from_json(architecture)
        dtype = "float16" if parsed.version == "2.5" else "bfloat16"
        return published_tensors(_modules(parsed), _table(parsed), dtype)

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        return _config_from_architecture(architecture_from_json(architecture))


class OmniLmmFamily(MiniCpmVFamily):
    """`model.vision_tower.*` and `model.resampler.*`."""

    name = "omnilmm"
    derive = staticmethod(omnilmm_architecture)

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return {"model.vision_tower.pos_embed", "model.resampler.query"} <= set(checkpoint.tensors)


def _modules(architecture: VisionArchitecture) -> VisionModules:
    return build_modules(architecture.vision, architecture.resampler)


def _slicing(architecture: VisionArchitecture, checkpoint: Checkpoint) -> SliceSpec:
    """How pictures are cut: config.json's numbers, or the defaults of the version's own code."""
    config = checkpoint.config or {}
    section = config if architecture.version == "2.0" else config_section(checkpoint, "slice_config")
    return slice_spec_from_version(
        architecture.version,
        queries=architecture.resampler.queries,
        size_pixels=architecture.image_size,
        patch_size=architecture.vision.patch_size,
        max_slices=config_integer(section, "max_slice_nums", 9),
    )


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


def _notes(architecture: VisionArchitecture) -> Iterator[str]:
    yield f"MiniCPM-V {architecture.version}" if architecture.version != "omnilmm" else "OmniLMM-12B"
    yield f"the encoder has {architecture.vision.layers} layers: what the file holds, not what config.json says"
    if architecture.is_packed:
        yield _PACKED_NOTE
    else:
        yield "positions are resampled in the graph, with antialiasing also where they are enlarged, as timm does"
    if architecture.version == "2.5":
        yield (
            "the original's batches depend on one another: positions are those of one long row, and padding is not "
            "hidden; exported slice by slice, vision_tokens with tgt_sizes (1, L) and resampler repeat it"
        )
    yield "the language model is neither read nor exported"


def _config_from_architecture(architecture: VisionArchitecture) -> dict[str, Any]:
    """What the family reads of `config.json`."""
    config: dict[str, Any] = {"hidden_size": architecture.resampler.width, "query_num": architecture.resampler.queries}
    if architecture.version == "omnilmm":
        return {**config, "model_type": "omnilmm", "image_size": architecture.image_size}
    config["model_type"] = "minicpmv"
    if architecture.version == "1.0":
        return {**config, "image_size": architecture.image_size}
    if architecture.version == "2.0":
        return {**config, "slice_mode": True, "scale_resolution": architecture.image_size}
    vision = {"num_attention_heads": architecture.vision.heads, "patch_size": architecture.vision.patch_size}
    return {**config, "version": float(architecture.version), "slice_mode": True, "vision_config": vision}
