"""What the original computes for the proof of an export: its parts' outputs and noise, and the contract's record.

`OriginalHere` computes it in this process when it is asked; `OriginalBeside` has another process compute it ahead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlm_export.bundle.manifest import Manifest
from vlm_export.exporting.contract import ContractOriginal, OriginalSide, Sides, original_side, staged_bundle
from vlm_export.exporting.floor import measure_noise, measure_noise_around
from vlm_export.exporting.options import FP32
from vlm_export.exporting.original_process import Call, OriginalProcess, start_process
from vlm_export.exporting.originals import quiet_transformers
from vlm_export.exporting.published_files import ConsumerChecks, check_consumers
from vlm_export.exporting.verification import HUGE_PART_BYTES, PartVerification
from vlm_export.family import Array, Arrays, Model, Reference
from vlm_export.proof.contract_record import ContractRecord
from vlm_export.proof.metrics import Deviation

LEAST_BYTES = 64 << 20
"""Parts of fewer bytes are computed here: their proof takes no longer than another process does to start."""
# With more processors, a large part is faster with the threads that this process has.
_FEW_PROCESSORS, _LARGE_PART_BYTES = 4, 1 << 30


class Original(ContractOriginal, Protocol):
    """Who computes the original's side of the proof."""

    def reference(self, part: str) -> Reference:
        """The part's Reference, loaded."""
        ...


class OriginalHere:
    """The original in this process."""

    def __init__(self, model: Model, verifications: Sequence[PartVerification], sides: Sides) -> None:
        self._model, self._sides = model, sides
        self._verifications = {each.part.name: each for each in verifications}
        self._loaded: tuple[str, Reference] | None = None
        self._side: OriginalSide | None = None

    def reference(self, part: str) -> Reference:
        """The last one that was asked for is kept, and no other: each may hold weights of its own."""
        if self._loaded is None or self._loaded[0] != part:
            self._loaded = None
            self._loaded = (part, self._verifications[part].load_reference())
        return self._loaded[1]

    def load(self, part: str) -> None:
        """Loads the Reference, whose errors are those of its stage."""
        self.reference(part)

    def outputs(self, part: str, inputs: Arrays) -> dict[str, Array]:
        """What the Reference gives."""
        return self.reference(part)(inputs)

    def noise(self, part: str, precision: str, inputs: Arrays) -> dict[str, Deviation]:
        """`measure_noise` of the Reference."""
        return measure_noise(self.reference(part), precision, inputs)

    def noise_around(self, part: str, precision: str, inputs: Arrays) -> dict[str, Deviation]:
        """`measure_noise_around` of the Reference."""
        return measure_noise_around(self.reference(part), precision, inputs)

    def recorded(self) -> tuple[ContractRecord, Mapping[str, bytes]]:
        # The contract's models take its place.
        self._loaded = None
        with quiet_transformers():
            self._side = original_side(self._model, self._sides)
        return self._side.record, self._side.contents

    def consumers(self, root: Path, manifest: Manifest) -> ConsumerChecks:
        side = self._side
        assert side is not None
        with quiet_transformers():
            bundle = staged_bundle(root, manifest)
            return check_consumers(bundle, side.record, side.contents, side.images, side.texts)


class OriginalBeside:
    """The original in another process, but for the parts that are faster here."""

    def __init__(self, here: OriginalHere, process: OriginalProcess, parts: frozenset[str]) -> None:
        self._here, self._process, self._parts = here, process, parts

    def reference(self, part: str) -> Reference:
        if part not in self._parts:
            return self._here.reference(part)
        self._process.call("load", part)
        return _Beside(part, self._process.call)

    def recorded(self) -> tuple[ContractRecord, Mapping[str, bytes]]:
        recorded: tuple[ContractRecord, Mapping[str, bytes]] = self._process.call("recorded")
        return recorded

    def consumers(self, root: Path, manifest: Manifest) -> ConsumerChecks:
        checks: ConsumerChecks = self._process.call("consumers", root, manifest)
        return checks


@dataclass(frozen=True)
class _Beside:
    """A Reference in the other process; as `RemoteReference`."""

    part: str
    call: Callable[..., Any]

    def __call__(self, inputs: Arrays) -> dict[str, Array]:
        outputs: dict[str, Array] = self.call("outputs", self.part, inputs)
        return outputs

    def noise(self, precision: str, inputs: Arrays) -> dict[str, Deviation]:
        noise: dict[str, Deviation] = self.call("noise", self.part, precision, inputs)
        return noise

    def noise_around(self, precision: str, inputs: Arrays) -> dict[str, Deviation]:
        noise: dict[str, Deviation] = self.call("noise_around", self.part, precision, inputs)
        return noise


@contextmanager
def original_beside(
    model: Model, verifications: Sequence[PartVerification], sides: Sides, precisions: Sequence[str]
) -> Iterator[Original]:
    """Who computes the original's side while the block lasts: another process where that pays, or else this one.

    Args:
        precisions: of the variants that will be proved.
    """
    here = OriginalHere(model, verifications, sides)
    remote = [each for each in verifications if _pays(each)]
    process = start_process(here, _expected(remote, precisions)) if remote else None
    if process is None:
        yield here
        return
    try:
        yield OriginalBeside(here, process, frozenset(each.part.name for each in remote))
    finally:
        process.end()


def _pays(verification: PartVerification) -> bool:
    size = verification.weights_bytes
    most = _LARGE_PART_BYTES if (os.cpu_count() or 1) > _FEW_PROCESSORS else HUGE_PART_BYTES
    return LEAST_BYTES <= size <= most


def _expected(verifications: Sequence[PartVerification], precisions: Sequence[str]) -> Iterator[Call]:
    """What the proof will ask for, in its order."""
    for verification in verifications:
        part = verification.part.name
        yield "load", part
        # A float16 variant is proved in float32 as well.
        for precision in dict.fromkeys((*precisions, FP32)):
            if verification.has_floor(precision):
                yield from (("noise", part, precision, inputs) for inputs in verification.floor_inputs())
        yield from (("outputs", part, inputs) for inputs in verification.expected_inputs())
    yield ("recorded",)
