"""Opening a bundle: the manifest is read at once, each other file is verified when it is first asked for."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Any

from vlm_export.bundle.layout import PRECISION_SUFFIXES, graph_path, ir_path
from vlm_export.bundle.manifest import MANIFEST_NAME, Manifest, PartRecord, VariantRecord, manifest_from_bytes
from vlm_export.bundle.onnx_locations import READS_ELSEWHERE, check_variant_files, check_variant_graph, holds_any
from vlm_export.bundle.replacement import aside_path, recover
from vlm_export.bundle.safe_files import (
    check_path,
    check_utf8,
    map_in_threads,
    opened_real_file,
    record_from_descriptor,
)
from vlm_export.bundle.strict_json import MAX_JSON_BYTES
from vlm_export.bundle.target_lock import locked_if_free
from vlm_export.errors import InputError, UsageError, VlmExportError, suggestion
from vlm_export.machine_faults import machine_fault
from vlm_export.specs import ImageSpec, TileSpec
from vlm_export.specs.signature import Axis, Signature, TensorSpec

_COPY_AGAIN = "copy the bundle again, or export it again with --overwrite"


class OpenBundle:
    """A bundle whose files are verified before they are handed out; safe to use from several threads.

    Args:
        hashes_weights: False compares files of weights by their size alone.

    Attributes:
        root: the bundle's directory, with links on the way to it resolved.
        manifest: what it says about itself.
    """

    def __init__(self, root: Path, manifest: Manifest, manifest_bytes: bytes, *, hashes_weights: bool = True) -> None:
        self.root = root
        self.manifest = manifest
        self._manifest_bytes = manifest_bytes
        variants = [] if hashes_weights else [variant for part in manifest.parts for variant in part.variants]
        self._by_size = frozenset(name for variant in variants for name in variant.external_data)
        self._lock = Lock()
        self._verified: dict[str, Future[Path]] = {}
        self._checked_graphs: set[str] = set()

    def __reduce__(self) -> tuple[Any, tuple[str, str, bool]]:
        """As a pickle it is its path, opened and checked again where the pickle is read."""
        return _open_again, (str(self.root), hashlib.sha256(self._manifest_bytes).hexdigest(), not self._by_size)

    def file(self, relative: str) -> Path:
        """The path of a listed file, once its size and sha256 are found equal to the manifest's.

        Each file is read once per OpenBundle.

        Raises:
            UsageError: the manifest lists no such file.
            InputError: missing, a link, hard-linked, outside the bundle, or another content.
        """
        if relative not in self.manifest.files:
            raise UsageError(
                f"the bundle has no file {relative!r}",
                where=str(self.root),
                fix=suggestion(relative, self.manifest.files),
            )
        with self._lock:
            future = self._verified.get(relative)
            mine = future is None
            if future is None:
                future = self._verified[relative] = Future()
        if mine:
            try:
                future.set_result(self._verify(relative))
            except BaseException as error:
                if not isinstance(error, VlmExportError):
                    del self._verified[relative]
                future.set_exception(error)
        return future.result()

    def verify(self, names: Iterable[str]) -> None:
        """Verifies several files side by side, as `file` does."""
        map_in_threads(self.file, names)

    def graph_file(self, variant: VariantRecord) -> Path:
        """The path of the variant's graph for ONNX Runtime, once it and its data files are verified.

        The graph is not parsed: publication did that, its hash is the manifest's, and ONNX Runtime itself refuses data
        outside of the bundle, tensors that do not fit their data and unknown operators. Where it could read what has no
        hash, it goes through `model_files`: an address in memory, a provider's file, a file of no variant beside it.

        Raises:
            InputError: as in `file`, or as in `model_files`.
        """
        self.verify((variant.file, *variant.external_data))
        path = self.root / variant.file
        beside = {(path.parent / name).relative_to(self.root).as_posix() for name in os.listdir(path.parent)}
        variants = [entry for part in self.manifest.parts for entry in part.variants]
        graphs = {name for entry in variants for name in (entry.file, *entry.external_data)}
        if not beside <= graphs or holds_any(path, READS_ELSEWHERE):
            return self.model_files(variant)
        return path

    def model_files(self, variant: VariantRecord) -> Path:
        """The path of the variant's graph, once it and its data files are verified, and the graph is read.

        The graph makes an engine touch no other file (`vlm_export.bundle.onnx_locations`): for proofs, and for engines
        that do not look after that themselves.

        Raises:
            InputError: as in `file`, or the graph is malformed or names other files.
        """
        self.verify((variant.file, *variant.external_data))
        if variant.file not in self._checked_graphs:
            check_variant_graph(self.root, self.manifest, variant)
            self._checked_graphs.add(variant.file)
        return self.root / variant.file

    def _verify(self, relative: str) -> Path:
        expected = self.manifest.files[relative]
        path = self.root / relative
        with opened_real_file(self.root, relative) as descriptor:
            size = os.fstat(descriptor).st_size
            # The size first: a file that is too long need not be read.
            if size != expected.size_bytes:
                raise self._changed(path, f"{expected.size_bytes} bytes", f"{size} bytes")
            if relative in self._by_size:
                return path
            found = record_from_descriptor(descriptor)
        if found != expected:
            raise self._changed(path, f"sha256 {expected.sha256}", f"sha256 {found.sha256}")
        return path

    def _changed(self, path: Path, expected: str, got: str) -> InputError:
        try:
            replaced = _read_manifest(self.root) != self._manifest_bytes
        except InputError:
            replaced = True
        if replaced:
            return InputError(
                "the bundle was replaced while it was being opened", where=str(self.root), fix="open it again"
            )
        return InputError(
            "a file of the bundle is not the one that was exported",
            where=str(path),
            expected=expected,
            got=got,
            fix="copy the bundle again, or export it again with --overwrite",
        )


def open_bundle(path: Path | str, *, hashes_weights: bool = True) -> OpenBundle:
    """Reads and checks the manifest of the bundle at `path`; no other file is read yet.

    Args:
        hashes_weights: as of `OpenBundle`.

    Raises:
        UsageError: `path` is no path.
        InputError: not a bundle (the message says what it is instead), or a manifest that is cut off, malformed,
            of a newer version, lists no size and sha256 for a variant's file, or states sizes that exclude another.
    """
    check_path(path, "a bundle")
    path = Path(path).absolute()
    what = "the bundle's path is not valid UTF-8, and engines take no other"
    check_utf8(path, InputError, what, fix="rename the directory")
    if not os.path.lexists(path):
        _recover_interrupted(path)
    _check_is_bundle(path)
    root = path.resolve()
    raw = _read_manifest(root)
    manifest = manifest_from_bytes(raw, str(root / MANIFEST_NAME))
    # A package without tasks has the file names of the software that it was made for.
    has_own_names = manifest.export.packaged_for is None or bool(manifest.tasks)
    for part in manifest.parts:
        for variant in part.variants:
            check_variant_files(manifest, variant, str(root / MANIFEST_NAME))
            if has_own_names:
                _check_variant_name(part, variant, str(root / MANIFEST_NAME))
    _check_stated_sizes(manifest, str(root / MANIFEST_NAME))
    return OpenBundle(root, manifest, raw, hashes_weights=hashes_weights)


def _check_variant_name(part: PartRecord, variant: VariantRecord, where: str) -> None:
    """InputError where a variant's file is that of another precision, whose gates are other ones."""
    known = variant.precision in PRECISION_SUFFIXES
    if not known or variant.file not in (path(part.name, variant.precision) for path in (graph_path, ir_path)):
        raise InputError(
            "a variant's precision is not that of its file",
            where=f"{where}: part {part.name!r}",
            expected=f"one of {', '.join(PRECISION_SUFFIXES)}, in the file of that name",
            got=f"{variant.precision!r:.60} in {variant.file!r:.100}",
            fix="do not use this bundle; export the model again",
        )


