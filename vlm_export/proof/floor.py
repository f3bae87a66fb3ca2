"""How far a right graph may be off: measured on the Reference itself, not guessed.

Two right computations of one model differ by rounding alone. How much that is, depends on the model, and the Reference
shows it: against itself in float64, and, for float16, against itself with its weights and activations rounded. A gate
is a small multiple of that floor. The fixed gates (`gates.py`) hold beside it, so that none is looser than they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeAlias

from vlm_export.proof.metrics import Array, Deviation, json_number, worst_by_output
from vlm_export.specs.codec import Check, Spec, below, between

Ratio: TypeAlias = Annotated[float, between(0, 1), below(1)]
_NUMBERS = ("row_error", "max_abs", "scale")


@dataclass(frozen=True)
class FloorRule:
    """How a precision's gate follows from its floor.

    Attributes:
        factor: gate over floor.
        least: the smallest floor: a few units in the last place of a value, for outputs that are merely looked up.
    """

    factor: float
    least: float


# Right graphs of every family reached at most three fifths of their gates (docs/numerics.md).
RULES: Mapping[str, FloorRule] = {
    "fp32": FloorRule(8.0, 4 * 2.0**-24),
    "fp16": FloorRule(3.0, 2.0**-11),
}
# The gate of the scale is at least this share of the floor of a row's error. Few values, whose errors do not cancel,
# make a scale's own floor small by chance.
_SCALE_SHARE = 2.0
# Another machine, engine or version sums in another order, and may fuse or approximate what this one does not.
ELSEWHERE = 4.0
# A wrong graph breaks every point; more measurements would only take time.
_MEASURED_AGAIN = 12
# Of a gate: what is seen beyond this is worth a measurement, so that right graphs keep room.
_NEAR = 0.5
Arrays: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True)
class Floor:
    """The measured floor of one variant of a part.

    Attributes:
        rule: name of the rule in `RULES`.
        outputs: output name → the floor.
        measured: by what, and at how many points.
        allowance: by how much gates are wider because floor and outputs come from different machines or engines.
    """

    rule: str
    outputs: Mapping[str, Deviation]
    measured: str
    allowance: float = 1.0

    def gate(self, output: str) -> Deviation | None:
        """The limits of an output, None where its floor is not known."""
        if output not in self.outputs:
            return None
        rule, floor = RULES[self.rule], self.outputs[output]
        row, largest = max(floor.row_error, rule.least), max(floor.max_abs, rule.least)
        scale = max(rule.factor * floor.scale, _SCALE_SHARE * row)
        return Deviation(
            self.allowance * rule.factor * row, self.allowance * rule.factor * largest, self.allowance * scale
        )

    def share(self, output: str, seen: Deviation) -> float:
        """What of the output's gate was seen, of the number that is nearest to its limit; NaN counts as infinite."""
        gate = self.gate(output)
        if gate is None:
            return 0.0
        shares = (getattr(seen, name) / getattr(gate, name) for name in _NUMBERS)
        return max(math.inf if math.isnan(share) else share for share in shares)

    def to_json(self, seen: Mapping[str, Deviation]) -> dict[str, Any]:
        """Floor, gate and what was seen, for each output.

        Args:
            seen: output name → the worst deviation.
        """
        outputs = {}
        for name, floor in self.outputs.items():
            gate, worst = self.gate(name), seen.get(name)
            assert gate is not None
            outputs[name] = {
                "floor": floor.to_json(),
                "gate": gate.to_json(),
                "seen": None if worst is None else worst.to_json(),
                "share": None if worst is None else json_number(self.share(name, worst)),
            }
        return {"rule": self.rule, "measured": self.measured, "allowance": self.allowance, "outputs": outputs}


@dataclass(frozen=True)
class _RecordedDeviation(Spec):
    row_error: Ratio
    max_abs: Ratio
    scale: Ratio


@dataclass(frozen=True)
class _RecordedOutput(Spec):
    floor: _RecordedDeviation
    gate: Any
    seen: Any
    share: Any


@dataclass(frozen=True)
class _RecordedFloor(Spec):
    """What `Floor.to_json` writes; of it the floors count, gates are made anew."""

    rule: Annotated[str, Check(f"one of {', '.join(RULES)}", RULES.__contains__)]
    measured: str
    allowance: Any
    outputs: Mapping[str, _RecordedOutput]


def floor_from_json(data: Mapping[str, Any], where: str, allowance: float) -> Floor:
    """The floor that a manifest records; its gates are made anew by the rule.

    Raises:
        InputError: the record is malformed.
    """
    record = _RecordedFloor.from_json(data, where)
    floors = {name: output.floor for name, output in record.outputs.items()}
    outputs = {name: Deviation(floor.row_error, floor.max_abs, floor.scale) for name, floor in floors.items()}
    return Floor(record.rule, outputs, record.measured, allowance)


class FloorJudge:
    """Judges points by a floor that grows where a point shows more noise than those before it.

    Attributes:
        floor: the floor as it is known now.
    """

    def __init__(self, floor: Floor, measure: Callable[[Arrays], Mapping[str, Deviation]] | None = None) -> None:
        """measure: the noise for inputs, None where there is no Reference to measure it on."""
        self.floor, self._measure, self._left = floor, measure, _MEASURED_AGAIN

    def judge(self, seen: Mapping[str, Deviation], inputs: Arrays) -> dict[str, list[str]]:
        """Output name → what its deviation breaks.

        A point that comes near a gate is measured itself before it is judged: a long row or a sharp attention may be
        noisier than all points that were measured before.
        """
        near = any(self.floor.share(name, deviation) > _NEAR for name, deviation in seen.items())
        if near and self._measure is not None and self._left:
            self._left -= 1
            found = worst_by_output([self.floor.outputs, self._measure(inputs)])
            self.floor = replace(self.floor, outputs=found)
        judged = {name: judge_deviation(deviation, self.floor, name) for name, deviation in seen.items()}
        return {name: texts for name, texts in judged.items() if texts}


def judge_deviation(seen: Deviation, floor: Floor, output: str) -> list[str]:
    """What the deviation breaks, one phrase each; every condition is written so that NaN fails."""
    gate = floor.gate(output)
    if gate is None:
        return []
    names = {"row_error": "relative error of a row", "max_abs": "relative max-abs", "scale": "scale"}
    return [
        f"{title}: expected at most {getattr(gate, name):.3g} (measured noise: "
        f"{getattr(floor.outputs[output], name):.2g}), got {getattr(seen, name):.3g}"
        for name, title in names.items()
        if not (getattr(seen, name) <= getattr(gate, name))
    ]
