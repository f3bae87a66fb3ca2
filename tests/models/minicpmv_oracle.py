"""The oracle of MiniCPM-V and OmniLMM: models of its checkpoints, and each record as a call of a Part.

For test modules of several areas, which load this file with `runpy`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from vlm_export.family import Model, Part

DATA = Path(__file__).parents[1] / "data" / "minicpmv"
GRID = ("v1_0", "v2_0", "omnilmm")
PACKED = ("v2_5", "v2_6", "v4_5")
PATCH = 14
# Recorded outputs that are no output of a Part, and how many records there are of each kind.
POSITION_IDS, POSITIONS, LANGUAGE_MODEL = "position_ids.", "output.resampler_pos_embed_2x7", "output.llm_"
Array = npt.NDArray[Any]


class Case(NamedTuple):
    """A recorded output, and the Part and inputs that must give it."""

    record: str
    part: str
    inputs: dict[str, Array]
    expected: Array


def golden(variant: str) -> dict[str, Array]:
    return dict(load_file(DATA / variant / "golden.safetensors"))


def part_of(model: Model, name: str) -> Part:
    return next(part for part in model.parts if part.name == name)


def cases(variant: str) -> list[Case]:
    """All records of outputs, at least one Case each; `vision`, `vision_tokens` and `resampler` are all called."""
    found = list(_grid_cases(variant) if variant in GRID else _packed_cases(variant))
    covered = {case.record for case in found}
    others = {key for key in golden(variant) if key.startswith(("output.", "preprocess.r")) and key not in covered}
    assert all(key == POSITIONS or key.startswith(LANGUAGE_MODEL) for key in others), others
    return found


def padded(pixels: Array) -> Array:
    """Zeros below and to the right, up to whole patches: timm's `dynamic_img_pad`, which a host does."""
    height, width = pixels.shape[2:]
    return np.pad(pixels, ((0, 0), (0, 0), (0, -height % PATCH), (0, -width % PATCH)))


def packed(image: Array) -> Array:
    """(3, H, W) → (3, p, p · L), patches row by row."""
    channels, height, width = image.shape
    blocks = image.reshape(channels, height // PATCH, PATCH, width // PATCH, PATCH)
    row: Array = blocks.transpose(0, 2, 1, 3, 4).reshape(channels, PATCH, -1)
    return row


def _grid_cases(variant: str) -> Iterator[Case]:
    records = golden(variant)
    tower = "vision_tower" if variant == "omnilmm" else "vpm"
    for size in [key.removeprefix("input.pixel_") for key in records if key.startswith("input.pixel_")]:
        pixels = padded(records[f"input.pixel_{size}"])
        rows, columns = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
        tokens = records[f"output.{tower}_{size}"]
        patches = tokens[:, tokens.shape[1] - rows * columns :].reshape(1, rows, columns, -1)
        features = records[f"output.resampler_{size}"]
        yield Case(f"output.{tower}_{size}", "vision_tokens", {"pixel_values": pixels}, patches)
        yield Case(f"output.resampler_{size}", "resampler", {"image_tokens": patches}, features)
        yield Case(f"output.resampler_{size}", "vision", {"pixel_values": pixels}, features)
    if "preprocess.resampler" in records:
        prepared = {"pixel_values": records["preprocess.pixel_values"][None]}
        yield Case("preprocess.resampler", "vision", prepared, records["preprocess.resampler"])


def _packed_cases(variant: str) -> Iterator[Case]:
    records = golden(variant)
    sizes = records["input.tgt_sizes"].astype(np.int64)
    rows = [packed(records[f"input.image_{i}"])[None] for i in range(len(sizes))]
    for i, row in enumerate(rows):
        inputs = {"pixel_values": row, "tgt_sizes": sizes[i : i + 1]}
        tokens, features = records[f"output.vpm_single_{i}"], records[f"output.resampler_single_{i}"]
        yield Case(f"output.vpm_single_{i}", "vision_tokens", inputs, tokens)
        split = {"image_tokens": tokens, "tgt_sizes": sizes[i : i + 1]}
        yield Case(f"output.resampler_single_{i}", "resampler", split, features)
        yield Case(f"output.resampler_single_{i}", "vision", inputs, features)
    longest = max(row.shape[3] for row in rows)
    batch = np.concatenate([np.pad(row, ((0, 0), (0, 0), (0, 0), (0, longest - row.shape[3]))) for row in rows])
    tokens, features = records["output.vpm_batch"], records["output.resampler_batch"]
    # 2.5 lays out positions over the longest image's patches, and hides no padding: as if all were of its length.
    seen = np.tile(np.array([[1, longest // PATCH]]), (len(rows), 1)) if variant == "v2_5" else sizes
    yield Case("output.vpm_batch", "vision_tokens", {"pixel_values": batch, "tgt_sizes": seen}, tokens)
    yield Case("output.resampler_batch", "resampler", {"image_tokens": tokens, "tgt_sizes": sizes}, features)
    if variant != "v2_5":
        yield Case("output.resampler_batch", "vision", {"pixel_values": batch, "tgt_sizes": sizes}, features)
    if variant == "v4_5":
        yield from _video_cases(records)


def _video_cases(records: dict[str, Array]) -> Iterator[Case]:
    """Three frames of 4 · 4 patches, in groups of several forms; a shorter group is filled with a hidden frame."""
    frames, size, hidden = records["input.video_features"], [4, 4], [0, 0]
    forms = {
        "output.resampler_temporal_0_7_19": (frames[None], [[size] * 3], [[0, 7, 19]]),
        "output.resampler_no_temporal": (frames[:, None], [[size]] * 3, [[-1]] * 3),
        "output.resampler_temporal_pair_plus_single": (
            np.stack([frames[:2], np.stack([frames[2], np.zeros_like(frames[2])])]),
            [[size, size], [size, hidden]],
            [[3, 4], [-1, -1]],
        ),
    }
    for record, (tokens, sizes, ids) in forms.items():
        inputs = {"image_tokens": tokens, "tgt_sizes": np.array(sizes), "temporal_ids": np.array(ids)}
        yield Case(record, "video_resampler", inputs, records[record])


def valid(case: Case, outputs: Array) -> Array:
    """The values that mean something, in one row: tokens of padding do not."""
    if case.record != "output.vpm_batch":
        return outputs.reshape(1, -1)
    sizes = case.inputs["tgt_sizes"]
    return np.concatenate([row[: count[0] * count[1]].ravel() for row, count in zip(outputs, sizes, strict=True)])[None]


def read_manifests() -> dict[str, dict[str, tuple[int, ...]]]:
    """Name of a config → published key → shape; layers, which are all alike, are stored once with their number."""
    stored = json.loads(gzip.decompress((DATA / "published.json.gz").read_bytes()))
    manifests: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, entry in stored.items():
        shapes = {key: tuple(shape) for key, shape in entry["tensors"].items()}
        manifests[name] = {}
        for key, shape in shapes.items():
            for i in range(entry["layers"] if "{i}" in key else 1):
                manifests[name][key.replace("{i}", str(i))] = shape
    return manifests


def run_module(part: Part, inputs: dict[str, Array]) -> Array:
    with torch.inference_mode():
        outputs: Array = part.module(*(torch.from_numpy(inputs[name]) for name in part.signature.input_names)).numpy()
    return outputs


@dataclass(frozen=True)
class MetaStore:
    """Weights without memory."""

    def new(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, device="meta")
