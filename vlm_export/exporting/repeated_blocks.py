"""A deep module is traced with four of its blocks, and the third is repeated in the graph for all that were left out.

The back end takes most of an export, and its time grows with the number of nodes. Blocks that are made alike give nodes
that are alike but for the names of weights and of per-layer inputs and outputs. So the second and the third block of
the short graph are compared node by node; where they differ in anything else, the whole module is traced. The graph is
verified against the original like any other.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from types import FunctionType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from vlm_export.family import Part
from vlm_export.specs.signature import Signature, TensorSpec

TRACED = 4
"""The first, two that are compared, and the last."""

_LOG = logging.getLogger(__name__)
_NUMBER = re.compile(r"\.(\d+)\.")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, type, FunctionType)
_OF_MODULES = frozenset(vars(nn.Module()))
_SMALL_BYTES = 4096


class NotRepeatedError(Exception):
    """Why a module's blocks are no repetition of one another."""


@dataclass(frozen=True)
class RepeatedBlocks:
    """Lists of equally many blocks, each list's alike, within one module.

    Attributes:
        lists: path in the module → the whole list.
        count: of the blocks in each list.
    """

    module: nn.Module
    lists: Mapping[str, nn.ModuleList]
    count: int

    @contextmanager
    def cut(self, part: Part) -> Iterator[Part]:
        """The part with `TRACED` of its blocks, as long as the context lasts.

        Raises:
            NotRepeatedError: it has inputs or outputs for some of the blocks only.
        """
        short = _cut_signature(part.signature, self.count)
        try:
            for path, blocks in self.lists.items():
                self._put(path, nn.ModuleList(list(blocks)[:TRACED]))
            yield replace(part, signature=short)
        finally:
            for path, blocks in self.lists.items():
                self._put(path, blocks)

    def _put(self, path: str, blocks: nn.ModuleList) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.module.get_submodule(parent), name, blocks)

    def place(self, name: str) -> tuple[str, int, str] | None:
        """List, number of the block and name in it, of a weight; None for one outside of the lists."""
        for path in self.lists:
            if name.startswith(f"{path}."):
                number, _, rest = name[len(path) + 1 :].partition(".")
                return path, int(number), rest
        return None

    def weight(self, path: str, number: int, name: str) -> torch.Tensor:
        """The tensor of a block."""
        block = self.lists[path][number]
        parent, _, last = name.rpartition(".")
        found: torch.Tensor = getattr(block.get_submodule(parent), last)
        return found


def repeated_blocks(module: nn.Module) -> RepeatedBlocks | None:
    """The lists of a module whose blocks are alike and more than `TRACED`; None where there are none, lists of several
    lengths, or beside them one as long whose blocks differ, which the module may go through together with them."""
    long = {
        path: found
        for path, found in module.named_modules()
        if isinstance(found, nn.ModuleList) and len(found) > TRACED
    }
    # Those in a list's blocks are repeated with them.
    outer = {path: found for path, found in long.items() if not any(path.startswith(f"{other}.") for other in long)}
    lists = {path: found for path, found in outer.items() if _are_alike(list(found))}
    counts = {len(found) for found in lists.values()}
    if len(counts) != 1:
        return None
    (count,) = counts
    goes_together = any(len(outer[path]) == count for path in outer.keys() - lists.keys())
    return None if goes_together else RepeatedBlocks(module, lists, count)


def _are_alike(blocks: Sequence[nn.Module]) -> bool:
    first = _form(blocks[0])
    return first is not None and all(_form(block) == first for block in blocks[1:])


