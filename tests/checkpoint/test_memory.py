"""Reading and converting never hold weights in anonymous memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

TENSORS, ELEMENTS = 20, 2_621_440
TENSOR_BYTES = 4 * ELEMENTS
ALLOWED_GROWTH_BYTES = TENSORS * TENSOR_BYTES // 10

MEASURE = """
import re, sys, torch
from pathlib import Path
from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.store import ScratchStore
torch.set_num_threads(1)

def anonymous_bytes():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

source, scratch, small = sys.argv[1:]
for key in (c := open_checkpoint(small)).tensors:
    c.read(key).sum().item()
before = anonymous_bytes()
checkpoint = open_checkpoint(source)
opened = anonymous_bytes()
tensors = {key: checkpoint.read(key) for key in checkpoint.tensors}
total = sum(tensor.sum().item() for tensor in tensors.values())
read = anonymous_bytes()
with ScratchStore(Path(scratch)) as store:
    copies = [store.new(tuple(tensor.shape)).copy_(tensor) for tensor in tensors.values()]
    assert sum(copy.sum().item() for copy in copies) == total
    stored = anonymous_bytes()
print(opened - before, read - before, stored - before)
"""


def write_big(path: Path, form: str, writer: Any) -> None:
    tensor = torch.ones(ELEMENTS)
    if form == "torchscript":
        size = b"J" + ELEMENTS.to_bytes(4, "little")
        names = [str(i) for i in range(TENSORS)]
        pickled = {f"w{n}": writer.tensor(storage=n, elements=ELEMENTS, size=size, stride=b"K\1") for n in names}
        raw = tensor.numpy().tobytes()
        writer.archive(path, writer.module(pickled), dict.fromkeys(names, raw))
    elif form == "safetensors":
        save_file({f"w{i}": tensor.clone() for i in range(TENSORS)}, path)
    else:
        torch.save({f"w{i}": tensor.clone() for i in range(TENSORS)}, path)


@pytest.mark.parametrize("form", ["safetensors", "state_dict", "torchscript"])
def test_weights_are_never_anonymous_memory(tmp_path: Path, form: str, writer: Any, safetensors_file: Path) -> None:
    path = tmp_path / "big"
    write_big(path, form, writer)
    assert path.stat().st_size > 200_000_000
    command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "scratch"), str(safetensors_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    opened, read, stored = map(int, done.stdout.split())
    path.unlink()
    assert opened < ALLOWED_GROWTH_BYTES
    assert read < ALLOWED_GROWTH_BYTES
    assert stored < ALLOWED_GROWTH_BYTES
