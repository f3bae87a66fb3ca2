"""A part as PyTorch runs it, in each of the ways that a bench holds graphs against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlm_export.bundle.opened import OpenBundle
from vlm_export.exporting.module_outputs import source_model
from vlm_export.family import Model, Reference, reference_from_module


@contextmanager
def source_run(bundle: OpenBundle, source: str, part: str, form: str, threads: int) -> Iterator[Reference]:
    """What runs a part on arrays by name; it lasts as long as the context.

    Args:
        form: "eager" for the Reference, which is the original's own class where there is one; "compiled" for the
            part's module behind `torch.compile`; "bf16" for that module with weights and activations in bfloat16.
        threads: of torch, in this process.

    Raises:
        InputError: the source's files are not those that the manifest records.
    """
    torch.set_num_threads(threads)
    with source_model(bundle, source) as model:
        yield _run(model, part, form)


def _run(model: Model, name: str, form: str) -> Reference:
    if form == "eager":
        return model.references[name]()
    (part,) = (part for part in model.parts if part.name == name)
    if form == "compiled":
        part.module.compile()
        return reference_from_module(part)
    return reference_from_module(replace(part, module=_InBfloat16(part.module)))


class _InBfloat16(nn.Module):
    """A module in bfloat16, whose inputs and outputs stay float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.to(torch.bfloat16)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: Any = self.module(*(each.to(torch.bfloat16) if each.is_floating_point() else each for each in inputs))
        given = (outputs,) if isinstance(outputs, Tensor) else outputs
        return tuple(each.float() if each.is_floating_point() else each for each in given)
