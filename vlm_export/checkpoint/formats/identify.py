"""What a file is, by its first bytes, so that a wrong one is named for what it is."""

from __future__ import annotations

from typing import Literal

from vlm_export.checkpoint.seen_file import SeenFile, error_from_unreadable
from vlm_export.errors import InputError

WeightsKind = Literal["zip", "legacy_pickle", "safetensors"]
ZIP_MAGIC = b"PK\x03\x04"
# torch.save before torch 1.6: protocol 2, then the number 0x1950a86a20f9469cfc6c.
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_HEAD_BYTES = 1024
_TRY_AGAIN = "download the checkpoint itself again and compare its size and sha256 with its publisher's"
_OTHER_FORMATS = {
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\x89HDF": "an HDF5 file (TensorFlow or Keras weights)",
    b"GGUF": "a GGUF file (llama.cpp weights)",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG image",
}


def identify_weights(file: SeenFile) -> WeightsKind:
    """How the weights in `file` are stored, by content alone.

    Raises:
        InputError: the file is none of the known kinds; the error says what it is instead.
    """
    head = _read_head(file)
    if head.startswith(ZIP_MAGIC):
        return "zip"
    if head.startswith(LEGACY_MAGIC):
        return "legacy_pickle"
    if _is_safetensors(file, head):
        return "safetensors"
    raise error_from_bad_file(file)


def error_from_bad_file(file: SeenFile) -> InputError:
    """The error for a file that is no checkpoint, with its real cause."""
    head = _read_head(file)
    what, fix = _describe(head)
    return InputError(
        f"the file is no checkpoint: it is {what}",
        where=str(file),
        expected="a .pt/.pth file as torch.save or torch.jit.save writes it, or a .safetensors file",
        got=f"{file.size_bytes} bytes that start with {head[:24]!r}",
        fix=fix,
    )


def _read_head(file: SeenFile) -> bytes:
    with file.open() as opened:
        try:
            return opened.read(_HEAD_BYTES)
        except OSError as error:
            raise error_from_unreadable(file.path, error) from error


def _is_safetensors(file: SeenFile, head: bytes) -> bool:
    # An eight-byte length and a JSON header: the only kind whose brace stands at byte 8.
    named = file.path.suffix == ".safetensors" and len(head) >= 8 and head.strip(b"\x00") != b""
    return head[8:9] == b"{" or (named and _plain_text(head) is None)


def _describe(head: bytes) -> tuple[str, str]:
    if not head:
        return "empty", _TRY_AGAIN
    if not head.strip(b"\x00"):
        return "filled with zero bytes, as an interrupted download leaves it", _TRY_AGAIN
    text = _plain_text(head)
    if text is not None:
        return text
    if head[257:262] == b"ustar":
        return "a tar archive", "tar checkpoints of torch before 1.6 are not read: load and save it with a newer torch"
    for magic, name in _OTHER_FORMATS.items():
        if head.startswith(magic):
            return name, "name the checkpoint's .pt, .pth or .safetensors file instead"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return (
            "a pickle that torch.save did not write, and it is not opened",
            "save the weights with safetensors.torch.save_file(model.state_dict(), …)",
        )
    if len(head) < 8:
        return "cut off after a few bytes", _TRY_AGAIN
    return "of an unknown format", _TRY_AGAIN


def _plain_text(head: bytes) -> tuple[str, str] | None:
    """What a text file is, or None for binary data."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights it points to", "run `git lfs pull` in the repository it came from"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<!--", b"<?xml")):
        return (
            "an HTML or XML page, as a download that needs a login or met an error leaves it",
            "download the file with a direct link",
        )
    if start.startswith((b"{", b"[")):
        return "a JSON text", "name the weights file, or the directory that holds it together with config.json"
    return None
