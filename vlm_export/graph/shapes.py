"""Shapes and named axes of inputs and outputs, and the shapes of everything between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import onnx_ir as ir

from vlm_export.errors import suggestion
from vlm_export.graph.errors import GraphError
from vlm_export.graph.inference import Copy
from vlm_export.graph.trial import Change, apply

# An axis as users state it: its size, its name, or None for "not known".
Axis: TypeAlias = "int | str | None"


def set_shape(model: ir.Model, shapes: Mapping[str, Sequence[Axis]]) -> int:
    """States the shapes of inputs and outputs, and infers those of all tensors between anew.

    What inference cannot tell is kept unless it depends on a changed axis; there a renamed or fixed axis is replaced
    by what it is now, and what may be another size becomes unknown.

    Args:
        shapes: input or output → its axes.

    Returns:
        How many of these have another shape than before.

    Raises:
        GraphError: no such input or output, a default value of another shape, shapes that do not fit together in the
            graph, or an output that is said to be what it is not.
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    outputs = {str(value.name): value for value in model.graph.outputs if str(value.name) not in inputs}
    for name, axes in shapes.items():
        if name not in inputs and name not in outputs:
            raise GraphError(f"the model has no input or output {name!r}", fix=suggestion(name, [*inputs, *outputs]))
        _check_axes(name, axes)
        _check_constant({**outputs, **inputs}[name], axes)
    new_inputs = {inputs[name]: ir.Shape(axes) for name, axes in shapes.items() if name in inputs}
    new_outputs = {outputs[name]: ir.Shape(axes) for name, axes in shapes.items() if name in outputs}
    axes_now, keeps_sizes = _axis_changes(model, new_inputs)
    keeps_ranks = all(value.shape is None or len(value.shape) == len(shape) for value, shape in new_inputs.items())
    changed = [value for value, shape in {**new_inputs, **new_outputs}.items() if value.shape != shape]

    def edit(copy: Copy) -> Change:
        for value, shape in new_inputs.items():
            copy.of(value).shape = shape.copy()
        stated = {copy.of(value): shape for value, shape in new_outputs.items()}
        nodes = [node for node in (value.producer() for value in stated) if node is not None]
        values = [copy.of(value) for value in new_inputs]
        return Change(nodes, values, axes_now, keeps_sizes, keeps_ranks, stated=stated)

    apply(model, edit)
    return len(changed)


def set_axis(model: ir.Model, axis: str, size: int | str) -> int:
    """Fixes a named axis to a size, or gives it another name, in all inputs; the rest follows.

    Returns:
        How many inputs have the axis.

    Raises:
        GraphError: no input has it, or the shapes would not fit together.
    """
    shapes = {
        str(value.name): [_stated_axis(dim, axis, size) for dim in value.shape]
        for value in model.graph.inputs
        if value.shape is not None and axis in map(_name_of, value.shape)
    }
    if not shapes:
        known = {_name_of(dim) for value in model.graph.inputs for dim in value.shape or ()} - {None}
        fix = suggestion(axis, sorted(map(str, known))) or "no input has a named axis: state shapes instead"
        raise GraphError(f"no input has an axis {axis!r}", fix=fix)
    set_shape(model, shapes)
    return len(shapes)


def _name_of(dim: int | ir.SymbolicDim) -> str | None:
    return None if isinstance(dim, int) else dim.value


def _stated_axis(dim: int | ir.SymbolicDim, axis: str, size: int | str) -> Axis:
    if isinstance(dim, int):
        return dim
    return size if dim.value == axis else dim.value


def _check_axes(name: str, axes: Sequence[Axis]) -> None:
    for axis in axes:
        if (isinstance(axis, int) and not 0 <= axis < 1 << 63) or axis == "":
            raise GraphError(
                f"tensor {name!r} cannot have this shape",
                expected="sizes from 0 to 2**63 - 1, names, or None",
                got=str(list(axes)),
                fix="name an axis whose size varies",
            )


def _check_constant(value: ir.Value, axes: Sequence[Axis]) -> None:
    tensor = value.const_value if value.is_initializer() else None
    if tensor is not None and list(tensor.shape.numpy()) != list(axes):
        raise GraphError(
            f"tensor {value.name!r} has a value of another shape", expected=str(tensor.shape), got=str(list(axes))
        )


def _axis_changes(model: ir.Model, shapes: Mapping[ir.Value, ir.Shape]) -> tuple[dict[str, int | str | None], bool]:
    """What becomes of each named axis, and whether fixed sizes elsewhere stay right."""
    now: dict[str, set[int | str | None]] = {}
    keeps_sizes = True
    for value in model.graph.inputs:
        new = shapes.get(value, value.shape)
        if value.shape is None or new is None or len(new) != len(value.shape):
            keeps_sizes = keeps_sizes and (value not in shapes or value.shape is None)
            continue
        for was, dim in zip(value.shape, new, strict=True):
            if isinstance(was, int):
                keeps_sizes = keeps_sizes and dim == was
            elif was.value is not None:
                now.setdefault(was.value, set()).add(dim if isinstance(dim, int) else dim.value)
    axes = {name: next(iter(sizes)) if len(sizes) == 1 else None for name, sizes in now.items()}
    return {name: size for name, size in axes.items() if size != name}, keeps_sizes