def _form(block: nn.Module) -> list[Any] | None:
    """What two blocks share whose forward passes are the same but for weights; None where that cannot be told."""
    form: list[Any] = []
    for name, module in block.named_modules(remove_duplicate=False):
        own = {key: value for key, value in vars(module).items() if key not in _OF_MODULES}
        if not all(_is_plain(value) for value in own.values()):
            return None
        tensors = {**module._parameters, **module._buffers}
        shapes = [(key, None if t is None else (tuple(t.shape), t.dtype)) for key, t in tensors.items()]
        form.append((name, type(module), own, shapes))
    return form


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _cut_signature(signature: Signature, blocks: int) -> Signature:
    numbers = {
        number for tensor in (*signature.inputs, *signature.outputs) if (number := _number(tensor.name)) is not None
    }
    if numbers and numbers != set(range(blocks)):
        raise NotRepeatedError(f"inputs and outputs of {len(numbers)} of {blocks} blocks")

    def kept(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(tensor for tensor in tensors if (_number(tensor.name) or 0) < TRACED)

    return replace(signature, inputs=kept(signature.inputs), outputs=kept(signature.outputs))


def _number(name: str) -> int | None:
    """Of the block that an input or output of the graph belongs to."""
    match = _NUMBER.search(name)
    return int(match[1]) if match else None


def _numbered(name: str, number: int) -> str:
    return _NUMBER.sub(f".{number}.", name, count=1)


def repeat_blocks(model: ir.Model, blocks: RepeatedBlocks, signature: Signature) -> None:
    """Gives the graph of a cut part all of its blocks, in place.

    Args:
        signature: of the whole part.

    Raises:
        NotRepeatedError: the graph's blocks are not alike.
    """
    model.graph.sort()
    _Repetition(model.graph, blocks).run(signature)


_Source = tuple[Any, ...]
"""Where a node's input comes from, so that two blocks can be compared: ("own", node, output) in the same block,
("before", node, output) in the one before, ("weight", list, name), ("tensor", dtype, bytes), ("input", name without its
number), or ("fixed", value)."""


class _Repetition:
    def __init__(self, graph: ir.Graph, blocks: RepeatedBlocks) -> None:
        self.graph, self.blocks = graph, blocks
        nodes = list(graph)
        starts = self._starts(nodes)
        length = starts[2] - starts[1]
        if starts[3] - starts[2] != length:
            raise NotRepeatedError(f"blocks of {length} and {starts[3] - starts[2]} nodes")
        self.first, self.second = nodes[starts[1] : starts[2]], nodes[starts[2] : starts[3]]
        self.tail = nodes[starts[3] :]
        self.sources = [
            [self._source(value, self.second, self.first, 2) for value in node.inputs] for node in self.second
        ]
        self._compare()

    def _starts(self, nodes: Sequence[ir.Node]) -> dict[int, int]:
        """Number of a block → the first node that reads one of its weights."""
        starts: dict[int, int] = {}
        for index, node in enumerate(nodes):
            for value in node.inputs:
                place = self.blocks.place(value.name or "") if value is not None and value.is_initializer() else None
                if place is not None:
                    starts.setdefault(place[1], index)
        if set(starts) != set(range(TRACED)) or sorted(starts.values()) != [starts[i] for i in range(TRACED)]:
            raise NotRepeatedError("blocks that do not follow one another")
        return starts

    def _source(
        self, value: ir.Value | None, block: Sequence[ir.Node], before: Sequence[ir.Node], number: int
    ) -> _Source:
        if value is None:
            return ("fixed", None)
        if value.is_initializer():
            place = self.blocks.place(value.name or "")
            if place is not None:
                if place[1] != number:
                    raise NotRepeatedError(f"block {number} reads {value.name}")
                return ("weight", place[0], place[2])
            tensor = value.const_value
            if tensor is not None and tensor.nbytes <= _SMALL_BYTES:
                return ("tensor", tensor.dtype, tuple(tensor.shape.numpy()), tensor.numpy().tobytes())
            return ("fixed", value)
        producer = value.producer()
        if producer is None:
            own = _number(value.name or "")
            if own is None:
                return ("fixed", value)
            if own != number:
                raise NotRepeatedError(f"block {number} reads {value.name}")
            return ("input", _numbered(value.name or "", 0))
        for kind, nodes in (("own", block), ("before", before)):
            for index, node in enumerate(nodes):
                if node is producer:
                    return (kind, index, value.index())
        return ("fixed", value)

    def _compare(self) -> None:
        """NotRepeatedError unless the second block is the first with other weights, on what the first made."""
        for index, (one, other) in enumerate(zip(self.first, self.second, strict=True)):
            if _operation(one) != _operation(other):
                raise NotRepeatedError(f"{one.op_type} and {other.op_type}")
            for value, source in zip(one.inputs, self.sources[index], strict=True):
                found = self._source(value, self.first, (), 1)
                if source[0] != "before" and found != source:
                    raise NotRepeatedError(f"an input of {one.op_type} comes from elsewhere")
                # What the block before made lies before the first of the two.
                if source[0] == "before" and found[0] != "fixed":
                    raise NotRepeatedError(f"an input of {one.op_type} is carried on in one block alone")

    def run(self, signature: Signature) -> None:
        last = self.blocks.count - 1
        self._renumber_tail(last)
        inputs = {value.name: value for value in self.graph.inputs}
        outputs = {value.name: value for value in self.graph.outputs}
        carried = [(value, list(value.uses())) for node in self.second for value in node.outputs]
        made = [list(node.outputs) for node in self.second]
        behind, names = self.second[-1], count()
        for number in range(TRACED - 1, last):
            before, made, nodes = made, [], list[ir.Node]()
            for index, node in enumerate(self.second):
                read = [
                    self._value(source, value, number, made, before, inputs)
                    for source, value in zip(self.sources[index], node.inputs, strict=True)
                ]
                new = [self._output(value, number, names, outputs) for value in node.outputs]
                made.append(new)
                attributes = list(node.attributes.values())
                nodes.append(
                    ir.Node(
                        node.domain,
                        node.op_type,
                        read,
                        attributes,
                        outputs=new,
                        overload=node.overload,
                        version=node.version,
                        name=f"{node.name}_of_block_{number}",
                    )
                )
            self.graph.insert_after(behind, nodes)
            behind = nodes[-1]
        self._lead_to_tail(carried, [value for values in made for value in values], outputs)
        _set_interface(self.graph, signature, inputs, outputs)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and self.blocks.place(name) is not None:
                del self.graph.initializers[name]
        self.graph.sort()

    def _renumber_tail(self, last: int) -> None:
        """What is of the last block that was traced becomes the last block's."""
        for node in self.tail:
            for index, value in enumerate(node.inputs):
                place = self.blocks.place(value.name or "") if value is not None and value.is_initializer() else None
                if place is not None and value is not None:
                    if place[1] != TRACED - 1:
                        raise NotRepeatedError(f"what follows the blocks reads {value.name}")
                    node.replace_input_with(index, self._weight(place[0], last, place[2], value))
        for value in (*self.graph.inputs, *self.graph.outputs):
            if _number(value.name or "") == TRACED - 1:
                value.name = _numbered(value.name or "", last)

    def _weight(self, path: str, number: int, name: str, like: ir.Value) -> ir.Value:
        full = f"{path}.{number}.{name}"
        if full not in self.graph.initializers:
            tensor = ir.Tensor(self.blocks.weight(path, number, name).detach().numpy(), name=full)
            self.graph.register_initializer(ir.Value(name=full, shape=like.shape, type=like.type, const_value=tensor))
        return self.graph.initializers[full]

    def _value(
        self,
        source: _Source,
        like: ir.Value | None,
        number: int,
        made: Sequence[Sequence[ir.Value]],
        before: Sequence[Sequence[ir.Value]],
        inputs: dict[str | None, ir.Value],
    ) -> ir.Value | None:
        """What the block of that number reads where the traced one reads `like`."""
        if source[0] == "own":
            return made[source[1]][source[2]]
        if source[0] == "before":
            return before[source[1]][source[2]]
        if like is None or source[0] in ("fixed", "tensor"):
            return like
        if source[0] == "weight":
            return self._weight(source[1], number, source[2], like)
        name = _numbered(source[1], number)
        return inputs.setdefault(name, ir.Value(name=name, shape=like.shape, type=like.type))

    def _output(
        self, like: ir.Value, number: int, names: Iterator[int], outputs: dict[str | None, ir.Value]
    ) -> ir.Value:
        own = _number(like.name or "") if like.is_graph_output() else None
        name = _numbered(like.name or "", number) if own is not None else f"{like.name}_again_{next(names)}"
        value = ir.Value(name=name, shape=like.shape, type=like.type)
        if own is not None:
            outputs[name] = value
        return value

    def _lead_to_tail(
        self,
        carried: Sequence[tuple[ir.Value, Sequence[Any]]],
        made: Sequence[ir.Value],
        outputs: dict[str | None, ir.Value],
    ) -> None:
        """The tail reads what the last repetition made in place of what the traced block made."""
        tail = set(self.tail)
        for (value, uses), new in zip(carried, made, strict=True):
            for use in uses:
                if use.node in tail:
                    use.node.replace_input_with(use.idx, new)
            if value.is_graph_output() and _number(value.name or "") is None:
                outputs[value.name] = new


def _operation(node: ir.Node) -> tuple[Any, ...]:
    attributes = {}
    for name, attribute in node.attributes.items():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            raise NotRepeatedError(f"a graph within {node.op_type}")
        value = attribute.value
        if isinstance(value, ir.TensorProtocol):
            value = (value.dtype, np.asarray(value.numpy()).tobytes(), tuple(value.shape.numpy()))
        attributes[name] = (attribute.type, value)
    return node.domain, node.op_type, node.overload, len(node.inputs), len(node.outputs), attributes


def _set_interface(
    graph: ir.Graph,
    signature: Signature,
    inputs: Mapping[str | None, ir.Value],
    outputs: Mapping[str | None, ir.Value],
) -> None:
    for values, known, names in (
        (graph.inputs, inputs, signature.input_names),
        (graph.outputs, outputs, signature.output_names),
    ):
        found = [known.get(name) for name in names]
        if None in found:
            raise NotRepeatedError("inputs or outputs that no block has")
        values.clear()
        values.extend(value for value in found if value is not None)


Trace = Callable[[Part], ir.Model]


def traced_in_blocks(part: Part, trace: Trace) -> ir.Model:
    """The part's graph, from a trace of a few of its blocks where they repeat one another, otherwise of them all."""
    blocks = repeated_blocks(part.module)
    if blocks is not None:
        try:
            with blocks.cut(part) as short:
                model = trace(short)
            repeat_blocks(model, blocks, part.signature)
        # A module that does not run with fewer blocks fails in the trace; if it does not run at all, so will the whole.
        except (NotRepeatedError, torch.onnx.OnnxExporterError) as error:
            _LOG.info("part %s is traced whole: %s", part.name, error)
        else:
            return model
    return trace(part)
