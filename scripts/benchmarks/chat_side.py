"""One side of the benchmarks `chat` and `decoding`, in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vlm_export.bundle.memory import anonymous_bytes, peak_bytes

if TYPE_CHECKING:
    from vlm_export.runtime.model import Model

Form = tuple[int, int]
"""Pixels of an image's side, and the size of the vocabulary."""

Generate = Callable[[npt.NDArray[np.float32], list[int]], Iterator[int]]


def serve(side: str, name: str, bundle: str, weights: str, threads: str, prompt_tokens: str) -> None:
    """Answers each number of tokens on the input with a generation's ids, times and the process's memory.

    Args:
        side: of `_SIDES`, or the name of one of the bundle's precisions.
    """
    if side in _SIDES:
        generate, form = _SIDES[side](name, Path(weights), int(threads))
    else:
        generate, form = _bundle(Path(bundle), int(threads), side)
    pixels, text = inputs(*form, int(prompt_tokens))
    for line in sys.stdin:
        start = time.perf_counter()
        tokens = generate(pixels, text)
        ids = [next(tokens)]
        first = time.perf_counter()
        ids += islice(tokens, int(line) - 1)
        end = time.perf_counter()
        result = {
            "ids": ids,
            "first_seconds": first - start,
            "token_seconds": (end - first) / max(len(ids) - 1, 1),
            "peak_bytes": peak_bytes(),
            "anonymous_bytes": anonymous_bytes(),
        }
        print(json.dumps(result), flush=True)


def inputs(size: int, vocab_size: int, tokens: int) -> tuple[npt.NDArray[np.float32], list[int]]:
    """Random pixels (1, 3, S, S), and that many ids of a text."""
    rng = np.random.default_rng(0)
    pixels = rng.random((1, 3, size, size), dtype=np.float32)
    return pixels, rng.integers(3, vocab_size - 100, tokens).tolist()


def _bundle(bundle: Path, threads: int, precision: str) -> tuple[Generate, Form]:
    from vlm_export.runtime.load import load

    return generation(load(bundle, threads=threads, precision=precision))


def generation(model: Model) -> tuple[Generate, Form]:
    """A bundle that chats, or that writes captions; tokens come on whether or not the model would end."""
    from vlm_export.specs import ImageSpec

    session = model.session
    assert isinstance(session.image_spec, ImageSpec)
    form = (session.image_spec.size_pixels, session.text_spec.vocab_size)
    return (_chat(model) if "chat" in model.tasks else _caption(model)), form


def _chat(model: Model) -> Generate:
    from vlm_export.lab.bench_runs import chat_tokens
    from vlm_export.runtime.tasks.chat_rows import ChatRow

    chat, session = model.chatting, model.session

    def generate(pixels: npt.NDArray[np.float32], text: list[int]) -> Iterator[int]:
        features = session.engine(chat.spec.vision).run({"pixel_values": pixels})["image_features"]
        places = chat.spec.image_token_id
        given = [] if places is None else [places] * features.shape[1]
        row = ChatRow([*given, *text], (features,), 0 if given else features.shape[1])
        return (token.token_id for token in chat_tokens(chat, [row], chat.spec.context_length - row.length + 1))

    return generate


def _caption(model: Model) -> Generate:
    from vlm_export.runtime.generation.loop import stream
    from vlm_export.runtime.generation.options import GenerationOptions
    from vlm_export.runtime.tasks.attending import HIDDEN, decoder_state
    from vlm_export.specs.tasks import CaptionSpec

    session, spec = model.session, model.manifest.task(CaptionSpec)
    assert spec is not None
    most = model.manifest.part(spec.decoder).signature.axis("total_sequence").maximum
    options = GenerationOptions(eos_token_ids=(), max_length=most)

    def generate(pixels: npt.NDArray[np.float32], text: list[int]) -> Iterator[int]:
        hidden = session.run(spec.vision, {"pixel_values": pixels})[HIDDEN]
        state = decoder_state(session, spec, hidden, np.ones(hidden.shape[:2], np.int64))
        return (token.token_id for token in stream(state, np.array([text], np.int64), options))

    return generate


def _original(name: str, weights: Path, threads: int, *, cached: bool) -> tuple[Generate, Form]:
    import torch

    from benchmarks.chat_original import OriginalNanoVlm
    from benchmarks.measuring import random_original

    torch.set_num_threads(threads)
    checkpoint = random_original(name, weights)
    model, config = OriginalNanoVlm(checkpoint, cached=cached), checkpoint.config
    assert config is not None
    form = (config["vit_img_size"], config["lm_vocab_size"])

    @torch.inference_mode()
    def step(function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs)

    def generate(pixels: npt.NDArray[np.float32], text: list[int]) -> Iterator[int]:
        logits, cache, fed = step(model.first_logits, torch.from_numpy(pixels), torch.tensor([text]))
        while True:
            token = logits.argmax(-1, keepdim=True)
            yield int(token)
            logits, cache, fed = step(model.next_logits, token, cache, fed)

    return generate, form


_SIDES: dict[str, Callable[[str, Path, int], tuple[Generate, Form]]] = {
    "original": lambda name, weights, threads: _original(name, weights, threads, cached=True),
    "original-uncached": lambda name, weights, threads: _original(name, weights, threads, cached=False),
}
