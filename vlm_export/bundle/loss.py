"""What a quantised variant loses, as its manifest records it: figures, what they were measured on, and the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias, get_args

from vlm_export.specs.codec import Spec, between

Cosine: TypeAlias = Annotated[float, between(-1, 1)]
Share: TypeAlias = Annotated[float, between(0, 1)]
Count: TypeAlias = Annotated[int, between(0)]
BudgetKey: TypeAlias = Literal["cosine", "mean-cosine", "top10", "exact-match", "zero-shot", "retrieval@1"]
_DIGITS = 9
BUDGET_KEYS: tuple[BudgetKey, ...] = get_args(BudgetKey)


@dataclass(frozen=True)
class OutputLoss(Spec):
    """Cosines of an output's rows with those that it is compared with: the least, and their mean."""

    cosine: Cosine
    mean_cosine: Cosine


@dataclass(frozen=True)
class Accuracy(Spec):
    """The share of labelled samples that are right: in float32, and with the graphs of another precision."""

    float32: Share
    here: Share

    @property
    def kept(self) -> float:
        """1 less what is lost: 0.99 where it falls from 0.95 to 0.94; 1 where nothing is lost."""
        # Shares that are subtracted are rounded: a loss of exactly what is allowed is within a budget.
        return round(min(1.0, 1 - (self.float32 - self.here)), _DIGITS)


@dataclass(frozen=True)
class Loss(Spec):
    """The figures of a graph.

    Attributes:
        outputs: output → against the float32 graph, on the samples.
        golden: output → against the original, on the golden records.
        top10_texts, top10_images: share of the ten nearest texts of an image, and images of a text, that stay among
            them; of a bundle that embeds texts alone, texts of a text, and of images alone, images of an image. None
            where it embeds neither, or samples are fewer than eleven (twelve of the same kind).
        exact_match: share of texts that are written letter for letter as in float32; None where none is written.
        size_share: bytes of the graph with its weights, of the float32 graph's.
        zero_shot: labelled images whose label is the nearest one; None without labels.
        retrieval_texts, retrieval_images: of images and texts that belong together: images whose nearest text, and
            texts whose nearest image is their own; None without such.
    """

    outputs: Mapping[str, OutputLoss]
    golden: Mapping[str, OutputLoss]
    top10_texts: Share | None
    top10_images: Share | None
    exact_match: Share | None
    size_share: Annotated[float, between(0)]
    zero_shot: Accuracy | None = None
    retrieval_texts: Accuracy | None = None
    retrieval_images: Accuracy | None = None

    def figure(self, key: BudgetKey) -> float | None:
        """The worst figure that a budget's key is about, None where nothing was measured.

        Of "zero-shot" and "retrieval@1" it is 1 less what is lost.
        """
        outputs = [*self.outputs.values(), *self.golden.values()]
        if key == "cosine":
            return min((output.cosine for output in outputs), default=None)
        if key == "mean-cosine":
            return min((output.mean_cosine for output in outputs), default=None)
        if key == "exact-match":
            return self.exact_match
        if key == "zero-shot":
            return None if self.zero_shot is None else self.zero_shot.kept
        if key == "retrieval@1":
            both = (self.retrieval_texts, self.retrieval_images)
            return min((found.kept for found in both if found is not None), default=None)
        return min((top for top in (self.top10_texts, self.top10_images) if top is not None), default=None)


@dataclass(frozen=True)
class Samples(Spec):
    """How much the figures stand on.

    Attributes:
        images, texts: that the loss was measured on, in float32 and quantised alike.
        rows: of the part's inputs that they lead to.
        golden: records of the original's outputs.
        own_images, own_texts: of these, those that the user named.
        calibration_images, calibration_texts: that ranges were calibrated on; none of them is among the former.
        labelled, labels: images with a label, and how many labels there are.
        pairs: of an image and a text that belong together.
    """

    images: Count
    texts: Count
    rows: Count
    golden: Count
    own_images: Count = 0
    own_texts: Count = 0
    calibration_images: Count = 0
    calibration_texts: Count = 0
    labelled: Count = 0
    labels: Count = 0
    pairs: Count = 0


@dataclass(frozen=True)
class Searched(Spec):
    """Weights that the recipe would change, and that stay in float32 for the budget.

    Attributes:
        costs: weight → 1 less the mean cosine of the part's outputs where it alone is quantised; the costliest first.
        nodes, of_nodes: nodes that read them, of all nodes that the recipe would change.
    """

    costs: Mapping[str, Annotated[float, between(0, 2)]]
    nodes: Count
    of_nodes: Count


@dataclass(frozen=True)
class LossRecord(Spec):
    """What a quantised variant loses.

    Attributes:
        recipe: a sentence about what was done.
        reduce_range: whether weights of 8 bits use 7, for CPUs without VNNI.
        measured: the variant's figures; those of tasks are of all parts of this precision together.
        naive: the figures of onnxruntime.quantization.quantize_dynamic with its defaults; None where it has none.
        naive_failed: why it has none.
        budget: the least that each figure had to be.
        samples: what was measured.
        kept: weights that stay in float32 → why.
        notes: what was not measured, or on too little; sentences.
        searched: what a search left in float32, so that the rest is within the budget; None where it left nothing.
    """

    recipe: str
    reduce_range: bool
    measured: Loss
    naive: Loss | None
    naive_failed: str
    budget: Mapping[str, Cosine]
    samples: Samples
    kept: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    searched: Searched | None = None

    @property
    def is_within_budget(self) -> bool:
        """Whether every figure that the budget states and something measured is as good as it demands."""
        return not over_budget(self.measured, self.budget)


def over_budget(loss: Loss, budget: Mapping[str, float] | Mapping[BudgetKey, float]) -> list[tuple[str, float, float]]:
    """Key, least and figure of what is over budget; what was not measured is over none."""
    found = [(key, budget[key], loss.figure(key)) for key in BUDGET_KEYS if key in budget]
    # Written so that NaN is over budget.
    return [(key, least, figure) for key, least, figure in found if figure is not None and not figure >= least]
