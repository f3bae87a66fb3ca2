"""What the benchmark of `embed` concludes from its figures, and the images that it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import embed
from benchmarks.report import write_report

from vlm_export.runtime.inputs.images import open_image

SECONDS = {
    embed.FP32: 2.0,
    "onnxruntime int8": 1.0,
    "openvino int8-static": 0.5,
    "transformers": 4.4,
    "transformers-loader": 4.2,
    "fastembed": 3.2,
    "modern-onnx-clip": 3.4,
}
COSINES = {**dict.fromkeys(SECONDS, 1.0), "openvino int8-static": 0.998}


def run(images: int, peak_mib: int, busy: float = 0.95) -> dict[str, Any]:
    return {"run": "a model", "images": images, "seconds": 1.0, "busy": busy, "peak_bytes": peak_mib << 20}


def report(runs: list[dict[str, Any]], **seconds: float) -> Any:
    times = {side: [found, 1.1 * found] for side, found in {**SECONDS, **seconds}.items()}
    return embed.report_from_results("a model", times, COSINES, runs, 2, 32)


def test_the_fastest_variant_of_the_cosine_is_judged(tmp_path: Path) -> None:
    found = report([run(2000, 900), run(2000, 300), run(50_000, 310)])
    assert found.reached
    assert "onnxruntime int8: 4.40 times transformers, 4.20 times transformers-loader" in found.conclusion
    assert "1.03 times the memory for 50,000 images" in found.conclusion
    page = write_report(found, tmp_path, "embed", "python scripts/benchmark.py embed")
    assert "| a model: 50,000 images | 1.0 | 95% | 310 |" in page


@pytest.mark.parametrize(
    ("runs", "seconds"),
    [
        ([run(2000, 900, busy=0.8)], {}),
        ([run(2000, 900), run(2000, 300), run(50_000, 340)], {}),
        # The faster form of transformers counts.
        ([run(2000, 900)], {"transformers-loader": 3.9}),
        ([run(2000, 900)], {"fastembed": 2.9}),
    ],
)
def test_one_goal_that_is_missed(runs: list[dict[str, Any]], seconds: dict[str, float]) -> None:
    assert not report(runs, **seconds).reached


def test_images_are_the_same_each_time(tmp_path: Path) -> None:
    first, second = (embed.write_images(tmp_path / name, 6) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    images = [open_image(path) for path in first]
    assert len({image.size for image in images}) > 2
    assert np.asarray(images[0]).std() > 20