def _open_again(root: str, manifest_sha256: str, hashes_weights: bool) -> OpenBundle:
    """The bundle of a pickle; InputError when another one is there now."""
    bundle = open_bundle(root, hashes_weights=hashes_weights)
    if hashlib.sha256(bundle._manifest_bytes).hexdigest() != manifest_sha256:
        raise InputError(
            "the bundle was replaced since it was opened",
            where=root,
            expected=f"{MANIFEST_NAME} of sha256 {manifest_sha256}",
            got="another bundle, or another export of the same checkpoint",
            fix="open it again with load, and send that to the workers",
        )
    return bundle


def _read_manifest(root: Path) -> bytes:
    with opened_real_file(root, MANIFEST_NAME) as descriptor, open(descriptor, "rb", closefd=False) as file:
        return file.read(MAX_JSON_BYTES + 1)


def _recover_interrupted(path: Path) -> None:
    """Puts a bundle back that an overwriting export moved aside and died (only without an atomic exchange)."""
    if os.path.lexists(aside_path(path)):
        try:
            with locked_if_free(path) as free:
                if free:
                    recover(path)
        except OSError as error:
            raise machine_fault(error, str(path)) or InputError(
                "an interrupted export left the bundle under another name",
                where=str(aside_path(path)),
                got=f"it cannot be renamed back: {error.strerror}",
                fix=f"rename it to {path.name}",
            ) from error


