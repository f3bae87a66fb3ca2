"""`config.json` of a bundle: transformers' `CLIPConfig` where its CLIPModel computes the same, else open_clip's own."""

from __future__ import annotations

from typing import Any

from vlm_export.models.openclip.config import OpenClipArchitecture

_END_ID = 49407


def hub_config(architecture: OpenClipArchitecture, image_size: int) -> dict[str, Any]:
    """The config for other hosts, for images of `image_size`."""
    if not is_clip(architecture):
        kind = "CustomTextCLIP" if architecture.custom_text else "CLIP"
        return {"model_type": "open_clip", "architectures": [kind], "model_cfg": architecture.to_json()}
    vision, text = architecture.vision_cfg, architecture.text_cfg
    common = {"hidden_act": vision.activation(architecture.quick_gelu), "layer_norm_eps": vision.eps}
    text_config = {
        "model_type": "clip_text_model",
        "hidden_size": text.width,
        "intermediate_size": int(text.width * text.mlp_ratio),
        "num_hidden_layers": text.layers,
        "max_position_embeddings": text.context_length,
        "vocab_size": text.vocab_size,
        "num_attention_heads": text.heads,
        "eos_token_id": min(_END_ID, text.vocab_size - 1),
        **common,
    }
    vision_config: dict[str, Any] = {
        "model_type": "clip_vision_model",
        "image_size": image_size,
        "num_channels": 3,
        **common,
    }
    if isinstance(vision.layers, tuple):
        # transformers has no ModifiedResNet; the sizes are told for the reader.
        vision_config |= {"hidden_size": vision.width * 32, "stages": list(vision.layers)}
    else:
        vision_config |= {
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "patch_size": vision.patch_edge,
            "num_attention_heads": vision.width // vision.head_width,
        }
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": architecture.embed_dim,
        "text_config": text_config,
        "vision_config": vision_config,
    }


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
