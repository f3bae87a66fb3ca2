"""A source as PyTorch runs it, in each of the ways that a bench holds graphs against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError
from vlm_export.exporting.module_outputs import source_model
from vlm_export.family import Model, Reference, reference_from_module


@contextmanager
def source_runs(bundle: OpenBundle, source: str, form: str, threads: int) -> Iterator[Callable[[str], Reference]]:
    """What gives for a part what runs it on arrays by name; it lasts as long as the context.

    Args:
        form: "eager" for the Reference, which is the original's own class where there is one; "compiled" for the
            part's module behind `torch.compile`; "bf16" for that module with weights and activations in bfloat16.
        threads: of torch, in this process.

    Raises:
        InputError: the source's files are not those that the manifest records.
    """
    torch.set_num_threads(threads)
    with source_model(bundle, source) as model:
        yield partial(_run, model, form)


def _run(model: Model, form: str, name: str) -> Reference:
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


def transformers_images(source: str, threads: int) -> Callable[[Sequence[str], int], npt.NDArray[np.float32]]:
    """transformers' own model and processor on files of images, a batch at a time, as its documentation shows them.

    Source: transformers 5.23, `AutoModel.get_image_features` of its dual encoders.

    Args:
        source: a directory that transformers saved; its weights are read from safetensors alone.
        threads: of torch, in this process.

    Returns:
        What gives embeddings float32 (N, D) of unit length for files and a batch size.

    Raises:
        InputError: transformers does not read it, or it is no model that embeds images.
    """
    folder, given = Path(source), {"local_files_only": True, "trust_remote_code": False}
    torch.set_num_threads(threads)
    library = import_module("transformers")
    if not (folder / "config.json").is_file():
        raise InputError("transformers does not read it", where=source, expected="a directory with config.json")
    try:
        model = library.AutoModel.from_pretrained(folder, use_safetensors=True, **given).eval()
        processor = library.AutoImageProcessor.from_pretrained(folder, **given)
    except (OSError, ValueError, KeyError) as error:
        raise InputError("transformers does not read it", where=source, got=str(error)[:200]) from error
    if not hasattr(model, "get_image_features"):
        raise InputError("the model of transformers embeds no images", where=source, got=type(model).__name__)

    @torch.inference_mode()
    def encode(files: Sequence[str], batch_size: int) -> npt.NDArray[np.float32]:
        found = []
        for start in range(0, len(files), batch_size):
            images = [Image.open(file) for file in files[start : start + batch_size]]
            rows = model.get_image_features(**processor(images=images, return_tensors="pt"))
            rows = rows if isinstance(rows, Tensor) else rows.pooler_output
            found.append(nn.functional.normalize(rows, dim=-1).numpy())
        return np.concatenate(found)

    return encode
