"""torch's translations of its operators into ONNX, read once in a process.

The dynamo back end parses the sources of all of them for each graph, which takes as long as the graph of a small part;
they are the same each time. Each graph gets a copy, since the back end adds what its caller brings. Where a release of
torch has them elsewhere, it reads them for each graph: the graphs are the same.

Source: torch 2.15, torch/onnx/_internal/exporter/_registration.py (`ONNXRegistry.from_torchlib`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache, partial
from importlib import import_module
from typing import Any

_LOG = logging.getLogger(__name__)


@contextmanager
def kept_translations() -> Iterator[None]:
    """Within it, the back end reads the translations of each opset once."""
    try:
        registry = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        original = registry.__dict__["from_torchlib"]
    except (ImportError, AttributeError, KeyError) as error:
        _LOG.info("torch's translations are read for each graph: %s", error)
        yield
        return
    registry.from_torchlib = staticmethod(partial(_copied, _reader(registry)))
    try:
        yield
    finally:
        registry.from_torchlib = original


@cache
def _reader(registry: Any) -> Callable[..., Any]:
    """Called outside of the context alone, where the class reads by itself."""
    return cache(registry.from_torchlib)


def _copied(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    registry = copy(read(*arguments, **options))
    registry.functions = {target: list(found) for target, found in registry.functions.items()}
    return registry
