"""Whoever reads a file tells the machine's faults as such, also in Python programs; the file is not to blame."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_export.bundle.opened import open_bundle
from vlm_export.bundle.safe_files import record_of_file
from vlm_export.checkpoint.directory import scan_directory
from vlm_export.checkpoint.formats.identify import identify_weights
from vlm_export.checkpoint.formats.zipcheck import check_zip
from vlm_export.checkpoint.seen_file import hash_file, see_file
from vlm_export.cli.common import existing_path
from vlm_export.errors import EnvironmentFailure, InputError
from vlm_export.exporting.tokenizers.openai_bpe import read_bounded
from vlm_export.graph.recipe import read_recipe
from vlm_export.machine_faults import CAUSES, machine_fault
from vlm_export.runtime.inputs.images import named_decoding, open_image, read_stream
from vlm_export.runtime.inputs.texts import read_tokenizer_file
from vlm_export.runtime.inputs.tokenizer import named_failures
from vlm_export.runtime.search.store import read_embeddings

NUMBERS = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS]
BUNDLE = Path(__file__).parent / "data" / "runtime" / "tiny_bundle"


class Failing(io.BytesIO):
    """A stream whose reading the system refuses."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def read(self, size: int | None = -1) -> bytes:
        raise OSError(self._number, os.strerror(self._number))


READERS: dict[str, Callable[[Path], Any]] = {
    "image": open_image,
    "tokenizer": read_tokenizer_file,
    "tokenizer of a checkpoint": read_bounded,
    "bundle": lambda _: open_bundle(BUNDLE),
    "file of a bundle": lambda path: record_of_file(path.parent, path.name),
    "checkpoint": lambda path: identify_weights(see_file(path)),
    "archive": lambda path: check_zip(see_file(path)),
    "hash": lambda path: hash_file(see_file(path), "x"),
    "directory": lambda path: scan_directory(path.parent),
    "embeddings": read_embeddings,
    "recipe": read_recipe,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_machine_that_refuses_a_file_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Path], Any]
) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"some bytes")
    for number in NUMBERS:

        def refuse(*_: Any, number: int = number, **__: Any) -> Any:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(os, "open", refuse)
            patched.setattr(Path, "open", refuse)
            patched.setattr(Path, "iterdir", refuse)
            with pytest.raises(EnvironmentFailure) as caught:
                reader(path)
        assert (caught.value.what, caught.value.fix) == CAUSES[number]
        assert caught.value.got == os.strerror(number)
        assert caught.value.where


@pytest.mark.parametrize("number", NUMBERS)
def test_a_path_that_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(EnvironmentFailure, match=CAUSES[number][0]):
        existing_path(str(tmp_path))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_stream_that_fails_half_way(number: int) -> None:
    with pytest.raises(EnvironmentFailure, match=CAUSES[number][0]):
        read_stream(Failing(number), "stream")
    stream = Failing(number)
    with pytest.raises(EnvironmentFailure), named_decoding("x", "an image", str):
        Image.open(stream)


def test_memory_and_threads_inside_libraries() -> None:
    for error in (MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("Resource temporarily unavailable")):
        with pytest.raises(EnvironmentFailure), named_failures("the tokenizer cannot be loaded", "t.json"):
            raise error
        with pytest.raises(EnvironmentFailure), named_decoding("x", "an image", str):
            raise error


@pytest.mark.parametrize(
    "name", ["out of memory", "it's out of memory", 'a "too many open files"', "No space left on device"]
)
def test_a_name_that_speaks_of_the_machine_is_only_a_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        open_image(path)
    # As the command line asks again.
    assert machine_fault(caught.value, caught.value.where) is None
    assert machine_fault(ValueError(f"cannot read {str(path)!r}")) is None
    assert machine_fault(ValueError(f"Load model from {path} failed"), str(path)) is None
    with pytest.raises(InputError, match="cannot be loaded"), named_failures("the tokenizer cannot be loaded", "t"):
        raise ValueError(f"unknown variant `{name}`, expected one of")
