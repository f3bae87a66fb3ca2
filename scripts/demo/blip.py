"""The two BLIP demos, trained at once on the CPU: one vision encoder, a captioner and an answerer.

Their vision encoder starts from the CLIP demo's, so `scripts/train_demo.py` comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from demo.accuracy import (
    BATCH,
    Measured,
    answer_exactness,
    caption_exactness,
    exactness_figures,
    exactness_lines,
    held_out_questions,
)
from demo.files import CAPTION, CLIP, VQA, DemoFiles, published
from demo.questions import Question, ask
from demo.sentences import caption
from demo.tokens import CLS_ID, PAD_ID, SEP_ID, bert_rows, bert_tokenizer_json
from demo.torch_model import load_model, module_of, pixel_values, torch_model
from demo.training import Recipe, Schedule, draw_kinds, draw_trained, fan_in, fit, initialise
from demo.world import HELD_OUT, IMAGE_PIXELS, TRAINED, Drawing, draw
from vlm_export.models.blip.architecture import (
    HEAD_WIDTH,
    TEXT_EPS,
    VISION_EPS,
    BlipArchitecture,
    BlipVitSizes,
)
from vlm_export.models.blip.parts import BlipModules
from vlm_export.models.blip.weights import decoder_table, encoder_table, vision_table
from vlm_export.models.clip.encoders import ClipVisionTransformer
from vlm_export.models.layers.bert import BertSizes, CrossKeyValues, MultimodalEncoder, TextDecoder
from vlm_export.models.layers.vit import VisionTransformer
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD
from vlm_export.specs import torchvision_image_spec
from vlm_export.specs.tasks import SpecialTokens

IMAGE = torchvision_image_spec(IMAGE_PIXELS, "bicubic", "before_resize", IMAGE_MEAN, IMAGE_STD, resize="stretch")
REQUIRED_EXACT = 0.9
# BLIP's own default; greedy search is what the demo has to pass.
_BEAMS = 3
_IGNORED = -100
# salesforce/BLIP models/med.py (3a29b74) ties these, and its files hold both copies: stored key → its twin.
_TWINS = {
    "text_decoder.bert.embeddings.word_embeddings.weight": "text_decoder.cls.predictions.decoder.weight",
    "text_decoder.cls.predictions.bias": "text_decoder.cls.predictions.decoder.bias",
}


@dataclass(frozen=True)
class BlipSchedule(Schedule):
    """AdamW, one cycle: the rate rises over a tenth of the steps, then falls to zero.

    Attributes:
        questions_each: about every image.
        rate: of the text transformers. vision_rate: of the vision encoder, which has been trained before.
    """

    questions_each: int = 4
    # At 2e-3 yes-or-no questions stay at chance for as long as everything else takes.
    rate: float = 6e-4
    vision_rate: float = 3e-4
    weight_decay: float = 0.01


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


def train_checkpoints(files: Sequence[DemoFiles], schedule: BlipSchedule) -> None:
    """Writes the tokenizer, and both checkpoints when all is trained."""
    for each in files:
        each.tokenizer.parent.mkdir(parents=True, exist_ok=True)
        each.tokenizer.write_text(bert_tokenizer_json(), encoding="utf-8")
    tokenizer = Tokenizer.from_str(bert_tokenizer_json())
    pair = build_pair(tokenizer.get_vocab_size(), schedule.seed)
    warm_start(pair.captioner.vision, DemoFiles(CLIP).checkpoint, first_images(schedule))
    train(pair, tokenizer, schedule)
    files[0].save(published_checkpoint(pair.captioner, pair.captioner_architecture))
    files[1].save(published_checkpoint(pair.answerer, pair.answerer_architecture))


def measure_checkpoint(files: DemoFiles, drawings: Sequence[Drawing]) -> Measured:
    """The exactness of a checkpoint file in PyTorch, greedily and with beams."""
    model = torch_model(files.model(), files.tokenizer)
    found = {
        search: caption_exactness(partial(model.caption, beams=beams, batch_size=BATCH), drawings)
        if files.demo == CAPTION
        # Padding is attended to, as in the original.
        else answer_exactness(partial(model.answer, beams=beams, batch_size=BATCH), held_out_questions(drawings))
        for search, beams in (("greedy", 1), (f"beams_{_BEAMS}", _BEAMS))
    }
    state = torch.load(files.checkpoint, weights_only=True)["model"]
    counts = {
        "stored_values": sum(tensor.numel() for tensor in state.values()),
        "vocab_size": model.session.text_spec.vocab_size,
    }
    figures = counts | exactness_figures(found)
    return Measured(exactness_lines(found), figures, found["greedy"].exact >= REQUIRED_EXACT)


RECIPE = Recipe(
    (CAPTION, VQA), BlipSchedule(1400, 64), 2, 4 * len(HELD_OUT), 12_000_000, train_checkpoints, measure_checkpoint
)


def published_checkpoint(modules: BlipModules, architecture: BlipArchitecture) -> dict[str, Any]:
    """What `torch.save` takes, as Salesforce publishes it, with float16 matrices where the original has float32."""
    vision, encoder, decoder = architecture.vision, architecture.encoder, architecture.decoder
    assert decoder is not None
    table = vision_table(vision.layers, huggingface=False) | decoder_table(decoder.layers, ())
    if encoder is not None:
        table |= encoder_table(encoder.layers, has_cross_attention=True)
    state = published(table, modules.state_dict())
    state |= {key: state[twin] for key, twin in _TWINS.items()}
    for prefix, sizes in (("text_encoder.", encoder), ("text_decoder.bert.", decoder)):
        if sizes is not None:
            state[f"{prefix}embeddings.position_ids"] = torch.arange(sizes.positions)[None]
    return {"model": dict(sorted(state.items()))}


def build_pair(vocab_size: int, seed: int) -> DemoPair:
    """Both models with their first weights; the vision encoder has the CLIP demo's width and patches."""
    vision = BlipVitSizes(
        width=192, layers=3, heads=192 // HEAD_WIDTH, hidden=768, patch_size=16, image_size=IMAGE_PIXELS, eps=VISION_EPS
    )
    tokens = SpecialTokens(CLS_ID, SEP_ID, PAD_ID, decoder_start=vocab_size - 2, encoder_start=vocab_size - 1)
    # As many positions as the original's greatest caption length, and as many as a question may have.
    captions = BertSizes(
        width=128,
        layers=2,
        heads=128 // HEAD_WIDTH,
        hidden=256,
        vocab_size=vocab_size,
        positions=20,
        states_width=vision.width,
        eps=TEXT_EPS,
    )
    questions, answers = replace(captions, positions=35), replace(captions, states_width=captions.width)
    captioner = BlipArchitecture("original", vision, None, captions, 0, False, tokens)
    answerer = BlipArchitecture("original", vision, questions, answers, 0, False, tokens)
    pair = DemoPair(BlipModules(captioner), BlipModules(answerer), captioner, answerer)
    pair.answerer.vision = pair.captioner.vision
    named = chain(pair.captioner.named_parameters(), pair.answerer.named_parameters())
    initialise(named, seed, lambda name, parameter: 0.02 if "embedding" in name else fan_in(parameter))
    return pair


