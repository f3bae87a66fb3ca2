"""The proof that two models compute the same: both are run in onnxruntime, and every output is compared."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vlm_export.errors import GraphError, VerificationError
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.graph.prove.compare import compare, equal_values, says_something
from vlm_export.graph.prove.match_interfaces import InterfaceMatch, Resized, axis_label, match_interfaces
from vlm_export.graph.prove.new_sizes import Compared, run_new_sizes
from vlm_export.graph.prove.program import ModelProgram, Program, RunError
from vlm_export.graph.prove.random_inputs import (
    Run,
    as_dtype,
    bounds_of,
    held_by_both,
    load_feeds,
    random_runs,
    run_with_defaults_replaced,
)


@dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        runs: sets of inputs.
        outputs: of the changed model, each compared in every run.
        max_abs: the largest difference.
        not_compared: outputs of the original that the changed model lacks.
        at_default: inputs of the original that had their default in every run.
        one_size: open axis of the changed model → the only size that it had in the runs.
        only_run: axes whose new sizes the changed model was run at, while nothing says what is right there.
    """

    runs: int
    outputs: tuple[str, ...]
    max_abs: float
    not_compared: tuple[str, ...] = ()
    at_default: tuple[str, ...] = ()
    one_size: Mapping[str, int] = field(default_factory=dict)
    only_run: tuple[str, ...] = ()

    def __str__(self) -> str:
        result = f"differ by at most {self.max_abs:.3g}" if self.max_abs else "are equal"
        text = f"verified: {len(self.outputs)} outputs {result} on {self.runs} sets of inputs"
        for what, names in (("not compared", self.not_compared), ("only with their defaults", self.at_default)):
            text += f"; {what}: {', '.join(map(repr, names))}" if names else ""
        sizes = ", ".join(f"{axis} = {size}" for axis, size in self.one_size.items())
        text += f"; at one size only: {sizes}" if sizes else ""
        text += f"; only run, with nothing to compare with: {'; '.join(self.only_run)}" if self.only_run else ""
        return text

    def to_json(self) -> dict[str, Any]:
        """Returns the proof as `--json` prints it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def prove(
    before: ir.Model | Program,
    after: ir.Model | Program,
    *,
    inputs: Sequence[Path] = (),
    tolerance: float = 0.0,
    renamed: Mapping[str, str] | None = None,
    may_drop_outputs: bool = False,
    may_change_dtypes: bool = False,
) -> Proof:
    """Runs both on the same inputs and compares every output of the changed model.

    Inputs and outputs correspond by name, then by position. What is an internal tensor of the original (the ends of a
    part that was cut out, a tap) is taken from a run of the original. Inputs that have a default are tried without a
    feed, and once with other values, where both models name them.

    Args:
        inputs: files for the original's inputs (one .npz, or .pb in order); none: random values.
        tolerance: allowed difference, times max(1, largest absolute value of the output); 0: equal to the last bit.
        renamed: name in the changed model → name in the original.
        may_drop_outputs: the changed model need not have all of the original's outputs.
        may_change_dtypes: where dtypes differ, the original's values are converted to the changed model's.

    Raises:
        VerificationError: an output differs or is missing, or an input or output has another dtype.
        GraphError: onnxruntime cannot run the original on any inputs tried, the interfaces do not correspond, or an
            output has no finite value in any run.
    """
    first = ModelProgram(before) if isinstance(before, ir.Model) else before
    second = ModelProgram(after) if isinstance(after, ir.Model) else after
    matched = match_interfaces(first, second, renamed or {}, may_change_dtypes=may_change_dtypes)
    if not may_drop_outputs:
        matched.check_outputs()
    if not may_change_dtypes:
        matched.check_dtypes()
    resized = matched.resized_axes()
    trials = _Trials(matched, inputs)
    seen = new = Compared()
    if not any(isinstance(group.new, int) for group in resized):
        try:
            seen = _compare_runs(trials, matched, tolerance)
        except NotRunError:
            resized = matched.fixed_axes()
            if not resized:
                raise
    if resized:
        new = run_new_sizes(matched, resized, trials.first_run(resized), tolerance)
    if not new.only_run:
        _check_shown([name for name in matched.outputs if name not in seen.shown | new.shown], bool(inputs))
    return Proof(
        seen.runs + new.runs,
        tuple(matched.outputs),
        max(seen.max_abs, new.max_abs),
        matched.missing,
        trials.at_default,
        trials.only_sizes({group.new for group in resized}),
        new.only_run,
    )


def _compare_runs(trials: _Trials, matched: InterfaceMatch, tolerance: float) -> Compared:
    """Every run of the original against one of the changed model; NotRunError where the original has none."""
    runs, largest, shown = 0, 0.0, set[str]()
    for run in trials.runs():
        results = _run_changed(matched, run)
        for (name, source), result in zip(matched.outputs.items(), results, strict=True):
            expected = run.found[source]
            if matched.may_change_dtypes:
                expected = _as_held(expected, result, matched.after.tensor(name))
            largest = max(largest, compare(name, expected, result, tolerance))
            if says_something(expected):
                shown.add(name)
        runs += 1
    return Compared(runs, largest, frozenset(shown))


class NotRunError(GraphError):
    """The original takes no random inputs."""


class _Trials:
    """The runs of the original, and, at their end, the inputs that had their default in all of them."""

    def __init__(self, matched: InterfaceMatch, files: Sequence[Path]) -> None:
        self._matched, self._files = matched, files
        self._program = matched.before
        self.sizes: dict[str, set[int]] = {}
        self._wanted = list(dict.fromkeys([*matched.inputs.values(), *matched.outputs.values()]))
        self._refusal: GraphError | None = None
        defaults = [name for name, value in self._program.inputs.items() if value.is_initializer()]
        # Weights of an old model, which lists them as inputs, are none.
        self.at_default = tuple(name for name in defaults if name not in self._program.weights)

    def first_run(self, groups: Sequence[Resized]) -> Run:
        """Returns a run of the original at the sizes that the groups had before."""
        sizes = {
            label: group.old
            for group in groups
            for entry in group.axes
            if isinstance(label := axis_label(self._program.inputs[entry.input], entry.input, entry.axis), str)
        }
        for run in self._from_files() if self._files else self._random(sizes):
            return self._checked(run)
        raise self._not_run()

    def runs(self) -> Iterator[Run]:
        """Yields the runs, each checked to give the same at another time."""
        last: Run | None = None
        for run in self._from_files() if self._files else self._random({}):
            yield self._checked(run)
            self._note_sizes(run)
            last = run
        if last is None:
            raise self._not_run()
        both = set(self._matched.inputs.values())
        self.at_default = tuple(name for name in self.at_default if name not in last.feeds)
        replaced = run_with_defaults_replaced(last, [name for name in self.at_default if name in both], self._attempt)
        if replaced is not None:
            self.at_default = tuple(name for name in self.at_default if name not in replaced.feeds)
            yield self._checked(replaced)

    def _not_run(self) -> NotRunError:
        return NotRunError(
            "the original cannot be run on random inputs",
            got=(self._refusal.got or self._refusal.what) if self._refusal else "",
            fix="give inputs that it takes: --inputs FILE.npz",
        )

    def _note_sizes(self, run: Run) -> None:
        for name, source in self._matched.inputs.items():
            array, shape = run.found.get(source), self._matched.after.inputs[name].shape
            if isinstance(array, np.ndarray) and shape is not None:
                for dim, size in zip(shape, array.shape, strict=False):
                    if not isinstance(dim, int) and dim.value is not None:
                        self.sizes.setdefault(dim.value, set()).add(size)

    def only_sizes(self, compared_apart: Container[int | str | None]) -> dict[str, int]:
        """Open axis of the changed model → its size, where it had one size in all runs and was not run apart."""
        return {
            axis: next(iter(sizes))
            for axis, sizes in self.sizes.items()
            if len(sizes) == 1 and axis not in compared_apart
        }

    def _from_files(self) -> Iterator[Run]:
        feeds = load_feeds(self._files, self._program.inputs)
        yield Run(feeds, self._found(feeds))

    def _random(self, sizes: Mapping[str, int]) -> Iterator[Run]:
        required = {
            name: self._drawn(name, value) for name, value in self._program.inputs.items() if not value.is_initializer()
        }
        known = self._matched.fixed_sizes() | dict(sizes)
        yield from random_runs(required, known, self._program.size_inputs(), self._attempt)

    def _drawn(self, name: str, value: ir.Value) -> ir.Value:
        """What is drawn for an input: of integers and booleans that it becomes, or was, their own values."""
        new = self._matched.changed_input(name)
        if new is None or new.dtype is None or value.dtype is None or new.dtype == value.dtype:
            return value
        if not value.dtype.is_floating_point() and new.dtype.is_floating_point():
            return value
        return ir.Value(name=name, type=ir.TensorType(new.dtype), shape=value.shape)

    def _attempt(self, feeds: Mapping[str, Array]) -> Run | None:
        feeds = {
            name: held_by_both(array, self._program.inputs[name], self._matched.changed_input(name))
            for name, array in feeds.items()
        }
        try:
            return Run(feeds, self._found(feeds))
        except RunError as error:
            self._refusal = self._refusal or error
            return None

    def _found(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self._wanted, self._program.run(feeds, self._wanted), strict=True))

    def _checked(self, run: Run) -> Run:
        names = list(self._matched.outputs.values())
        for name, again in zip(names, self._program.run(run.feeds, names), strict=True):
            if not equal_values(run.found[name], again):
                raise GraphError(
                    "the original gives other results at every run: nothing can be compared",
                    where=name,
                    fix="remove the nodes that draw random numbers, or leave --verify out",
                )
        return run


def _run_changed(matched: InterfaceMatch, run: Run) -> list[Array]:
    feeds: dict[str, Array] = {}
    for name, source in matched.inputs.items():
        is_unfed = source in matched.before.inputs and source not in run.feeds
        if is_unfed and matched.after.inputs[name].is_initializer():
            continue
        array = run.found[source]
        feeds[name] = as_dtype(array, matched.after.tensor(name)) if matched.may_change_dtypes else array
    try:
        return matched.after.run(feeds, list(matched.outputs))
    except GraphError as error:
        raise VerificationError(
            "the changed model cannot be run on inputs that the original takes", got=error.got or error.what
        ) from error


def _check_shown(names: Sequence[str], given: bool) -> None:
    if names:
        raise GraphError(
            "outputs had no finite value in any run: nothing was compared",
            where=", ".join(names),
            fix=f"give {'other ' if given else ''}inputs for which they have: --inputs FILE.npz",
        )


def _as_held(expected: Array, result: Array, value: ir.Value | None) -> Array:
    """The original's values in the dtype that they have now; what that dtype cannot hold is not compared."""
    held = as_dtype(expected, value)
    if value is None or value.dtype is None or not value.dtype.is_integer() or expected.dtype.kind != "f":
        return held
    low, high = bounds_of(value.dtype)
    outside = ~((expected > low - 1) & (expected < high + 1))
    return np.where(outside, result, held) if held.shape == result.shape else held
