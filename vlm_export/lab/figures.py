"""The figures of a verification, and each of them then and now."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from vlm_export.bundle.manifest import Manifest
from vlm_export.errors import InputError
from vlm_export.proof.floor import RULES

STRICT_RATIO = 10.0
"""With `--strict`, an error may be this many times the recorded one, or up to its floor."""
# Error → the noise of the original itself, in the same measure.
_FLOORS = {"max_abs": "max_abs_floor", "seen": "floor"}
_DIGITS = 3


@dataclass(frozen=True)
class Figure:
    """One number, as it was recorded and as it is.

    Attributes:
        name: part, variant, output and measure: `vision.fp32.image_embeds.max_abs`.
        then, now: None where that side has none.
        failure: why it does not pass, "" where it does.
    """

    name: str
    then: float | None
    now: float | None
    failure: str = ""

    @property
    def ratio(self) -> float | None:
        """Now over then: infinite where nothing became something, None where one is not known."""
        if self.then is None or self.now is None:
            return None
        return self.now / self.then if self.then else (math.inf if self.now else 1.0)

    @property
    def sides(self) -> str:
        """`1e-06 → 2.5e-05 (25 times)`."""
        sides = ("none" if side is None else f"{side:.3g}" for side in (self.then, self.now))
        ratio = "" if self.ratio is None else f" ({self.ratio:.3g} times)"
        return " → ".join(sides) + ratio

    def __str__(self) -> str:
        return f"{self.name}: {self.sides}"

    def to_json(self) -> dict[str, Any]:
        ratio = self.ratio
        shown = "inf" if ratio is not None and math.isinf(ratio) else ratio
        return {"name": self.name, "then": self.then, "now": self.now, "ratio": shown, "failure": self.failure}


def figures_of(reports: Iterable[Mapping[str, Any]], contract: Mapping[str, Any] | None) -> dict[str, float]:
    """The figures in reports as JSON data (`PartReport.to_json`, `ContractReport.to_json`), of three digits.

    Of each output: `max_abs`, `cosine_distance` (1 - cosine), `seen` (the relative error of a row), and the floors.
    """
    found = {name: value for report in reports for name, value in _of_report(report)}
    for check in (contract or {}).get("checks", ()):
        if check["worst"] is not None:
            place = f"contract.{check['variant']}.{check['stage'].replace(' ', '_')}"
            found |= _of_comparison(place, check["worst"])
    return {name: float(f"{value:.{_DIGITS}g}") for name, value in found.items() if math.isfinite(value)}


def recorded_figures(manifest: Manifest) -> dict[str, float]:
    """The figures that the export recorded in a bundle; InputError where they are none."""
    reports = [variant.verification for part in manifest.parts for variant in part.variants if variant.verification]
    try:
        return figures_of(reports, manifest.export.contract)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        fix = "export the model again"
        raise InputError("the verification that a manifest records cannot be read", got=got, fix=fix) from error


def compare_figures(
    then: Mapping[str, float],
    now: Mapping[str, float],
    tolerances: Mapping[str, float],
    *,
    strict: bool = False,
    complete: bool = False,
) -> tuple[Figure, ...]:
    """Every figure of either side.

    Args:
        tolerances: pattern → largest ratio; the first that fits holds.
        strict: fail where an error is more than `STRICT_RATIO` times the recorded one and above its floor.
        complete: both sides were measured in the same way, so a figure that only one has fails.
    """
    names = dict.fromkeys([*then, *now])
    figures = (_judged(name, then, now, tolerances, strict) for name in names)
    return tuple(_required(figure) if complete else figure for figure in figures)


def _required(figure: Figure) -> Figure:
    """A figure that fails where one side lacks it."""
    if figure.now is None:
        return replace(figure, failure=f"{figure}: it is not measured any more")
    return replace(figure, failure=f"{figure}: nothing is recorded of it") if figure.then is None else figure


def _judged(
    name: str, then: Mapping[str, float], now: Mapping[str, float], tolerances: Mapping[str, float], strict: bool
) -> Figure:
    figure = Figure(name, then.get(name), now.get(name))
    ratio = figure.ratio
    if ratio is None or figure.now is None:
        return figure
    allowed = next((limit for pattern, limit in tolerances.items() if fnmatchcase(name, pattern)), None)
    place, _, measure = name.rpartition(".")
    failure = ""
    if allowed is not None and not ratio <= allowed:
        failure = f"{figure}: expected at most {allowed:g} times"
    elif allowed is None and strict and measure in _FLOORS and ratio > STRICT_RATIO:
        floor = now.get(f"{place}.{_FLOORS[measure]}", 0.0)
        if figure.now > floor:
            failure = f"{figure}: expected at most {STRICT_RATIO:g} times, or the floor of {floor:.3g} (--strict)"
    return replace(figure, failure=failure)


def _of_report(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    outputs = (report["floor"] or {}).get("outputs", {})
    for output, worst in report["worst"].items():
        place = f"{report['part']}.{report['variant'].replace(' ', '_')}.{output}"
        measured = outputs.get(output)
        floor = None if measured is None else float(measured["floor"]["max_abs"])
        yield from _of_comparison(place, worst, floor).items()
        if measured is not None and measured["seen"] is not None:
            yield f"{place}.seen", float(measured["seen"]["row_error"])
            yield f"{place}.floor", float(measured["floor"]["row_error"])
    if report["unrounded"] is not None:
        yield from _of_report(report["unrounded"])


def _of_comparison(place: str, worst: Mapping[str, Any], floor: float | None = None) -> dict[str, float]:
    """With the floor of the largest difference: of the largest value, at least some units in the last place."""
    relative = max(RULES["fp32"].least, floor or 0.0)
    return {
        f"{place}.max_abs": float(worst["max_abs"]),
        f"{place}.max_abs_floor": relative * float(worst["max_reference_abs"]),
        f"{place}.cosine_distance": max(0.0, 1.0 - float(worst["cosine"])),
    }
