"""A Reference that remembers: each output is computed once, and no error is lost."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_export.errors import EnvironmentFailure
from vlm_export.proof.cached_reference import CachedReference
from vlm_export.proof.metrics import Array
from vlm_export.proof.points import Arrays


def test_equal_inputs_are_computed_once_and_others_apart() -> None:
    calls: list[Arrays] = []

    def reference(inputs: Arrays) -> dict[str, np.ndarray]:
        calls.append(inputs)
        return {"y": inputs["x"] * 2}

    remembered = CachedReference(reference)
    zeros = np.zeros((2, 3), np.float32)
    different: list[Array] = [zeros, zeros.reshape(3, 2), zeros.astype(np.int32), zeros + 1, zeros.astype(np.float64)]
    for array in different:
        remembered.prepare({"x": array})
    for array in different:
        assert np.array_equal(remembered({"x": array.copy()})["y"], array * 2)
    assert len(calls) == len(different)


def test_an_error_comes_when_the_output_is_asked_for() -> None:
    def reference(inputs: Arrays) -> dict[str, np.ndarray]:
        raise RuntimeError("boom")

    remembered = CachedReference(reference)
    remembered.prepare({})
    with pytest.raises(RuntimeError, match="boom"):
        remembered({})


@pytest.mark.parametrize("error", [MemoryError(), EnvironmentFailure("no room"), KeyboardInterrupt()])
def test_the_machines_faults_go_through(error: BaseException) -> None:
    def reference(inputs: Arrays) -> dict[str, np.ndarray]:
        raise error

    with pytest.raises(type(error)):
        CachedReference(reference).prepare({})
