"""Trains the demo's two encoders from scratch on the CPU: contrastive loss over batches of near-identical scenes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from demo.aids import TrainingAids
from demo.checkpoint import pixel_values
from demo.sentences import agreement, sentence
from demo.tokens import CONTEXT_LENGTH, end_id, token_rows
from demo.world import ATTRIBUTES, IMAGE_PIXELS, TRAINED, Composition, draw
from vlm_export.models.clip.architecture import HEAD_WIDTH, LAYER_NORM_EPS, ClipArchitecture, TextSizes, VitSizes
from vlm_export.models.clip.encoders import ClipEncoders, ClipVisionTransformer
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD
from vlm_export.specs import torchvision_image_spec

REPORT_STEPS = 50
_FIRST_LOGIT_SCALE = math.log(1 / 0.07)
_LAST_LOGIT_SCALE = math.log(100)
_GROUP = 4
_IMAGE = torchvision_image_spec(IMAGE_PIXELS, "bicubic", "after_crop", IMAGE_MEAN, IMAGE_STD)


@dataclass(frozen=True)
class DemoSizes:
    """Depths and widths of the two encoders."""

    vision_width: int = 192
    vision_layers: int = 4
    patch_size: int = 16
    text_width: int = 128
    text_layers: int = 2
    embed_dim: int = 128


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; rates rise linearly, then fall along a cosine to zero.

    Attributes:
        matrix_rate: of Muon, which moves the blocks' weight matrices.
        other_rate: of AdamW, which moves everything else.
    """

    steps: int = 2000
    batch: int = 128
    matrix_rate: float = 0.02
    other_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    seed: int = 0


def demo_architecture(tokenizer: Tokenizer, sizes: DemoSizes) -> ClipArchitecture:
    """The architecture as OpenAI's key names and shapes imply it: heads are 64 wide, QuickGELU, the end token last."""
    vision = VitSizes(
        width=sizes.vision_width,
        layers=sizes.vision_layers,
        heads=sizes.vision_width // HEAD_WIDTH,
        hidden=4 * sizes.vision_width,
        patch_size=sizes.patch_size,
        image_size=IMAGE_PIXELS,
    )
    text = TextSizes(
        width=sizes.text_width,
        layers=sizes.text_layers,
        heads=sizes.text_width // HEAD_WIDTH,
        hidden=4 * sizes.text_width,
        context_length=CONTEXT_LENGTH,
        vocab_size=tokenizer.get_vocab_size(),
        pooling="argmax",
        end_token_id=end_id(tokenizer),
    )
    return ClipArchitecture("openai", sizes.embed_dim, "quick_gelu", LAYER_NORM_EPS, vision, text)


