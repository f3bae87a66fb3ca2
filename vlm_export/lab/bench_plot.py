"""The plots of a bench: loss against time, and throughput against threads."""

from __future__ import annotations

from vlm_export.lab.bench_result import BenchResult, Measured
from vlm_export.lab.plots import Mark, mark_plot, stacked

# What is less differs by the order of sums in float32 alone, and would only make the scale long.
_LEAST_LOSS = 1e-9


def bench_plot(found: BenchResult) -> str:
    """One SVG document: for each load the loss of each side against its time, where it is known, and where several
    numbers of threads were measured, its throughput against them."""
    drawn = []
    for load in found.loads:
        runs = found.on(load)
        several = len({one.side.threads for one in runs}) > 1
        lost = [mark for one in runs if (mark := _lost(found, one, several)) is not None]
        if lost:
            drawn.append(mark_plot(f"{load.label}: 1 - cosine against ms of a run", lost))
        if several:
            marks = [Mark(one.side.name, one.side.threads, one.rows_per_second) for one in runs]
            drawn.append(mark_plot(f"{load.label}: {load.unit} per second against threads", marks, joined=True))
    return stacked(drawn)


def _lost(found: BenchResult, one: Measured, several: bool) -> Mark | None:
    """None where nothing tells what the side loses. several: whether a name needs its number of threads."""
    (cosine,) = (cost.cosine for cost in found.costs if (cost.side, cost.part) == (one.side, one.load.part))
    name = one.side.label if several else one.side.name
    return None if cosine is None else Mark(name, 1000 * one.spread.median, max(_LEAST_LOSS, 1 - cosine))
