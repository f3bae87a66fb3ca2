"""The two exporter back ends: a Part in, an ONNX graph out whose weights still lie in the mapped files."""

from __future__ import annotations

import gc
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch

from vlm_export.errors import EnvironmentFailure, UsageError
from vlm_export.exporting.lowerings.operators import GELU_OPSET, lower_attention, lower_tanh_gelu
from vlm_export.exporting.lowerings.resample import Interpolation, InterpolationLowering, lower_interpolation
from vlm_export.exporting.lowerings.resample_resize import RESIZE_OPSET
from vlm_export.exporting.lowerings.translations import kept_translations
from vlm_export.exporting.repeated_blocks import traced_in_blocks
from vlm_export.family import Part
from vlm_export.graph.core.skeleton import SKELETON_THRESHOLD_BYTES, attach_weights
from vlm_export.specs.signature import Axis

Exporter = Literal["dynamo", "torchscript"]
Target = Literal["onnxruntime", "openvino", "tensorrt", "web"]
DEFAULT_OPSET = 18
OPSETS: dict[Exporter, range] = {"dynamo": range(18, 24), "torchscript": range(11, 21)}
# From this opset on, the dynamo back end writes one `Attention` operator.
ATTENTION_OPSET = 23
_BATCH, _OTHER = 2, 7


@dataclass(frozen=True)
class Lowerings:
    """Which form an operator takes where there is more than one.

    Attributes:
        interpolation: `matmul` equals torch's own rounding in every runtime. `resize-op` is one node, of opset 18 or
            later, whose coordinates are rounded as the runtime likes.
    """

    interpolation: Interpolation = "matmul"


DEFAULT_LOWERINGS = Lowerings()


def choose_lowerings(target: Target | None) -> Lowerings:
    """The forms for the runtime that a graph is meant for; None: for any of them.

    OpenVINO executes an antialiasing `Resize` wrongly (2026.4: errors above 1), TensorRT and WebGPU not at all.
    """
    return Lowerings(interpolation="resize-op" if target == "onnxruntime" else "matmul")


def choose_exporter(opset: int, exporter: Exporter | None) -> Exporter:
    """The back end for the opset: dynamo where it reaches, otherwise torchscript, unless one is asked for."""
    chosen: Exporter = exporter or ("dynamo" if opset in OPSETS["dynamo"] else "torchscript")
    if opset in OPSETS[chosen]:
        return chosen
    if exporter is None:
        raise UsageError(
            f"no back end writes opset {opset}", expected="11 to 23", got=str(opset), fix="choose another --opset"
        )
    other_reaches = any(opset in reach for reach in OPSETS.values())
    raise UsageError(
        f"the {chosen} back end does not write opset {opset}",
        expected=f"{OPSETS[chosen].start} to {OPSETS[chosen].stop - 1}",
        got=str(opset),
        fix="choose another --opset" + (", or leave --exporter out" if other_reaches else ""),
    )


def export_part(part: Part, opset: int, exporter: Exporter, lowerings: Lowerings = DEFAULT_LOWERINGS) -> ir.Model:
    """Exports the part with its symbolic axes; initializers refer to the module's own, mapped, tensors.

    Raises:
        EnvironmentFailure: the back end failed; the message names it and the part.
    """
    export = _export_dynamo if exporter == "dynamo" else _export_torchscript
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_no_collections())
        if opset < ATTENTION_OPSET:
            stack.enter_context(lower_attention())
        if opset < GELU_OPSET:
            stack.enter_context(lower_tanh_gelu())
        stack.enter_context(lower_interpolation(_interpolation(part, opset, lowerings)))
        try:
            return export(part, opset)
        except (RuntimeError, TypeError, ValueError, AttributeError, torch.onnx.OnnxExporterError) as error:
            raise EnvironmentFailure(
                f"the {exporter} back end failed on part {part.name}",
                where=f"torch {torch.__version__}, opset {opset}",
                got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
                fix="try the other back end (--exporter) or another --opset; install the pinned constraints",
            ) from error


def _interpolation(part: Part, opset: int, lowerings: Lowerings) -> InterpolationLowering:
    form = lowerings.interpolation if opset >= RESIZE_OPSET else "matmul"
    # The first axis is the batch, which is no size of an image.
    static_sizes = not any(isinstance(axis, str) for entry in part.signature.inputs for axis in entry.shape[1:])
    return InterpolationLowering(form, static_sizes)


