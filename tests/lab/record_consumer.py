"""Packs what a real consumer answered (the folder that a collector wrote) into a file of `tests/data/consumers`.

python tests/lab/record_consumer.py ANSWERS NAME.npz

Of pixels the levels of 0 to 255 are kept, of the images that preparations part on; they are whole numbers in what these
consumers make, and the demo's mean and deviation give the pixels back.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

KEPT = ("margin-1.png", "orientation.png", "portrait.png", "reduced.png")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def main(answers: Path, target: Path) -> None:
    def read(name: str) -> np.ndarray[Any, Any]:
        npy = answers / f"{name}.npy"
        return np.load(npy) if npy.exists() else np.array(json.loads((answers / f"{name}.json").read_text()), object)

    texts, images = list(read("texts")), list(read("images"))
    rows = [list(row) for row in read("ids")]
    ids = np.array([row + [-1] * (max(map(len, rows)) - len(row)) for row in rows], np.int16)
    kept = [name for name in KEPT if name in images]
    pixels = np.array([read("pixels")[images.index(name)] for name in kept], np.float64)
    exact = (pixels * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1))) * 255
    assert np.abs(exact - exact.round()).max() < 0.01
    np.savez_compressed(
        target,
        ids=ids,
        levels=exact.round().astype(np.uint8),
        text_vectors=np.array(list(read("text_vectors")), np.float32),
        image_vectors=np.array(list(read("image_vectors")), np.float32),
        texts=np.array(json.dumps(texts)),
        images=np.array(json.dumps(images)),
        kept=np.array(json.dumps(kept)),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
