"""The nanoVLM demo's model: its sizes, its first weights, and the vision encoder that starts from the CLIP demo's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from demo.blip_model import clip_vision, entry_without_norm
from demo.nanovlm_vocab import IMAGE_PLACEHOLDER
from demo.world import IMAGE_PIXELS
from vlm_export.models.layers.rotary_decoder import RotaryDecoderSizes
from vlm_export.models.layers.vit import VisionTransformer, VitForm
from vlm_export.models.nanovlm.architecture import IMAGE_TOKEN, ChatForm, NanoVlmArchitecture
from vlm_export.models.nanovlm.parts import NanoVlmModules
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD

# <|im_end|>, as in every published checkpoint of the second generation.
_END_ID = 2
_CLIP_HEAD_WIDTH = 64


@dataclass(frozen=True)
class NanoVlmDemoSizes:
    """Depths and widths; the vision encoder has the CLIP demo's width and patches and at most its depth."""

    vision_width: int = 192
    vision_layers: int = 3
    patch_size: int = 16
    pixel_shuffle: int = 2
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 256
    positions: int = 128


def demo_architecture(vocab_size: int, sizes: NanoVlmDemoSizes) -> NanoVlmArchitecture:
    """The second generation's layout: placeholders before the question, no template."""
    vision = VitForm(
        width=sizes.vision_width,
        layers=sizes.vision_layers,
        heads=sizes.vision_width // _CLIP_HEAD_WIDTH,
        hidden=4 * sizes.vision_width,
        patch_size=sizes.patch_size,
        grid=IMAGE_PIXELS // sizes.patch_size,
        activation="gelu_tanh",
        has_class_token=False,
    )
    decoder = RotaryDecoderSizes(
        width=sizes.width,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        hidden=sizes.hidden,
        vocab_size=vocab_size,
        positions=sizes.positions,
    )
    chat = ChatForm("placeholders", _END_ID, {IMAGE_TOKEN: IMAGE_PLACEHOLDER}, sizes.positions)
    return NanoVlmArchitecture(vision, decoder, sizes.pixel_shuffle, chat)


def initialise(modules: NanoVlmModules, seed: int) -> None:
    """Normal weights scaled to each matrix's fan-in, small embeddings; norms at one, biases at zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = modules.decoder.sizes
    with torch.no_grad():
        exponents = torch.arange(0, sizes.head_width, 2, dtype=torch.float32) / sizes.head_width
        modules.decoder.rotary.inv_freq.copy_(sizes.rope_base**-exponents)
        for name, parameter in modules.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, _deviation(name, parameter), generator=generator)


def _deviation(name: str, parameter: Tensor) -> float:
    if "embedding" in name:
        # The head is the same matrix: logits of larger rows would be far from even.
        return 0.05
    residual = name.endswith(("attn.out.weight", "mlp.fc2.weight", "mlp.down.weight"))
    return float(parameter[0].numel() ** -0.5) * (0.35 if residual else 1.0)


def warm_start(vision: VisionTransformer, clip_checkpoint: Path, images: Sequence[Image.Image]) -> None:
    """Fills the vision encoder with the first blocks of the CLIP demo's.

    CLIP normalises the values of pixels and nanoVLM does not: weights and biases of the patches take that in. What
    the class token gave to the patches is lost, and the blocks' activation is another one: training makes up for it.
    """
    clip = clip_vision(clip_checkpoint)
    with torch.no_grad():
        weight, positions = entry_without_norm(clip, images)
        mean, std = (torch.tensor(values)[None, :, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
        vision.patches.conv.weight.copy_(weight / std)
        assert vision.patches.conv.bias is not None
        vision.patches.conv.bias.copy_(-(weight * mean / std).sum(dim=(1, 2, 3)))
        vision.position_embedding.copy_(positions[1:])
        for ours, theirs in zip(vision.blocks, clip.blocks, strict=False):
            ours.load_state_dict(theirs.state_dict())
