"""`config.json` in the form of transformers' `CLIPConfig`, for whoever computes what its CLIPModel does."""

from __future__ import annotations

from typing import Any

from vlm_export.models.clip.architecture import (
    LEGACY_END_TOKEN_ID,
    ClipArchitecture,
    LibraryNames,
    ResNetSizes,
    TextSizes,
    VitSizes,
    stated_text,
    stated_vision,
)


def config_from_architecture(architecture: ClipArchitecture, library: LibraryNames) -> dict[str, Any]:
    """The config of both encoders, or of the one that there is."""
    vision, text = (
        None if sizes is None else hub_tower_config(architecture, sizes, library.model_type)
        for sizes in (architecture.vision, architecture.text)
    )
    stated = {"architectures": [class_name(architecture, library)], "projection_dim": architecture.embed_dim}
    if text is None or vision is None:
        return {**(vision or text or {}), **stated}
    return {"model_type": library.model_type, **stated, "text_config": text, "vision_config": vision}


def class_name(architecture: ClipArchitecture, library: LibraryNames) -> str:
    """transformers' class of such a checkpoint."""
    if architecture.text is None:
        return f"{library.classes}VisionModelWithProjection"
    return f"{library.classes}{'Model' if architecture.vision is not None else 'TextModelWithProjection'}"


def hub_tower_config(
    architecture: ClipArchitecture, sizes: VitSizes | ResNetSizes | TextSizes, model_type: str
) -> dict[str, Any]:
    """The section about one encoder, or all of a config of that encoder alone."""
    common = {"hidden_act": architecture.activation, "layer_norm_eps": architecture.eps}
    if isinstance(sizes, TextSizes):
        legacy = architecture.key_names == "huggingface" and sizes.pooling == "argmax"
        return {
            "model_type": f"{model_type}_text_model",
            **stated_text(sizes),
            "num_attention_heads": sizes.heads,
            "eos_token_id": LEGACY_END_TOKEN_ID if legacy else sizes.end_token_id,
            **common,
        }
    config = {
        "model_type": f"{model_type}_vision_model",
        "image_size": sizes.image_size,
        "num_attention_heads": sizes.heads,
        "num_channels": 3,
        **common,
    }
    if isinstance(sizes, VitSizes):
        return {**config, **stated_vision(sizes)}
    # transformers has no ModifiedResNet; the sizes are for the reader. It refuses a width that the heads don't share.
    return {**config, "hidden_size": sizes.width * 32, "stages": list(sizes.stages)}
