"""The text that stands for a sliced image in a prompt, as data: where a host puts which slice's features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from vlm_export.runtime.inputs.slice_plan import SlicePlan
from vlm_export.specs.slices import Pair, PlaceholderSpec

PlaceholderPart: TypeAlias = "str | int"
"""Text for the host's tokenizer, or the number of a slice: there its `queries` rows of `image_features` go."""


def placeholder_parts(plan: SlicePlan, spec: PlaceholderSpec, *, image_index: int = 0) -> tuple[PlaceholderPart, ...]:
    """Text and slice numbers in the prompt's order; neighbouring texts are joined.

    Args:
        image_index: the image's place among those of the prompt, for versions that number them.
    """
    parts: list[PlaceholderPart] = []
    for piece in _pieces(plan, spec, image_index):
        if isinstance(piece, str) and parts and isinstance(parts[-1], str):
            parts[-1] += piece
        elif piece != "":
            parts.append(piece)
    return tuple(parts)


def placeholder_text(parts: Sequence[PlaceholderPart], spec: PlaceholderSpec, *, queries: str | None = None) -> str:
    """The text for the tokenizer.

    Args:
        queries: what stands for one slice's features; by default `query_token`, `queries` times.
    """
    filling = spec.query_token * spec.queries if queries is None else queries
    return "".join(part if isinstance(part, str) else filling for part in parts)


def _pieces(plan: SlicePlan, spec: PlaceholderSpec, image_index: int) -> Iterator[PlaceholderPart]:
    if spec.image_id is not None:
        yield from (spec.image_id[0], str(image_index), spec.image_id[1])
    yield from _around(0, spec.source)
    if plan.grid is not None:
        yield spec.grid[0]
        for row in range(plan.grid.rows):
            yield spec.row_separator if row else ""
            first = 1 + row * plan.grid.columns
            for index in range(first, first + plan.grid.columns):
                yield from _around(index, spec.slice)
        yield spec.grid[1]
    yield spec.end


def _around(index: int, pair: Pair) -> Iterator[PlaceholderPart]:
    yield from (pair[0], index, pair[1])
