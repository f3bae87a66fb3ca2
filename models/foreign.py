"""Checkpoints of models that are not exported here, called by their names: from configs and from names of tensors.

Sources of the names: transformers 5.23 (`model_type` of the configuration classes, keys of the model classes),
open_clip 3.3.0 (fields of `model_cfg`), peft 0.18, timm 1.0, LAVIS' BLIP-2.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vlm_export.text_display import shown

# How people call what config.json says; other types are called as they stand there.
_TITLES: Mapping[str, str] = {
    "align": "ALIGN",
    "altclip": "AltCLIP",
    "aimv2": "AIMv2",
    "blip-2": "BLIP-2",
    "bridgetower": "BridgeTower",
    "chinese_clip": "Chinese-CLIP",
    "clap": "CLAP",
    "clipseg": "CLIPSeg",
    "clvp": "CLVP",
    "flava": "FLAVA",
    "git": "GIT",
    "groupvit": "GroupViT",
    "instructblip": "InstructBLIP",
    "llava": "LLaVA",
    "llava_next": "LLaVA-NeXT",
    "metaclip_2": "MetaCLIP 2",
    "minicpmo": "MiniCPM-o",
    "owlv2": "OWLv2",
    "owlvit": "OWL-ViT",
    "siglip": "SigLIP",
    "siglip2": "SigLIP 2",
    "siglip_vision_model": "SigLIP's image encoder",
    "siglip2_vision_model": "SigLIP 2's image encoder",
    "siglip_text_model": "SigLIP's text encoder",
    "siglip2_text_model": "SigLIP 2's text encoder",
    "vilt": "ViLT",
    "vision-text-dual-encoder": "a dual encoder of two other models",
    "xclip": "X-CLIP",
}
# Names of tensors, numbers written as N. A model is named where each pattern is found; these are in no family's files.
_DISTINCT: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a model with a PEFT adapter that is not merged (LoRA)", (r"(^|\.)lora_(embedding_)?[AB](\.|$)",)),
    ("CoCa of open_clip", (r"(^|\.)text_decoder\.(resblocks|cross_attn)\.",)),
    ("CLIPSeg", (r"(^|\.)decoder\.(film_mul|transposed_convolution)\.",)),
    ("OWL-ViT", (r"(^|\.)owlvit\.",)),
    ("OWLv2", (r"(^|\.)owlvN\.",)),
    ("InstructBLIP", (r"(^|\.)qformer\.embeddings\.",)),
    ("BLIP-2", (r"(^|\.)[qQ]former\.",)),
    ("ALIGN", (r"(^|\.)vision_model\.encoder\.blocks\.N\.depthwise_conv\.",)),
    ("AltCLIP", (r"(^|\.)text_model\.roberta\.",)),
    ("Chinese-CLIP", (r"(^|\.)vision_model\.pre_layrnorm\.", r"(^|\.)text_model\.encoder\.layer\.N\.")),
    ("Chinese-CLIP (its authors' own form)", (r"^bert\.encoder\.", r"^visual\.convN\.")),
    ("GroupViT", (r"(^|\.)group_token$",)),
    ("X-CLIP", (r"(^|\.)prompts_generator\.",)),
    ("SigLIP or SigLIP 2", (r"(^|\.)vision_model\.head\.probe$",)),
    ("SigLIP's image encoder", (r"^head\.probe$",)),
    ("LLaVA", (r"(^|\.)(multi_modal_projector|mm_projector)\.",)),
    ("a model of open_clip with an image encoder of timm", (r"(^|\.)visual\.trunk\.",)),
    ("EVA-CLIP", (r"(^|\.)visual\.blocks\.N\.attn\.",)),
    (
        "a model of open_clip with a text encoder of transformers",
        (r"(^|\.)text\.transformer\.(embeddings|encoder|layer|shared)\.",),
    ),
    ("FLAVA", (r"(^|\.)image_to_mm_projection\.",)),
    ("CLAP", (r"(^|\.)audio_(model|projection|branch)\.",)),
    ("ImageBind", (r"(^|\.)modality_trunks\.",)),
    ("BLIP without its heads (BlipModel)", (r"^text_model\.encoder\.layer\.N\.", r"^vision_model\.", r"^logit_scale$")),
    ("Stable Diffusion", (r"(^|\.)(diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",)),
    ("a diffusion model's U-Net", (r"^down_blocks\.N\.",)),
    ("SAM", (r"(^|\.)mask_decoder\.",)),
    ("Qwen-VL", (r"(^|\.)visual\.merger\.",)),
)
# The same, asked only where no family has claimed the file.
_OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("CLIP's image encoder without its projection (CLIPVisionModel)", (r"(^|\.)pre_layrnorm\.weight$",)),
    (
        "the text encoder of CLIP, or of a model like it, without its projection",
        (r"(^|\.)embeddings\.token_embedding\.weight$", r"(^|\.)final_layer_norm\.weight$"),
    ),
    ("the image encoder of CLIP alone, under OpenAI's key names", (r"(^|\.)visual\.convN\.weight$",)),
    ("the text encoder of CLIP alone, under OpenAI's key names", (r"(^|\.)token_embedding\.weight$", "ln_final")),
    ("an image model of transformers (ViT, DINOv2 or one like them)", (r"(^|\.)embeddings\.patch_embeddings\.",)),
    ("a vision transformer of timm without a text encoder", (r"^blocks\.N\.attn\.", r"^patch_embed\.")),
    ("a vision transformer of torchvision", (r"^encoder\.layers\.encoder_layer_N\.",)),
    ("a ResNet without a text encoder", (r"^(backbone\.)?layerN\.N\.convN\.weight$",)),
    ("a text model like BERT", (r"(^|\.)embeddings\.word_embeddings\.weight$",)),
    ("a language model", (r"(^|\.)(layers|h|blocks)\.N\.(self_attn|attn|attention|self_attention)\.", "embed|wte")),
)
_NUMBER = re.compile(r"\d+")


def title_of(model_type: str) -> str:
    """How people call a model that config.json names: "SigLIP 2"."""
    return _TITLES.get(model_type, "this model")


def distinct_model(keys: Iterable[str]) -> str | None:
    """The model whose names these are, if it is known and no family has them."""
    return _named(_DISTINCT, keys)


def other_model(keys: Iterable[str]) -> str | None:
    """What keys that no family claims look like, or None."""
    return _named(_OTHERS, keys)


def open_clip_form(config: Mapping[str, Any]) -> str | None:
    """What `open_clip_config.json` describes, where it is not a CLIP with both of open_clip's own encoders."""
    model = config.get("model_cfg")
    sections = model if isinstance(model, Mapping) else {}
    vision, text = sections.get("vision_cfg"), sections.get("text_cfg")
    if sections.get("multimodal_cfg") is not None:
        return "CoCa"
    if isinstance(vision, Mapping) and (name := vision.get("timm_model_name")):
        return f"a model with the image encoder {shown(str(name))} of timm"
    if isinstance(text, Mapping) and (name := text.get("hf_model_name")):
        return f"a model with the text encoder {shown(str(name))} of transformers"
    return None


def _named(table: tuple[tuple[str, tuple[str, ...]], ...], keys: Iterable[str]) -> str | None:
    forms = {_NUMBER.sub("N", key) for key in keys}
    return next((name for name, patterns in table if all(_is_found(pattern, forms) for pattern in patterns)), None)


def _is_found(pattern: str, forms: Collection[str]) -> bool:
    found = re.compile(pattern).search
    return any(found(form) for form in forms)
