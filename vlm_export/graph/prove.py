"""The proof that two models compute the same: both are run in onnxruntime, and every output is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vlm_export.errors import VerificationError
from vlm_export.graph.errors import GraphError
from vlm_export.graph.onnxruntime_session import Array
from vlm_export.graph.program import ModelProgram, Program
from vlm_export.graph.random_inputs import load_feeds, random_feeds

_RUNS = 3


@dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        runs: sets of inputs.
        outputs: of the changed model, each compared in every run.
        max_abs: the largest difference.
    """

    runs: int
    outputs: tuple[str, ...]
    max_abs: float

    def __str__(self) -> str:
        result = f"differ by at most {self.max_abs:.3g}" if self.max_abs else "are equal"
        return f"verified: {len(self.outputs)} outputs {result} on {self.runs} sets of inputs"

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"runs": self.runs, "outputs": list(self.outputs), "max_abs": self.max_abs}


@dataclass(frozen=True)
class Pairing:
    """Which tensors correspond: input or output of the changed model → tensor of the original."""

    inputs: dict[str, str]
    outputs: dict[str, str]


def prove(
    before: ir.Model | Program,
    after: ir.Model | Program,
    *,
    inputs: Sequence[Path] = (),
    tolerance: float = 0.0,
    renamed: Mapping[str, str] | None = None,
) -> Proof:
    """Runs both on the same inputs and compares every output of the changed model.

    Inputs and outputs correspond by name, then by position. What is an internal tensor of the original (the ends of a
    part that was cut out, a tap) is taken from a run of the original. Where dtypes differ, the original's values are
    converted to the changed model's.

    Args:
        inputs: files for the original's inputs (one .npz, or .pb in order); none: random values.
        tolerance: allowed difference, times max(1, largest absolute value of the output); 0: equal to the last bit.
        renamed: name in the changed model → name in the original.

    Raises:
        VerificationError: an output differs.
        GraphError: onnxruntime cannot run the original on any inputs tried, or the interfaces do not correspond.
    """
    first = ModelProgram(before) if isinstance(before, ir.Model) else before
    second = ModelProgram(after) if isinstance(after, ir.Model) else after
    pairing = pair_interfaces(first, second, renamed or {})
    wanted = [*pairing.inputs.values(), *pairing.outputs.values()]
    largest, runs = 0.0, 0
    for feeds in _feeds(first, second, pairing, inputs, wanted):
        found = dict(zip(wanted, first.run(feeds, wanted), strict=True))
        _check_repeats(first, feeds, list(pairing.outputs.values()), found)
        given = {name: _as_dtype(found[source], second.tensor(name)) for name, source in pairing.inputs.items()}
        results = _run_changed(second, given, list(pairing.outputs))
        for (name, source), result in zip(pairing.outputs.items(), results, strict=True):
            expected = _as_dtype(found[source], second.tensor(name))
            largest = max(largest, compare(name, expected, result, tolerance))
        runs += 1
    return Proof(runs, tuple(pairing.outputs), largest)


def pair_interfaces(before: Program, after: Program, renamed: Mapping[str, str]) -> Pairing:
    """Which tensors correspond.

    Raises:
        GraphError: an input or output of the changed model that stands for nothing in the original.
    """
    pairs = []
    for kind, old, new in (("input", before.inputs, after.inputs), ("output", before.outputs, after.outputs)):
        old_names, new_names = [str(value.name) for value in old], [str(value.name) for value in new]
        found: dict[str, str] = {}
        for position, name in enumerate(new_names):
            known = renamed.get(name, name)
            if known not in old_names and before.tensor(known) is None:
                known = _by_position(kind, name, position, old_names, new_names)
            found[name] = known
        pairs.append(found)
    return Pairing(*pairs)


def _by_position(kind: str, name: str, position: int, old: Sequence[str], new: Sequence[str]) -> str:
    if len(old) == len(new) and old[position] not in new:
        return old[position]
    raise GraphError(
        f"{kind} {name!r} of the changed model stands for no tensor of the original",
        got=f"the original's {kind}s are {list(old)}",
        fix="leave --verify out: the change is not meant to keep what is computed",
    )