def first_images(schedule: Schedule) -> list[Image.Image]:
    """Trained images, for the average over tokens that a start from CLIP's encoder needs."""
    return [draw(composition, (schedule.seed, i)).image for i, composition in enumerate(TRAINED[::20])]


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
    clip = module_of(load_model(checkpoint), "vision")
    assert isinstance(clip, ClipVisionTransformer)
    return clip


def entry_without_norm(clip: ClipVisionTransformer, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Patch weights float32 (C, 3, P, P) and positions float32 (1 + N, C) that need no norm before the blocks.

    CLIP normalises its tokens there, BLIP and SigLIP do not. A norm with the scale that the images' tokens have on
    average is a linear map, which patches and positions take in.
    """
    patches = clip.patches(pixel_values(images, IMAGE)) + clip.position_embedding[1:]
    scale = clip.norm_pre.weight / patches.std(dim=-1, unbiased=False).mean()
    conv, positions = clip.patches.conv.weight, clip.position_embedding
    weight = (conv - conv.mean(dim=0, keepdim=True)) * scale[:, None, None, None]
    return weight, (positions - positions.mean(dim=-1, keepdim=True)) * scale + clip.norm_pre.bias


def train(pair: DemoPair, tokenizer: Tokenizer, schedule: BlipSchedule) -> None:
    """Trains in place."""
    rng = np.random.default_rng([schedule.seed, 3])
    vision = list(pair.captioner.vision.parameters())
    known = set(map(id, vision))
    others = [parameter for parameter in pair.parameters() if id(parameter) not in known]
    rates = [schedule.vision_rate, schedule.rate]
    groups = [{"params": params, "lr": rate} for params, rate in zip((vision, others), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=schedule.steps + 1, pct_start=0.1, cycle_momentum=False
    )
    tokens = pair.captioner_architecture.tokens

    def losses() -> dict[str, Tensor]:
        drawings = draw_trained(schedule.batch, rng)
        states = pair.captioner.vision(pixel_values([drawing.image for drawing in drawings], IMAGE))
        texts = [caption(drawing.composition) for drawing in drawings]
        captions = decoder_loss(pair.captioner, tokenizer, texts, tokens, states, None)
        questions = [
            ask(drawing.composition, kind, rng)
            for drawing in drawings
            for kind in draw_kinds(schedule.questions_each, rng)
        ]
        states = states.repeat_interleave(schedule.questions_each, dim=0)
        return {"caption": captions, "answer": answer_loss(pair.answerer, tokenizer, questions, tokens, states, rng)}

    def move(step: int) -> None:
        optimizer.step()
        cycle.step()
        optimizer.zero_grad(set_to_none=True)

    fit(pair.parameters(), schedule.steps, losses, move)


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
    ids, mask = map(torch.from_numpy, bert_rows(tokenizer, [q.text for q in questions], tokens.encoder_start))
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
    ids, mask = map(torch.from_numpy, bert_rows(tokenizer, texts, tokens.decoder_start))
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
