"""`config.json` of a bundle: transformers' `CLIPConfig` where its CLIPModel computes the same, else open_clip's own."""

from __future__ import annotations

from typing import Any

from vlm_export.models.clip.architecture import (
    CLIP_NAMES,
    ClipArchitecture,
    ResNetSizes,
    TextSizes,
    VitSizes,
)
from vlm_export.models.clip.hub_config import config_from_architecture
from vlm_export.models.openclip.config import OpenClipArchitecture

_END_ID = 49407


def hub_config(architecture: OpenClipArchitecture, image_size: int) -> dict[str, Any]:
    """The config for other hosts, for images of `image_size`."""
    if not is_clip(architecture):
        kind = "CustomTextCLIP" if architecture.custom_text else "CLIP"
        return {"model_type": "open_clip", "architectures": [kind], "model_cfg": architecture.to_json()}
    return config_from_architecture(_as_clip(architecture, image_size), CLIP_NAMES)


def _as_clip(architecture: OpenClipArchitecture, image_size: int) -> ClipArchitecture:
    vision, text = architecture.vision_cfg, architecture.text_cfg
    sizes: VitSizes | ResNetSizes
    if isinstance(vision.layers, tuple):
        sizes = ResNetSizes(vision.width, vision.layers, vision.width * 32 // vision.head_width, image_size)
    else:
        hidden, heads = int(vision.width * vision.mlp_ratio), vision.width // vision.head_width
        sizes = VitSizes(vision.width, vision.layers, heads, hidden, vision.patch_edge, image_size)
    words = TextSizes(
        width=text.width,
        layers=text.layers,
        heads=text.heads,
        hidden=int(text.width * text.mlp_ratio),
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        pooling="argmax",
        end_token_id=min(_END_ID, text.vocab_size - 1),
    )
    activation = vision.activation(architecture.quick_gelu)
    return ClipArchitecture("openai", architecture.embed_dim, activation, vision.eps, sizes, words)


def is_clip(architecture: OpenClipArchitecture) -> bool:
    """Whether transformers' CLIPModel computes the same, but for a ModifiedResNet, which is OpenAI's."""
    vision, text = architecture.vision_cfg, architecture.text_cfg
    plain_vision = not (vision.timm_model_name or vision.attentional_pool or vision.no_ln_pre)
    plain_text = not (text.hf_model_name or text.no_causal_mask or text.proj_bias) and text.proj_type != "none"
    pools = (vision.pool_type, text.pool_type) == ("tok", "argmax")
    alike = vision.activation(architecture.quick_gelu) == text.activation(architecture.quick_gelu)
    unscaled = vision.ls_init_value is None and text.ls_init_value is None
    softmax = architecture.init_logit_bias is None
    return plain_vision and plain_text and pools and alike and vision.eps == text.eps and unscaled and softmax
