from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vlm_export.family import Checkpoint, Model, Part, StoredTensorInfo
from vlm_export.models.clip.family import ClipFamily

CHECKPOINT = Path(__file__).parents[1] / "data" / "clip" / "vit_p14" / "state_dict_fp32.pt"


class MemoryStore:
    def new(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> Model:
    """The tiny CLIP of the oracle: 42 pixels, 20 tokens, 200 ids."""
    weights: dict[str, Tensor] = torch.load(CHECKPOINT, weights_only=True)
    infos = {key: StoredTensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in weights.items()}
    checkpoint = Checkpoint(str(CHECKPOINT), "state_dict", (), infos, weights.__getitem__)
    return ClipFamily().build(checkpoint, MemoryStore())


@pytest.fixture(scope="session")
def parts(model: Model) -> dict[str, Part]:
    return {part.name: part for part in model.parts}


@pytest.fixture(scope="session")
def mutated(parts: dict[str, Part]) -> Callable[[str, Callable[[nn.Module], None]], Part]:
    """Makes a copy of a part with a change to its module."""

    def make(name: str, change: Callable[[nn.Module], None]) -> Part:
        module = copy.deepcopy(parts[name].module)
        with torch.no_grad():
            change(module)
        return replace(parts[name], module=module)

    return make