def example_tensors(part: Part) -> tuple[torch.Tensor, ...]:
    """What a back end traces: sizes of at least 2, each axis its own, so that none is specialised to 1 or tied to
    another."""
    axes = [axis for axis in part.signature.axes if not axis.sum_of]
    sizes = {axis.name: (_OTHER + i) * axis.multiple_of for i, axis in enumerate(axes)}
    sizes |= {"batch": _BATCH}
    limits = {axis.name: axis.maximum for axis in axes}
    sizes = {name: min(size, limits.get(name) or size) for name, size in sizes.items()}
    arrays = part.examples(part.signature.related(sizes), seed=0)
    return tuple(torch.from_numpy(arrays[name]) for name in part.signature.input_names)


def _export_dynamo(part: Part, opset: int) -> ir.Model:
    with kept_translations():
        return traced_in_blocks(part, lambda short: _trace_dynamo(short, opset))


def _trace_dynamo(part: Part, opset: int) -> ir.Model:
    signature = part.signature
    dims = {axis.name: _dimension(axis) for axis in signature.axes}
    shapes = [{i: dims[a] for i, a in enumerate(t.shape) if isinstance(a, str)} for t in signature.inputs]
    program = torch.onnx.export(
        part.module,
        example_tensors(part),
        dynamo=True,
        # torch's own optimizer folds weights into new ones in memory; ours works on the graph without weights.
        optimize=False,
        opset_version=opset,
        input_names=list(signature.input_names),
        output_names=list(signature.output_names),
        dynamic_shapes=_as_arguments(part.module, shapes),
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return program.model


def _as_arguments(module: torch.nn.Module, shapes: list[dict[int, Any]]) -> tuple[Any, ...]:
    """One entry for each argument of `forward`, as torch.export wants it: `*args` are a single one."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:named], tuple(shapes[named:]))


def _dimension(axis: Axis) -> Any:
    """torch.export's form of an axis; one with steps is a multiple of a dimension that counts them."""
    step = axis.multiple_of
    name = axis.name if step == 1 else f"{axis.name}_steps"
    steps = torch.export.Dim(name, min=axis.minimum // step, max=None if axis.maximum is None else axis.maximum // step)
    return steps if step == 1 else step * steps


def _export_torchscript(part: Part, opset: int) -> ir.Model:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        with _inference_without_weights():
            _trace(part, opset, path)
        model = ir.from_proto(onnx.load(path))
    attach_weights(model, _weights_by_name(part))
    return model


def _trace(part: Part, opset: int, path: Path) -> None:
    torch.onnx.export(
        part.module,
        example_tensors(part),
        path,
        dynamo=False,
        # Weights stay out of the protobuf, which is limited to 2 GB and would copy them; they come back below.
        # Folding would bake transposed or fused weights into it, under names of its own.
        export_params=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        opset_version=opset,
        input_names=list(part.signature.input_names),
        output_names=list(part.signature.output_names),
        dynamic_axes=part.signature.dynamic_axes(),
    )


@contextmanager
def _inference_without_weights() -> Iterator[None]:
    """Hides large weights from torch's shape inference, which would hold a transposed copy of each.

    Shapes are known from the trace; only small tensors, such as shapes and indices, are needed as values.
    """
    name = "_jit_pass_onnx_graph_shape_type_inference"
    original = getattr(torch._C, name)

    def infer(graph: Any, weights: Mapping[str, torch.Tensor], opset: int) -> None:
        original(graph, {key: t for key, t in weights.items() if t.nbytes <= SKELETON_THRESHOLD_BYTES}, opset)

    setattr(torch._C, name, infer)
    try:
        yield
    finally:
        setattr(torch._C, name, original)


def _weights_by_name(part: Part) -> dict[str, ir.TensorProtocol]:
    """The part's tensors as ONNX tensors that share their memory."""
    return {name: ir.Tensor(tensor.numpy(), name=name) for name, tensor in part.module.state_dict().items()}


@contextmanager
def _no_collections() -> Iterator[None]:
    """The back ends make millions of objects that live to their end: walking over them takes much of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """The back ends warn of their own deprecation and of constants that are constant by design."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
