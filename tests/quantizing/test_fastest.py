"""`precision="fastest"`: what the rule takes on which engine and processor, and that a budget holds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import vlm_export

WITH_VNNI = "processor : 0\nflags\t\t: fpu avx512f avx512_vnni\n"
WITHOUT = "processor : 0\nflags\t\t: fpu avx2\n"
ON_ARM = "processor : 0\nFeatures\t: fp asimd asimddp\n"


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes Linux tell of another processor."""

    def pretend(text: str) -> None:
        path = tmp_path / "cpuinfo"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr("platform.system", lambda: "Linux")
        monkeypatch.setattr("vlm_export.runtime.engines.fastest._CPUINFO", path)

    return pretend


@pytest.mark.parametrize(("text", "taken"), [(WITH_VNNI, "int8"), (ON_ARM, "int8"), (WITHOUT, "fp32"), ("", "fp32")])
def test_eight_bits_where_the_processor_multiplies_them(
    quantised: Callable[[str], Path], processor: Callable[[str], None], text: str, taken: str
) -> None:
    processor(text)
    model = vlm_export.load(quantised("int8"), precision="fastest")
    assert model.precision == taken
    assert vlm_export.load(quantised("int8")).precision == "fp32"


def test_each_engine_and_provider_has_an_order_of_its_own(
    quantised: Callable[[str], Path], processor: Callable[[str], None]
) -> None:
    processor(WITH_VNNI)
    dynamic, static = quantised("int8"), quantised("int8-static")
    assert vlm_export.load(static, precision="fastest").precision == "int8-static"
    assert vlm_export.load(static, precision="fastest", engine="openvino").precision == "int8-static"
    assert vlm_export.load(dynamic, precision="fastest", engine="openvino").precision == "fp32"
    assert vlm_export.load(dynamic, precision="fastest", providers="cuda").precision == "fp32"
    # Weights of 4 bits save room and no time.
    assert vlm_export.load(quantised("int4"), precision="fastest").precision == "fp32"


def test_a_variant_over_its_budget_is_not_taken(
    quantised: Callable[[str], Path], processor: Callable[[str], None], tmp_path: Path
) -> None:
    processor(WITH_VNNI)
    bundle = Path(shutil.copytree(quantised("int8"), tmp_path / "bundle"))
    path = bundle / "vlm_export.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    (variant,) = (one for one in data["parts"][0]["variants"] if one["precision"] == "int8")
    variant["loss"]["budget"]["cosine"] = 1.0
    path.write_text(json.dumps(data), encoding="utf-8")
    assert vlm_export.load(bundle, precision="fastest").precision == "fp32"


def test_without_those_instructions_a_reduced_range_will_do(
    demo: Path, processor: Callable[[str], None], tmp_path: Path
) -> None:
    processor(WITHOUT)
    vlm_export.quantize(demo, "int8", parts=["text"], output=tmp_path / "bundle", reduce_range=True, threads=1)
    assert vlm_export.load(tmp_path / "bundle", precision="fastest").precision == "int8"
