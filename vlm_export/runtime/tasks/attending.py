"""What tasks share whose texts attend to images: image states in batches, rows of tokens, and decoder states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vlm_export.errors import UsageError
from vlm_export.runtime.engines.onnxruntime import Array, batches
from vlm_export.runtime.generation.cross_attention_decoder import CrossAttentionState
from vlm_export.runtime.generation.options import GenerationOptions, IdArray
from vlm_export.runtime.inputs.images import ImageSource
from vlm_export.runtime.inputs.progress import progress_bar
from vlm_export.runtime.inputs.sources import Images, decoder_threads, image_list, text_list
from vlm_export.runtime.session import Session
from vlm_export.runtime.tasks.prepared_images import PIXELS, prepare_images
from vlm_export.specs.tasks import AnswerSpec, CaptionSpec

HIDDEN = "last_hidden_state"
_STATES = "encoder_hidden_states"


def paired(images: Images, texts: str | Sequence[str]) -> tuple[list[ImageSource], list[str], int]:
    """Images, texts and the number of pairs: item by item, where one of either may stand for all of the other's.

    Raises:
        UsageError: two different numbers above one.
    """
    sources, sentences = image_list(images), text_list(texts)
    sizes = {len(sources), len(sentences)}
    if len(sizes - {1}) > 1:
        raise UsageError(
            "images and texts do not pair up",
            expected="as many texts as images, or one of either",
            got=f"{len(sources)} images and {len(sentences)} texts",
        )
    count = min(sizes) if 0 in sizes else max(sizes)
    return sources, sentences, count


def image_rows(
    session: Session,
    part: str,
    sources: Sequence[ImageSource],
    count: int,
    batch_size: int,
    *,
    progress: bool = False,
) -> Iterator[tuple[list[int], dict[str, Array]]]:
    """Row numbers below `count`, and what the vision part returns for the images of those rows.

    A single image serves all rows and is encoded once.
    """
    with (
        decoder_threads(session.threads) as decoders,
        progress_bar(count, "image", shown=progress) as bar,
    ):
        shared: dict[str, Array] | None = None
        for batch in batches(range(count), batch_size):
            if len(sources) == 1 and count > 1:
                shared = shared or _seen(session, part, decoders, sources, 0)
                seen = {name: np.repeat(array, len(batch), axis=0) for name, array in shared.items()}
            else:
                seen = _seen(session, part, decoders, [sources[i] for i in batch], batch[0])
            yield list(batch), seen
            bar.update(len(batch))


def _seen(
    session: Session, part: str, decoders: ThreadPoolExecutor, sources: Sequence[ImageSource], first: int
) -> dict[str, Array]:
    prepared = prepare_images(session, part, sources, decoders, first=first)
    return session.run(part, {PIXELS: np.concatenate([image.tiles for image in prepared])})


def token_rows(
    session: Session, texts: Sequence[str], first: int, max_tokens: int, *, truncate: bool = False
) -> list[list[int]]:
    """Token ids of texts, each with that first token; errors as in `Tokenizer.encode_rows`."""
    rows = session.tokenizer_up_to(max_tokens).encode_rows(texts, truncate=truncate)
    return [[first, *row[1:]] for row in rows]


def attended(session: Session, part: str, ids: IdArray, mask: IdArray, states: Array) -> dict[str, Array]:
    """What a text part returns for token ids (B, T) that attend to states (B, S, width)."""
    return session.run(part, {"input_ids": ids, "attention_mask": mask, _STATES: states})


def decoder_state(
    session: Session, spec: CaptionSpec | AnswerSpec, states: Array, mask: IdArray
) -> CrossAttentionState:
    """A fresh decoder of B rows that attend to states (B, S, width) where mask (B, S) is 1."""
    keys_values = session.run(spec.cross_key_values, {_STATES: states})
    return CrossAttentionState(session.engine(spec.decoder), keys_values, mask)


def beam_options(
    session: Session,
    spec: CaptionSpec | AnswerSpec,
    *,
    beams: int | None,
    max_length: int | None,
    min_length: int | None,
    sample: bool = False,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> GenerationOptions:
    """Options of a generation; what is None comes from the spec, whose shortest length yields to a smaller maximum.

    Raises:
        UsageError: an option is out of its range, or the decoder has no position for every token.
    """
    longest = spec.max_length if max_length is None else max_length
    options = GenerationOptions(
        eos_token_ids=(spec.tokens.sep,),
        pad_token_id=spec.tokens.pad,
        beams=(1 if sample else spec.beams) if beams is None else beams,
        max_length=longest,
        min_length=min(spec.min_length, longest) if min_length is None else min_length,
        sample=sample,
        top_k=top_k if sample else None,
        top_p=top_p if sample else None,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    positions = session.manifest.part(spec.decoder).signature.axis("total_sequence").maximum
    if positions is not None and longest > positions:
        raise UsageError(
            "max_length is above what the decoder has positions for",
            where=session.manifest.name,
            expected=f"at most {positions}",
            got=str(longest),
        )
    return options
