"""What a graph with fewer bits loses, in figures: cosines of its outputs, ranking agreement, words that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from vlm_export.bundle.loss import Accuracy, Loss, OutputLoss
from vlm_export.proof.metrics import Array, paired_blocks, rows_of
from vlm_export.quantizing.task_runs import Answers, Feeds
from vlm_export.runtime.inputs.images import FloatArray

_NEAREST = 10
Run = Callable[[Feeds], Mapping[str, Array]]


@dataclass(frozen=True)
class Agreement:
    """What tasks keep, as in `Loss`."""

    top10_texts: float | None = None
    top10_images: float | None = None
    exact_match: float | None = None
    zero_shot: Accuracy | None = None
    retrieval_texts: Accuracy | None = None
    retrieval_images: Accuracy | None = None


def agreement(before: Answers, after: Answers) -> Agreement:
    """Rankings and words of two runs on the same images and texts."""
    images, texts = (before.image_vectors, after.image_vectors), (before.text_vectors, after.text_vectors)
    count = min(len(before.words), len(after.words))
    same = sum(left == right for left, right in zip(before.words, after.words, strict=False))
    # A task that only one of them could be asked has given no word back.
    words = same / max(len(before.words), len(after.words)) if count else None
    accuracies = (
        None if left is None or right is None else Accuracy(left, right)
        for left, right in zip(before.accuracies, after.accuracies, strict=True)
    )
    if before.image_vectors is None or before.text_vectors is None:
        # Of one encoder alone, what is near is of its own kind.
        return Agreement(_own_overlap(texts), _own_overlap(images), words, *accuracies)
    return Agreement(_overlap(images, texts), _overlap(texts, images), words, *accuracies)


def _overlap(
    queries: tuple[FloatArray | None, FloatArray | None], items: tuple[FloatArray | None, FloatArray | None]
) -> float | None:
    """Mean share of the ten nearest items of a query that stay among its ten nearest."""
    (left, right), (left_items, right_items) = queries, items
    if left is None or right is None or left_items is None or right_items is None:
        return None
    if min(len(left_items), len(right_items)) <= _NEAREST or len(left) != len(right):
        return None
    before, after = _nearest(left, left_items), _nearest(right, right_items)
    shares = [len(set(a) & set(b)) / _NEAREST for a, b in zip(before.tolist(), after.tolist(), strict=True)]
    return float(np.mean(shares))


def _own_overlap(vectors: tuple[FloatArray | None, FloatArray | None]) -> float | None:
    """As `_overlap` among the vectors themselves, each without itself."""
    left, right = vectors
    if left is None or right is None or len(left) <= _NEAREST + 1 or len(left) != len(right):
        return None
    shares = [
        len(set(a) & set(b)) / _NEAREST for a, b in zip(*(_own_nearest(rows) for rows in (left, right)), strict=True)
    ]
    return float(np.mean(shares))


def _own_nearest(rows: FloatArray) -> list[list[int]]:
    scores = rows @ rows.T
    np.fill_diagonal(scores, -np.inf)
    found: list[list[int]] = np.argsort(-scores, axis=1, kind="stable")[:, :_NEAREST].tolist()
    return found


def _nearest(queries: FloatArray, items: FloatArray) -> Array:
    return np.argsort(-(queries @ items.T), axis=1, kind="stable")[:, :_NEAREST]


def output_losses(pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> dict[str, OutputLoss]:
    """Output → the least and the mean cosine of its rows; of outputs of numbers.

    Args:
        pairs: expected and got.
    """
    found: dict[str, list[Array]] = {}
    for expected, got in pairs:
        for name, array in expected.items():
            if array.size:
                cosines = row_cosines(array, got[name]) if got[name].shape == array.shape else np.array([-1.0])
                found.setdefault(name, []).append(cosines)
    return {name: _output_loss(np.concatenate(cosines)) for name, cosines in found.items()}


def _output_loss(cosines: Array) -> OutputLoss:
    # NaN is the worst that a row can be.
    known = np.nan_to_num(cosines, nan=-1.0)
    return OutputLoss(float(known.min()), float(known.mean()))


def row_cosines(left: Array, right: Array) -> Array:
    """float64 (rows,), a row as in `metrics.compare`: two rows of zeros have 1, a row of zeros and another one 0."""
    rows = rows_of(left), rows_of(right)
    sums = np.zeros((3, len(rows[0])))
    for some, a, b in paired_blocks(*rows):
        a, b = a.astype(np.float64), b.astype(np.float64)
        sums[:, some] += np.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)])
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = sums[0] / np.sqrt(sums[1] * sums[2])
    zeros = (sums[1:] == 0).sum(0)
    return np.clip(np.where(zeros == 2, 1.0, np.where(zeros == 1, 0.0, cosines)), -1.0, 1.0)


def loss_of(
    outputs: Mapping[str, OutputLoss], golden: Mapping[str, OutputLoss], tasks: Agreement, size_share: float
) -> Loss:
    """The figures together."""
    return Loss(outputs, golden, size_share=size_share, **vars(tasks))
