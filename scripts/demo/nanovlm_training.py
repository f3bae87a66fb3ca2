"""Trains the nanoVLM demo on the CPU: every image with its caption and a few questions, loss on the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.checkpoint import pixel_values
from demo.nanovlm_chat import ChatTexts
from demo.nanovlm_questions import training_questions
from demo.questions import Question
from demo.training import REPORT_STEPS, rate_factor
from demo.world import IMAGE_PIXELS, TRAINED, draw
from vlm_export.models.layers.rotary_decoder import CachedDecoder
from vlm_export.models.nanovlm.parts import NanoVlmModules, VisionEncoder

# Of the images, some are drawn larger and shrunk by the preprocessing, as a user's are.
_LARGER_SHARE, _LARGER_PIXELS = 0.25, 96
_IGNORED = -100
_ALL_LOGITS = torch.tensor(0)


@dataclass(frozen=True)
class NanoVlmSchedule:
    """How long and how fast to train; rates rise linearly over a tenth of the steps, then fall along a cosine to zero.

    Attributes:
        questions_each: about every image, besides the caption's.
        matrix_rate: of Muon, which moves the decoder's matrices. rate: of AdamW, which moves its other weights.
        vision_rate: of AdamW for the vision encoder, which has been trained before.
    """

    steps: int = 1100
    batch: int = 64
    questions_each: int = 4
    matrix_rate: float = 0.02
    rate: float = 2e-3
    vision_rate: float = 3e-4
    weight_decay: float = 0.01
    seed: int = 0


class Losses(NamedTuple):
    """Mean cross-entropy of a token of an answer, its end included, in nats."""

    caption: Tensor
    answer: Tensor


class Batch(NamedTuple):
    """Rows of prompt and answer, padded on the right: each image's caption and questions are neighbours.

    pixels: float32 (P, 3, S, S). ids, mask, targets: int64 (P · Q, T); targets are the next tokens of answers.
    """

    pixels: Tensor
    ids: Tensor
    mask: Tensor
    targets: Tensor


def train(
    modules: NanoVlmModules, texts: ChatTexts, factor: int, schedule: NanoVlmSchedule, report: Callable[[str], None]
) -> None:
    """Trains in place; same seed, same numbers on the same machine. A line to `report` every 50 steps.

    factor: side of the squares of patches that become one feature.
    """
    torch.manual_seed(schedule.seed)
    rng = np.random.default_rng([schedule.seed, 5])
    optimizers = _build_optimizers(modules, schedule)
    vision, decoder = VisionEncoder(modules, factor), CachedDecoder(modules.decoder)
    started, sums = time.monotonic(), np.zeros(2)
    for step in range(1, schedule.steps + 1):
        losses = batch_losses(vision, decoder, modules, draw_batch(texts, schedule, rng), texts.settings.image_token_id)
        torch.autograd.backward(losses.caption + losses.answer)
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["first_lr"] * rate_factor(step, schedule.steps, max(1, schedule.steps // 10))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sums += [losses.caption.item(), losses.answer.item()]
        if step % REPORT_STEPS == 0:
            means, seconds = sums / REPORT_STEPS, time.monotonic() - started
            report(f"step {step}/{schedule.steps}  caption {means[0]:.4f}  answer {means[1]:.4f}  {seconds:.0f} s")
            sums[:] = 0


def _build_optimizers(modules: NanoVlmModules, schedule: NanoVlmSchedule) -> list[torch.optim.Optimizer]:
    vision = list(modules.vision.parameters())
    blocks = list(modules.decoder.blocks.parameters())
    matrices = [parameter for parameter in blocks if parameter.ndim == 2]
    taken = set(map(id, [*vision, *matrices]))
    others = [parameter for parameter in modules.parameters() if id(parameter) not in taken]
    groups = [{"params": vision, "lr": schedule.vision_rate}, {"params": others, "lr": schedule.rate}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=schedule.matrix_rate, weight_decay=schedule.weight_decay),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=schedule.weight_decay),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["first_lr"] = group["lr"]
    return optimizers


def draw_batch(texts: ChatTexts, schedule: NanoVlmSchedule, rng: np.random.Generator) -> Batch:
    """Trained compositions alone."""
    compositions = [TRAINED[int(i)] for i in rng.integers(len(TRAINED), size=schedule.batch)]
    images = [draw(composition, int(rng.integers(1 << 62)), _pixels(rng)).image for composition in compositions]
    questions = [
        question
        for composition in compositions
        for question in training_questions(composition, schedule.questions_each, rng)
    ]
    return Batch(pixel_values(images, texts.image), *token_rows(texts, questions))


def _pixels(rng: np.random.Generator) -> int:
    return _LARGER_PIXELS if rng.random() < _LARGER_SHARE else IMAGE_PIXELS


def token_rows(texts: ChatTexts, questions: Sequence[Question]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and targets, as `Batch` has them."""
    pairs = [(texts.prompt(question.text), texts.answer(question.answer)) for question in questions]
    shape = len(pairs), max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = np.full(shape, texts.settings.pad_token_id, dtype=np.int64)
    mask, targets = np.zeros_like(ids), np.full_like(ids, _IGNORED)
    for i, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[i, :end], mask[i, :end] = [*prompt, *answer], 1
        targets[i, len(prompt) - 1 : end - 1] = answer
    # The last token of a row is never fed: nothing follows it.
    return torch.from_numpy(ids[:, :-1]), torch.from_numpy(mask[:, :-1]), torch.from_numpy(targets[:, :-1])


def batch_losses(
    vision: VisionEncoder, decoder: CachedDecoder, modules: NanoVlmModules, batch: Batch, image_token_id: int | None
) -> Losses:
    """One forward pass without a cache, as the runtime's first step."""
    features = vision(batch.pixels)
    each, sizes = len(batch.ids) // len(features), modules.decoder.sizes
    words = modules.decoder.embedding(batch.ids)
    # Placeholders stand first and are as many in every row, so the features' order is that of their places.
    places = torch.eq(batch.ids, -1 if image_token_id is None else image_token_id)[:, :, None]
    embeds = words.masked_scatter(places, features.repeat_interleave(each, dim=0))
    positions = torch.arange(batch.ids.shape[1]).expand(batch.ids.shape)
    empty = words.new_zeros(len(words), sizes.kv_heads, 0, sizes.head_width)
    logits = decoder(embeds, batch.mask, positions, _ALL_LOGITS, *[empty] * (2 * sizes.layers))[0]
    losses = F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=_IGNORED, reduction="none")
    counted = batch.targets != _IGNORED
    is_caption = torch.arange(len(losses)) % each == 0
    return Losses(*(losses[rows].sum() / counted[rows].sum() for rows in (is_caption, ~is_caption)))
