"""A folder of embeddings whose run is killed at its file operations and goes on: each item once, nothing done twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from vlm_export import load
from vlm_export.runtime.bulk.embed import EmbedOptions, embed
from vlm_export.runtime.bulk.folder import embeddings_at
from vlm_export.runtime.search.store import npy_metadata

# The harness is a fixture of all tests, which the environment without torch does not have.
pytestmark = pytest.mark.needs_torch
BAD = "k04.png"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 images, one of which cannot be read."""
    folder, random = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(24):
        pixels = random.integers(0, 256, (20 + number, 31, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"k{number:02d}.png")
    (folder / BAD).write_bytes(b"no image")
    return folder


def test_a_killed_run_goes_on(harness: ModuleType, tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "outputs" / "out"
    output.parent.mkdir()
    readable = [path for path in sorted(images.iterdir()) if path.name != BAD]
    expected = load(tiny_bundle, threads=1).encode_image(readable, batch_size=1)

    def run(*, resume: bool) -> int:
        options = EmbedOptions(batch_size=3, shard_items=7, shard_format="npy", resume=resume)
        return embed(load(tiny_bundle, threads=2), [images], output, options).resumed

    def check() -> None:
        before = {path: path.stat().st_mtime_ns for path in output.glob("part-*.npy")}
        assert run(resume=True) == sum(npy_metadata(path)["shard"]["items"] for path in before)
        assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
        found = embeddings_at(output)
        assert found.items == tuple(map(str, readable))
        np.testing.assert_allclose(found.vectors, expected, rtol=0, atol=2e-6)
        assert not list(output.parent.rglob(".*"))
        shutil.rmtree(output)

    assert harness.kill_at_each_step(lambda: run(resume=False), check, every=4, most=4000) > 5
