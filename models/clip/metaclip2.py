"""MetaCLIP 2: CLIP's two encoders behind a multilingual tokenizer (XLM-V's vocabulary).

Port of transformers 5.23 models/metaclip_2/modeling_metaclip_2.py. It differs from CLIP's class in one thing: the
end-of-text id of its published checkpoints is 2, and there it is that token's id, not the sign of an old config.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlm_export.family import Checkpoint, NoOptions
from vlm_export.models.clip.architecture import LibraryNames
from vlm_export.models.clip.family import ClipFamily
from vlm_export.specs.codec import Spec


class MetaClip2Family(ClipFamily):
    """transformers' `MetaClip2Model`, whole or one tower of it; its key names are CLIP's, so config.json decides."""

    name = "metaclip2"
    options: type[Spec] = NoOptions
    library = LibraryNames("metaclip_2", "MetaClip2", has_legacy_end=False)
    config_types: Mapping[str, tuple[str, ...]] = {
        "metaclip_2": ("MetaClip2Model",),
        "metaclip_2_vision_model": ("MetaClip2VisionModelWithProjection",),
        "metaclip_2_text_model": ("MetaClip2TextModelWithProjection",),
    }

    def recognises(self, checkpoint: Checkpoint) -> bool:
        # OpenAI's key names with this model_type are no published form.
        is_its = (checkpoint.config or {}).get("model_type") in self.config_types and super().recognises(checkpoint)
        return is_its and "visual.conv1.weight" not in checkpoint.tensors
