"""`vlm_export.ray`: each row once, the vectors of `encode_image`, and weights that two workers hold once."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from vlm_export import load
from vlm_export.errors import InputError, UsageError
from vlm_export.ray import Embedder

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "runtime" / "tiny_bundle"
BAD = 5
RAY = ("ray[data]==2.60.0", "pandas")
# Private memory of a worker that opened a bundle, of the size of the weights.
MOST_PRIVATE = 0.10
WORKER = """
import json, sys
import numpy as np
import onnxruntime
from vlm_export.bundle.memory import anonymous_bytes
from vlm_export.ray import Embedder
bundle, paths = sys.argv[1], sys.argv[2:]
np.ones((64, 64), np.float32) @ np.ones((64, 64), np.float32)
before = anonymous_bytes()
embedder = Embedder(bundle, batch_size=2)
embedder.model.session.engine("vision")
opened = anonymous_bytes()
print(json.dumps({"private": opened - before}), flush=True)
for line in sys.stdin:
    found = embedder({"path": np.array(json.loads(line))})
    print(json.dumps({"paths": found["path"].tolist(), "vectors": found["embedding"].tolist()}), flush=True)
"""
RAY_JOB = """
import json, os, signal, sys
import numpy as np
import ray
from pathlib import Path
from vlm_export.bundle.memory import anonymous_bytes
from vlm_export.ray import Embedder

class Watched(Embedder):
    def __init__(self, killed, **options):
        import onnxruntime
        before = anonymous_bytes()
        super().__init__(**options)
        self.model.session.engine("vision")
        self.killed, self.private = Path(killed), anonymous_bytes() - before

    def __call__(self, batch):
        found = super().__call__(batch)
        rows = len(found["path"])
        if 7 in batch["number"] and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {**found, "process": np.full(rows, os.getpid()), "private": np.full(rows, self.private)}

