"""Tiny checkpoints in every supported form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import VlmExportError

DATA = Path(__file__).parents[1] / "data"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def clip_data() -> Path:
    """The oracle's CLIP checkpoints: vit_p14, vit_w128, rn_tiny."""
    return DATA / "clip"


@pytest.fixture
def weights() -> Weights:
    """A few tensors of several dtypes and ranks."""
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3, generator=generator),
        "a.bias": torch.randn(5, generator=generator),
        "b.weight": torch.randn(4, 5, generator=generator).half(),
        "c": torch.randn(2, 2, generator=generator).bfloat16(),
        "count": torch.tensor(7),
    }


@pytest.fixture
def safetensors_file(tmp_path: Path, weights: Weights) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture
def state_dict_file(tmp_path: Path, weights: Weights) -> Path:
    path = tmp_path / "weights.pt"
    torch.save(weights, path)
    return path


Refusal = Callable[..., str]


@pytest.fixture
def refusal() -> Refusal:
    """Opens what must be refused with the given exit status; returns the whole message."""

    def refuse(path: Path, *, status: int = 3, **options: str) -> str:
        with pytest.raises(VlmExportError) as caught:
            open_checkpoint(str(path), **options)
        assert caught.value.exit_status == status, caught.value
        return str(caught.value)

    return refuse
