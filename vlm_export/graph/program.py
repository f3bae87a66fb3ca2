"""Models made runnable for comparison: with internal tensors as further outputs, weights not copied, two in a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from vlm_export.graph.errors import GraphError
from vlm_export.graph.inference import copy_of
from vlm_export.graph.onnxruntime_session import Array, start_session
from vlm_export.graph.skeleton import attach_weights, detach_weights
from vlm_export.graph.tensor_slots import tensor_slots

# Above this, weights are fed from where they lie instead of being copied into a protobuf, which holds 2 GB.
_INLINE_BYTES = 256 << 20
_FED_BYTES = 1 << 20


class Program(Protocol):
    """Something with named inputs and tensors that can be run."""

    @property
    def inputs(self) -> Sequence[ir.Value]: ...

    @property
    def outputs(self) -> Sequence[ir.Value]: ...

    def tensor(self, name: str) -> ir.Value | None:
        """A tensor that `run` can return."""

    def run(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]: ...


class ModelProgram:
    """One model. Its sessions, one per set of wanted tensors, start when they are first run."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        # An input with an initializer has a default, and needs no feed.
        self.inputs = [value for value in model.graph.inputs if not value.is_initializer()]
        self.outputs = list(model.graph.outputs)
        nodes = [value for node in model.graph for value in node.outputs if value.name]
        self._tensors = {str(value.name): value for value in (*nodes, *model.graph.inputs, *model.graph.outputs)}
        self._sessions: dict[tuple[str, ...], _Session] = {}

    def tensor(self, name: str) -> ir.Value | None:
        return self._tensors.get(name)

    def run(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        """The wanted tensors.

        Raises:
            GraphError: onnxruntime does not accept the graph, or the feeds.
        """
        fed = {name: feeds[name] for name in wanted if name in feeds}
        computed = tuple(name for name in dict.fromkeys(wanted) if name not in fed)
        if computed and computed not in self._sessions:
            self._sessions[computed] = _Session(self._model, computed)
        outputs = self._sessions[computed].run(feeds) if computed else []
        results = fed | dict(zip(computed, outputs, strict=True))
        return [results[name] for name in wanted]


class _Session:
    def __init__(self, model: ir.Model, wanted: Sequence[str]) -> None:
        scratch = copy_of(model).model
        known = {str(value.name): value for node in scratch.graph for value in node.outputs}
        known |= {str(value.name): value for value in scratch.graph.outputs}
        scratch.graph.outputs[:] = [known[name] for name in wanted]
        self._weights = _detached(scratch)
        try:
            self._session = start_session(ir.to_proto(scratch).SerializeToString())
        # onnxruntime's own classes share no base but Exception.
        except Exception as error:
            raise GraphError("onnxruntime does not accept the graph", got=_first_line(error)) from error

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        weights = {name: np.asarray(tensor.numpy()) for name, tensor in self._weights.items()}
        needed = {entry.name for entry in self._session.get_inputs()}
        given = {name: array for name, array in feeds.items() if name in needed}
        try:
            outputs: list[Array] = self._session.run(None, {**given, **weights})
        except Exception as error:
            raise GraphError("onnxruntime cannot run the graph", got=_first_line(error)) from error
        return outputs


def _detached(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    total = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    weights = detach_weights(model, _FED_BYTES) if total > _INLINE_BYTES else {}
    # numpy's own dtypes are what onnxruntime takes from Python.
    odd = {name: tensor for name, tensor in weights.items() if tensor.dtype.numpy().kind not in "biufc"}
    attach_weights(model, odd)
    for slot in tensor_slots(model):
        if slot.is_stored_elsewhere:
            # A graph that is no file has no place from which its data could be found.
            slot.tensor = slot.loaded()
    return {name: tensor for name, tensor in weights.items() if name not in odd}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


class Chain:
    """Two programs, the second fed from the first."""

    def __init__(self, first: ModelProgram, second: ModelProgram, connections: Iterable[tuple[str, str]]) -> None:
        """`connections`: output of the first, input of the second."""
        self._first, self._second, self._connections = first, second, list(connections)
        fed = {into for _, into in self._connections}
        own = {str(value.name): value for value in second.inputs if value.name not in fed}
        self.inputs = [*first.inputs, *(value for name, value in own.items() if first.tensor(name) is None)]
        self.outputs = [*first.outputs, *second.outputs]

    def tensor(self, name: str) -> ir.Value | None:
        return self._second.tensor(name) or self._first.tensor(name)

    def run(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        late = [name for name in wanted if self._second.tensor(name) is not None and name not in feeds]
        early = [name for name in wanted if name not in late]
        needed = [*early, *(out for out, _ in self._connections)]
        results = dict(zip(needed, self._first.run(feeds, needed), strict=True))
        passed = {into: results[out] for out, into in self._connections}
        results |= dict(zip(late, self._second.run({**feeds, **passed}, late), strict=True))
        return [results[name] for name in wanted]
