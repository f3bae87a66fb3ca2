"""What an engine would load, or refuse late, is refused when a bundle is opened."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from vlm_export.bundle import opened as opened_module
from vlm_export.bundle.manifest import MANIFEST_NAME, FileRecord, Manifest, VariantRecord, manifest_from_bytes
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.bundle.safe_files import record_from_descriptor
from vlm_export.errors import InputError, UsageError, VlmExportError
from vlm_export.runtime.engines.choice import engine_choice
from vlm_export.runtime.engines.onnxruntime import Engine

GRAPH = "onnx/vision_model.onnx"
DATA = "onnx/vision_model.onnx_data"
LOCATION = {"location": "vision_model.onnx_data"}
WEIGHTS = np.ones(32, np.float32).tobytes()

Build = Callable[..., Path]
GraphBytes = Callable[..., bytes]
Reseal = Callable[..., None]


def model_path(root: Path) -> Path:
    bundle = open_bundle(root)
    return bundle.model_files(bundle.manifest.part("vision").variant("fp32"))


def open_engine(root: Path) -> Engine:
    return engine_choice("onnxruntime", None, 1).open_part(open_bundle(root), "vision", "fp32")


def assert_refused(root: Path, says: str) -> None:
    """By what reads the graph, for a proof or another engine, and by loading it, which trusts its hash."""
    with pytest.raises(InputError, match=says) as caught:
        model_path(root)
    assert caught.value.exit_status == 3
    assert caught.value.where
    assert caught.value.fix
    with pytest.raises(InputError):
        open_engine(root)


def test_a_good_bundle_opens_and_runs(build_bundle: Build) -> None:
    path = model_path(build_bundle())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (embeds,) = session.run(None, {"pixel_values": np.ones((3, 8), np.float32)})
    np.testing.assert_array_equal(embeds, np.full((3, 4), 8.0, np.float32))


def test_an_inline_graph_opens(build_bundle: Build, graph_bytes: GraphBytes) -> None:
    assert model_path(build_bundle(graph_bytes())).is_file()


@pytest.mark.parametrize("name", [GRAPH, DATA, "config.json", MANIFEST_NAME])
def test_links_are_refused(build_bundle: Build, tmp_path: Path, name: str) -> None:
    """A file that is a link to an identical file outside, as in a hub cache."""
    root = build_bundle()
    blob = tmp_path / "blob"
    (root / name).rename(blob)
    (root / name).symlink_to(blob)
    with pytest.raises(InputError, match="is a symbolic link"):
        open_bundle(root).verify([GRAPH, DATA, "config.json"])


def test_a_linked_directory_is_refused(build_bundle: Build, tmp_path: Path) -> None:
    root = build_bundle()
    (root / "onnx").rename(tmp_path / "elsewhere")
    (root / "onnx").symlink_to(tmp_path / "elsewhere")
    assert_refused(root, "a directory on the way to a file is a link")


def test_the_bundle_itself_may_be_reached_through_a_link(build_bundle: Build, tmp_path: Path) -> None:
    root = build_bundle()
    (tmp_path / "current").symlink_to(root)
    assert model_path(tmp_path / "current") == root / GRAPH


@pytest.mark.parametrize("name", [GRAPH, DATA, MANIFEST_NAME])
def test_hard_links_are_refused(build_bundle: Build, tmp_path: Path, name: str) -> None:
    root = build_bundle()
    os.link(root / name, tmp_path / "second name")
    assert_refused(root, "hard links")


@pytest.mark.parametrize("kind", ["fifo", "directory", "missing"])
def test_what_is_no_file_is_refused(build_bundle: Build, kind: str) -> None:
    root = build_bundle()
    (root / DATA).unlink()
    if kind == "fifo":
        os.mkfifo(root / DATA)
    elif kind == "directory":
        (root / DATA).mkdir()
    assert_refused(root, "is missing" if kind == "missing" else "no regular file")


@pytest.mark.parametrize(
    "location",
    ["../vision_model.onnx_data", "/etc/passwd", "../../secret", "..\\secret", "a//b", ""],
)
def test_locations_that_leave_the_directory(build_bundle: Build, graph_bytes: GraphBytes, location: str) -> None:
    """The manifest agrees with every byte; only the graph itself points elsewhere."""
    assert_refused(build_bundle(graph_bytes({"location": location}), WEIGHTS), "not a plain path|says not where")


@pytest.mark.parametrize("location", ["./vision_model.onnx_data", "vision_model.onnx"])
def test_odd_locations_of_files_that_the_manifest_lists(
    build_bundle: Build, graph_bytes: GraphBytes, location: str
) -> None:
    """Publication refuses them. Loading reads nothing but what has the manifest's hash, so it need not."""
    root = build_bundle(graph_bytes({"location": location}), WEIGHTS)
    with pytest.raises(InputError, match=r"not a plain path|does not list for it"):
        model_path(root)
    assert open_engine(root).inputs


