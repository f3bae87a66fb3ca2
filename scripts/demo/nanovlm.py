"""The nanoVLM demo, trained on the CPU: every image with its caption and a few questions, loss on the answers.

Its vision encoder starts from the CLIP demo's, so `scripts/train_demo.py` comes first.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from demo.accuracy import BATCH, Measured, answer_exactness, exactness_figures, exactness_lines, held_out_chat
from demo.blip import REQUIRED_EXACT, clip_vision, entry_without_norm, first_images
from demo.files import CHAT, CLIP, DemoFiles, published
from demo.questions import CAPTION, Question, ask_unambiguously, caption_question
from demo.tokens import IMAGE_PLACEHOLDER, chat_tokenizer_config_json, chat_tokenizer_json
from demo.torch_model import load_model, pixel_values, torch_model
from demo.training import Recipe, Schedule, cosine_moves, draw_kinds, draw_trained, fan_in, fit, initialise
from demo.world import HELD_OUT, IMAGE_PIXELS, Drawing
from vlm_export.models.layers.rotary_decoder import CachedDecoder, RotaryDecoderSizes
from vlm_export.models.layers.vit import VisionTransformer, VitForm
from vlm_export.models.nanovlm.architecture import (
    IMAGE_TOKEN,
    ChatForm,
    NanoVlmArchitecture,
    config_from_architecture,
)
from vlm_export.models.nanovlm.parts import NanoVlmModules, VisionEncoder
from vlm_export.models.nanovlm.weights import EMBEDDING_KEY, HEAD_KEY, weight_table
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD
from vlm_export.runtime.tasks.chat import ChatTask
from vlm_export.specs import ImageSpec

PIXEL_SHUFFLE = 2
# <|im_end|>, as in every published checkpoint of the second generation.
_END_ID = 2
_IGNORED = -100
_ALL_LOGITS = torch.tensor(0)


@dataclass(frozen=True)
class NanoVlmSchedule(Schedule):
    """Rates rise linearly over a tenth of the steps, then fall along a cosine to zero.

    Attributes:
        questions_each: about every image, besides the caption's.
        matrix_rate: of Muon, which moves the decoder's matrices. rate: of AdamW, which moves its other weights.
        vision_rate: of AdamW for the vision encoder, which has been trained before.
    """

    questions_each: int = 4
    matrix_rate: float = 0.02
    rate: float = 2e-3
    vision_rate: float = 3e-4
    weight_decay: float = 0.01


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


def train_checkpoint(files: Sequence[DemoFiles], schedule: NanoVlmSchedule) -> None:
    """Writes the checkpoint when all is trained."""
    (own,) = files
    architecture = demo_architecture(Tokenizer.from_str(chat_tokenizer_json()).get_vocab_size())
    modules = build_modules(architecture, schedule.seed)
    warm_start(modules.vision, DemoFiles(CLIP).checkpoint, first_images(schedule))
    with tempfile.TemporaryDirectory() as folder:
        # Prompts and preprocessing are what the project derives from the files, so files come first.
        untrained = Path(folder)
        write_checkpoint(untrained, modules, architecture)
        chat = torch_model(load_model(untrained), untrained / "tokenizer.json").chatting
        train(modules, chat, schedule)
    write_checkpoint(own.checkpoint, modules, architecture)


def measure_checkpoint(files: DemoFiles, drawings: Sequence[Drawing]) -> Measured:
    """The exactness of captions and answers of the checkpoint in PyTorch."""
    model = torch_model(files.model(), files.tokenizer)
    exactness = answer_exactness(partial(model.answer, batch_size=BATCH), held_out_chat(drawings))
    found = {"greedy": exactness}
    figures = {"vocab_size": model.session.text_spec.vocab_size} | exactness_figures(found)
    passed = min(exactness.by_kind[CAPTION], exactness.exact) >= REQUIRED_EXACT
    return Measured(exactness_lines(found), figures, passed)


RECIPE = Recipe(
    (CHAT,), NanoVlmSchedule(1100, 64), 1, 2 * len(HELD_OUT), 5_000_000, train_checkpoint, measure_checkpoint
)


def write_checkpoint(folder: Path, modules: NanoVlmModules, architecture: NanoVlmArchitecture) -> None:
    """Weights, sizes and tokenizer as nanoVLM publishes them, with float16 matrices where it has float32."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "config.json": json.dumps(config_from_architecture(architecture), indent=2) + "\n",
        "tokenizer.json": chat_tokenizer_json(),
        "tokenizer_config.json": chat_tokenizer_config_json(architecture.decoder.positions),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    tensors = published(weight_table(architecture.vision.layers, architecture.decoder), modules.state_dict())
    # A tied head is stored once, and the metadata says what else it is, as `safetensors.torch.save_model` writes it.
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={EMBEDDING_KEY: HEAD_KEY}))


def demo_architecture(vocab_size: int) -> NanoVlmArchitecture:
    """The second generation's layout: placeholders before the question, no template."""
    vision = VitForm(
        width=192,
        layers=3,
        heads=3,
        hidden=768,
        patch_size=16,
        grid=IMAGE_PIXELS // 16,
        activation="gelu_tanh",
        has_class_token=False,
    )
    decoder = RotaryDecoderSizes(
        width=128, layers=4, heads=4, kv_heads=2, hidden=256, vocab_size=vocab_size, positions=128
    )
    chat = ChatForm("placeholders", _END_ID, {IMAGE_TOKEN: IMAGE_PLACEHOLDER}, decoder.positions)
    return NanoVlmArchitecture(vision, decoder, PIXEL_SHUFFLE, chat)


