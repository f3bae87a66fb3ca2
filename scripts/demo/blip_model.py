"""The BLIP demo's two models: their sizes, and the vision encoder that starts from the CLIP demo's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from demo.blip_vocab import CLS_ID, PAD_ID, SEP_ID
from demo.checkpoint import load_model, pixel_values
from demo.world import IMAGE_PIXELS
from vlm_export.models.blip.architecture import (
    HEAD_WIDTH,
    TEXT_EPS,
    VISION_EPS,
    BlipArchitecture,
    BlipVitSizes,
)
from vlm_export.models.blip.parts import BlipModules
from vlm_export.models.clip.encoders import ClipVisionTransformer
from vlm_export.models.layers.bert import BertSizes
from vlm_export.models.layers.vit import VisionTransformer
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD
from vlm_export.specs import torchvision_image_spec
from vlm_export.specs.tasks import SpecialTokens

IMAGE = torchvision_image_spec(IMAGE_PIXELS, "bicubic", "before_resize", IMAGE_MEAN, IMAGE_STD, resize="stretch")
# As many as the original's greatest caption length, and as many as a question may have.
_CAPTION_POSITIONS, _QUESTION_POSITIONS, _ANSWER_POSITIONS = 20, 35, 20


@dataclass(frozen=True)
class BlipDemoSizes:
    """Depths and widths; the vision encoder has the CLIP demo's width and patches and at most its depth."""

    vision_width: int = 192
    vision_layers: int = 3
    patch_size: int = 16
    text_width: int = 128
    text_layers: int = 2
    text_hidden: int = 256


@dataclass(frozen=True)
class DemoPair:
    """The captioner and the answerer; in training they are one: their vision encoder is the same module."""

    captioner: BlipModules
    answerer: BlipModules
    captioner_architecture: BlipArchitecture
    answerer_architecture: BlipArchitecture

    def parameters(self) -> list[nn.Parameter]:
        """Each once."""
        return list(nn.ModuleList([self.captioner, self.answerer]).parameters())


def build_pair(vocab_size: int, sizes: BlipDemoSizes) -> DemoPair:
    """Modules with uninitialised weights; `initialise` fills them."""
    vision = BlipVitSizes(
        width=sizes.vision_width,
        layers=sizes.vision_layers,
        heads=sizes.vision_width // HEAD_WIDTH,
        hidden=4 * sizes.vision_width,
        patch_size=sizes.patch_size,
        image_size=IMAGE_PIXELS,
        eps=VISION_EPS,
    )
    tokens = SpecialTokens(CLS_ID, SEP_ID, PAD_ID, decoder_start=vocab_size - 2, encoder_start=vocab_size - 1)
    captions = _text_sizes(sizes, vocab_size, _CAPTION_POSITIONS, sizes.vision_width)
    questions = replace(captions, positions=_QUESTION_POSITIONS)
    answers = replace(captions, positions=_ANSWER_POSITIONS, states_width=sizes.text_width)
    captioner = BlipArchitecture("original", vision, None, captions, 0, False, tokens)
    answerer = BlipArchitecture("original", vision, questions, answers, 0, False, tokens)
    pair = DemoPair(BlipModules(captioner), BlipModules(answerer), captioner, answerer)
    pair.answerer.vision = pair.captioner.vision
    return pair


def _text_sizes(sizes: BlipDemoSizes, vocab_size: int, positions: int, states_width: int) -> BertSizes:
    return BertSizes(
        width=sizes.text_width,
        layers=sizes.text_layers,
        heads=sizes.text_width // HEAD_WIDTH,
        hidden=sizes.text_hidden,
        vocab_size=vocab_size,
        positions=positions,
        states_width=states_width,
        eps=TEXT_EPS,
    )


def initialise(pair: DemoPair, seed: int) -> None:
    """Normal weights scaled to each matrix's fan-in, small embeddings; norms at one, biases at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for model in (pair.captioner, pair.answerer):
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    small = "embedding" in name
                    deviation = 0.02 if small else float(parameter[0].numel() ** -0.5)
                    parameter.normal_(0.0, deviation, generator=generator)


def warm_start(vision: VisionTransformer, clip_checkpoint: Path, images: Sequence[Image.Image]) -> None:
    """Fills the vision encoder with the first blocks of the CLIP demo's."""
    clip = clip_vision(clip_checkpoint)
    with torch.no_grad():
        weight, positions = entry_without_norm(clip, images)
        vision.patches.conv.weight.copy_(weight)
        vision.position_embedding.copy_(positions)
        first = clip.class_embedding + clip.position_embedding[0]
        vision.class_embedding.copy_(clip.norm_pre(first) - vision.position_embedding[0])
        for ours, theirs in zip(vision.blocks, clip.blocks, strict=False):
            ours.load_state_dict(theirs.state_dict())


def clip_vision(checkpoint: Path) -> ClipVisionTransformer:
    """The CLIP demo's vision encoder."""
    clip = next(part.module for part in load_model(checkpoint).parts if part.name == "vision")
    assert isinstance(clip, ClipVisionTransformer)
    return clip


def entry_without_norm(clip: ClipVisionTransformer, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Patch weights float32 (C, 3, P, P) and positions float32 (1 + N, C) that need no norm before the blocks.

    CLIP normalises its tokens there, BLIP and SigLIP do not. A norm with the scale that the images' tokens have on
    average is a linear map, which patches and positions take in.
    """
    patches = clip.patches(pixel_values(images, IMAGE)) + clip.position_embedding[1:]
    scale = clip.norm_pre.weight / patches.std(dim=-1, unbiased=False).mean()
    weight = _centred(clip.patches.conv.weight, 0) * scale[:, None, None, None]
    return weight, _centred(clip.position_embedding, -1) * scale + clip.norm_pre.bias


def _centred(tensor: Tensor, axis: int) -> Tensor:
    return tensor - tensor.mean(dim=axis, keepdim=True)
