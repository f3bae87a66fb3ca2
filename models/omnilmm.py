"""OmniLMM-12B: the vision modules, EVA-02 enormous and a resampler.

Port, proven by the outputs of its original: OpenBMB/OmniLMM (08ae772). All but the keys is as in MiniCPM-V 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_export.family import DEFAULT_BUILD, BuildOptions, Checkpoint, Description, Model, StoredTensorInfo, WeightStore
from vlm_export.models.minicpmv import (
    build_vision,
    config_from_architecture,
    describe_vision,
    refuse_sizes,
    vision_tensors,
)
from vlm_export.models.minicpmv_architecture import HeadWidth, VisionArchitecture, assumed_heads, omnilmm_architecture
from vlm_export.specs.codec import Spec


class OmniLmmFamily:
    """`model.vision_tower.*` and `model.resampler.*`; whatever else the files hold belongs to the language model."""

    name = "omnilmm"
    reads: tuple[str, ...] = ("model.vision_tower.", "model.resampler.")
    options: type[Spec] = HeadWidth
    marks: tuple[str, ...] = ("model.resampler.query",)
    roots: tuple[str, ...] = ()
    config_types: Mapping[str, tuple[str, ...]] = {"omnilmm": ("OmniLMMForCausalLM",)}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return {"model.vision_tower.pos_embed", "model.resampler.query"} <= set(checkpoint.tensors)

    def describe(self, checkpoint: Checkpoint) -> Description:
        return describe_vision(omnilmm_architecture(checkpoint), checkpoint, assumed_heads(checkpoint, DEFAULT_BUILD))

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        refuse_sizes(options)
        architecture = omnilmm_architecture(checkpoint, HeadWidth.from_config(options.family_options).head_width)
        return build_vision(self, architecture, checkpoint, store, assumed_heads(checkpoint, options))

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        return vision_tensors(VisionArchitecture.from_config(architecture))

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        return config_from_architecture(VisionArchitecture.from_config(architecture))
