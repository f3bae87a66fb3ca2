"""Models on disk: opened without reading their weights, written in one step with the weights streamed one at a time."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from vlm_export.bundle.environment import check_free_space, environment_errors
from vlm_export.bundle.replacement import sync_directory, sync_file
from vlm_export.errors import UsageError
from vlm_export.graph.errors import GraphError
from vlm_export.graph.tensor_slots import TensorSlot, tensor_slots

DEFAULT_EXTERNAL_BYTES = 64 << 20
# What protobuf can hold in one message.
PROTO_LIMIT_BYTES = (1 << 31) - 1


@dataclass(frozen=True)
class Storage:
    """Where the weights of a written model lie.

    Attributes:
        external: in files beside the graph; None: only when they exceed 64 MiB together.
        shard_bytes: a new file is begun before one would exceed this; a larger tensor has a file of its own.
        threshold_bytes: tensors up to this size stay in the graph file, where readers see shapes and scalars.
    """

    external: bool | None = None
    shard_bytes: int | None = None
    threshold_bytes: int = 1024

    def __post_init__(self) -> None:
        if (self.shard_bytes is not None and self.shard_bytes <= 0) or self.threshold_bytes < 0:
            raise UsageError("sizes of storage are positive", got=str(self), fix="give a number of bytes above zero")


def open_model(path: Path | str) -> ir.Model:
    """Reads the graph; tensors with external data are mapped when they are used, and never read as a whole.

    Raises:
        GraphError: no ONNX model, a part that would get lost (sparse initializers, training information), or external
            data that is missing, too short, or lies outside the model's directory.
        EnvironmentFailure: the file cannot be read.
    """
    path = Path(os.path.abspath(path))
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise GraphError(f"the model {what}", where=str(path), expected="a file in ONNX's binary format")
    with environment_errors("reading the model", None):
        proto = _read_proto(path)
    _refuse_what_gets_lost(proto, path)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        # The library wraps what it finds in errors that print whole graphs; the innermost names the fault.
        raise GraphError("the graph is malformed", where=str(path), got=_innermost(error)) from error
    _locate_external_data(model, path)
    return model


def _read_proto(path: Path) -> onnx.ModelProto:
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError:
        raise
    except Exception as error:
        raise GraphError("the file is not an ONNX model", where=str(path), got=_first_bytes(path)) from error
    if not proto.HasField("graph"):
        raise GraphError("the file holds no graph", where=str(path), got=_first_bytes(path))
    return proto


def _first_bytes(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(48)
    return f"starts with {start!r}" if start else "an empty file"


def _refuse_what_gets_lost(proto: onnx.ModelProto, path: Path) -> None:
    lost = {
        "sparse initializers": proto.graph.sparse_initializer,
        "training information": proto.training_info,
    }
    for name, entries in lost.items():
        if entries:
            raise GraphError(f"{name} cannot be kept", where=str(path), fix="remove them with the tool that wrote them")


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0][:200]


def _locate_external_data(model: ir.Model, path: Path) -> None:
    root, sizes = path.parent.resolve(), dict[str, int]()
    for slot in tensor_slots(model):
        tensor = slot.tensor
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        tensor.base_dir = str(path.parent)
        if tensor.path not in sizes:
            sizes[tensor.path] = _data_file_size(Path(tensor.path), root, tensor.name)
        end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
        if (tensor.offset or 0) < 0 or end > sizes[tensor.path] or end - (tensor.offset or 0) < tensor.nbytes:
            raise GraphError(
                f"the external data of {tensor.name!r} is too short",
                where=tensor.path,
                expected=f"{max(end, (tensor.offset or 0) + tensor.nbytes)} bytes",
                got=f"{sizes[tensor.path]} bytes, of which {tensor.length} are the tensor's",
                fix="copy the data file again; it was cut off",
            )


def _data_file_size(file: Path, root: Path, tensor_name: str) -> int:
    if not file.resolve().is_relative_to(root):
        raise GraphError(
            f"the external data of {tensor_name!r} lies outside the model's directory",
            where=str(file),
            expected=f"a file below {root}",
        )
    if not file.is_file():
        raise GraphError(
            f"the external data of {tensor_name!r} is missing", where=str(file), fix="put it beside the model"
        )
    return file.stat().st_size


def save_model(
    model: ir.Model, path: Path | str, *, storage: Storage | None = None, overwrite: bool = False
) -> tuple[Path, ...]:
    """Writes the model beside its target and puts it in place when it is complete, the graph file last.

    Weights are written once each, also when several initializers share one. The files are `PATH`, `PATH_data`,
    `PATH_data_1`, …. The model may have been read from the files that are replaced: its tensors then refer to the new
    ones afterwards; otherwise it is left as it was. Data files of before that the new model has no use for stay. When
    weights are replaced, the old files are set aside first, so that a process killed between the renames leaves no
    mixture.

    Args:
        overwrite: replace files of these names.

    Returns:
        The files written, the graph first, as `path` names them.

    Raises:
        UsageError: the target exists without `overwrite`, or its directory does not.
        GraphError: what stays in the graph file exceeds protobuf's 2 GB.
        EnvironmentFailure: the disk is full or read-only.
    """
    given, path, storage = Path(path), Path(os.path.abspath(path)), storage or Storage()
    slots = list(tensor_slots(model))
    shards = _shards(_external_slots(slots, storage), storage.shard_bytes)
    names = [path.name, *(_data_name(path.name, index) for index in range(len(shards)))]
    targets = tuple(path.with_name(name) for name in names)
    _check_targets(targets, overwrite)
    _check_inline_bytes(slots, shards)
    needed_bytes = sum(slot.nbytes for slot in slots)
    with environment_errors("writing the model", path.parent, needed_bytes):
        check_free_space(path.parent, needed_bytes)
        with _staging(path) as staging:
            placed = _write(model, slots, shards, [staging / name for name in names])
            replaced = any(target.exists() for target in targets)
            _put_in_place(staging, targets)
    if replaced:
        for slot, tensor in placed:
            if isinstance(tensor, ir.ExternalTensor):
                tensor.base_dir = str(path.parent)
            slot.tensor = tensor
    return tuple(given.with_name(name) for name in names)


def _data_name(name: str, index: int) -> str:
    return f"{name}_data" if index == 0 else f"{name}_data_{index}"


def _external_slots(slots: Sequence[TensorSlot], storage: Storage) -> list[TensorSlot]:
    external = storage.external
    if external is None:
        sizes = {slot.identity: slot.nbytes for slot in slots}
        external = sum(sizes.values()) > DEFAULT_EXTERNAL_BYTES or storage.shard_bytes is not None
    return [slot for slot in slots if external and slot.can_be_external and slot.nbytes > storage.threshold_bytes]


def _shards(slots: Sequence[TensorSlot], shard_bytes: int | None) -> list[dict[object, list[TensorSlot]]]:
    """Per file: tensors by identity, with all the slots that hold them."""
    shards: list[dict[object, list[TensorSlot]]] = []
    home: dict[object, dict[object, list[TensorSlot]]] = {}
    filled = 0
    for slot in slots:
        if slot.identity not in home:
            if not shards or (shard_bytes is not None and filled and filled + slot.nbytes > shard_bytes):
                shards.append({})
                filled = 0
            filled += slot.nbytes
            home[slot.identity] = shards[-1]
        home[slot.identity].setdefault(slot.identity, []).append(slot)
    return shards


def _check_targets(targets: Sequence[Path], overwrite: bool) -> None:
    parent = targets[0].parent
    if not parent.is_dir():
        raise UsageError("the output's directory does not exist", where=str(parent), fix="create it")
    for target in targets:
        if target.is_dir():
            raise UsageError("the output is a directory", where=str(target), fix="name a file")
        if os.path.lexists(target) and not overwrite:
            raise UsageError("the output exists", where=str(target), fix="choose another name, or pass --overwrite")


def _check_inline_bytes(slots: Sequence[TensorSlot], shards: Sequence[dict[object, list[TensorSlot]]]) -> None:
    external = {id(slot) for shard in shards for group in shard.values() for slot in group}
    inline_bytes = sum(slot.nbytes for slot in slots if id(slot) not in external)
    if inline_bytes > PROTO_LIMIT_BYTES:
        raise GraphError(
            "the graph file would exceed protobuf's 2 GB",
            expected=f"at most {PROTO_LIMIT_BYTES} bytes",
            got=f"{inline_bytes} bytes of tensors in the graph file",
            fix="store the weights externally",
        )


def _write(
    model: ir.Model,
    slots: Sequence[TensorSlot],
    shards: Sequence[dict[object, list[TensorSlot]]],
    files: Sequence[Path],
) -> list[tuple[TensorSlot, ir.TensorProtocol]]:
    """Writes all files; returns what each slot holds in them, and leaves the slots as they were."""
    placed: dict[int, tuple[TensorSlot, ir.TensorProtocol]] = {}
    for shard, file in zip(shards, files[1:], strict=True):
        tensors = [group[0].tensor for group in shard.values()]
        written = ir.external_data.convert_tensors_to_external(tensors, str(file.parent), file.name)
        for group, external in zip(shard.values(), written, strict=True):
            placed |= {id(slot): (slot, external) for slot in group}
    for slot in slots:
        if id(slot) not in placed and slot.is_stored_elsewhere:
            placed[id(slot)] = slot, slot.loaded()
    before = [(slot, slot.tensor) for slot, _ in placed.values()]
    try:
        for slot, tensor in placed.values():
            slot.tensor = tensor
        onnx.save(ir.to_proto(model), files[0], format="protobuf")
    finally:
        for slot, tensor in before:
            slot.tensor = tensor
    return list(placed.values())


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    folder = path.with_name(f".{path.name}.vlm-export-{os.getpid()}-{secrets.token_hex(6)}.tmp")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(staging: Path, targets: Sequence[Path]) -> None:
    for target in targets:
        sync_file(staging / target.name)
    if len(targets) == 1:
        os.replace(staging / targets[0].name, targets[0])
    else:
        _replace_together(staging, targets)
    # The model is complete and in place by now; what may be lost is only that this survives a power cut.
    with suppress(OSError):
        sync_directory(targets[0].parent)


def _replace_together(staging: Path, targets: Sequence[Path]) -> None:
    """The old graph leaves first and the new one comes last: at no time does a graph stand beside other weights."""
    aside = staging / "old"
    aside.mkdir()
    old = [target for target in targets if os.path.lexists(target)]
    done: list[Path] = []
    try:
        for target in old:
            os.replace(target, aside / target.name)
        for target in reversed(targets):
            os.replace(staging / target.name, target)
            done.append(target)
    except BaseException:
        for target in done:
            target.unlink(missing_ok=True)
        for target in reversed(old):
            if (aside / target.name).exists():
                os.replace(aside / target.name, target)
        raise
