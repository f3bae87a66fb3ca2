"""Nodes found by what they are: a small language of patterns.

A pattern is a chain of steps, `MatMul -> Add -> *Gelu`: each step's node reads a tensor that the node before it makes.
Between steps, `->` is a direct reader, and `->>` any node further down. A step is

    OPERATOR[TERM, TERM, …]

- OPERATOR: a name with wildcards (`*`, `?`), alternatives with `|` (`Relu|*Gelu`), after `DOMAIN:` of another domain
  than ONNX's; `*:Gelu` is any domain.
- Terms, in brackets, all of which must hold:
  `name=GLOB`                 the node's name, or that of a tensor that it makes
  `@ATTRIBUTE=VALUE`          an attribute: number, list `1,0` in parentheses `(0,2,1,3)`, or text with wildcards;
                              `@ATTRIBUTE` alone: it is set; `!@ATTRIBUTE`: it is not
  `in0=TYPE`, `out0=TYPE`     dtype and shape of an input or output, `in=TYPE` of any: `float16`, `(batch,*,3)`,
                              `float32(2,3)`; an axis is a size, a name with wildcards, `*` for any, `?` for
                              unknown, and `...` any number of axes
  `in0=const`                 that input is an initializer or constant; `in0=input`: an input of the graph
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from vlm_export.errors import GraphError
from vlm_export.graph.core.names import all_nodes
from vlm_export.graph.core.tensors import constant_tensor
from vlm_export.graph.look.show import axis_text, dtype_name

_STEP = re.compile(r"^\s*(?P<operator>[^\[\]\s]+)\s*(?:\[(?P<terms>.*)\])?\s*$", re.DOTALL)
_TYPE_TERM = re.compile(r"^(?P<end>in|out)(?P<index>\d*)=(?P<want>.+)$")
_TYPE = re.compile(r"^(?P<dtype>[\w*?]*)(?P<shape>\(.*\))?$")


@dataclass(frozen=True)
class Step:
    """One node of a chain: its operator, its conditions, and whether it may lie further down than the next reader."""

    operator: str
    terms: tuple[str, ...]
    is_far: bool


def find_nodes(model: ir.Model, pattern: str) -> list[tuple[ir.Node, ...]]:
    """Finds all chains of nodes that match, in the graphs' order; GraphError where the pattern is malformed."""
    steps = parse_pattern(pattern)
    return [chain for node in all_nodes(model) if _matches(node, steps[0]) for chain in _chains((node,), steps[1:])]


def parse_pattern(pattern: str) -> list[Step]:
    """Parses a pattern; GraphError where it is malformed."""
    steps: list[Step] = []
    pieces = re.split(r"(->>|->)", pattern)
    for index in range(0, len(pieces), 2):
        found = _STEP.match(pieces[index])
        if found is None:
            raise GraphError(
                "the pattern is malformed",
                where=pattern,
                expected="OPERATOR[TERM, …] -> OPERATOR …",
                got=pieces[index].strip() or "an empty step",
            )
        terms = tuple(term.strip() for term in _split_terms(found["terms"] or "") if term.strip())
        for term in terms:
            if not (term.startswith(("name=", "@", "!@")) or _TYPE_TERM.match(term)):
                raise GraphError(
                    "the pattern has an unknown term",
                    where=pattern,
                    expected="name=, @ATTRIBUTE, !@ATTRIBUTE, in=, in0=, out0= …",
                    got=term,
                )
        steps.append(Step(found["operator"], terms, is_far=index > 0 and pieces[index - 1] == "->>"))
    return steps


def _split_terms(text: str) -> Iterator[str]:
    """At commas outside parentheses."""
    depth, start = 0, 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    yield text[start:]


def _chains(chain: tuple[ir.Node, ...], steps: list[Step]) -> Iterator[tuple[ir.Node, ...]]:
    if not steps:
        yield chain
        return
    for node in _followers(chain[-1], steps[0].is_far):
        if _matches(node, steps[0]):
            yield from _chains((*chain, node), steps[1:])


def _followers(node: ir.Node, is_far: bool) -> list[ir.Node]:
    """Readers of what the node makes, each once; all that depends on it if `is_far`."""
    found: dict[ir.Node, None] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop(0)
        readers = [user for value in current.outputs for user, _ in value.uses() if user not in found]
        found.update(dict.fromkeys(readers))
        if is_far:
            waiting += dict.fromkeys(readers)
    return list(found)


def _matches(node: ir.Node, step: Step) -> bool:
    return any(_is_operator(node, choice) for choice in step.operator.split("|")) and all(
        _holds(node, term) for term in step.terms
    )


def _is_operator(node: ir.Node, pattern: str) -> bool:
    domain, _, op_type = pattern.rpartition(":")
    return fnmatchcase(node.domain, "" if domain in ("", "ai.onnx") else domain) and fnmatchcase(node.op_type, op_type)


def _holds(node: ir.Node, term: str) -> bool:
    if term.startswith("name="):
        names = [node.name, *(value.name for value in node.outputs)]
        return any(fnmatchcase(name, term.removeprefix("name=")) for name in names if name)
    if term.startswith("!@"):
        return term[2:] not in node.attributes
    if term.startswith("@"):
        name, _, wanted = term[1:].partition("=")
        return name in node.attributes and (not wanted or _is_attribute(node.attributes[name], wanted))
    found = _TYPE_TERM.match(term)
    assert found is not None
    values = node.inputs if found["end"] == "in" else node.outputs
    if found["index"]:
        values = values[int(found["index"]) : int(found["index"]) + 1]
    return any(value is not None and _is_type(value, found["want"].strip()) for value in values)


def _is_attribute(attribute: ir.Attr, wanted: str) -> bool:
    if attribute.is_ref():
        return False
    if wanted.startswith("("):
        items = [item.strip() for item in wanted.strip("()").split(",") if item.strip()]
        value = list(attribute.value) if isinstance(attribute.value, list | tuple) else []
        return len(items) == len(value) and all(
            _is_entry(entry, item) for entry, item in zip(value, items, strict=True)
        )
    return _is_entry(attribute.value, wanted)


def _is_entry(entry: object, wanted: str) -> bool:
    if isinstance(entry, int | float):
        try:
            return float(wanted) == float(entry)
        except ValueError:
            return False
    return isinstance(entry, str) and fnmatchcase(entry, wanted)


def _is_type(value: ir.Value, wanted: str) -> bool:
    if wanted == "const":
        return constant_tensor(value) is not None
    if wanted == "input":
        return value.is_graph_input()
    found = _TYPE.match(wanted)
    if found is None:
        return False
    dtype = "?" if value.dtype is None else dtype_name(value.dtype)
    return fnmatchcase(dtype, found["dtype"] or "*") and (found["shape"] is None or _is_shape(value, found["shape"]))


def _is_shape(value: ir.Value, wanted: str) -> bool:
    if value.shape is None:
        return False
    items = [item.strip() for item in wanted[1:-1].split(",") if item.strip()]
    axes = [axis_text(axis) for axis in value.shape]
    if "..." in items:
        before, after = items[: items.index("...")], items[items.index("...") + 1 :]
        if len(axes) < len(before) + len(after):
            return False
        axes = axes[: len(before)] + axes[len(axes) - len(after) :]
        items = before + after
    return len(items) == len(axes) and all(
        axis == "?" if item == "?" else fnmatchcase(axis, item) for axis, item in zip(axes, items, strict=True)
    )
