"""The earliest result: weights that are mapped and compared by size, and what a first embedding does not import."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_export import Model, load
from vlm_export.errors import InputError, UsageError

# The tiny bundle is written anew with onnx, which the environment without torch lacks.
pytestmark = pytest.mark.needs_torch
IDS = [[1, 2, 524], [1, 7, 524]]
DATA = "onnx/text_model.onnx_data"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, relist: Callable[[Path], None]) -> Path:
    """The tiny bundle with the weights of its text part in a file of their own."""
    import onnx

    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "pair"))
    manifest = json.loads((folder / "vlm_export.json").read_text())
    (part,) = (part for part in manifest["parts"] if part["name"] == "text")
    (variant,) = part["variants"]
    path = folder / variant["file"]
    model = onnx.load(path)
    onnx.save_model(model, path, save_as_external_data=True, location=Path(DATA).name, size_threshold=1024)
    variant["external_data"] = [DATA]
    manifest["files"][DATA] = {"size_bytes": 0, "sha256": "0" * 64}
    (folder / "vlm_export.json").write_text(json.dumps(manifest))
    relist(folder)
    return folder


def changed(path: Path) -> None:
    """Another byte, and the same size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_mapped_weights_give_the_same_vectors(bundle: Path, tiny_model: Model) -> None:
    model = load(bundle, threads=1, weights="mapped")
    for again in (model, pickle.loads(pickle.dumps(model))):
        np.testing.assert_allclose(again.encode_ids(IDS), tiny_model.encode_ids(IDS), atol=1e-6)


def test_weights_are_compared_by_size_where_it_is_asked_for(bundle: Path) -> None:
    changed(bundle / DATA)
    with pytest.raises(InputError, match="not the one that was exported"):
        load(bundle, threads=1).encode_ids(IDS)
    model = load(bundle, threads=1, verify="size")
    for again in (model, pickle.loads(pickle.dumps(model))):
        assert again.encode_ids(IDS).shape[0] == 2
    with (bundle / DATA).open("ab") as file:
        file.write(b"0")
    with pytest.raises(InputError, match="not the one that was exported"):
        load(bundle, threads=1, verify="size").encode_ids(IDS)


def test_a_graph_is_compared_whole_in_any_case(bundle: Path) -> None:
    changed(bundle / "onnx" / "text_model.onnx")
    with pytest.raises(InputError, match="not the one that was exported"):
        load(bundle, threads=1, verify="size").encode_ids(IDS)


@pytest.mark.parametrize("option", [{"verify": "no"}, {"weights": "paked"}])
def test_unknown_words_are_refused(bundle: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"full or by size|weights cannot be"):
        load(bundle, **option)


def test_a_first_embedding_imports_no_bar(bundle: Path) -> None:
    code = (
        "import sys; from vlm_export import load\n"
        f"load({str(bundle)!r}, threads=1).encode_ids({IDS!r})\n"
        "assert not {'tqdm', 'torch', 'onnx', 'yaml'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
