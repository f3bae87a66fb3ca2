"""The graphs of one part: in float32, by the recipe, and by onnxruntime's own defaults for comparison."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from vlm_export.bundle.manifest import PRECISIONS, PartRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.quantised import QuantisedFrom
from vlm_export.graph.core.files import Storage, open_model, save_model
from vlm_export.precision.fused_attention import fuse_attention
from vlm_export.precision.one_node import quiet
from vlm_export.precision.quantised import Calibration, Scratch, changed_weights, quantise
from vlm_export.precision.recipes import Recipe
from vlm_export.quantizing.calibration import calibrated
from vlm_export.quantizing.task_runs import Feeds

# onnxruntime's quantiser holds the whole model several times, in one message of protobuf.
_LARGEST_NAIVE_BYTES = 1_500_000_000
_MAX_CAUSE = 160
_WITHOUT_CONTRIBUTED = "tensorrt"
_LARGEST_INLINE_BYTES = 1 << 20


@dataclass(frozen=True)
class QuantisedGraph:
    """A written graph.

    Attributes:
        paths: the graph and its data files.
        weights: name of an initializer → the float32 weight that it holds.
        kept: weights that stay in float32 → why.
        smoothed: initializers that were scaled → the norm's weight that tells by how much.
        fused: number of attentions that became one node.
    """

    paths: tuple[Path, ...]
    weights: Mapping[str, QuantisedFrom]
    kept: Mapping[str, str]
    smoothed: Mapping[str, str]
    fused: int

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)


def write_quantised(
    bundle: OpenBundle,
    part: PartRecord,
    recipe: Recipe,
    target: Path,
    scratch: Path,
    *,
    calibration: Calibration,
    reduce_range: bool,
    keep: Mapping[str, str],
) -> QuantisedGraph:
    """Quantises a part's float32 graph and writes it, with a data file beside it above 64 MiB of weights.

    Args:
        calibration: by `part_calibration`.
        keep: weights that stay in float32, each with the reason.
    """
    model, fused = _source(bundle, part)
    levels = scratch / "levels.bin"
    made = quantise(
        model,
        recipe,
        levels,
        reduce_range=reduce_range,
        calibration=calibration,
        keep=keep,
        by_steps=_is_fed_by_steps(part),
    )
    written = save_model(made.model, target, storage=Storage())
    levels.unlink()
    return QuantisedGraph(tuple(written), made.weights, made.kept, made.smoothed, fused)


def write_tried(
    bundle: OpenBundle,
    part: PartRecord,
    recipe: Recipe,
    scratch: Path,
    *,
    calibration: Calibration,
    reduce_range: bool,
    keep: Mapping[str, str],
) -> QuantisedGraph:
    """As `write_quantised`, for a graph that a search runs and nobody publishes.

    What stays in float32 lies in a copy of the bundle's data files, made once for all graphs of a search, so that each
    writes the weights alone that it quantises.
    """
    model, fused = _source(bundle, part)
    target, levels, others = (scratch / f"tried.{ending}" for ending in ("onnx", "levels", "others"))
    made = quantise(
        model,
        recipe,
        levels,
        reduce_range=reduce_range,
        calibration=calibration,
        keep=keep,
        by_steps=_is_fed_by_steps(part),
    )
    computed = Scratch(others)
    for name, value in made.model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            if not (copy := scratch / tensor.location).exists():
                shutil.copyfile(tensor.path, copy)
        elif tensor is not None and tensor.nbytes > _LARGEST_INLINE_BYTES:
            value.const_value = computed.put(tensor, name)
    ir.save(made.model, target)
    return QuantisedGraph((target, levels, others), made.weights, made.kept, made.smoothed, fused)


def part_calibration(
    bundle: OpenBundle, part: PartRecord, recipe: Recipe, scratch: Path, feeds: Sequence[Feeds], threads: int | None
) -> Calibration:
    """What a static recipe calibrates on the inputs of a part; nothing for other recipes."""
    if recipe.kind != "static":
        return Calibration()
    return calibrated(_source(bundle, part)[0], recipe, feeds, scratch, threads)


def part_weights(bundle: OpenBundle, part: PartRecord, recipe: Recipe) -> dict[str, int]:
    """Weights that the recipe changes in a part → how many nodes read each."""
    return changed_weights(_source(bundle, part)[0], recipe)


def _is_fed_by_steps(part: PartRecord) -> bool:
    """Whether a part has a cache: an axis is the sum of what was there and what is new."""
    return any(axis.sum_of for axis in part.signature.axes)


def _source(bundle: OpenBundle, part: PartRecord) -> tuple[ir.Model, int]:
    """The float32 graph as it is quantised, and how many of its attentions were fused."""
    model = open_model(bundle.model_files(part.variant(PRECISIONS[0])))
    # TensorRT's parser has none of ONNX Runtime's operators.
    return model, 0 if bundle.manifest.export.target == _WITHOUT_CONTRIBUTED else fuse_attention(model)


def write_naive(bundle: OpenBundle, part: PartRecord, target: Path) -> str:
    """`onnxruntime.quantization.quantize_dynamic` with its defaults; why it made nothing, or ""."""
    path = bundle.model_files(part.variant(PRECISIONS[0]))
    size = float32_bytes(bundle, part)
    if size > _LARGEST_NAIVE_BYTES:
        return f"not run: the graph has {size / 1e9:.1f} GB, which it would hold several times"
    try:
        with quiet():
            from onnxruntime.quantization import quantize_dynamic

            quantize_dynamic(onnx.load(path), target)
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime's quantisers raise what happens to break.
        return f"it fails: {type(error).__name__}: {error}"[:_MAX_CAUSE].partition("\n")[0]
    return ""


def float32_bytes(bundle: OpenBundle, part: PartRecord) -> int:
    """Bytes of a part's float32 graph with its weights."""
    variant = part.variant(PRECISIONS[0])
    return sum(bundle.manifest.files[name].size_bytes for name in (variant.file, *variant.external_data))
