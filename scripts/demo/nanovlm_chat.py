"""A checkpoint's directory in PyTorch, read back as every other one, with prompts as the runtime writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from demo.checkpoint import load_model, pixel_values
from vlm_export.family import Model, Part
from vlm_export.runtime.engines.onnxruntime import Array, TensorInfo
from vlm_export.runtime.generation.embedding_decoder import EMBEDS, IDS, EmbeddedDecoderState, left_padded
from vlm_export.runtime.generation.loop import generate
from vlm_export.runtime.generation.options import GenerationOptions
from vlm_export.runtime.inputs.chat_prompt import PromptWriter
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.specs import ImageSpec
from vlm_export.specs.tasks import ChatSpec

_BATCH = 64


@dataclass(frozen=True)
class ChatTexts:
    """What texts become before the decoder, and ids after it."""

    writer: PromptWriter
    tokenizer: Tokenizer
    settings: ChatSpec
    image: ImageSpec

    def prompt(self, question: str) -> list[int]:
        """Ids of a prompt about one image, placeholders included."""
        return self.writer.ids(question, [(1, 1)])

    def answer(self, text: str) -> list[int]:
        """Ids of what should follow a prompt, the end token included."""
        return [*self.tokenizer.prompt_ids(f" {text}"), self.settings.eos_token_ids[0]]


def chat_texts(model: Model, folder: Path) -> ChatTexts:
    """Of the model that `folder` holds."""
    assert isinstance(model.image, ImageSpec)
    assert model.text is not None
    tokenizer = Tokenizer(folder / "tokenizer.json", model.text)
    settings = next(task for task in model.tasks if isinstance(task, ChatSpec))
    return ChatTexts(PromptWriter(tokenizer, settings, str(folder)), tokenizer, settings, model.image)


class TorchEngine:
    """A Part as the runtime's `Engine`: the same loop that runs graphs runs the modules they came from."""

    def __init__(self, part: Part) -> None:
        self._part = part
        specs = part.signature
        self.inputs = tuple(TensorInfo(spec.name, spec.dtype, spec.shape) for spec in specs.inputs)
        self.outputs = tuple(TensorInfo(spec.name, spec.dtype, spec.shape) for spec in specs.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.inference_mode():
            outputs = self._part.module(*(torch.from_numpy(np.asarray(feeds[port.name])) for port in self.inputs))
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        return {port.name: tensor.numpy() for port, tensor in zip(self.outputs, tensors, strict=True)}


class TorchChat:
    """Answers as the runtime's `ChatTask` does, greedily."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder)
        self.texts = chat_texts(self.model, folder)
        self._vision, self._embed, self._decoder = (TorchEngine(part) for part in self.model.parts)

    def module(self, name: str) -> nn.Module:
        """The part of that name, which answers run."""
        return next(part.module for part in self.model.parts if part.name == name)

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        """One answer for each question."""
        said: list[str] = []
        for first in range(0, len(questions), _BATCH):
            rows = slice(first, first + _BATCH)
            said += self._answers(images[rows], [self.texts.prompt(question) for question in questions[rows]])
        return said

    def _answers(self, images: Sequence[Image.Image], prompts: Sequence[list[int]]) -> list[str]:
        settings = self.texts.settings
        pixels = pixel_values(images, self.texts.image).numpy()
        (features,) = self._vision.run({self._vision.inputs[0].name: pixels}).values()
        prepared = left_padded([self._embedded(ids, own) for ids, own in zip(prompts, features, strict=True)])
        length = prepared.attention_mask.shape[1]
        options = GenerationOptions(eos_token_ids=settings.eos_token_ids, max_new_tokens=settings.max_new_tokens)
        state = EmbeddedDecoderState(self._decoder, self._embed, prepared)
        rows = generate(state, np.zeros((len(prompts), length), np.int64), options)
        return [self.texts.tokenizer.decode(row[length:]).strip() for row in rows]

    def _embedded(self, ids: Sequence[int], features: FloatArray) -> FloatArray:
        """float32 (T, D) of one prompt."""
        words: FloatArray = self._embed.run({IDS: np.array([ids])})[EMBEDS][0].copy()
        words[np.array(ids) == self.texts.settings.image_token_id] = features
        return words