@pytest.mark.parametrize("location", ["other_data", "*_ORT_MEM_ADDR_*"])
def test_locations_that_the_manifest_does_not_list(
    build_bundle: Build, graph_bytes: GraphBytes, reseal: Reseal, location: str
) -> None:
    root = build_bundle(graph_bytes({"location": location}), WEIGHTS)
    (root / "onnx" / "other_data").write_bytes(WEIGHTS)
    reseal(root)
    assert_refused(root, "names a data file that the manifest does not list")


def test_a_memory_address_as_location(build_bundle: Build, graph_bytes: GraphBytes) -> None:
    """onnxruntime's own mark for a tensor that lies at an address in memory."""
    graph = graph_bytes({"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096", "length": "128"})
    assert_refused(build_bundle(graph, WEIGHTS), "names a data file that the manifest does not list")


def test_truncated_data(build_bundle: Build) -> None:
    root = build_bundle()
    (root / DATA).write_bytes(WEIGHTS[:-1])
    assert_refused(root, r"not the one that was exported[\s\S]*128 bytes[\s\S]*127 bytes")


def test_data_that_was_truncated_before_it_was_sealed(build_bundle: Build, graph_bytes: GraphBytes) -> None:
    assert_refused(build_bundle(graph_bytes(LOCATION), WEIGHTS[:-1]), "which has 127 bytes")


@pytest.mark.parametrize(
    "entries",
    [
        {"length": "9000000000000000"},
        {"offset": "9000000000000000"},
        {"offset": "-1"},
        {"offset": "1"},
        {"length": "x"},
        {"length": "9" * 400},
        {"length": "129"},
        {"length": "127"},
    ],
)
def test_ranges_outside_the_data(build_bundle: Build, graph_bytes: GraphBytes, entries: dict[str, str]) -> None:
    graph = graph_bytes({**LOCATION, **entries})
    assert_refused(build_bundle(graph, WEIGHTS), "does not fit its data|is no number")


@pytest.mark.parametrize("dims", [(8, 5), (2**31, 2**31), (-8, 4), (9_000_000_000_000_000,)])
@pytest.mark.parametrize("external", [True, False])
def test_shapes_larger_than_the_data(
    build_bundle: Build, graph_bytes: GraphBytes, dims: tuple[int, ...], external: bool
) -> None:
    graph = graph_bytes(LOCATION if external else None, dims=dims)
    assert_refused(build_bundle(graph, WEIGHTS if external else None), "does not fit its data")


def test_an_empty_graph(build_bundle: Build) -> None:
    root = build_bundle()
    (root / GRAPH).write_bytes(b"")
    assert_refused(root, "not the one that was exported")
    assert_refused(build_bundle(b"", name="sealed"), "a graph file is empty")


def test_loading_parses_no_graph(build_bundle: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest's hash covers what publication read."""

    def refuse(*_: object) -> None:
        raise AssertionError("the graph is parsed")

    monkeypatch.setattr(opened_module, "check_variant_graph", refuse)
    root = build_bundle()
    assert open_engine(root).inputs
    (root / "onnx" / "notes.txt").write_text("an unlisted file beside the graph", encoding="utf-8")
    with pytest.raises(AssertionError, match="parsed"):
        open_engine(root)


def test_data_of_another_model_of_the_same_size(build_bundle: Build) -> None:
    root = build_bundle()
    (root / DATA).write_bytes(np.full(32, 2, np.float32).tobytes())
    assert_refused(root, r"not the one that was exported[\s\S]*sha256")


def test_graph_of_another_model_of_the_same_size(build_bundle: Build) -> None:
    root = build_bundle()
    content = (root / GRAPH).read_bytes()
    (root / GRAPH).write_bytes(content.replace(b"MatMul", b"MatMux"))
    assert_refused(root, "not the one that was exported")


def test_unknown_domain(build_bundle: Build, graph_bytes: GraphBytes) -> None:
    assert_refused(build_bundle(graph_bytes(domain="evil.ops")), "unknown domain 'evil.ops'")


@pytest.mark.parametrize("name", ["/etc/passwd", "../bundle/onnx/vision_model.onnx", "onnx\\vision_model.onnx", ".."])
def test_manifest_names_that_leave_the_bundle(build_bundle: Build, name: str) -> None:
    root = build_bundle()
    text = (root / MANIFEST_NAME).read_text()
    (root / MANIFEST_NAME).write_text(text.replace(f'"{GRAPH}"', f'"{name}"'.replace("\\", "\\\\")))
    with pytest.raises(InputError, match="not a plain path"):
        open_bundle(root)


def test_a_variant_whose_file_is_not_listed(build_bundle: Build, reseal: Reseal, manifest: Manifest) -> None:
    root = build_bundle()
    part = manifest.parts[0]
    wrong = replace(part, variants=(VariantRecord("fp32", "onnx/absent.onnx"),))
    reseal(root, replace(manifest, parts=(wrong,)))
    with pytest.raises(InputError, match="names a file that the bundle does not list"):
        open_bundle(root)


def test_unlisted_files_are_not_handed_out(build_bundle: Build) -> None:
    root = build_bundle()
    (root / "extra.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no file 'confg\.json'[\s\S]*did you mean 'config\.json'"):
        open_bundle(root).file("confg.json")
    for name in ("extra.json", "../bundle/config.json", "/etc/passwd"):
        with pytest.raises(UsageError):
            open_bundle(root).file(name)


def test_each_file_is_hashed_once(build_bundle: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(descriptor: int) -> FileRecord:
        calls.append(descriptor)
        return record_from_descriptor(descriptor)

    monkeypatch.setattr(opened_module, "record_from_descriptor", counting)
    bundle = open_bundle(build_bundle())
    assert calls == []
    variant = bundle.manifest.part("vision").variant("fp32")
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: bundle.model_files(variant), range(16)))
    assert set(paths) == {bundle.root / GRAPH}
    assert len(calls) == 2