def _feeds(
    before: Program, after: Program, pairing: Pairing, files: Sequence[Path], wanted: Sequence[str]
) -> list[dict[str, Array]]:
    if files:
        feeds = load_feeds(files, before.inputs)
        before.run(feeds, wanted)
        return [feeds]
    sizes = _fixed_sizes(before, after, pairing)
    accepted: list[dict[str, Array]] = []
    refusal: GraphError | None = None
    for seed, feeds in enumerate(random_feeds(before.inputs, sizes)):
        try:
            before.run(feeds, wanted)
        except GraphError as error:
            refusal = refusal or error
            continue
        accepted.append(feeds)
        if len(accepted) == _RUNS or (seed and not before.inputs):
            break
    if not accepted:
        raise GraphError(
            "the original cannot be run on random inputs",
            got=refusal.got if refusal else "",
            fix="give inputs that it takes: --inputs FILE.npz",
        )
    return accepted


def _fixed_sizes(before: Program, after: Program, pairing: Pairing) -> dict[str, int]:
    """Named axes of the original that the changed model fixes."""
    sizes: dict[str, int] = {}
    for name, source in pairing.inputs.items():
        old, new = before.tensor(source), after.tensor(name)
        for axis, (open_size, fixed) in enumerate(zip(_dims(old), _dims(new), strict=False)):
            if isinstance(fixed, int) and not isinstance(open_size, int):
                sizes[str(open_size.value) if open_size.value is not None else f"{source}.{axis}"] = fixed
    return sizes


def _dims(value: ir.Value | None) -> Sequence[int | ir.SymbolicDim]:
    return () if value is None or value.shape is None else value.shape.dims


def _check_repeats(
    program: Program, feeds: Mapping[str, Array], names: Sequence[str], found: Mapping[str, Array]
) -> None:
    for name, again in zip(names, program.run(feeds, names), strict=True):
        if not equal_values(found[name], again):
            raise GraphError(
                "the original gives other results at every run: nothing can be compared",
                where=name,
                fix="remove the nodes that draw random numbers, or leave --verify out",
            )


def _run_changed(program: Program, feeds: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
    try:
        return program.run(feeds, names)
    except GraphError as error:
        raise VerificationError(
            "the changed model cannot be run on inputs that the original takes",
            got=error.got,
        ) from error


def _as_dtype(array: Array, value: ir.Value | None) -> Array:
    if value is None or value.dtype is None or not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        return array
    wanted = value.dtype.numpy()
    return array if array.dtype == wanted else np.asarray(array.astype(wanted))


def compare(name: str, expected: Array, got: Array, tolerance: float) -> float:
    """The largest difference of two outputs.

    Raises:
        VerificationError: it exceeds the tolerance, or kinds, shapes or dtypes differ.
    """
    if equal_values(expected, got):
        return 0.0
    if _form(expected) != _form(got):
        raise VerificationError(f"output {name!r} has another form", expected=_form(expected), got=_form(got))
    difference, bound = float("inf"), 0.0
    if isinstance(expected, np.ndarray) and expected.dtype.kind in "biuf":
        left, right = expected.astype(np.float64), got.astype(np.float64)
        same = (left == right) | (np.isnan(left) & np.isnan(right))
        with np.errstate(invalid="ignore"):
            difference = float(np.max(np.where(same, 0.0, np.abs(left - right)), initial=0.0))
        finite = np.abs(left[np.isfinite(left)])
        bound = tolerance * max(1.0, float(finite.max(initial=0.0)))
    if not (tolerance > 0 and difference <= bound):
        raise VerificationError(
            f"output {name!r} differs",
            expected=f"at most {bound:.3g}" if tolerance else "equal values",
            got=f"a difference of {difference:.3g}",
            fix="a --tolerance allows for rounding",
        )
    return difference


def _form(array: Array) -> str:
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__


def equal_values(left: Array, right: Array) -> bool:
    """To the last bit; NaN equals NaN. Sequences and maps entry by entry."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        if left.dtype.kind != "f":
            return bool(np.array_equal(left, right))
        nans = np.isnan(left) & np.isnan(right)
        return bool(np.all(nans | ((left == right) & (np.signbit(left) == np.signbit(right)))))
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal_values, left, right))
    return type(left) is type(right) and bool(left == right)
