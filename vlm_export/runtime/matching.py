"""Whether a text fits a picture: the probability of a match, and the cosine of their embeddings.

Sources: salesforce/BLIP models/blip_itm.py and train_retrieval.py (3a29b74), which disagree on the first token of the
text that attends to the picture: the demo leaves [CLS], training and evaluation write [ENC]. transformers takes token
ids as they come, which is [CLS].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.engine import Array
from vlm_export.runtime.given import Pictures
from vlm_export.runtime.image import FloatArray
from vlm_export.runtime.multimodal import HIDDEN, IMAGE_EMBEDS, TEXT_EMBEDS, Multimodal, paired
from vlm_export.runtime.pair import TEXT_BATCH_SIZE
from vlm_export.runtime.text_cleaning import clean_caption
from vlm_export.runtime.vectors import batches, softmax_rows
from vlm_export.specs.tasks import FirstToken, MatchSpec

MULTIMODAL = "multimodal_text"
_CHECKPOINT = "a checkpoint for retrieval, such as Salesforce's model_base_retrieval_coco.pth"


@dataclass(frozen=True)
class PairMatch:
    """A picture and a text.

    Attributes:
        text: as the tokenizer got it.
        first_token: the convention: "enc" or "cls".
        probability: of a match, from the picture and the text together (ITM).
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


class Matching(Multimodal):
    """Compares texts with pictures; one picture serves many texts, one text many pictures."""

    def match(
        self,
        images: Pictures,
        texts: str | Sequence[str],
        *,
        first_token: FirstToken | None = None,
        clean: bool | None = None,
        truncate: bool = False,
        batch_size: int = 8,
        progress: bool = False,
    ) -> list[PairMatch]:
        """How well each text fits its picture.

        Args:
            first_token: "enc" for the convention of the original's training and evaluation, "cls" for that of its
                demo and of transformers; None for the manifest's.
            clean: prepare texts as the original's datasets do; None with "enc" only, as its demo does not.
            truncate: cut texts that are too long instead of raising.

        Raises:
            InputError: the bundle does not match, a picture is unreadable, or a text is too long.
            UsageError: an unknown convention, or the numbers do not pair up.
        """
        asked = self._asked(MatchSpec, "match texts with pictures", _CHECKPOINT)
        self._require_output("text", TEXT_EMBEDS)
        convention = _convention(asked, first_token)
        sources, sentences, count = paired(images, texts)
        if convention == "enc" if clean is None else clean:
            sentences = [clean_caption(text) for text in sentences]
        rows = self._rows(sentences, asked.tokens.first(convention), asked.max_text_tokens, truncate=truncate)
        embeds = self._text_embeds(rows, asked.tokens.cls)
        which = [0] * count if len(sentences) == 1 else range(count)
        matches: list[PairMatch] = []
        for batch, seen in self._picture_rows(sources, count, batch_size, progress=progress):
            chosen = [which[i] for i in batch]
            ids, mask = self.tokenizer.pad_masked([rows[i] for i in chosen])
            feeds = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": seen[HIDDEN]}
            logits = self._run(MULTIMODAL, feeds)["itm_logits"]
            cosines = (seen[IMAGE_EMBEDS] * embeds[chosen]).sum(axis=1, dtype=np.float64)
            matches += self._matches([sentences[i] for i in chosen], convention, logits, cosines)
        return matches

    def _text_embeds(self, rows: Sequence[Sequence[int]], start: int) -> FloatArray:
        """float32 (N, D) of texts alone, which start with [CLS] under both conventions."""
        embeds = [self._no_rows()]
        for batch in batches(range(len(rows)), TEXT_BATCH_SIZE):
            ids, mask = self.tokenizer.pad_masked([[start, *rows[i][1:]] for i in batch])
            embeds.append(self.encode_ids(ids, mask))
        return np.concatenate(embeds)

    def _matches(
        self, texts: Sequence[str], convention: FirstToken, logits: Array, cosines: Array
    ) -> Iterator[PairMatch]:
        if not (np.isfinite(logits).all() and np.isfinite(cosines).all()):
            raise InputError(
                "a graph returned values that are not finite",
                where=self.manifest.name,
                expected="finite scores of a match",
                fix="use the fp32 variant, or verify the bundle on this machine",
            )
        for text, pair, share, cosine in zip(texts, logits, softmax_rows(logits)[:, 1], cosines, strict=True):
            yield PairMatch(text, convention, float(share), float(pair[1]), float(cosine))


def _convention(asked: MatchSpec, first_token: FirstToken | None) -> FirstToken:
    if first_token is None:
        return asked.first_token
    if first_token not in get_args(FirstToken):
        raise UsageError("unknown first token", expected=" or ".join(get_args(FirstToken)), got=repr(first_token))
    return first_token