def test_a_relative_path_survives_a_change_of_directory(build_bundle: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    root = build_bundle()
    monkeypatch.chdir(root.parent)
    bundle = open_bundle("bundle")
    monkeypatch.chdir("/")
    assert bundle.file("config.json").read_text() == "{}"


def test_a_bundle_replaced_between_manifest_and_files(build_bundle: Build, reseal: Reseal) -> None:
    root = build_bundle()
    bundle = open_bundle(root)
    (root / DATA).write_bytes(np.full(32, 2, np.float32).tobytes())
    reseal(root)
    with pytest.raises(InputError, match="replaced while it was being opened"):
        bundle.file(DATA)
    assert model_path(root)


def bad_place(kind: str, tmp_path: Path, root: Path) -> Path:
    place = tmp_path / "place"
    if kind == "file":
        place = tmp_path / "model.onnx"
        place.write_bytes(b"x")
    elif kind == "empty":
        place.mkdir()
    elif kind == "graphs":
        shutil.copytree(root, place)
        (place / MANIFEST_NAME).unlink()
    elif kind == "temporary":
        place = tmp_path / ".out.vlm-export-1-0123456789ab.tmp"
        place.mkdir()
    elif kind == "checkpoint":
        place.mkdir()
        (place / "model.safetensors").write_bytes(b"x")
    elif kind == "truncated":
        shutil.copytree(root, place)
        (place / MANIFEST_NAME).write_bytes((root / MANIFEST_NAME).read_bytes()[:-20])
    elif kind == "dangling":
        place.symlink_to(tmp_path / "nowhere")
    return place


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "there is no bundle here"),
        ("dangling", "there is no bundle here"),
        ("file", "a bare ONNX graph"),
        ("empty", "no manifest"),
        ("graphs", "ONNX graphs without a manifest"),
        ("temporary", "an export that has not ended"),
        ("checkpoint", r"a checkpoint[\s\S]*export it first"),
        ("truncated", "cut off"),
    ],
)
def test_what_is_no_bundle_is_named(build_bundle: Build, tmp_path: Path, kind: str, says: str) -> None:
    place = bad_place(kind, tmp_path, build_bundle())
    with pytest.raises(InputError, match=says) as caught:
        open_bundle(place)
    assert str(place) in str(caught.value)


def test_a_path_that_is_not_utf8(build_bundle: Build, tmp_path: Path) -> None:
    root = build_bundle()
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    root.rename(odd)
    with pytest.raises(InputError, match="not valid UTF-8"):
        open_bundle(odd)


def test_no_flipped_byte_gets_through(build_bundle: Build) -> None:
    """One bit of one byte anywhere in graph or data."""
    root = build_bundle()
    for name in (GRAPH, DATA):
        content = bytearray((root / name).read_bytes())
        for at in range(0, len(content), 5):
            content[at] ^= 1
            (root / name).write_bytes(content)
            with pytest.raises(VlmExportError):
                model_path(root)
            content[at] ^= 1
        (root / name).write_bytes(content)
    assert model_path(root)


def test_errors_can_be_compared_after_the_manifest_is_read(build_bundle: Build) -> None:
    bundle = open_bundle(build_bundle())
    assert isinstance(bundle, OpenBundle)
    assert manifest_from_bytes((bundle.root / MANIFEST_NAME).read_bytes()) == bundle.manifest
    assert pickle.loads(pickle.dumps(bundle.manifest)) == bundle.manifest
