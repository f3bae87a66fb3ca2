"""The weights of a bundle's graphs against its ledger: without torch and onnx."""

from __future__ import annotations

from vlm_export.bundle.layout import LEDGER_NAME
from vlm_export.bundle.ledger import GraphLedger, found_ledger, ledger_differences, ledger_from_bytes, summary
from vlm_export.bundle.manifest import VariantRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import VerificationError

NO_LEDGER = "the ledger of weights: the bundle has none, so weights that were replaced cannot be told"


def read_ledger(bundle: OpenBundle) -> dict[str, GraphLedger] | None:
    """Path of a graph → its ledger, None where the bundle has none; InputError where it is malformed."""
    if LEDGER_NAME not in bundle.manifest.files:
        return None
    path = bundle.file(LEDGER_NAME)
    return dict(ledger_from_bytes(path.read_bytes(), str(path)))


def check_ledger(bundle: OpenBundle, variant: VariantRecord) -> tuple[str, ...]:
    """Every initializer and node of the variant's graph is the one that the export wrote.

    Returns:
        What could not be checked, for the report.

    Raises:
        VerificationError: names the initializers that were replaced, added or left out, or says that nodes were.
    """
    ledger = read_ledger(bundle)
    if ledger is None:
        return (NO_LEDGER,)
    bundle.model_files(variant)
    recorded = ledger.get(variant.file)
    differences = ["the ledger does not list it"]
    if recorded is not None:
        differences = ledger_differences(recorded, found_ledger(bundle.root, variant.file))
    if differences:
        raise VerificationError(
            "a graph is not the one that was exported",
            where=variant.file,
            expected=f"the weights and nodes that {LEDGER_NAME} records",
            got=summary(differences),
            fix="do not use this bundle; export the model again",
        )
    return ()
