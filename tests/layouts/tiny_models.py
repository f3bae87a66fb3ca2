"""A tiny checkpoint of each kind of model, as its authors save it, for packages of all of them."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    AltCLIPModel,
    AltCLIPProcessor,
    ChineseCLIPImageProcessorPil,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPImageProcessorPil,
    CLIPProcessor,
    MetaClip2Model,
)

TESTS = Path(__file__).parents[1] / "models"
SQUARE = {"height": 32, "width": 32}


@cache
def module(name: str) -> SimpleNamespace:
    """A file of tests/models, whose helpers make its models."""
    return SimpleNamespace(**runpy.run_path(str(TESTS / f"{name}.py")))


def siglip(folder: Path) -> None:
    """Sigmoid scores, texts filled to 64 with the end token, images of mean 0.5 that are stretched."""
    tests = module("test_siglip")
    tests.save(folder, tests.siglip_tokenizer(folder.parent / "pieces"))


def naflex(folder: Path) -> None:
    """SigLIP 2 of native sizes: patches with their positions instead of images."""
    tests, duals = module("test_siglip2"), module("dual_encoders")
    tokenizer = tests.tokenizer()
    torch.manual_seed(0)
    duals.spread(tests.Siglip2Model(tests.config_of(len(tokenizer)))).save_pretrained(folder)
    tests.Siglip2Processor(tests.image_processor(), tokenizer).save_pretrained(folder)


def altclip(folder: Path) -> None:
    """A text encoder that reads a mask."""
    tests, duals = module("test_altclip"), module("dual_encoders")
    tokenizer = duals.unigram_tokenizer()
    torch.manual_seed(0)
    duals.spread(AltCLIPModel(tests.config_of(len(tokenizer)))).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
    AltCLIPProcessor(images, tokenizer).save_pretrained(folder)


def metaclip2(folder: Path) -> None:
    """Texts that are filled with id 1 and see no padding; images are stretched."""
    tests, duals = module("test_metaclip2"), module("dual_encoders")
    tokenizer = duals.unigram_tokenizer(model_max_length=77)
    torch.manual_seed(0)
    duals.spread(MetaClip2Model(tests.config_of(len(tokenizer)))).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessorPil(size=tests.SQUARE, crop_size=tests.SQUARE), tokenizer).save_pretrained(folder)


def chineseclip(folder: Path) -> None:
    """BERT's texts, pooled at the first token."""
    tests, duals = module("test_chineseclip"), module("dual_encoders")
    tokenizer = duals.wordpiece_tokenizer(model_max_length=96)
    torch.manual_seed(0)
    duals.spread(ChineseCLIPModel(tests.config_of(len(tokenizer)))).save_pretrained(folder)
    images = ChineseCLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_center_crop=False)
    ChineseCLIPProcessor(images, tokenizer).save_pretrained(folder)


def jinaclip(folder: Path) -> None:
    """Jina's second version: adapters, rotary positions, the mean of tokens."""
    tests, duals = module("test_jinaclip"), module("dual_encoders")
    tokenizer = duals.unigram_tokenizer(model_max_length=8194)
    torch.manual_seed(0)
    vision, text = duals.spread(tests.eva(16)), duals.spread(tests.adapted_text(vocab_size=len(tokenizer)))
    state = {**tests.published_vision(vision), **tests.published_text(text)}
    tests.save(folder, state, tests.config(2, len(tokenizer)), tokenizer)


def _open_clip(folder: Path, **fields: Any) -> None:
    module("open_clip_forms").save(folder, module("open_clip_forms").config(**fields))


def open_clip(folder: Path) -> None:
    _open_clip(folder)


def open_clip_resnet(folder: Path) -> None:
    _open_clip(folder, vision_cfg=module("test_openclip").RESNET, quick_gelu=True, custom_text=False)


def _timm(folder: Path, form: str, **fields: Any) -> None:
    name, size, tower = module("test_openclip").TIMM_FORMS[form]
    _open_clip(folder, vision_cfg={"timm_model_name": name, "image_size": size, **tower}, **fields)


def eva02(folder: Path) -> None:
    _timm(folder, "eva02")


def mobileclip(folder: Path) -> None:
    forms = module("open_clip_forms")
    _timm(folder, "mobileclip", text_cfg=forms.text(no_causal_mask=True))


def siglip_of_open_clip(folder: Path) -> None:
    """A sigmoid and texts whose last token counts."""
    stated = module("test_openclip").FORMS["sigmoid, last of all tokens, projection with a bias"]
    module("open_clip_forms").save(folder, stated)


def blip(folder: Path) -> None:
    """As its authors publish it, with a head for matches beside both encoders."""
    folder.mkdir()
    shutil.copyfile(
        TESTS.parent / "data" / "blip" / "retrieval" / "model_retrieval.pth", folder / "model_retrieval.pth"
    )


def clip_of_images_alone(folder: Path) -> None:
    """transformers' image encoder with its projection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=32)
    module("dual_encoders").spread(CLIPVisionModelWithProjection(config)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE).save_pretrained(folder)


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "SigLIP, texts alone": {"parts": ("text",)},
    "BLIP for retrieval": {"tokenizer": str(TESTS.parent / "data" / "blip" / "vocab.txt")},
}
"""Of the export, where a model has some."""
MAKERS: Mapping[str, Callable[[Path], None]] = {
    "SigLIP": siglip,
    "SigLIP, texts alone": siglip,
    "SigLIP 2, NaFlex": naflex,
    "AltCLIP": altclip,
    "MetaCLIP 2": metaclip2,
    "Chinese-CLIP": chineseclip,
    "Jina CLIP v2": jinaclip,
    "open_clip": open_clip,
    "open_clip, ResNet": open_clip_resnet,
    "open_clip, sigmoid": siglip_of_open_clip,
    "EVA-02": eva02,
    "MobileCLIP": mobileclip,
    "BLIP for retrieval": blip,
    "CLIP, images alone": clip_of_images_alone,
}
