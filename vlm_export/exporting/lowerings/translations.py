"""torch's translations of its operators into ONNX, read once in a process.

The dynamo back end parses the sources of all of them for each graph, which takes as long as the graph of a small part;
they are the same each time. Each graph gets a copy, since the back end adds what its caller brings.

Source: torch 2.15, torch/onnx/_internal/exporter/_registration.py (`ONNXRegistry.from_torchlib`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import Any

from torch.onnx._internal.exporter._registration import ONNXRegistry

_read = cache(ONNXRegistry.from_torchlib)


@contextmanager
def kept_translations() -> Iterator[None]:
    """Within it, the back end reads the translations of each opset once."""
    original = ONNXRegistry.__dict__["from_torchlib"]
    ONNXRegistry.from_torchlib = staticmethod(_copied)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]


def _copied(*arguments: Any, **options: Any) -> ONNXRegistry:
    registry = copy(_read(*arguments, **options))
    registry.functions = {target: list(found) for target, found in registry.functions.items()}
    return registry
