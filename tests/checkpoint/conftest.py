"""Tiny checkpoints in every supported form, and archives written by hand, opcode by opcode."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import VlmExportError

DATA = Path(__file__).parents[1] / "data"
Weights = dict[str, torch.Tensor]
Refusal = Callable[..., str]


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


@pytest.fixture
def refusal() -> Refusal:
    """Opens what must be refused with the given exit status; returns the whole message."""

    def refuse(path: Path, *, status: int = 3, **options: Any) -> str:
        with pytest.raises(VlmExportError) as caught:
            open_checkpoint(str(path), **options)
        assert caught.value.exit_status == status, caught.value
        return str(caught.value)

    return refuse


class ArchiveWriter:
    """Writes TorchScript archives without code from opcodes."""

    def text(self, text: str) -> bytes:
        raw = text.encode()
        return b"X" + len(raw).to_bytes(4, "little") + raw

    def tensor(
        self, *, storage: str = "0", elements: int = 6, size: bytes = b"K\2K\3", stride: bytes = b"K\3K\1"
    ) -> bytes:
        """One float32 tensor, as torch writes it; `size` and `stride` are opcodes too."""
        persistent = self.text("storage") + b"ctorch\nFloatStorage\n" + self.text(storage) + self.text("cuda:0")
        persistent = b"(" + persistent + b"J" + elements.to_bytes(4, "little") + b"tQ"
        arguments = persistent + b"K\0" + b"(" + size + b"t" + b"(" + stride + b"t"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89ccollections\nOrderedDict\n)R" + b"tR"

    def module(self, attributes: dict[str, bytes]) -> bytes:
        """One module, for an attribute of another."""
        items = b"".join(self.text(name) + value for name, value in attributes.items())
        return b"c__torch__.Any.Name\nNode\n)\x81}(" + items + b"ub"

    def archive(
        self, path: Path, root: bytes, storages: dict[str, bytes] | None = None, *, aligned: bool = True
    ) -> Path:
        """An archive whose root is the pickled value `root`; one storage "0" of 24 bytes unless others are given."""
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arch/data.pkl", b"\x80\x02" + root + b".")
            archive.writestr("arch/constants.pkl", b"\x80\x02).")
            for name, raw in (storages or {"0": bytes(24)}).items():
                info = zipfile.ZipInfo(f"arch/data/{name}")
                if aligned:
                    # torch pads the header with an extra field, so that the bytes start at a multiple of 64.
                    start = archive.start_dir + 30 + len(info.filename) + 4
                    padding = -start % 64
                    info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
                archive.writestr(info, raw)
        return path


@pytest.fixture
def writer() -> ArchiveWriter:
    return ArchiveWriter()


@dataclass(frozen=True)
class Sentinel:
    """Pickles to a call that makes a directory."""

    path: Path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Sentinel]:
    found = Sentinel(tmp_path / "executed")
    yield found
    assert not found.path.exists(), "the checkpoint's pickle was executed"
