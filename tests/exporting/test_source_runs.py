"""Sources as PyTorch runs them for a bench: in bfloat16, too, decoders with their caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_export.bundle.opened import open_bundle
from vlm_export.exporting.source_runs import source_runs
from vlm_export.proof.golden import iterate_golden
from vlm_export.quantizing.losses import row_cosines

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize(("family", "variant"), [("nanovlm", "222m"), ("blip", "caption")])
def test_bfloat16_loses_what_bfloat16_loses(
    nanovlm_bundle: Callable[[str], Path], blip_bundle: Callable[[str], Path], family: str, variant: str
) -> None:
    bundle = open_bundle((nanovlm_bundle if family == "nanovlm" else blip_bundle)(variant))
    source = DATA / family / variant
    checkpoint = source if family == "nanovlm" else next(source.glob("*.pth"))
    with source_runs(bundle, str(checkpoint), "bf16", 1) as run_of:
        for part in bundle.manifest.parts:
            run = run_of(part.name)
            for record in iterate_golden(bundle, part.name):
                for name, found in run(record.inputs).items():
                    expected = record.outputs[name].reshape(-1, record.outputs[name].shape[-1])
                    if expected.size:
                        assert row_cosines(expected, found.reshape(expected.shape)).min() > 0.99, (part.name, name)
