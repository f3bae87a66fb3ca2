"""What each submodule of a part's PyTorch module gives, run eagerly: the side that `bisect` holds a graph against."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlm_export.bundle.opened import OpenBundle
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.exporting.reverify import declared_options
from vlm_export.exporting.source import build_model, recognise_source
from vlm_export.family import Model, Part

Array = npt.NDArray[Any]
INPUT_OF, OUTPUT = " input", "output "
"""What stands behind a submodule's name for what it is given, and before the name of an output of the whole."""


@contextmanager
def source_model(bundle: OpenBundle, source: str) -> Iterator[Model]:
    """The model of a bundle as PyTorch modules that its source fills; their weights last as long as this.

    Raises:
        InputError: the source's files are not those that the manifest records.
    """
    options = declared_options(bundle, source)
    with TemporaryDirectory(prefix="vlm-export-") as folder:
        opened = recognise_source(
            source, options, Path(folder), lambda _done, _total: None, bundle.manifest.source.files
        )
        with ScratchStore(Path(folder) / "weights.bin") as store:
            yield build_model(opened, store, options)


def _silent(_done: int, _total: int) -> None:
    """Nobody is told of the progress."""


def submodules(part: Part) -> tuple[str, ...]:
    """Names of all submodules, the part's own parameters' names excepted."""
    return tuple(name for name, _ in part.module.named_modules() if name)


def module_values(part: Part, names: Collection[str], inputs: Sequence[Mapping[str, Array]]) -> dict[str, list[Array]]:
    """Runs the module on every set of inputs, and keeps what submodules give and are given.

    Args:
        names: `blocks.0.mlp` for what that submodule gives, `blocks.0.mlp input` for its first argument, and
            `output image_embeds` for what the whole module gives.

    Returns:
        The value for each set; without names of submodules that do not run exactly once, or that give no one tensor.
    """
    found: dict[str, list[Array]] = {name: [] for name in names}
    calls: dict[str, int] = dict.fromkeys(names, 0)

    def keep(name: str, value: object) -> None:
        if name in found:
            calls[name] += 1
            if isinstance(value, Tensor):
                found[name].append(value.detach().numpy().copy())

    def keep_arguments(module: nn.Module, arguments: tuple[object, ...]) -> None:
        keep(f"{known[module]}{INPUT_OF}", arguments[0] if arguments else None)

    def keep_output(module: nn.Module, _arguments: object, output: object) -> None:
        keep(known[module], output)

    known = {module: name for name, module in part.module.named_modules()}
    handles: list[RemovableHandle] = []
    for module, name in known.items():
        if name in found or f"{name}{INPUT_OF}" in found:
            handles += [module.register_forward_pre_hook(keep_arguments), module.register_forward_hook(keep_output)]
    try:
        with torch.inference_mode():
            for feeds in inputs:
                tensors = [torch.from_numpy(np.ascontiguousarray(feeds[n])) for n in part.signature.input_names]
                outputs = part.module(*tensors)
                for name, output in zip(part.signature.output_names, _as_tuple(outputs), strict=True):
                    keep(f"{OUTPUT}{name}", output)
    finally:
        for handle in handles:
            handle.remove()
    return {name: arrays for name, arrays in found.items() if len(arrays) == len(inputs) == calls[name]}


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
