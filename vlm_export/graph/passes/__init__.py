"""Passes over whole models: each keeps what the model computes, changes it in place and says what it did.

A pass is a function of an `onnx_ir.Model`. `GraphPass` makes it one of onnx_ir's passes, to stand beside the library's
own in its `Sequential` and `PassManager`. The library's are used where they lose nothing; a pass of ours that resembles
one of them says in its docstring in which case the library's fails, and `tests/graph/passes/test_library_passes.py`
shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir


class GraphPass(ir.passes.InPlacePass):
    """A pass of this package as one of onnx_ir's; the model counts as modified where the function says anything.

    Attributes:
        found: what the function said that it did, in the last run.
    """

    def __init__(self, change: Callable[..., object], **options: Any) -> None:
        """`change` takes the model, and changes it in place; `options` are its further arguments."""
        super().__init__()
        self._change, self._options = change, options
        self.found: object = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.found = self._change(model, **self._options)
        return ir.passes.PassResult(model, modified=bool(self.found))