def build_modules(architecture: NanoVlmArchitecture, seed: int) -> NanoVlmModules:
    """The model with its first weights."""
    modules = NanoVlmModules(architecture)
    sizes = modules.decoder.sizes
    exponents = torch.arange(0, sizes.head_width, 2, dtype=torch.float32) / sizes.head_width
    modules.decoder.rotary.inv_freq.copy_(sizes.rope_base**-exponents)
    initialise(modules.named_parameters(), seed, _deviation)
    return modules


def _deviation(name: str, parameter: Tensor) -> float:
    if "embedding" in name:
        # The head is the same matrix: logits of larger rows would be far from even.
        return 0.05
    residual = name.endswith(("attn.out.weight", "mlp.fc2.weight", "mlp.down.weight"))
    return fan_in(parameter) * (0.35 if residual else 1.0)


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


def train(modules: NanoVlmModules, chat: ChatTask, schedule: NanoVlmSchedule) -> None:
    """Trains in place; `chat` writes the prompts."""
    rng = np.random.default_rng([schedule.seed, 5])
    encoder = list(modules.vision.parameters())
    matrices = [parameter for parameter in modules.decoder.blocks.parameters() if parameter.ndim == 2]
    taken = set(map(id, [*encoder, *matrices]))
    others = [parameter for parameter in modules.parameters() if id(parameter) not in taken]
    groups = [{"params": encoder, "lr": schedule.vision_rate}, {"params": others, "lr": schedule.rate}]
    optimizers = (
        torch.optim.Muon(matrices, lr=schedule.matrix_rate, weight_decay=schedule.weight_decay),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=schedule.weight_decay),
    )
    fit(
        modules.parameters(),
        schedule.steps,
        lambda: batch_losses(modules, draw_batch(chat, schedule, rng), chat.spec.image_token_id)._asdict(),
        cosine_moves(optimizers, schedule.steps, max(1, schedule.steps // 10)),
    )


def draw_batch(chat: ChatTask, schedule: NanoVlmSchedule, rng: np.random.Generator) -> Batch:
    """Images of trained compositions, each with its caption's question and others."""
    drawings, questions = draw_trained(schedule.batch, rng), list[Question]()
    for composition in (drawing.composition for drawing in drawings):
        kinds = draw_kinds(schedule.questions_each, rng)
        questions += [caption_question(composition), *(ask_unambiguously(composition, kind, rng) for kind in kinds)]
    spec = chat.session.image_spec
    assert isinstance(spec, ImageSpec)
    return Batch(pixel_values([drawing.image for drawing in drawings], spec), *token_rows(chat, questions))


def prompt_ids(chat: ChatTask, question: str) -> list[int]:
    """Ids of a prompt about one image, placeholders included."""
    return chat.rows.writer.ids(question, [(1, 1)])


def token_rows(chat: ChatTask, questions: Sequence[Question]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and targets, as `Batch` has them; what follows a prompt ends with the end token."""
    pairs = [
        (prompt_ids(chat, q.text), [*chat.session.tokenizer.prompt_ids(f" {q.answer}"), chat.spec.eos_token_ids[0]])
        for q in questions
    ]
    shape = len(pairs), max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = np.full(shape, chat.spec.pad_token_id, dtype=np.int64)
    mask, targets = np.zeros_like(ids), np.full_like(ids, _IGNORED)
    for i, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[i, :end], mask[i, :end] = [*prompt, *answer], 1
        targets[i, len(prompt) - 1 : end - 1] = answer
    # The last token of a row is never fed: nothing follows it.
    return torch.from_numpy(ids[:, :-1]), torch.from_numpy(mask[:, :-1]), torch.from_numpy(targets[:, :-1])


def batch_losses(modules: NanoVlmModules, batch: Batch, image_token_id: int | None) -> Losses:
    """One forward pass without a cache, as the runtime's first step."""
    features = VisionEncoder(modules, PIXEL_SHUFFLE)(batch.pixels)
    each, sizes = len(batch.ids) // len(features), modules.decoder.sizes
    words = modules.decoder.embedding(batch.ids)
    # Placeholders stand first and are as many in every row, so the features' order is that of their places.
    places = torch.eq(batch.ids, -1 if image_token_id is None else image_token_id)[:, :, None]
    embeds = words.masked_scatter(places, features.repeat_interleave(each, dim=0))
    positions = torch.arange(batch.ids.shape[1]).expand(batch.ids.shape)
    empty = words.new_zeros(len(words), sizes.kv_heads, 0, sizes.head_width)
    decoder = CachedDecoder(modules.decoder)
    logits = decoder(embeds, batch.mask, positions, _ALL_LOGITS, *[empty] * (2 * sizes.layers))[0]
    losses = F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=_IGNORED, reduction="none")
    counted = batch.targets != _IGNORED
    is_caption = torch.arange(len(losses)) % each == 0
    return Losses(*(losses[rows].sum() / counted[rows].sum() for rows in (is_caption, ~is_caption)))
