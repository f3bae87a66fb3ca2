"""Whether a text fits an image: the probability of a match, and the cosine of their embeddings.

Sources: salesforce/BLIP models/blip_itm.py and train_retrieval.py (3a29b74), which disagree on the first token of the
text that attends to the image: the demo leaves [CLS], training and evaluation write [ENC]. transformers takes token
ids as they come, which is [CLS].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engines.onnxruntime import Array, batches
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.inputs.sources import Images
from vlm_export.runtime.inputs.text_cleaning import clean_caption
from vlm_export.runtime.session import Session
from vlm_export.runtime.tasks.attending import HIDDEN, attended, image_rows, paired, token_rows
from vlm_export.runtime.tasks.embed import TEXT_BATCH_SIZE, EmbedTask, softmax_rows
from vlm_export.specs.tasks import FirstToken, MatchSpec


@dataclass(frozen=True)
class ImageTextMatch:
    """An image and a text.

    Attributes:
        text: as the tokenizer got it.
        first_token: the convention: "enc" or "cls".
        probability: of a match, from the image and the text together (ITM).
        match_logit: the logit of a match; the other one is that of none.
        cosine: of the two embeddings, each computed without the other (ITC); it has no scale and no convention.
    """

    text: str
    first_token: FirstToken
    probability: float
    match_logit: float
    cosine: float

    @property
    def retrieval_score(self) -> float:
        """What the original orders by in the second stage of retrieval: `evaluation` in train_retrieval.py."""
        return self.match_logit + self.cosine


class MatchTask:
    """Compares texts with images; one image serves many texts, one text many images.

    Args:
        embed: gives the embeddings of which the cosine is a part of the score.
    """

    def __init__(self, session: Session, spec: MatchSpec, embed: EmbedTask) -> None:
        self.session, self.spec, self._embed = session, spec, embed

    def match(
        self,
        images: Images,
        texts: str | Sequence[str],
        *,
        first_token: FirstToken | None = None,
        clean: bool | None = None,
        truncate: bool = False,
        batch_size: int = 8,
        progress: bool = False,
    ) -> list[ImageTextMatch]:
        """How well each text fits its image.

        Args:
            first_token: "enc" for the convention of the original's training and evaluation, "cls" for that of its
                demo and of transformers; None for the manifest's.
            clean: prepare texts as the original's datasets do; None with "enc" only, as its demo does not.
            truncate: cut texts that are too long instead of raising.

        Raises:
            InputError: an image is unreadable, or a text is too long.
            UsageError: an unknown convention, or the numbers do not pair up.
        """
        convention = _convention(self.spec, first_token)
        sources, sentences, count = paired(images, texts)
        if convention == "enc" if clean is None else clean:
            sentences = [clean_caption(text) for text in sentences]
        first = self.spec.tokens.first(convention)
        rows = token_rows(self.session, sentences, first, self.spec.max_text_tokens, truncate=truncate)
        embeds = self._text_embeds(rows, self.spec.tokens.cls)
        which = [0] * count if len(sentences) == 1 else range(count)
        matches: list[ImageTextMatch] = []
        vision = self.spec.vision
        for batch, seen in image_rows(self.session, vision, sources, count, batch_size, progress=progress):
            chosen = [which[i] for i in batch]
            ids, mask = self.session.tokenizer.pad_masked([rows[i] for i in chosen])
            logits = attended(self.session, self.spec.multimodal, ids, mask, seen[HIDDEN])["itm_logits"]
            cosines = (seen[self._image_output] * embeds[chosen]).sum(axis=1, dtype=np.float64)
            matches += self._matches([sentences[i] for i in chosen], convention, logits, cosines)
        return matches

    @property
    def _image_output(self) -> str:
        assert self._embed.spec.image is not None
        return self._embed.spec.image.output

    def _text_embeds(self, rows: Sequence[Sequence[int]], start: int) -> FloatArray:
        """float32 (N, D) of texts alone, which start with [CLS] under both conventions."""
        embeds = [np.zeros((0, self._embed.embed_dim), np.float32)]
        for batch in batches(range(len(rows)), TEXT_BATCH_SIZE):
            ids, mask = self.session.tokenizer.pad_masked([[start, *rows[i][1:]] for i in batch])
            embeds.append(self._embed.encode_ids(ids, mask))
        return np.concatenate(embeds)

    def _matches(
        self, texts: Sequence[str], convention: FirstToken, logits: Array, cosines: Array
    ) -> Iterator[ImageTextMatch]:
        if not (np.isfinite(logits).all() and np.isfinite(cosines).all()):
            raise InputError(
                "a graph returned values that are not finite",
                where=self.session.manifest.name,
                expected="finite scores of a match",
                fix="use the fp32 variant, or verify the bundle on this machine",
            )
        for text, pair, share, cosine in zip(texts, logits, softmax_rows(logits)[:, 1], cosines, strict=True):
            yield ImageTextMatch(text, convention, float(share), float(pair[1]), float(cosine))


def _convention(spec: MatchSpec, first_token: FirstToken | None) -> FirstToken:
    if first_token is None:
        return spec.first_token
    if first_token not in get_args(FirstToken):
        raise UsageError("unknown first token", expected=" or ".join(get_args(FirstToken)), got=repr(first_token))
    return first_token
