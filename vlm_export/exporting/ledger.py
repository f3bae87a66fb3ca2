"""Accounts for every initializer of a written graph: which parameter it is, and which stored tensors that is made of.

The parameters are those of a module built from the checkpoint, so that a graph can be held against the checkpoint
again later: a changed row of one rare token is found, which no grid of random inputs need see.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor, nn

from vlm_export.bundle.ledger import CheckpointTensor, GraphLedger, LedgerEntry, found_ledger
from vlm_export.errors import VerificationError
from vlm_export.family import Part
from vlm_export.graph.passes.constant_fold import made_of
from vlm_export.models.reading.weights import origins_of
from vlm_export.precision.fp16_rounding import Original

Array = npt.NDArray[Any]
# A number, a shape, a table that the code computes; whatever is larger must be a weight, or made of weights.
_CONSTANT_BYTES = 1 << 20
_BLOCK_BYTES = 16 << 20
_TRANSPOSED = re.compile(r"(?P<stem>.+)\.(?:transposed|\((?P<perm>[\d, ]+)\))")
_FOLDED = re.compile(r"(?P<stem>.+)\.(?P<kind>weight|bias)\.folded(?:\.\d+)?")
_SHOWN_ROWS = 5
# Of a constant that float16 rounded: numbers of the code, not tables that were computed from weights.
_RECORDED_VALUES = 16


@dataclass(frozen=True)
class _Made:
    """What an initializer should hold: an array whose values may still have to be cast, None where nothing but the
    graph knows them; and its story."""

    values: Array | None
    parameters: tuple[str, ...]
    transformation: str


def folded_sources(graph: ir.Model) -> dict[str, tuple[str, ...]]:
    """Initializers that the simplification computed from others → the names of those."""
    return {name: made_of(value) for name, value in graph.graph.initializers.items() if made_of(value)}


def original_of(
    part: Part, graph: ir.Model, constants: Mapping[str, ir.TensorProtocol]
) -> Callable[[str], Original | None]:
    """Tells of an initializer what makes the float32 tensor that it was before it was rounded, None where nothing does.

    Weights are the module's parameters, so that a wrong one in the graph is no excuse for itself.

    Args:
        constants: what other initializers held, from `rounded_from` or from `recorded_constants`.
    """
    tensors = _parameters(part.module)
    # Apart from the graph, whose initializers the caller replaces.
    initializers = {name: value.const_value for name, value in graph.graph.initializers.items()}

    def weight(name: str) -> _Made | None:
        stored = initializers[name]
        return None if stored is None else _weight(name, stored, part.module, tensors)

    def tensor(name: str) -> ir.TensorProtocol:
        made = weight(name)
        assert made is not None
        return ir.tensor(np.ascontiguousarray(made.values), name=name)

    def original(name: str) -> Original | None:
        # Folded weights are computed again when they are written, so that one is in memory at a time.
        if weight(name) is not None:
            return partial(tensor, name)
        return partial(constants.__getitem__, name) if name in constants else None

    return original


def recorded_constants(ledger: GraphLedger, graph: ir.Model) -> dict[str, ir.TensorProtocol]:
    """float16 initializers → what they were before they were rounded, where the ledger tells."""
    found: dict[str, ir.TensorProtocol] = {}
    for entry in ledger.initializers:
        stored = graph.graph.initializers[entry.name].const_value
        if stored is None or entry.data_type != int(ir.DataType.FLOAT16):
            continue
        if entry.unrounded is None:
            found[entry.name] = ir.LazyTensor(
                partial(_widened, stored), dtype=ir.DataType.FLOAT, shape=ir.Shape(entry.shape), name=entry.name
            )
        elif entry.unrounded:
            numbers = np.asarray(entry.unrounded, np.float32).reshape(entry.shape)
            found[entry.name] = ir.tensor(numbers, name=entry.name)
    return found


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def account_for(
    part: Part,
    root: Path,
    graph: str,
    computed: Mapping[str, Sequence[str]] | None = None,
    constants: Mapping[str, ir.TensorProtocol] | None = None,
) -> GraphLedger:
    """The ledger of a written graph, after comparing each weight in it with the module's parameter.

    Args:
        part: whose module was built from the checkpoint.
        root: the bundle; `graph` is relative to it.
        computed: from `folded_sources`; None where only the graph's file is known: then what the file alone does not
            explain is taken as computed.
        constants: as for `original_of`; the ledger records those that rounding changed.

    Raises:
        VerificationError: a weight is not the checkpoint's, or an initializer is nobody's.
    """
    tensors = _parameters(part.module)
    stored = ir.load(root / graph).graph.initializers
    problems: list[str] = []
    entries = []
    found = found_ledger(root, graph)
    for entry in found.initializers:
        constant = stored[entry.name].const_value
        assert constant is not None
        made, before = _weight(entry.name, constant, part.module, tensors), None
        if made is None:
            made, before = _unnamed(entry.name, constant, tensors, computed), (constants or {}).get(entry.name)
            if made is not None and before is not None:
                made = replace(made, values=before.numpy())
        if made is not None and made.values is not None:
            problems += _differences(entry.name, made, constant.numpy(), tensors)
        if made is None:
            problems.append(f"{entry.name}: {constant.nbytes} bytes that are no parameter, nor made of any")
            continue
        unrounded = None if before is None else _unrounded(before.numpy(), constant.numpy())
        entries.append(replace(_told(entry, made, tensors), unrounded=unrounded))
    if problems:
        more = f"; and {len(problems) - _SHOWN_ROWS} more" if len(problems) > _SHOWN_ROWS else ""
        raise VerificationError(
            f"{len(problems)} weights of part {part.name!r} are not the checkpoint's",
            where=graph,
            expected="the checkpoint's values, cast, transposed or folded as the ledger says",
            got="; ".join(problems[:_SHOWN_ROWS]) + more,
            fix="this graph must not be used; export the model again",
        )
    return replace(found, initializers=tuple(entries))


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _array(tensor: Tensor) -> Array:
    values: Array = tensor.detach().numpy()
    return values


def _weight(name: str, stored: ir.TensorProtocol, module: nn.Module, tensors: Mapping[str, Tensor]) -> _Made | None:
    """The parameter that the initializer is, by its name or else by its values; None where it is none."""
    return _made(name, module, tensors) or _equal_parameter(stored.numpy(), tensors)


def _equal_parameter(values: Array, tensors: Mapping[str, Tensor]) -> _Made | None:
    """Simplification moves small weights as it moves constants, and calls them by the name of the value they become."""
    for name, tensor in tensors.items():
        own = _array(tensor)
        for array, transformation in ((own, "as it is"), (own.T, "transposed")):
            if values.ndim and array.shape == values.shape and not _other_rows(array, values, 0):
                return _Made(array, (name,), transformation)
    return None


def _made(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> _Made | None:
    """By the name that the export gives each kind of initializer; None where the name tells nothing."""
    if name in tensors:
        return _Made(_array(tensors[name]), (name,), "as it is")
    if (match := _TRANSPOSED.fullmatch(name)) and match["stem"] in tensors:
        values = _array(tensors[match["stem"]])
        perm = tuple(int(axis) for axis in match["perm"].split(",") if axis.strip()) if match["perm"] else None
        if perm is not None and len(perm) > values.ndim:
            values = values.reshape(*(1 for _ in range(len(perm) - values.ndim)), *values.shape)
        return _Made(np.transpose(values, perm), (match["stem"],), "transposed")
    if match := _FOLDED.fullmatch(name):
        return _folded(match["stem"], match["kind"], module)
    return None


def _folded(stem: str, kind: str, module: nn.Module) -> _Made | None:
    """A convolution's weight or bias with the norm behind it: the one that its parent registers next."""
    parent_name, _, own = stem.rpartition(".")
    siblings = list(module.get_submodule(parent_name)._modules.items()) if parent_name or own in module._modules else []
    names = [name for name, _ in siblings]
    if own not in names or names.index(own) + 1 >= len(names):
        return None
    conv = siblings[names.index(own)][1]
    norm_own, norm = siblings[names.index(own) + 1]
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
        return None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gamma, beta, mean, variance = (
        _array(tensor).astype(np.float64) for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    # The graph states epsilon in float32.
    factor = gamma / np.sqrt(variance + np.float64(np.float32(norm.eps)))
    prefix = f"{parent_name}." if parent_name else ""
    parameters = [f"{prefix}{norm_own}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    if kind == "weight":
        values = (_array(conv.weight).astype(np.float64) * factor[:, None, None, None]).astype(np.float32)
        return _Made(values, (f"{stem}.weight", *parameters), "batch norm folded in")
    start = _array(conv.bias).astype(np.float64) if conv.bias is not None else 0.0
    return _Made(((start - mean) * factor + beta).astype(np.float32), tuple(parameters), "batch norm folded in")


def _unnamed(
    name: str, constant: ir.TensorProtocol, tensors: Mapping[str, Tensor], computed: Mapping[str, Sequence[str]] | None
) -> _Made | None:
    """What is no parameter itself."""
    sources = [source.removesuffix(".transposed") for source in (computed or {}).get(name, ())]
    if weights := tuple(dict.fromkeys(source for source in sources if source in tensors)):
        return _Made(None, weights, "computed from weights alone")
    if constant.nbytes <= _CONSTANT_BYTES or computed is None or sources:
        return _Made(None, (), "a constant that the module's code computes")
    return None


def _unrounded(before: Array, after: Array) -> tuple[float, ...] | None:
    """For the ledger: None where rounding changed nothing, nothing where the values are too many to record."""
    if np.array_equal(before, after.astype(before.dtype)):
        return None
    is_short = before.size <= _RECORDED_VALUES and bool(np.isfinite(before).all())
    return tuple(before.astype(float).ravel().tolist()) if is_short else ()


def _differences(name: str, made: _Made, found: Array, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    assert made.values is not None
    parameter = made.parameters[0] if made.parameters else ""
    keys = ", ".join(key for key, _ in origins_of(tensors[parameter])) if parameter in tensors else ""
    stated = f"{name} (checkpoint: {keys})" if keys else name
    if made.values.shape != found.shape:
        yield f"{stated}: shape {found.shape} instead of {made.values.shape}"
        return
    axis = len(found.shape) - 1 if made.transformation == "transposed" and found.ndim == 2 else 0
    rows = _other_rows(made.values, found, axis)
    if rows:
        shown = ", ".join(map(str, rows[:_SHOWN_ROWS])) + ("" if len(rows) <= _SHOWN_ROWS else ", …")
        yield f"{stated}: {len(rows)} of {found.shape[axis] if found.ndim else 1} rows differ ({shown})"


def _other_rows(expected: Array, found: Array, axis: int) -> list[int]:
    """Indices along the axis at which the arrays differ once `expected` has the dtype of `found`; in blocks."""
    if found.ndim == 0:
        return [] if expected.astype(found.dtype) == found else [0]
    left, right = np.moveaxis(expected, axis, 0), np.moveaxis(found, axis, 0)
    step = max(1, _BLOCK_BYTES // max(1, found.nbytes // max(1, len(right))))
    rows: list[int] = []
    with np.errstate(over="ignore"):
        for start in range(0, len(right), step):
            a, b = left[start : start + step].astype(found.dtype), right[start : start + step]
            if not np.array_equal(a, b):
                differs = (a != b).reshape(len(b), -1).any(axis=1)
                rows += [start + int(i) for i in np.flatnonzero(differs)]
    return rows


def _told(entry: LedgerEntry, made: _Made, tensors: Mapping[str, Tensor]) -> LedgerEntry:
    transformation = made.transformation
    if entry.data_type == int(ir.DataType.FLOAT16):
        transformation += ", cast to float16"
    origins = [origin for name in made.parameters if name in tensors for origin in origins_of(tensors[name])]
    checkpoint = tuple(CheckpointTensor(key, how) for key, how in origins)
    return replace(entry, parameters=made.parameters, transformation=transformation, checkpoint=checkpoint)