def initialise(encoders: ClipEncoders, seed: int) -> None:
    """Normal weights scaled to each matrix's fan-in; norms at one, biases at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoders.named_parameters():
            if name == "logit_scale":
                parameter.fill_(_FIRST_LOGIT_SCALE)
            elif "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, _deviation(name, parameter), generator=generator)


def _deviation(name: str, parameter: Tensor) -> float:
    if name == "vision.position_embedding":
        # As large as what it is added to: drowned in the patches' values, positions were learnt last of all.
        return 0.5
    if "embedding" in name:
        return 0.02
    if name.endswith("projection"):
        return float(parameter.shape[0] ** -0.5)
    residual = name.endswith(("attn.out.weight", "mlp.fc2.weight"))
    return float(parameter[0].numel() ** -0.5) * (0.35 if residual else 1.0)


def sample_compositions(batch: int, rng: np.random.Generator) -> list[Composition]:
    """Groups of four trained compositions, three of which differ from the first in one attribute: hard negatives."""
    chosen: list[Composition] = []
    while len(chosen) < batch:
        base = TRAINED[int(rng.integers(len(TRAINED)))]
        chosen += [base, *(_neighbour(base, rng) for _ in range(_GROUP - 1))]
    return chosen[:batch]


def _neighbour(base: Composition, rng: np.random.Generator) -> Composition:
    names = list(ATTRIBUTES)
    while True:
        name = names[int(rng.integers(len(names)))]
        value = ATTRIBUTES[name][int(rng.integers(len(ATTRIBUTES[name])))]
        changed = Composition(**{other: base.value(other) for other in names} | {name: value})
        if changed != base and not changed.held_out:
            return changed


def contrastive_loss(logits: Tensor, agrees: Tensor) -> Tensor:
    """Symmetric cross-entropy of each pair against the others of its batch.

    logits: float32 (B, B), images by sentences. agrees: bool (B, B); a sentence that is true of another image too
    is neither its match nor a negative, and is left out.
    """
    others = agrees & ~torch.eye(len(agrees), dtype=torch.bool)
    masked = logits.masked_fill(others, float("-inf"))
    labels = torch.arange(len(logits))
    return (F.cross_entropy(masked, labels) + F.cross_entropy(masked.T, labels)) / 2


def train(encoders: ClipEncoders, tokenizer: Tokenizer, schedule: Schedule, report: Callable[[str], None]) -> None:
    """Trains in place; same seed, same numbers on the same machine. A line to `report` every 50 steps."""
    assert isinstance(encoders.vision, ClipVisionTransformer)
    torch.manual_seed(schedule.seed)
    rng = np.random.default_rng([schedule.seed, 2])
    aids = TrainingAids(encoders.vision)
    optimizers = _build_optimizers(encoders, aids, schedule)
    encoders.train()
    started, losses = time.monotonic(), 0.0
    for step in range(1, schedule.steps + 1):
        losses += _step(encoders, aids, tokenizer, schedule.batch, rng)
        nn.utils.clip_grad_norm_(encoders.parameters(), 1.0)
        for optimizer, rate in optimizers:
            _move(optimizer, rate * rate_factor(step, schedule.steps, schedule.warmup_steps))
        with torch.no_grad():
            encoders.logit_scale.clamp_(max=_LAST_LOGIT_SCALE)
        if step % REPORT_STEPS == 0:
            mean, seconds = losses / REPORT_STEPS, time.monotonic() - started
            report(f"step {step}/{schedule.steps}  contrastive loss {mean:.3f}  {seconds:.0f} s")
            losses = 0.0
    aids.close()
    encoders.eval()


def _step(
    encoders: ClipEncoders, aids: TrainingAids, tokenizer: Tokenizer, batch: int, rng: np.random.Generator
) -> float:
    """Leaves the gradients of one new batch; returns its contrastive loss."""
    compositions = sample_compositions(batch, rng)
    drawings = [draw(composition, int(rng.integers(1 << 62))) for composition in compositions]
    sentences = [sentence(composition, rng) for composition in compositions]
    ids = torch.from_numpy(token_rows(tokenizer, [entry.text for entry in sentences]))
    images = encoders.vision(pixel_values([drawing.image for drawing in drawings], _IMAGE))
    texts = encoders.text(ids)
    logits = encoders.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    loss = contrastive_loss(logits, torch.from_numpy(agreement(sentences, compositions)))
    torch.autograd.backward(loss + aids.loss(images, drawings))
    return loss.item()


def _build_optimizers(
    encoders: ClipEncoders, aids: TrainingAids, schedule: Schedule
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each with its rate. Muon needs about half of AdamW's images here."""
    named = dict(encoders.named_parameters())
    matrices = [name for name, parameter in named.items() if ".blocks." in name and parameter.ndim == 2]
    others = [parameter for name, parameter in named.items() if name not in matrices] + list(aids.parameters())
    muon = torch.optim.Muon(
        [named[name] for name in matrices], lr=schedule.matrix_rate, weight_decay=schedule.weight_decay
    )
    adam = torch.optim.AdamW(others, lr=schedule.other_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [(muon, schedule.matrix_rate), (adam, schedule.other_rate)]


def _move(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Of the full rate, at a step that counts from 1: up to it in a line, then down to zero along a cosine."""
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
