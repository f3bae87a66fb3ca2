"""Checkpoints of models that are not exported here, called by their names: from configs and from names of tensors.

Sources of the names: transformers 5.23 (`model_type` of the configuration classes, keys of the model classes),
peft 0.18, timm 1.0, LAVIS' BLIP-2.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

# How people call what config.json says; other types are called as they stand there.
_TITLES: Mapping[str, str] = {
    "aimv2": "AIMv2",
    "align": "ALIGN",
    "altclip": "AltCLIP",
    "bert": "BERT",
    "blip": "BLIP",
    "blip-2": "BLIP-2",
    "bridgetower": "BridgeTower",
    "chinese_clip": "Chinese-CLIP",
    "clap": "CLAP",
    "clipseg": "CLIPSeg",
    "clvp": "CLVP",
    "dinov2": "DINOv2",
    "flava": "FLAVA",
    "git": "GIT",
    "groupvit": "GroupViT",
    "instructblip": "InstructBLIP",
    "jina_clip_text": "the text encoder of Jina CLIP alone",
    "jina_clip_vision": "the image encoder of Jina CLIP alone",
    "jina_embeddings_v3": "jina-embeddings-v3, a text encoder alone,",
    "kosmos-2": "Kosmos-2",
    "llava": "LLaVA",
    "llava_next": "LLaVA-NeXT",
    "minicpmo": "MiniCPM-o",
    "owlv2": "OWLv2",
    "owlvit": "OWL-ViT",
    "paligemma": "PaliGemma",
    "roberta": "RoBERTa",
    "vilt": "ViLT",
    "vision-text-dual-encoder": "a dual encoder of two other models",
    "vit": "ViT",
    "xclip": "X-CLIP",
}
# What config.json calls by a supported type, under another class: what it is, and the way out.
_CLASSES: Mapping[str, tuple[str, str]] = {
    **{
        f"{cls}{tower}Model": (
            f"{title}'s {encoder} encoder without its projection",
            f"save the model that it was taken from as {cls}{tower}ModelWithProjection: its projection makes the "
            "embedding",
        )
        for cls, title in (("CLIP", "CLIP"), ("MetaClip2", "MetaCLIP 2"))
        for tower, encoder in (("Vision", "image"), ("Text", "text"))
    },
    "CLIPForImageClassification": (
        "CLIP's image encoder with a classifier instead of its projection",
        "export the CLIPModel that it was made from; what its classifier says is not exported",
    ),
    "SiglipForImageClassification": (
        "SigLIP's image encoder with a classifier instead of its pooling",
        "export the SiglipModel that it was made from; what its classifier says is not exported",
    ),
    "BlipModel": (
        "BLIP without its heads",
        "export one of the classes with a head: matching, captions or answers",
    ),
}
# The endings of the types of one encoder alone ("siglip_vision_model").
_ENCODERS = {"_vision_model": "image encoder", "_text_model": "text encoder"}
# Names of tensors, numbers written as N. A model is named where each pattern is found; these are in no family's files.
_DISTINCT: tuple[tuple[str, tuple[str, ...]], ...] = (
    # Jina's own adapters are a parametrization of each weight, with all tasks in one tensor.
    (
        "a model with a PEFT adapter that is not merged (LoRA)",
        (r"(?<!\.parametrizations\.weight\.N)(^|\.)lora_(embedding_)?[AB](\.|$)",),
    ),
    ("CoCa of open_clip", (r"(^|\.)text_decoder\.(resblocks|cross_attn)\.",)),
    ("CLIPSeg", (r"(^|\.)decoder\.(film_mul|transposed_convolution)\.",)),
    ("OWL-ViT", (r"(^|\.)owlvit\.",)),
    ("OWLv2", (r"(^|\.)owlvN\.",)),
    ("InstructBLIP", (r"(^|\.)qformer\.embeddings\.",)),
    ("BLIP-2", (r"(^|\.)[qQ]former\.",)),
    ("ALIGN", (r"(^|\.)vision_model\.encoder\.blocks\.N\.depthwise_conv\.",)),
    (
        "BLIP without its heads (BlipModel)",
        (r"(^|\.)text_model\.encoder\.layer\.N\.", r"(^|\.)vision_model\..*\.qkv\.", r"(^|\.)logit_scale$"),
    ),
    ("BridgeTower", (r"(^|\.)cross_modal_(text|image)_layers\.",)),
    (
        "a dual encoder of two other models",
        (r"(^|\.)text_model\.pooler\.", r"(^|\.)visual_projection\.", r"(^|\.)logit_scale$"),
    ),
    ("GroupViT", (r"(^|\.)group_token$",)),
    ("X-CLIP", (r"(^|\.)prompts_generator\.",)),
    ("LLaVA or a chat model like it", (r"(^|\.)(multi_modal_projector|mm_projector)\.",)),
    ("GIT", (r"(^|\.)git\.image_encoder\.",)),
    ("Kosmos-2", (r"(^|\.)image_to_text_projection\.",)),
    ("ViLT", (r"(^|\.)embeddings\.text_embeddings\.", r"(^|\.)embeddings\.patch_embeddings\.")),
    ("OWL-ViT or OWLv2", (r"(^|\.)vision_model\.pre_layernorm\.", r"(^|\.)text_model\.")),
    ("EVA-CLIP", (r"(^|\.)visual\.blocks\.N\.attn\.",)),
    ("FLAVA", (r"(^|\.)image_to_mm_projection\.",)),
    ("CLAP", (r"(^|\.)audio_(model|projection|branch)\.",)),
    ("ImageBind", (r"(^|\.)modality_trunks\.",)),
    ("Stable Diffusion", (r"(^|\.)(diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",)),
    ("a diffusion model's U-Net", (r"^down_blocks\.N\.",)),
    ("SAM", (r"(^|\.)mask_decoder\.",)),
    ("Qwen-VL", (r"(^|\.)visual\.merger\.",)),
)
_PATCHES = r"(^|\.)(patch_embeddings?|patch_embed)\."
_WORDS = r"(^|\.)(word_embeddings|token_embedding|embed_tokens|tok_embeddings|wte|embed_in)\.weight$"
# The same, asked only where no family has claimed the file. The first is of what the others are a half of.
_OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a model of images and texts that is not known here", (_PATCHES, _WORDS)),
    ("CLIP's image encoder without its projection (CLIPVisionModel)", (r"(^|\.)pre_layrnorm\.weight$",)),
    (
        "the text encoder of CLIP, or of a model like it, without its projection",
        (r"(^|\.)embeddings\.token_embedding\.weight$", r"(^|\.)final_layer_norm\.weight$"),
    ),
    ("the image encoder of CLIP alone, under OpenAI's key names", (r"(^|\.)visual\.convN\.weight$",)),
    ("the text encoder of CLIP alone, under OpenAI's key names", (r"(^|\.)token_embedding\.weight$", "ln_final")),
    ("BLIP's image encoder alone", (r"(^|\.)embeddings\.class_embedding$", r"\.self_attn\.qkv\.")),
    ("an image model of transformers (ViT, DINOv2 or one like them)", (r"(^|\.)embeddings\.patch_embeddings\.",)),
    ("a vision transformer of timm without a text encoder", (r"^blocks\.N\.attn\.", r"^patch_embed\.")),
    ("a vision transformer of torchvision", (r"^encoder\.layers\.encoder_layer_N\.",)),
    ("an image encoder alone", (_PATCHES,)),
    ("a ResNet without a text encoder", (r"^(backbone\.)?layerN\.N\.convN\.weight$",)),
    ("a text model like BERT", (r"(^|\.)embeddings\.word_embeddings\.weight$",)),
    ("a language model", (r"(^|\.)(layers|h|blocks)\.N\.(self_attn|attn|attention|self_attention)\.", _WORDS)),
)
_NUMBER = re.compile(r"\d+")


def title_of(model_type: str) -> str:
    """How people call a model that config.json names: "SigLIP 2"."""
    for ending, encoder in _ENCODERS.items():
        if title := _TITLES.get(model_type.removesuffix(ending) if model_type.endswith(ending) else ""):
            return f"{title}'s {encoder}"
    return _TITLES.get(model_type, "this model")


def class_described(classes: Iterable[str]) -> tuple[str, str] | None:
    """What one of these classes of a supported type is, and the way out; None where it is not known."""
    return next((_CLASSES[name] for name in classes if name in _CLASSES), None)


def distinct_model(keys: Iterable[str]) -> str | None:
    """The model whose names these are, if it is known and no family has them."""
    return _named(_DISTINCT, keys)


def other_model(keys: Iterable[str]) -> str | None:
    """What keys that no family claims look like, or None."""
    return _named(_OTHERS, keys)


def _named(table: tuple[tuple[str, tuple[str, ...]], ...], keys: Iterable[str]) -> str | None:
    forms = {_NUMBER.sub("N", key) for key in keys}
    return next((name for name, patterns in table if all(_is_found(pattern, forms) for pattern in patterns)), None)


def _is_found(pattern: str, forms: Collection[str]) -> bool:
    found = re.compile(pattern).search
    return any(found(form) for form in forms)
