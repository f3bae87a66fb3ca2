"""A folder of embeddings of 20,000 images whose run is killed 30 times at random: what an undisturbed run makes."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_export.runtime.bulk.folder import embeddings_at, folder_state, skipped_items

pytestmark = pytest.mark.slow
ITEMS, KILLS, SHARD_ITEMS = 20_000, 30, 100
# One in a thousand.
BAD = range(7, ITEMS, 1000)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Small JPEGs that all differ, of mixed sizes."""
    folder, noise = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(ITEMS):
        pixels = noise.integers(0, 256, (16 + number % 17, 16 + number % 13, 3), dtype=np.uint8)
        path = folder / f"{number:05d}.jpg"
        Image.fromarray(pixels).save(path)
        if number in BAD:
            path.write_bytes(path.read_bytes()[:60])
    return folder


def test_killed_at_random_and_resumed(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    calm, killed = tmp_path / "calm", tmp_path / "outputs" / "killed"

    def command(output: Path, *more: str) -> list[str]:
        shards = ("--shard-format", "npy", "--shard-items", str(SHARD_ITEMS), "--threads", "2", "--quiet")
        return [
            sys.executable,
            "-m",
            "vlm_export",
            "embed",
            str(tiny_bundle),
            str(images),
            "-o",
            str(output),
            *shards,
            *more,
        ]

    def shards() -> int:
        return len(list(killed.glob("part-*.npy")))

    subprocess.run(command(calm), check=True, capture_output=True)
    draw = random.Random(0)
    for _ in range(KILLS):
        more = draw.randrange(5)
        goal, is_working = shards() + more, more > 0
        with subprocess.Popen(command(killed, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            while shards() < goal and run.poll() is None:
                time.sleep(0.002)
            # Where no shard is waited for, somewhere between the start of Python and the first batches.
            time.sleep(draw.uniform(0, 0.1 if is_working else 1.5))
            assert run.poll() is None, "the run ended before its kill"
            run.kill()
    assert shards() < ITEMS // SHARD_ITEMS
    subprocess.run(command(killed, "--resume"), check=True, capture_output=True)

    assert {path.name: path.read_bytes() for path in killed.iterdir()} == {
        path.name: path.read_bytes() for path in calm.iterdir()
    }
    assert list((tmp_path / "outputs").iterdir()) == [killed]
    names = [str(images / f"{number:05d}.jpg") for number in range(ITEMS)]
    assert embeddings_at(killed).items == tuple(name for number, name in enumerate(names) if number not in BAD)
    assert [entry.item for entry in skipped_items(killed)] == [names[number] for number in BAD]
    assert folder_state(killed).skipped == len(BAD)
