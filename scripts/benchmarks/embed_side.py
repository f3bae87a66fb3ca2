"""One side of the benchmark `embed`, in a process of its own, also of another environment: it imports no sibling.

    PYTHON embed_side.py SIDE FOLDER THREADS [PRECISION ENGINE]

Each line of the input is a JSON list of files and the name of a `.npy` file; each gets a line with the seconds from the
names to that file, which holds the vectors, float32 (files, D).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

BATCH = 32
Encode = Callable[[Sequence[str]], Any]


def main() -> int:
    """Serves until the input ends."""
    side, folder, threads, *options = sys.argv[1:]
    encode = SIDES[side](folder, int(threads), *options)
    for line in sys.stdin:
        files, target = json.loads(line)
        start = time.perf_counter()
        np.save(target, encode(files))
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    return 0


def _bundle(folder: str, threads: int, precision: str, engine: str) -> Encode:
    """`vlm_export.embed` to a file of embeddings, which is read again."""
    from vlm_export import EmbedOptions, embed, load
    from vlm_export.runtime.bulk.folder import embeddings_at

    model: Any = load(folder, precision=precision, engine=engine, threads=threads)  # type: ignore[arg-type]
    scratch = TemporaryDirectory()

    def encode(files: Sequence[str]) -> Any:
        output = Path(scratch.name) / "vectors.npy"
        embed(model, list(files), output, EmbedOptions(batch_size=BATCH, overwrite=True))
        return embeddings_at(output).vectors

    return encode


def _transformers(folder: str, threads: int, loaders: int) -> Encode:
    """transformers' model and image processor, as its documentation shows them, in batches.

    Args:
        loaders: of torch's DataLoader: processes that decode and prepare images beside the model; 0: none.
    """
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader
    from transformers import AutoImageProcessor, AutoModel

    torch.set_num_threads(threads)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)

    def prepared(files: Sequence[str]) -> Any:
        images = [Image.open(file).convert("RGB") for file in files]
        return processor(images=images, return_tensors="pt")["pixel_values"]

    def encode(files: Sequence[str]) -> Any:
        batches: Iterable[Any] = DataLoader(list(files), BATCH, collate_fn=prepared, num_workers=loaders)  # type: ignore[arg-type]
        rows = []
        with torch.inference_mode():
            for pixels in batches:
                found = model.get_image_features(pixel_values=pixels)
                rows.append(getattr(found, "pooler_output", found))
            return torch.nn.functional.normalize(torch.cat(rows), dim=-1).numpy()

    return encode


def _fastembed(folder: str, threads: int) -> Encode:
    """fastembed on a folder with `model.onnx` and `preprocessor_config.json`."""
    from fastembed import ImageEmbedding

    known = (model["model"] for model in ImageEmbedding.list_supported_models() if model["model_file"] == "model.onnx")
    model = ImageEmbedding(next(known), specific_model_path=folder, threads=threads)
    return lambda files: np.stack(list(model.embed(list(files), batch_size=BATCH)))


def _modern(folder: str, threads: int) -> Encode:
    """modern-onnx-clip on a folder with `visual.onnx` and `config.json`; it takes all cores, without an option."""
    from onnx_clip.model import OnnxClip
    from PIL import Image

    model = OnnxClip(folder, silent=True)

    def encode(files: Sequence[str]) -> Any:
        starts = range(0, len(files), BATCH)
        parts = [[Image.open(file) for file in files[start : start + BATCH]] for start in starts]
        return np.concatenate([model.get_image_embedding(part) for part in parts])

    return encode


SIDES: dict[str, Callable[..., Encode]] = {
    "bundle": _bundle,
    "transformers": lambda folder, threads: _transformers(folder, threads, 0),
    "transformers-loader": lambda folder, threads: _transformers(folder, threads, 1),
    "fastembed": _fastembed,
    "modern-onnx-clip": _modern,
}

if __name__ == "__main__":
    sys.exit(main())
