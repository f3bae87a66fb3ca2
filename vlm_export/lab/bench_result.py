"""What a bench found: times, ratios to the first side, costs, and what follows from them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import exp, log
from typing import Any

from vlm_export.lab.bench_plan import BenchOptions, Load, Side
from vlm_export.lab.timing import Spread, ratios
from vlm_export.proof.metrics import json_number
from vlm_export.runtime.engines.choice import ONNXRUNTIME

_VERBS: Mapping[str, tuple[str, ...]] = {
    "embed": ("embed", "INPUT"),
    "features": ("embed", "INPUT"),
    "caption": ("caption", "IMAGE"),
    "answer": ("ask", "IMAGE", "QUESTION"),
    "chat": ("ask", "IMAGE", "QUESTION"),
    "match": ("match", "IMAGE", "TEXT"),
}
"""Kind of task → the verb that does it, and what stands behind the bundle."""


@dataclass(frozen=True)
class Measured:
    """The seconds of one run of a side on a load, in each round."""

    side: Side
    load: Load
    seconds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Seconds of a run."""
        return Spread.of(self.seconds)

    @property
    def rows_per_second(self) -> float:
        return self.load.rows / self.spread.median


@dataclass(frozen=True)
class Cost:
    """What a side takes beside time.

    Attributes:
        load_seconds: to open the part, with the checks of its files; measured once.
        peak_bytes: of the process's memory, pages of mapped files included; after all loads. None outside Linux.
        anonymous_bytes: of it what is no file's, at the end.
        size_bytes: of the part's files; None for PyTorch and for graphs beside the bundle.
        cosine: the least of any row of an output with float32's in ONNX Runtime, over the bundle's recorded inputs, its
            images and its texts; None where the bundle has no float32, and of tasks that write.
        same_tokens: of a task that writes: the share of each row's tokens up to the first that is another than
            float32's in ONNX Runtime, on average; None of parts and of other tasks.
    """

    side: Side
    part: str
    load_seconds: float
    peak_bytes: int | None
    anonymous_bytes: int | None
    size_bytes: int | None
    cosine: float | None
    same_tokens: float | None = None


@dataclass(frozen=True)
class Recommendation:
    """The fastest side within the bound.

    Attributes:
        speed: how many times as fast as the first side: the geometric mean over all loads.
        call, command: what to write in a program, and on the command line.
    """

    side: Side
    speed: float
    call: str
    command: str

    def to_json(self) -> dict[str, Any]:
        return {**self.side.to_json(), "speed": self.speed, "call": self.call, "command": self.command}


@dataclass(frozen=True)
class BenchResult:
    """All that was measured.

    Attributes:
        tasks: kinds of what the bundle can do.
        not_run: what was not measured, and why.
    """

    bundle: str
    tasks: tuple[str, ...]
    options: BenchOptions
    measured: tuple[Measured, ...]
    costs: tuple[Cost, ...]
    not_run: tuple[str, ...] = ()

    @property
    def loads(self) -> tuple[Load, ...]:
        return tuple(dict.fromkeys(one.load for one in self.measured))

    @property
    def sides(self) -> tuple[Side, ...]:
        return tuple(dict.fromkeys(one.side for one in self.measured))

    def on(self, load: Load) -> tuple[Measured, ...]:
        """Every side on one load, the one that the others are compared with first."""
        return tuple(one for one in self.measured if one.load == load)

    def speed(self, one: Measured) -> Spread:
        """How many times as fast as the first side on the same load, round by round."""
        return Spread.of(ratios(self.on(one.load)[0].seconds, one.seconds))

    def recommendation(self) -> Recommendation | None:
        """The fastest side of the bundle whose every part is within the bound; None where none is."""
        best: Recommendation | None = None
        for side in self.sides:
            runs = [one for one in self.measured if one.side == side]
            if not side.is_of_bundle or len(runs) < len(self.loads) or not self._within_bound(side):
                continue
            speed = exp(sum(log(self.speed(one).median) for one in runs) / len(runs))
            if best is None or speed > best.speed:
                best = Recommendation(side, speed, *self._written(side))
        return best

    def _within_bound(self, side: Side) -> bool:
        costs = [cost for cost in self.costs if cost.side == side]
        return all(
            cost.same_tokens == 1 or (cost.cosine is not None and cost.cosine >= self.options.least_cosine)
            for cost in costs
        )

    def _written(self, side: Side) -> tuple[str, str]:
        """What opens that side, and the command of the first task that the bundle has."""
        engine = [] if side.engine == ONNXRUNTIME else [f"engine={side.engine!r}"]
        words = [repr(self.bundle), *engine, f"precision={side.precision!r}", f"threads={side.threads}"]
        options = [] if side.engine == ONNXRUNTIME else ["--engine", side.engine]
        options += ["--precision", side.precision, "--threads", str(side.threads)]
        measured = [load.part for load in self.loads if load.part in self.tasks]
        verb = next(verb for task, verb in _VERBS.items() if task in (measured or self.tasks or _VERBS))
        command = [verb[0], self.bundle, *verb[1:], *options]
        return f"vlm_export.load({', '.join(words)})", shlex.join(["vlm-export", *command])

    def to_json(self) -> dict[str, Any]:
        """What `bench --json` prints."""
        best = self.recommendation()
        return {
            "bundle": self.bundle,
            "rounds": self.options.rounds,
            "measured": [self._measured_json(one) for one in self.measured],
            "costs": [_cost_json(cost) for cost in self.costs],
            "least_cosine": self.options.least_cosine,
            "recommended": None if best is None else best.to_json(),
            "not_run": list(self.not_run),
        }

    def _measured_json(self, one: Measured) -> dict[str, Any]:
        return {
            **one.side.to_json(),
            **asdict(one.load),
            "unit": one.load.unit,
            "seconds": vars(one.spread),
            "rows_per_second": one.rows_per_second,
            "speed": vars(self.speed(one)),
            "rounds": list(one.seconds),
        }


def _cost_json(cost: Cost) -> dict[str, Any]:
    data = {name: json_number(value) for name, value in vars(cost).items() if name != "side"}
    return {**cost.side.to_json(), **data}
