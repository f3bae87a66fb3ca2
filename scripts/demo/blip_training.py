"""Trains the BLIP demo's two models at once on the CPU: one vision encoder, a captioner and an answerer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from demo.blip_model import IMAGE, DemoPair
from demo.blip_vocab import token_rows
from demo.checkpoint import pixel_values
from demo.questions import KINDS, Question, ask
from demo.sentences import caption
from demo.training import REPORT_STEPS
from demo.world import IMAGE_PIXELS, TRAINED, Composition, draw
from vlm_export.models.blip.parts import BlipModules
from vlm_export.models.layers.bert import CrossKeyValues, MultimodalEncoder, TextDecoder
from vlm_export.specs.tasks import SpecialTokens

# Of the images, some are drawn larger and shrunk by the preprocessing, as a user's are.
_LARGER_SHARE, _LARGER_PIXELS = 0.25, 96
_IGNORED = -100
# How often a kind is asked: comparing what is said with what is seen is learnt last.
_WEIGHTS = {"exists": 4.0, "count": 2.0}


@dataclass(frozen=True)
class BlipSchedule:
    """How long and how fast to train; AdamW, one cycle: the rate rises over a tenth of the steps, then falls to zero.

    Attributes:
        rate: of the text transformers. vision_rate: of the vision encoder, which has been trained before.
        questions_each: about every image.
    """

    steps: int = 1400
    batch: int = 64
    questions_each: int = 4
    # At 2e-3 yes-or-no questions stay at chance for as long as everything else takes.
    rate: float = 6e-4
    vision_rate: float = 3e-4
    weight_decay: float = 0.01
    seed: int = 0


class Losses(NamedTuple):
    """Mean cross-entropy of a token, in nats."""

    caption: Tensor
    answer: Tensor


def train(pair: DemoPair, tokenizer: Tokenizer, schedule: BlipSchedule, report: Callable[[str], None]) -> None:
    """Trains in place; same seed, same numbers on the same machine. A line to `report` every 50 steps."""
    torch.manual_seed(schedule.seed)
    rng = np.random.default_rng([schedule.seed, 3])
    optimizer, cycle = _build_optimizer(pair, schedule)
    started, sums = time.monotonic(), np.zeros(2)
    for step in range(1, schedule.steps + 1):
        losses = _batch_losses(pair, tokenizer, schedule, rng)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.caption + losses.answer)
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        sums += [losses.caption.item(), losses.answer.item()]
        if step % REPORT_STEPS == 0:
            means, seconds = sums / REPORT_STEPS, time.monotonic() - started
            report(f"step {step}/{schedule.steps}  caption {means[0]:.4f}  answer {means[1]:.4f}  {seconds:.0f} s")
            sums[:] = 0


def _build_optimizer(
    pair: DemoPair, schedule: BlipSchedule
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    vision = list(pair.captioner.vision.parameters())
    known = set(map(id, vision))
    others = [parameter for parameter in pair.parameters() if id(parameter) not in known]
    groups = [{"params": vision, "lr": schedule.vision_rate}, {"params": others, "lr": schedule.rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    rates = [schedule.vision_rate, schedule.rate]
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=schedule.steps + 1, pct_start=0.1, cycle_momentum=False
    )
    return optimizer, cycle


def _batch_losses(pair: DemoPair, tokenizer: Tokenizer, schedule: BlipSchedule, rng: np.random.Generator) -> Losses:
    compositions = [TRAINED[int(i)] for i in rng.integers(len(TRAINED), size=schedule.batch)]
    images = [draw(composition, int(rng.integers(1 << 62)), _pixels(rng)).image for composition in compositions]
    states = pair.captioner.vision(pixel_values(images, IMAGE))
    tokens = pair.captioner_architecture.tokens
    texts = [caption(composition) for composition in compositions]
    captions = decoder_loss(pair.captioner, tokenizer, texts, tokens, states, None)
    questions = [question for composition in compositions for question in _questions(composition, schedule, rng)]
    states = states.repeat_interleave(schedule.questions_each, dim=0)
    return Losses(captions, answer_loss(pair.answerer, tokenizer, questions, tokens, states, rng))


def _pixels(rng: np.random.Generator) -> int:
    return _LARGER_PIXELS if rng.random() < _LARGER_SHARE else IMAGE_PIXELS


def _questions(composition: Composition, schedule: BlipSchedule, rng: np.random.Generator) -> list[Question]:
    weights = np.array([_WEIGHTS.get(kind, 1.0) for kind in KINDS])
    kinds = rng.choice(len(KINDS), size=schedule.questions_each, p=weights / weights.sum())
    return [ask(composition, KINDS[int(kind)], rng) for kind in kinds]


def answer_loss(
    answerer: BlipModules,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    tokens: SpecialTokens,
    image_states: Tensor,
    rng: np.random.Generator,
) -> Tensor:
    """image_states: float32 (B, N, W), of each question's image.

    The original hides a question's padding from the decoder in training and shows it in generation; half of the
    batches here show it, so that an answer does not depend on what else is in the batch.
    """
    ids, mask = map(torch.from_numpy, token_rows(tokenizer, [q.text for q in questions], tokens.encoder_start))
    states = MultimodalEncoder(answerer.encoder)(ids, mask, image_states)
    shown = torch.ones_like(mask) if rng.random() < 0.5 else mask
    return decoder_loss(answerer, tokenizer, [q.answer for q in questions], tokens, states, shown)


def decoder_loss(
    model: BlipModules,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    tokens: SpecialTokens,
    states: Tensor,
    states_mask: Tensor | None,
) -> Tensor:
    """Mean cross-entropy of the texts' tokens, [SEP] included, each given those before it. Starts from [DEC].

    states: float32 (B, S, width), what cross-attention reads. states_mask: int64 (B, S), None for all ones.
    """
    ids, mask = map(torch.from_numpy, token_rows(tokenizer, texts, tokens.decoder_start))
    if states_mask is None:
        states_mask = torch.ones(states.shape[:2], dtype=torch.int64)
    decoder = TextDecoder(model.decoder, model.decoder_head)
    sizes = model.decoder.sizes
    empty = states.new_zeros(len(ids), sizes.heads, 0, sizes.width // sizes.heads)
    keys_values = CrossKeyValues(model.decoder)(states)
    cache = [tensor for i in range(sizes.layers) for tensor in (empty, empty, *keys_values[2 * i : 2 * i + 2])]
    logits = decoder(ids[:, :-1], mask[:, :-1], states_mask, *cache)[0]
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, _IGNORED)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)
