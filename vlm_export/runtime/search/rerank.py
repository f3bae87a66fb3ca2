"""Two-stage retrieval: the nearest by cosine, put in order by what looks at image and text together.

Source: `evaluation` of salesforce/BLIP (train_retrieval.py, 3a29b74). The best by cosine are the candidates; each gets
the logit of a match plus the cosine as its score, with [ENC] as the text's first token and texts cleaned as its
datasets do. It works in both directions: images for a text, and texts for an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm_export.errors import UsageError
from vlm_export.runtime.inputs.images import ImageSource
from vlm_export.runtime.inputs.text_cleaning import clean_caption
from vlm_export.runtime.model import Model
from vlm_export.runtime.search.filters import Condition
from vlm_export.runtime.search.index import SearchIndex
from vlm_export.runtime.tasks.match import ImageTextMatch

CANDIDATES = 16
"""How many the first stage hands over by default; the original's evaluation takes 128 or 256 of its test set."""


@dataclass(frozen=True)
class RerankedMatch:
    """One result of a search: the item, how it compares with the query, and what else is known of it."""

    item: str
    match: ImageTextMatch
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """What results are ordered by."""
        return self.match.retrieval_score


def search_reranked(
    model: Model,
    index: SearchIndex,
    query: str | ImageSource,
    k: int,
    *,
    is_image: bool,
    candidates: int = CANDIDATES,
    truncate: bool = False,
    where: Sequence[str | Condition] = (),
) -> list[RerankedMatch]:
    """The k best items for a query, in the order of the second stage.

    Args:
        index: of images (items are their paths) for a text, of texts for an image.
        query: a text, or an image when `is_image`.
        candidates: so many of the nearest are compared; at least k.
        truncate: cut texts that are too long for the model instead of raising.
        where: conditions on the items, as in `SearchIndex.search`.

    Raises:
        UsageError: query and items are both images or both texts, or there are fewer candidates than results.
        InputError: the bundle does not match, an item is no longer readable, or a text is too long.
    """
    if (index.meta.kind == "image") == is_image:
        raise UsageError(
            "a match is that of an image and a text",
            expected="embeddings of texts" if is_image else "embeddings of images",
            got=f"embeddings of {index.meta.kind}s",
            fix="search without reranking",
        )
    if candidates < k:
        raise UsageError("there are fewer candidates than results", expected=f"at least {k}", got=str(candidates))
    if is_image:
        vector = model.encode_image(_image(query))[0]
    else:
        vector = model.encode_text(clean_caption(str(query)), truncate=truncate)[0]
    nearest = index.search(vector, candidates, where=where)
    items = [found.item for found in nearest]
    if is_image:
        matches = model.match(_image(query), items, first_token="enc", truncate=truncate)
    else:
        matches = model.match([Path(item) for item in items], str(query), first_token="enc", truncate=truncate)
    found = [RerankedMatch(one.item, match, one.columns) for one, match in zip(nearest, matches, strict=True)]
    return sorted(found, key=lambda one: -one.score)[:k]


def _image(query: str | ImageSource) -> ImageSource:
    return Path(query) if isinstance(query, str) else query