def _check_is_bundle(path: Path) -> None:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name.
        got = str(getattr(error, "strerror", None) or error)
        raise machine_fault(error, str(path)) or InputError(
            "there is no bundle here", where=str(path), got=got
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise InputError(
            "a bundle is a directory, this is a file",
            where=str(path),
            got="a bare ONNX graph, without its manifest" if path.suffix == ".onnx" else f"{status.st_size} bytes",
            fix="pass the directory that 'vlm-export export' made",
        )
    if os.path.lexists(path / MANIFEST_NAME):
        return
    if path.name.startswith(".") and ".vlm-export-" in path.name and path.suffix == ".tmp":
        got, fix = "the temporary directory of an export that has not ended", "let the export end, or run it again"
    elif any(path.glob("*.onnx")) or any(path.glob("onnx/*.onnx")):
        got, fix = "ONNX graphs without a manifest", "copy the whole bundle, or export the model again"
    elif any(path.glob("*.safetensors")) or any(path.glob("*.bin")) or any(path.glob("*.pt")):
        got, fix = "a checkpoint", "export it first: vlm-export export SOURCE -o DIR"
    else:
        got, fix = "no manifest", "pass the directory that 'vlm-export export' made"
    raise InputError("this directory is not a bundle", where=str(path), expected=MANIFEST_NAME, got=got, fix=fix)


def _check_stated_sizes(manifest: Manifest, where: str) -> None:
    """InputError where the manifest prepares inputs in a size that its own signatures exclude.

    An image size or a context length is stated twice: in how inputs are prepared, and in the parts' signatures.
    The runtime compares the signatures with the graphs when it opens them.
    """
    image, text = manifest.image, manifest.text
    for part in manifest.parts:
        for tensor in part.signature.inputs:
            is_image = tensor.name == "pixel_values" and tensor.dtype.startswith("float") and len(tensor.shape) == 4
            if is_image and isinstance(image, ImageSpec):
                _check_image_size(part, tensor, image.size_pixels, f"{where}: image.size_pixels")
            if is_image and isinstance(image, TileSpec):
                _check_image_size(part, tensor, image.tile_size_pixels, f"{where}: image.tile_size_pixels")
            most = _axis(part.signature, tensor.shape[-1]).maximum if tensor.shape else None
            is_text = part.name == "text" and tensor.name == "input_ids"
            if is_text and text is not None and most is not None and text.context_length > most:
                raise InputError(
                    f"the manifest prepares texts longer than part {part.name!r} takes",
                    where=f"{where}: text.context_length",
                    expected=f"at most {most} tokens",
                    got=f"{text.context_length} tokens",
                    fix=_COPY_AGAIN,
                )


def _check_image_size(part: PartRecord, tensor: TensorSpec, size_pixels: int, where: str) -> None:
    """InputError where a part takes images of no such height and width."""
    for entry in tensor.shape[2:]:
        axis = _axis(part.signature, entry)
        least, most, step = axis.minimum, axis.maximum, axis.multiple_of
        if size_pixels < least or (most is not None and size_pixels > most) or size_pixels % step:
            upper = "" if most in (None, least) else f" to {most}"
            raise InputError(
                f"the manifest prepares images in a size that part {part.name!r} does not take",
                where=where,
                expected=f"{least}{upper} pixels" + (f" in steps of {step}" if step > 1 else ""),
                got=f"{size_pixels} pixels",
                fix=_COPY_AGAIN,
            )


def _axis(signature: Signature, entry: int | str) -> Axis:
    """The axis that an entry of a shape names; a fixed size is one of a single size."""
    return Axis("", entry, entry) if isinstance(entry, int) else signature.axis(entry)
