"""Models made runnable for comparison: with internal tensors as further outputs, weights not copied, two in a row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from vlm_export.errors import GraphError
from vlm_export.graph.core.inference import copy_of
from vlm_export.graph.core.names import fresh_name, names_in
from vlm_export.graph.core.onnxruntime_session import Array, numpy_lacks, start_session
from vlm_export.graph.core.replace_uses import place_behind, replace_uses
from vlm_export.graph.core.skeleton import attach_weights, detach_weights, weights_among_inputs
from vlm_export.graph.core.tensors import is_plain_number, tensor_slots
from vlm_export.graph.prove.random_inputs import inputs_that_decide_sizes
from vlm_export.interrupts import run_session
from vlm_export.machine_faults import machine_fault

# Above this, weights are fed from where they lie instead of being copied into a protobuf, which holds 2 GB.
INLINE_BYTES = 256 << 20
FED_BYTES = 1 << 20


class RunError(GraphError):
    """These feeds cannot be run; others may."""


class Program(Protocol):
    """Something with named inputs and tensors that can be run.

    Attributes:
        inputs: by name; one that is an initializer, too, has a default and needs no feed.
        outputs: by name.
        weights: inputs that are no choice of the caller's: before IR version 4 every initializer is an input, too.
    """

    @property
    def inputs(self) -> Mapping[str, ir.Value]: ...

    @property
    def outputs(self) -> Mapping[str, ir.Value]: ...

    @property
    def weights(self) -> set[str]: ...

    def tensor(self, name: str) -> ir.Value | None:
        """Returns a tensor that `run` can return."""

    def size_inputs(self) -> set[str]:
        """Returns inputs whose values decide how large tensors are."""

    def run(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        """Runs and returns the wanted tensors; of an input its feed, or its default. What numpy lacks comes as float32.

        GraphError where onnxruntime does not accept the graph, RunError where it does not accept the feeds.
        """


class ModelProgram:
    """One model. Its sessions, one per set of wanted tensors, start when they are first run."""

    def __init__(self, model: ir.Model, *, optimised: bool = False) -> None:
        """
        Args:
            optimised: let onnxruntime rewrite the graph, which gives other roundings.
        """
        self._model, self._optimised = model, optimised
        self.inputs = {str(value.name): value for value in model.graph.inputs}
        self.outputs = {str(value.name): value for value in model.graph.outputs}
        self.weights = weights_among_inputs(model)
        nodes = {str(value.name): value for node in model.graph for value in node.outputs if value.name}
        self.tensors: Mapping[str, ir.Value] = nodes | self.inputs | self.outputs
        self._sessions: dict[tuple[str, ...], _Session] = {}

    def tensor(self, name: str) -> ir.Value | None:
        return self.tensors.get(name)

    def size_inputs(self) -> set[str]:
        return inputs_that_decide_sizes(self._model)

    def run(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        fed = {name: feeds[name] if name in feeds else self._default(name) for name in wanted if name in self.inputs}
        computed = tuple(name for name in dict.fromkeys(wanted) if name not in fed)
        if computed and computed not in self._sessions:
            self._sessions[computed] = _Session(self._model, computed, self._optimised)
        outputs = self._sessions[computed].run(feeds) if computed else []
        results = fed | dict(zip(computed, outputs, strict=True))
        return [results[name] for name in wanted]

    def _default(self, name: str) -> Array:
        tensor = self.inputs[name].const_value
        if tensor is None:
            raise RunError("an input is not fed", got=name)
        array = np.asarray(tensor.numpy())
        return array if is_plain_number(array.dtype) or array.dtype.kind in "cOSU" else array.astype(np.float32)


class _Session:
    def __init__(self, model: ir.Model, wanted: Sequence[str], optimised: bool = False) -> None:
        scratch = copy_of(model).model
        known = {str(value.name): value for node in scratch.graph for value in node.outputs}
        known |= {str(value.name): value for value in (*scratch.graph.initializers.values(), *scratch.graph.outputs)}
        scratch.graph.outputs[:] = [known[name] for name in wanted]
        self._weights = _detached(scratch)
        try:
            self._session = start_session(ir.to_proto(scratch).SerializeToString(), optimised=optimised)
            ends = zip(scratch.graph.outputs, self._session.get_outputs(), strict=True)
            odd_outputs = [value for value, entry in ends if numpy_lacks(entry.type)]
            odd_inputs = [entry.name for entry in self._session.get_inputs() if numpy_lacks(entry.type)]
            if odd_outputs or odd_inputs:
                _cast_ends(scratch.graph, odd_inputs, odd_outputs)
                self._session = start_session(ir.to_proto(scratch).SerializeToString(), optimised=optimised)
        # onnxruntime's own classes share no base but Exception.
        except Exception as error:
            raise machine_fault(error, "onnxruntime") or GraphError(
                "onnxruntime does not accept the graph", got=_first_line(error)
            ) from error

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        weights = {name: np.asarray(tensor.numpy()) for name, tensor in self._weights.items() if name not in feeds}
        needed = {entry.name for entry in self._session.get_inputs()}
        needed |= {entry.name for entry in self._session.get_overridable_initializers()}
        given = {name: array for name, array in feeds.items() if name in needed}
        try:
            outputs: list[Array] = run_session(self._session, {**weights, **given})
        except Exception as error:
            raise machine_fault(error, "onnxruntime") or RunError(
                "onnxruntime cannot run the graph", got=_first_line(error)
            ) from error
        return outputs


def _cast_ends(graph: ir.Graph, inputs: Collection[str], outputs: Collection[ir.Value]) -> None:
    """Inputs and outputs of dtypes that Python cannot take or give become float32, which holds all of their values."""
    taken = names_in(graph)
    for position, value in enumerate(graph.inputs):
        if value.name in inputs and value.dtype is not None:
            new = ir.val(value.name, ir.DataType.FLOAT, value.shape)
            narrow = ir.val(fresh_name(f"{value.name}_narrow", taken), value.dtype, value.shape)
            replace_uses(value, narrow)
            graph.inputs[position] = new
            place_behind(None, graph, ir.node("Cast", [new], {"to": value.dtype}, outputs=[narrow]))
    for position, value in enumerate(graph.outputs):
        if value in outputs:
            wide = ir.val(fresh_name(f"{value.name}_wide", taken), ir.DataType.FLOAT, value.shape)
            graph.append(ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, outputs=[wide]))
            graph.outputs[position] = wide


def _detached(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    total = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    weights = detach_weights(model, FED_BYTES) if total > INLINE_BYTES else {}
    # numpy's own dtypes are what onnxruntime takes from Python.
    odd = {name: tensor for name, tensor in weights.items() if not is_plain_number(tensor.dtype.numpy())}
    attach_weights(model, odd)
    for slot in tensor_slots(model):
        if slot.is_stored_elsewhere:
            # A graph that is no file has no place from which its data could be found.
            slot.tensor = slot.loaded()
    return {name: tensor for name, tensor in weights.items() if name not in odd}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


class Chain:
    """Two programs, the second fed from the first; tensors are called as `compose` calls them."""

    def __init__(
        self,
        first: ModelProgram,
        second: ModelProgram,
        connections: Iterable[tuple[str, str]],
        *,
        shared_inputs: Iterable[str] = (),
        prefixes: tuple[str, str] = ("", ""),
    ) -> None:
        """
        Args:
            connections: output of the first, input of the second, without prefixes.
            shared_inputs: of both, of equal names without prefixes: the first's is fed to both.
            prefixes: what stands before all names of the first, and of the second.
        """
        self._first, self._second = first, second
        # Input of the second → tensor of the first.
        self._joints = {into: out for out, into in connections} | {name: name for name in shared_inputs}
        left = {f"{prefixes[0]}{name}": name for name in first.tensors}
        right = {f"{prefixes[1]}{name}": name for name in second.tensors if name not in self._joints}
        self._names = {name: (first, own) for name, own in left.items()} | {
            name: (second, own) for name, own in right.items()
        }
        self.inputs = {name: first.inputs[own] for name, own in left.items() if own in first.inputs} | {
            name: second.inputs[own] for name, own in right.items() if own in second.inputs
        }
        fixed = {name for program in (first, second) for name in program.weights}
        self.weights = {name for name in self.inputs if self._names[name][1] in fixed}
        # The second may return what it was given: a tensor of the first.
        late = {
            f"{prefixes[0]}{self._joints[name]}" if name in self._joints else f"{prefixes[1]}{name}": value
            for name, value in second.outputs.items()
        }
        self.outputs = {f"{prefixes[0]}{name}": value for name, value in first.outputs.items()} | late

    def tensor(self, name: str) -> ir.Value | None:
        program, own = self._names.get(name, (self._first, ""))
        return program.tensor(own)

    def size_inputs(self) -> set[str]:
        early, late = self._first.size_inputs(), self._second.size_inputs()
        # What the first makes of its inputs may decide sizes in the second.
        if any(into in late for into in self._joints):
            early = set(self._first.inputs)
        found = {(self._first, own) for own in early} | {(self._second, own) for own in late}
        return {name for name in self.inputs if self._names[name] in found}

    def run(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        given: dict[ModelProgram, dict[str, Array]] = {self._first: {}, self._second: {}}
        for name, array in feeds.items():
            if name in self._names:
                program, own = self._names[name]
                given[program][own] = array
        places = [self._names[name] for name in wanted]
        early = [own for program, own in places if program is self._first]
        needed = list(dict.fromkeys([*early, *self._joints.values()]))
        firsts = dict(zip(needed, self._first.run(given[self._first], needed), strict=True))
        late = [own for program, own in places if program is not self._first]
        joined = {into: firsts[out] for into, out in self._joints.items()}
        seconds = dict(zip(late, self._second.run(given[self._second] | joined, late), strict=True))
        return [(firsts if program is self._first else seconds)[own] for program, own in places]
