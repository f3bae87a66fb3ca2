"""`vlm_export.embed`: the vectors of `encode_image`, from any inputs, and exactly once however often it is killed."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import vlm_export
from vlm_export import Model, load
from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.runtime.bulk.embed import EmbedOptions, EmbedResult, embed
from vlm_export.runtime.bulk.folder import embeddings_at, folder_state, skipped_items
from vlm_export.runtime.bulk.items import TableColumns
from vlm_export.runtime.search.store import npy_metadata

BAD = ("k03.png", "k11.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in two folders, two of which cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(24):
        path = folder / ("below" if number % 3 == 0 else "") / f"k{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (20 + number, 31, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        if path.name in BAD:
            path.write_bytes(path.read_bytes()[:90])
    (folder / "notes.md").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def readable(images: Path) -> list[Path]:
    return [path for path in sorted(images.rglob("*.png")) if path.name not in BAD]


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path, readable: list[Path]) -> np.ndarray[Any, Any]:
    vectors: np.ndarray[Any, Any] = load(tiny_bundle, threads=1).encode_image(readable, batch_size=1)
    return vectors


@pytest.fixture
def two_workers(tiny_bundle: Path) -> Model:
    return load(tiny_bundle, threads=2)


def options(**changed: Any) -> EmbedOptions:
    return EmbedOptions(**{"batch_size": 3, "shard_items": 7, **changed})


def check_whole(found: EmbedResult, output: Path, readable: list[Path], expected: np.ndarray[Any, Any]) -> None:
    read = embeddings_at(output)
    assert read.items == tuple(map(str, readable))
    np.testing.assert_allclose(read.vectors, expected, rtol=0, atol=2e-6)
    assert found.rows == len(readable)


@pytest.mark.parametrize("output", ["x.npy", "x.parquet", "folder", "v1.2/"])
def test_vectors_are_those_of_encode_image(
    output: str, two_workers: Model, images: Path, readable: list[Path], expected: Any, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    found = embed(two_workers, [images], f"{tmp_path}/{output}", options(), progress=lambda *done: told.append(done))
    check_whole(found, tmp_path / output, readable, expected)
    assert [Path(name).name for name in found.skipped] == sorted(BAD, key=lambda name: name != "k03.png")
    assert found.scan.others == (str(images / "notes.md"),)
    assert told[-1] == (24, 24)
    assert found.shards == (0 if "." in output and not output.endswith("/") else 4)


@pytest.mark.parametrize("shard_format", ["parquet", "npy"])
def test_a_folder_says_what_it_holds(shard_format: Any, two_workers: Model, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    embed(two_workers, [images], output, options(shard_format=shard_format))
    assert sorted(path.suffix for path in output.iterdir()) == [".json", *[f".{shard_format}"] * 4]
    state = folder_state(output)
    assert (state.complete, state.shards, state.rows, state.skipped) == (True, 4, 22, 2)
    assert [Path(entry.item).name for entry in skipped_items(output)] == ["k03.png", "k11.png"]
    assert all(entry.reason for entry in skipped_items(output))
    if shard_format == "parquet":
        assert pyarrow.parquet.read_table(output).column("item").to_pylist() == list(embeddings_at(output).items)


def test_what_is_there_is_kept_unless_it_may_go(
    two_workers: Model, images: Path, readable: list[Path], expected: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    embed(two_workers, [images / "below"], output, options())
    with pytest.raises(UsageError, match="the output exists") as refused:
        embed(two_workers, [images], output, options())
    assert "--resume" in refused.value.fix
    with pytest.raises(InputError, match="the inputs are not those of the run that is resumed"):
        embed(two_workers, [images], output, options(resume=True))
    for changed in ({"shard_items": 5}, {"truncate": True}):
        with pytest.raises(InputError, match=f"another value of --{next(iter(changed)).replace('_', '-')}"):
            embed(two_workers, [images / "below"], output, options(resume=True, **changed))
    check_whole(embed(two_workers, [images], output, options(overwrite=True)), output, readable, expected)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary").write_text("mine")
    for chosen in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(UsageError, match="holds no embeddings"):
            embed(two_workers, [images], tmp_path / "mine", options(**chosen))
    for place in (tmp_path / "mine" / "diary" / "out", tmp_path / "none" / "out"):
        with pytest.raises(EnvironmentFailure, match="cannot be written"):
            embed(two_workers, [images], place, options())
    with pytest.raises(UsageError, match="whole or not there"):
        embed(two_workers, [images], tmp_path / "x.npy", options(resume=True))


def test_an_error_stops_a_run_that_may_skip_nothing(two_workers: Model, images: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be decoded") as refused:
        embed(two_workers, [images], tmp_path / "out", options(on_error="stop"))
    assert refused.value.where.endswith("k03.png")
    with pytest.raises(InputError, match="cannot be decoded"):
        embed(two_workers, [images / "k01.png", images / "k11.png"], tmp_path / "x.npy", options())
    with pytest.raises(InputError, match="not complete"):
        embeddings_at(tmp_path / "out")


def test_lists_tables_and_archives(
    two_workers: Model, images: Path, readable: list[Path], expected: Any, tmp_path: Path
) -> None:
    paths = [*readable, images / "k11.png"]
    names = [f"photo {number}" for number in range(len(paths))]
    (tmp_path / "list").write_text("\n".join(map(str, paths)), encoding="utf-8")
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "file", "colour"), *zip(names, paths, ["a,b"] * len(paths), strict=True)])
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for path in paths:
            archive.add(path, path.name)
        archive.addfile(tarfile.TarInfo("k.json"), io.BytesIO())
    columns = TableColumns("file", "id", ("colour",))
    kept = names[:-1]
    for output in ("table.parquet", "table.npy"):
        found = embed(two_workers, [tmp_path / "table.csv"], tmp_path / output, options(columns=columns))
        assert list(found.skipped) == names[-1:]
        assert embeddings_at(tmp_path / output).items == tuple(kept)
        np.testing.assert_allclose(embeddings_at(tmp_path / output).vectors, expected, rtol=0, atol=2e-6)
    assert npy_metadata(tmp_path / "table.npy")["columns"] == {"colour": ["a,b"] * len(kept)}
    again = TableColumns("item", keep=("colour",))
    with pytest.raises(InputError, match="none of the 22 images"):
        # Its items are names, and not paths.
        embed(two_workers, [tmp_path / "table.parquet"], tmp_path / "y.npy", options(columns=again))
    embed(two_workers, [], tmp_path / "listed", options(lists=[tmp_path / "list"]))
    assert embeddings_at(tmp_path / "listed").items == tuple(map(str, readable))
    found = embed(two_workers, [tmp_path / "shard.tar"], tmp_path / "packed", options())
    assert embeddings_at(tmp_path / "packed").items == tuple(f"{tmp_path}/shard.tar/{path.name}" for path in readable)
    np.testing.assert_allclose(embeddings_at(tmp_path / "packed").vectors, expected, rtol=0, atol=2e-6)
    assert found.scan.others == (f"{tmp_path}/shard.tar/k.json",)
    assert [error.where for error in found.skipped.values()] == [f"{tmp_path}/shard.tar/k11.png"]


def test_inputs_that_cannot_be_read_are_told(two_workers: Model, images: Path, tmp_path: Path) -> None:
    def refused(name: str, content: bytes, match: str, **chosen: Any) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=match):
            embed(two_workers, [tmp_path / name], tmp_path / "x.npy", options(**chosen))

    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"size": "-512"}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    refused("negative.tar", packed.getvalue(), "negative size")
    refused("a.tar", b"no archive", "an archive cannot be read")
    refused("a.csv", b"name\nx.png\n", "lacks a column")
    refused("b.csv", b"path\n\xff\n", "a table cannot be read")
    refused("c.csv", b"path\n", "names no images")
    refused("a.parquet", b"no table", "a table cannot be read")
    refused("a.txt", b"\n\n", "no lines")
    with pytest.raises(UsageError, match="files of their own"):
        embed(two_workers, [tmp_path / "a.txt", images], tmp_path / "x.npy")
    for more in ([], [tmp_path / "a.csv"]):
        with pytest.raises(UsageError, match="columns are those of tables"):
            embed(two_workers, [*more, images], tmp_path / "x.npy", options(columns=TableColumns("file")))
    with pytest.raises(UsageError, match="name of ours"):
        options(columns=TableColumns(keep=("item",)))
    with pytest.raises(UsageError, match=r"\.npy or \.parquet"):
        embed(two_workers, [images], tmp_path / "x.csv")


def test_texts(two_workers: Model, tmp_path: Path) -> None:
    texts = [f"{'a ' * (number % 5)}cat {number}" for number in range(70)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    found = embed(two_workers, [tmp_path / "texts.txt"], tmp_path / "out", options(batch_size=2, shard_items=40))
    assert (found.rows, found.shards, found.scan.kind) == (70, 2, "text")
    read = embeddings_at(tmp_path / "out")
    assert read.items == tuple(texts)
    np.testing.assert_allclose(read.vectors, two_workers.encode_text(texts), rtol=0, atol=2e-6)


def test_a_damaged_shard_is_told(two_workers: Model, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    embed(two_workers, [images], output, options(shard_format="npy"))
    shard = output / "part-000001.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    with pytest.raises(InputError):
        embeddings_at(output)
    with pytest.raises(InputError):
        embed(two_workers, [images], output, options(shard_format="npy", resume=True))
    os.unlink(shard)
    assert embed(two_workers, [images], output, options(shard_format="npy", resume=True)).resumed == 17
    assert shard.read_bytes() == content
    (output / "_embeddings.json").write_text("{}")
    (output / "part-mine.npy").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"embeddings\.json"):
        embeddings_at(output)
    embed(two_workers, [images], output, options(overwrite=True))
    assert len(embeddings_at(output).items) == 22
    assert (output / "part-mine.npy").exists()


@pytest.mark.parametrize("shard_format", ["npy", "parquet"])
def test_a_shard_of_another_run_is_told(
    two_workers: Model, images: Path, tmp_path: Path, shard_format: Literal["npy", "parquet"]
) -> None:
    output, swapped = tmp_path / "out", tmp_path / "swapped"
    embed(two_workers, [images], output, options(shard_format=shard_format))
    first, second = (output / f"part-00000{number}.{shard_format}" for number in (0, 1))
    for source, target in ((first, swapped), (second, first), (swapped, second)):
        source.rename(target)
    with pytest.raises(InputError, match="of another run"):
        embeddings_at(output)
    # A folder of an older version does not say what its shards are of.
    state = json.loads((output / "_embeddings.json").read_text())
    del state["shard_sha256"]
    (output / "_embeddings.json").write_text(json.dumps(state))
    assert len(embeddings_at(output).items) == 22


def test_it_is_public(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    calls: list[Callable[..., Any]] = [vlm_export.embed, embed]
    assert calls[0] is calls[1]
    with pytest.raises(UsageError, match="skip or stop"):
        EmbedOptions(on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="resumes or overwrites"):
        EmbedOptions(resume=True, overwrite=True)
