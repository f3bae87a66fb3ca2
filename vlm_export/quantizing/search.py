"""`--search`: the weights that must stay in float32 for the budget, the costliest first.

What a weight costs is what its part loses where it alone is quantised. How many of that order must stay is found by
halving, so that few variants are measured in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlm_export.bundle.loss import OutputLoss, Searched
from vlm_export.quantizing.task_runs import Feeds

REASON = "the budget, found by a search"
_MOST_FEEDS = 4


@dataclass(frozen=True)
class WeightCost:
    """A weight that a recipe changes.

    Attributes:
        nodes: that read it.
        cost: 1 less the mean cosine of its part's outputs where it alone is quantised.
    """

    part: str
    weight: str
    nodes: int
    cost: float


@dataclass
class PartSearch:
    """A part's weights, the costliest first, and how many of them stay in float32."""

    order: Sequence[WeightCost]
    count: int = 0

    @property
    def keep(self) -> dict[str, str]:
        """What stays, as `precision.quantised.quantise` takes it."""
        return {one.weight: REASON for one in self.order[: self.count]}

    @property
    def candidates(self) -> Sequence[WeightCost]:
        """What could stay besides: all but the cheapest, since a variant without any quantised weight is none."""
        return self.order[self.count : -1]

    def record(self) -> Searched | None:
        """What the manifest says; None where nothing had to stay."""
        if not self.count:
            return None
        stays = self.order[: self.count]
        costs = {one.weight: one.cost for one in stays}
        return Searched(costs, sum(one.nodes for one in stays), sum(one.nodes for one in self.order))


def cost_of(outputs: Mapping[str, OutputLoss]) -> float:
    """1 less the mean cosine of the output that loses most."""
    return max(0.0, 1 - min((output.mean_cosine for output in outputs.values()), default=1.0))


def few(feeds: Sequence[Feeds]) -> list[Feeds]:
    """An even choice of inputs to order weights by: each is run once for every weight."""
    return list(feeds[:: max(1, -(-len(feeds) // _MOST_FEEDS))])


def fewest(most: int, is_enough: Callable[[int], bool]) -> int:
    """The smallest number from 1 to `most` that is enough, where more is never worse; `most` where none is."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return high
