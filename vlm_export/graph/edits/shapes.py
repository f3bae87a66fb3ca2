"""Shapes and named axes of inputs and outputs, and the shapes of everything between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from vlm_export.errors import GraphError, VerificationError, suggestion
from vlm_export.graph.core.inference import Copy, copy_of
from vlm_export.graph.core.transaction import Change, apply
from vlm_export.graph.edits.baked_sizes import READINGS, HeldError, find_misfit, find_repairs, output_shapes, refusal
from vlm_export.graph.edits.size_repairs import Repair
from vlm_export.graph.prove.match_interfaces import AxisOfInput, Resized

# An axis as users state it: its size, its name, or None for "not known".
Axis: TypeAlias = "int | str | None"


@dataclass(frozen=True)
class Reshaped:
    """What stating other shapes did.

    Attributes:
        changed: inputs and outputs that have another shape now.
        repaired: constants that held an old size and follow the data now, one sentence each.
    """

    changed: int
    repaired: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join([str(self.changed), *self.repaired])


def set_shape(model: ir.Model, shapes: Mapping[str, Sequence[Axis]]) -> Reshaped:
    """States the shapes of inputs and outputs, and infers those of all tensors between anew.

    What inference cannot tell is kept unless it depends on a changed axis; there a renamed or fixed axis is replaced
    by what it is now, and what may be another size becomes unknown. Constants that hold the old size of an axis, as
    exporters that trace write them, are made to follow the data. The repaired model is run: at the old size it gives
    the same to the last bit, and several at once give what each gives alone.

    Args:
        shapes: input or output → its axes.

    Raises:
        GraphError: no such input or output, a default value of another shape, shapes that do not fit together in the
            graph, an output that is said to be what it is not, or a node that holds the old size and cannot be
            repaired.
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
    repairs, inferred = _repairs(model, new_inputs)

    def edit(copy: Copy) -> Change:
        for value, shape in new_inputs.items():
            copy.of(value).shape = shape.copy()
        repaired = [node for repair in repairs for node in repair.make(copy.model.graph)]
        for node in repaired:
            for value in node.outputs:
                # It was right for the old size alone.
                value.shape = None
        stated = {
            copy.of(outputs[name]): ir.Shape(axes)
            for name, axes in inferred.items()
            if name in outputs and None not in axes
        }
        stated |= {copy.of(value): shape for value, shape in new_outputs.items()}
        nodes = [node for node in (value.producer() for value in stated) if node is not None] + repaired
        values = [copy.of(value) for value in new_inputs]
        return Change(nodes, values, axes_now, keeps_sizes, keeps_ranks, stated=stated)

    apply(model, edit)
    return Reshaped(len(changed), tuple(repair.text for repair in repairs))


def set_axis(model: ir.Model, axis: str, size: int | str) -> Reshaped:
    """Fixes a named axis to a size, or gives it another name, in all inputs; the rest follows, as in `set_shape`.

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
    return set_shape(model, shapes)


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


def _resized_axes(shapes: Mapping[ir.Value, ir.Shape]) -> list[tuple[Resized, bool]]:
    """Axes that get another size, those that change together as one; and whether the size of before was fixed.

    A named axis that is only renamed keeps all of its sizes; one that is fixed may have had any, so that 1 is tried.
    """
    groups: dict[tuple[int, int | str, bool], list[AxisOfInput]] = {}
    for value, shape in shapes.items():
        if value.shape is None or len(value.shape) != len(shape):
            continue
        for axis, (was, now) in enumerate(zip(value.shape, shape, strict=True)):
            new = now if isinstance(now, int) else now.value or f"{value.name}.{axis}"
            if was == now or (not isinstance(was, int) and not isinstance(now, int)) or 0 in (was, now):
                continue
            old = was if isinstance(was, int) else 1
            groups.setdefault((old, new, isinstance(was, int)), []).append(AxisOfInput(str(value.name), axis))
    return [(Resized(tuple(axes), key[0], key[1]), key[2]) for key, axes in groups.items() if key[0] != key[1]]


def _repairs(
    model: ir.Model, shapes: Mapping[ir.Value, ir.Shape]
) -> tuple[list[Repair], dict[str, list[int | str | None]]]:
    """What has to follow the data, and the shapes that outputs have then.

    Raises:
        GraphError: a node that holds an old size and cannot be repaired, or a repair that gives something else.
    """
    groups = _resized_axes(shapes)
    repaired = copy_of(model).model
    found: list[Repair] = []
    inferred: dict[str, list[int | str | None]] = {}
    misfit = find_misfit(repaired, [group for group, _ in groups]) if groups else None
    for group, was_fixed in groups:
        if misfit is None and not was_fixed:
            continue
        try:
            repairs, repaired = _repaired(model, repaired, group)
        except HeldError:
            raise
        except GraphError:
            if misfit is not None:
                raise
            # The model takes the new size as it is.
            repairs = []
        found += repairs
        if len(groups) == 1:
            inferred = output_shapes(repaired, group)
    return found, inferred


def _repaired(model: ir.Model, so_far: ir.Model, group: Resized) -> tuple[list[Repair], ir.Model]:
    """The first reading of the graph whose repairs prove right.

    Raises:
        GraphError: none does; the fault of the first.
    """
    refusals: list[GraphError] = []
    for reading in READINGS:
        trial = copy_of(so_far).model
        try:
            repairs = find_repairs(so_far, group, reading)
            for repair in repairs:
                repair.make(trial.graph)
            misfit = find_misfit(trial, [group])
            if misfit is not None:
                raise refusal(misfit, group)
            if repairs:
                _prove_repair(model, trial, group)
            return repairs, trial
        except HeldError:
            raise
        except GraphError as error:
            refusals.append(error)
    raise refusals[0]


def _prove_repair(model: ir.Model, repaired: ir.Model, group: Resized) -> None:
    """Runs the repaired model at the old size and at new ones.

    Raises:
        GraphError: it gives something else, or cannot be run.
    """
    from vlm_export.graph.prove.prove import prove

    same, before, after = copy_of(repaired).model, copy_of(model).model, copy_of(repaired).model
    for entry in group.axes:
        _set_axis(before, entry, group.old)
        _set_axis(same, entry, group.old)
        _set_axis(after, entry, group.new)
    for changed in (same, after):
        for node in changed.graph:
            for value in node.outputs:
                value.shape = None
    try:
        prove(before, same)
        prove(before, after)
    except VerificationError as error:
        raise GraphError(
            "constants that hold the old size were made to follow the data, and the result is another one",
            where=error.where or str(group),
            expected=error.expected,
            got="; ".join(part for part in (error.what, error.got) if part),
            fix="keep the size, or export the model again with this axis open",
        ) from error


def _set_axis(model: ir.Model, entry: AxisOfInput, size: int | str) -> None:
    (value,) = (value for value in model.graph.inputs if value.name == entry.input)
    if value.shape is not None:
        dims = list(value.shape.dims)
        dims[entry.axis] = size if isinstance(size, int) else ir.SymbolicDim(size)
        value.shape = ir.Shape(dims)