bundle, killed, answer, home, *paths = sys.argv[1:]
ray.init(num_cpus=4, include_dashboard=False, _temp_dir=home)
rows = [{"path": path, "number": number} for number, path in enumerate(paths)]
dataset = ray.data.from_items(rows, override_num_blocks=12)
found = dataset.map_batches(
    Watched, fn_constructor_kwargs={"bundle": bundle, "killed": killed}, batch_size=8, concurrency=2, num_cpus=1
).take_all()
json.dump([{**row, "embedding": row["embedding"].tolist()} for row in found], open(answer, "w"), default=int)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """96 images, one of which cannot be read."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(96):
        Image.fromarray(random.integers(0, 256, (20, 31, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    (folder / f"{BAD:02d}.png").write_bytes(b"no image")
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory, relist: Callable[[Path], None]) -> Path:
    """The tiny bundle with 90 MB of weights in its vision part."""
    import onnx
    from onnx import helper, numpy_helper

    bundle = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("heavy") / "bundle"))
    random, sizes = np.random.default_rng(0), (3 * 24 * 24, 8192, 1024, 12)
    nodes, weights, value = [helper.make_node("Flatten", ["pixel_values"], ["0"])], [], "0"
    for number, shape in enumerate(pairwise(sizes)):
        weights.append(numpy_helper.from_array(random.standard_normal(shape, dtype=np.float32), f"w{number}"))
        output = "image_embeds" if number == len(sizes) - 2 else f"{number + 1}"
        nodes.append(helper.make_node("MatMul", [value, f"w{number}"], [output]))
        value = output
    shapes: dict[str, list[str | int | None]] = {"pixel_values": ["batch", 3, 24, 24], "image_embeds": ["batch", 12]}
    tensors = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "vision", tensors[:1], tensors[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, bundle / "onnx" / "vision_model.onnx")
    relist(bundle)
    return bundle


def readable(images: list[str]) -> list[str]:
    return [path for number, path in enumerate(images) if number != BAD]


def check_rows(paths: list[str], vectors: Any, images: list[str], bundle: Path) -> None:
    """Every image once, whatever the order, with the vectors of `encode_image`."""
    assert sorted(paths) == readable(images)
    rows = np.array(vectors, np.float32)[np.argsort(paths)]
    np.testing.assert_allclose(rows, load(bundle, threads=1).encode_image(readable(images)), rtol=0, atol=2e-6)


def told(worker: subprocess.Popen[str]) -> Any:
    assert worker.stdout is not None
    return json.loads(worker.stdout.readline())


def test_two_workers_hold_the_weights_once(heavy: Path, images: list[str], cache: Path) -> None:
    weights = (heavy / "onnx" / "vision_model.onnx").stat().st_size
    # The first fills the cache.
    Embedder(str(heavy)).model.session.engine("vision")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER, str(heavy)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    paths: list[str] = []
    vectors: list[list[float]] = []
    with subprocess.Popen(command, **pipes) as first, subprocess.Popen(command, **pipes) as second:
        for worker in (first, second):
            assert told(worker)["private"] < MOST_PRIVATE * weights
        for number, start in enumerate(range(0, len(images), 24)):
            worker = (first, second)[number % 2]
            print(json.dumps(images[start : start + 24]), file=worker.stdin, flush=True)
            found = told(worker)
            paths += found["paths"]
            vectors += found["vectors"]
        for worker in (first, second):
            worker.communicate()
    check_rows(paths, vectors, images, heavy)


@pytest.mark.slow
def test_ray_data_gives_each_row_once_though_a_worker_is_killed(
    heavy: Path, images: list[str], cache: Path, python_with: Callable[..., Path], tmp_path: Path
) -> None:
    from importlib.metadata import requires

    base = [text for text in requires("vlm-export") or () if "extra ==" not in text]
    python = python_with("ray", *RAY, *base, "pyarrow")
    # Ray writes a token to HOME, and its sockets' names must be short.
    with TemporaryDirectory() as home:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": home}
        command = [
            str(python),
            "-c",
            RAY_JOB,
            str(heavy),
            str(tmp_path / "killed"),
            str(tmp_path / "answer.json"),
            home,
        ]
        done = subprocess.run([*command, *images], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    rows = json.loads((tmp_path / "answer.json").read_text())
    check_rows([row["path"] for row in rows], [row["embedding"] for row in rows], images, heavy)
    weights = (heavy / "onnx" / "vision_model.onnx").stat().st_size
    private = {row["process"]: row["private"] for row in rows}
    assert len(private) >= 2
    assert max(private.values()) < MOST_PRIVATE * weights


def bytes_of(images: list[str]) -> list[bytes]:
    return [Path(path).read_bytes() for path in images]


def test_images_of_each_kind(images: list[str], cache: Path) -> None:
    columns: dict[str, Any] = {
        "path": np.array(images[:4]),
        "object": np.array(images[:4], dtype=object),
        "bytes": bytes_of(images[:4]),
        "pixels": np.stack([np.asarray(Image.open(path)) for path in images[:4]]),
        "list": [np.asarray(Image.open(path)) for path in images[:4]],
    }
    expected = load(TINY, threads=1).encode_image(images[:4])
    for column, values in columns.items():
        embedder = pickle.loads(pickle.dumps(Embedder(str(TINY), column=column)))
        found = embedder({column: values, "n": np.arange(4)})
        assert list(found) == [column, "n", "embedding"]
        np.testing.assert_allclose(found["embedding"], expected, rtol=0, atol=2e-6)
    none: npt.NDArray[Any] = Embedder(str(TINY))({"path": np.array([], dtype=str)})["embedding"]
    assert none.shape == (0, 12)


def test_what_cannot_be_read(images: list[str], cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    batch = {"path": np.array([*images[4:7], None], dtype=object), "n": np.arange(4)}
    with caplog.at_level(logging.WARNING):
        found = Embedder(str(TINY))(batch)
    assert found["n"].tolist() == [0, 2]
    assert len(found["embedding"]) == 2
    assert images[BAD] in caplog.text
    found = Embedder(str(TINY), on_error="keep")(batch)
    assert [bool(reason) for reason in found["error"]] == [False, True, False, True]
    assert np.isnan(found["embedding"]).all(axis=1).tolist() == [False, True, False, True]
    with pytest.raises(InputError, match="cannot be decoded"):
        Embedder(str(TINY), on_error="stop")(batch)


def test_texts_and_options(cache: Path) -> None:
    texts = ["a cat", "two dogs and a bird", "a cat"]
    found = Embedder(str(TINY), column="title", kind="text", output="vector", batch_size=2)({"title": np.array(texts)})
    np.testing.assert_allclose(found["vector"], load(TINY, threads=1).encode_text(texts), rtol=0, atol=2e-6)
    with pytest.raises(UsageError, match="lacks the column"):
        Embedder(str(TINY), column="title", kind="text")({"path": np.array(texts)})
    with pytest.raises(UsageError, match="a name that is added"):
        Embedder(str(TINY))({"path": np.array(texts), "embedding": np.arange(3)})
    with pytest.raises(UsageError, match="images or texts"):
        Embedder(str(TINY), kind="sound")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="skips, keeps or stops"):
        Embedder(str(TINY), on_error="ignore")  # type: ignore[arg-type]
