"""What the original computes for the proof of an export, in this process, when it is asked.

`original_process.py` has another process compute the same, ahead of being asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from vlm_export.bundle.manifest import Manifest
from vlm_export.exporting.contract import OriginalSide, Sides, original_side, staged_bundle
from vlm_export.exporting.floor import measure_noise, measure_noise_around
from vlm_export.exporting.originals import quiet_transformers
from vlm_export.exporting.published_files import ConsumerChecks, check_consumers
from vlm_export.exporting.verification import PartVerification
from vlm_export.family import Array, Arrays, Model, Reference
from vlm_export.proof.contract_record import ContractRecord
from vlm_export.proof.metrics import Deviation


class Original(Protocol):
    """Who computes the original's side of the proof."""

    def reference(self, part: str) -> Reference:
        """The part's Reference, loaded."""
        ...

    def recorded(self) -> tuple[ContractRecord, Mapping[str, bytes]]:
        """The record of the contract, and its image files by name."""
        ...

    def consumers(self, root: Path, manifest: Manifest) -> ConsumerChecks:
        """The staged bundle's files as other software reads them, after `recorded`."""
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
        with quiet_transformers():
            self._side = original_side(self._model, self._sides)
        return self._side.record, self._side.contents

    def consumers(self, root: Path, manifest: Manifest) -> ConsumerChecks:
        side = self._side
        assert side is not None
        with quiet_transformers():
            bundle = staged_bundle(root, manifest)
            return check_consumers(bundle, side.record, side.contents, side.images, side.texts)
