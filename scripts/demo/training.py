"""Trains the demo's two encoders from scratch: contrastive loss over batches of near-identical scenes, CPU only."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from demo.sentences import agreement, sentence
from demo.tokens import CONTEXT_LENGTH, END, token_rows
from demo.world import ATTRIBUTES, PICTURE_PIXELS, TRAINED, Composition, render
from vlm_export.models.clip import IMAGE_MEAN, IMAGE_STD, ClipEncoders
from vlm_export.models.clip_architecture import LAYER_NORM_EPS, ClipArchitecture, TextSizes, VitSizes

_MAX_LOGIT_SCALE = math.log(100)
_GROUP = 4


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; the learning rate rises linearly, then falls along a cosine to zero."""

    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    seed: int


def demo_architecture(tokenizer: Tokenizer, vision_layers: int = 4, text_layers: int = 2) -> ClipArchitecture:
    """The demo's sizes; heads are 64 wide, as OpenAI's key names imply."""
    vocab_size = tokenizer.get_vocab_size()
    width = 128
    vision = VitSizes(width, vision_layers, width // 64, 4 * width, patch_size=8, image_size=PICTURE_PIXELS)
    end = tokenizer.token_to_id(END)
    text = TextSizes(width, text_layers, width // 64, 4 * width, CONTEXT_LENGTH, vocab_size, "argmax", end)
    return ClipArchitecture("openai", 128, "quick_gelu", LAYER_NORM_EPS, vision, text)


def initialise(encoders: ClipEncoders, seed: int) -> None:
    """Normal weights scaled to each block's depth and fan-in; norms at one, biases at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoders.named_parameters():
        with torch.no_grad():
            if name == "logit_scale":
                parameter.fill_(math.log(1 / 0.07))
            elif "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, _deviation(name, parameter), generator=generator)


def _deviation(name: str, parameter: Tensor) -> float:
    if "embedding" in name:
        return 0.02
    if name.endswith("projection"):
        return parameter.shape[0] ** -0.5
    fan_in = parameter[0].numel()
    # Two residual branches a block; the demo has at most a handful of blocks.
    return fan_in**-0.5 * (0.35 if name.endswith(("attn.out.weight", "mlp.fc2.weight")) else 1.0)


def sample_compositions(batch: int, rng: np.random.Generator) -> list[Composition]:
    """Groups of four trained compositions, three of which differ from the first in one attribute: hard negatives."""
    chosen: list[Composition] = []
    while len(chosen) < batch:
        base = TRAINED[int(rng.integers(len(TRAINED)))]
        chosen.append(base)
        chosen.extend(_neighbour(base, rng) for _ in range(_GROUP - 1))
    return chosen[:batch]


def _neighbour(base: Composition, rng: np.random.Generator) -> Composition:
    names = list(ATTRIBUTES)
    while True:
        name = names[int(rng.integers(len(names)))]
        value = ATTRIBUTES[name][int(rng.integers(len(ATTRIBUTES[name])))]
        values = {other: base.value(other) for other in names} | {name: value}
        changed = Composition(**values)
        if changed != base and not changed.held_out:
            return changed


def pixel_values(pictures: Sequence[Image.Image]) -> Tensor:
    """float32 (B, 3, S, S), normalised; the pictures already have the model's size."""
    stacked = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures]) / 255
    normalised = (stacked - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(0, 3, 1, 2)))


def contrastive_loss(logits: Tensor, agrees: Tensor) -> Tensor:
    """Symmetric cross-entropy of each pair against the others of its batch.

    logits: float32 (B, B), pictures by sentences. agrees: bool (B, B); a sentence that is true of another picture too
    is neither its match nor a negative, and is left out.
    """
    others = agrees & ~torch.eye(len(agrees), dtype=torch.bool)
    masked = logits.masked_fill(others, float("-inf"))
    labels = torch.arange(len(logits))
    return (F.cross_entropy(masked, labels) + F.cross_entropy(masked.T, labels)) / 2


def train(encoders: ClipEncoders, tokenizer: Tokenizer, schedule: Schedule, report: Callable[[str], None]) -> None:
    """Trains in place; a line to `report` every 50 steps."""
    rng = np.random.default_rng([schedule.seed, 2])
    optimizer = _build_optimizer(encoders, schedule)
    encoders.train()
    started, running = time.monotonic(), 0.0
    for step in range(schedule.steps):
        rate = schedule.learning_rate * _rate_factor(step, schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _step(encoders, tokenizer, schedule.batch, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoders.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            encoders.logit_scale.clamp_(max=_MAX_LOGIT_SCALE)
        running += float(loss.detach())
        if (step + 1) % 50 == 0:
            report(f"step {step + 1}/{schedule.steps}  loss {running / 50:.3f}  {time.monotonic() - started:.0f} s")
            running = 0.0
    encoders.eval()


def _step(encoders: ClipEncoders, tokenizer: Tokenizer, batch: int, rng: np.random.Generator) -> Tensor:
    compositions = sample_compositions(batch, rng)
    seeds = rng.integers(0, 1 << 62, batch)
    pictures = [render(composition, int(seed)) for composition, seed in zip(compositions, seeds, strict=True)]
    sentences = [sentence(composition, rng) for composition in compositions]
    ids = torch.from_numpy(token_rows(tokenizer, [entry.text for entry in sentences]))
    image = F.normalize(encoders.vision(pixel_values(pictures)), dim=-1)
    text = F.normalize(encoders.text(ids), dim=-1)
    logits = encoders.logit_scale.exp() * image @ text.T
    return contrastive_loss(logits, torch.from_numpy(agreement(sentences, compositions)))


def _build_optimizer(encoders: ClipEncoders, schedule: Schedule) -> torch.optim.Optimizer:
    matrices = [p for p in encoders.parameters() if p.ndim >= 2]
    vectors = [p for p in encoders.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98))


def _rate_factor(step: int, schedule: Schedule) -> float:
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
