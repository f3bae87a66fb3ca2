"""Models on disk: opened without reading their weights, written in one step with the weights streamed one at a time."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir

from vlm_export.bundle.environment import check_free_space, environment_errors
from vlm_export.bundle.manifest import is_ir
from vlm_export.bundle.staging import Staged, finish_commits, staging
from vlm_export.errors import EnvironmentFailure, GraphError, UsageError, VlmExportError
from vlm_export.graph.core.file_checks import attribute_protos, check_proto, graph_protos, tensor_protos
from vlm_export.graph.core.tensors import TensorSlot, tensor_slots
from vlm_export.graph.core.transaction_files import (
    DATA,
    GRAPH_FILE_KEY,
    GRAPHS,
    check_readers,
    check_targets,
    place_models,
    step_folder,
)

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
        shared: data files of other models beside the target; tensors that lie in them stay there.
    """

    external: bool | None = None
    shard_bytes: int | None = None
    threshold_bytes: int = 1024
    shared: frozenset[Path] = frozenset()

    def __post_init__(self) -> None:
        if (self.shard_bytes is not None and self.shard_bytes <= 0) or self.threshold_bytes < 0:
            raise UsageError("sizes of storage are positive", got=str(self), fix="give a number of bytes above zero")


def open_model(path: Path | str) -> ir.Model:
    """Reads the graph; tensors with external data are mapped when they are used, and never read as a whole.

    Raises:
        GraphError: no ONNX model, a part that would get lost (sparse tensors, training information), a type that is not
            supported (maps), or external data that is missing, too short, or lies outside the model's directory.
        EnvironmentFailure: the file cannot be read.
    """
    path = Path(os.path.abspath(path))
    finish_commits(path.parent)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise GraphError(f"the model {what}", where=str(path), expected="a file in ONNX's binary format")
    if is_ir(path):
        fix = "name the graph, or the bundle, that it was made from"
        raise GraphError("the graph is OpenVINO's own form, not ONNX", where=str(path), fix=fix)
    with environment_errors("reading the model", None):
        proto = _read_proto(path)
    check_proto(proto, path)
    _refuse_what_gets_lost(proto, path)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        # The library wraps what it finds in errors that print whole graphs; the innermost names the fault.
        cause = _innermost(error)
        what, got = "the graph is malformed", str(cause).partition("\n")[0][:200]
        if isinstance(cause, NotImplementedError):
            # Only the first sentence is about the graph.
            what, got = "the graph uses a part of ONNX that is not supported", got.partition(". ")[0]
        raise GraphError(what, where=str(path), got=got) from error
    _locate_external_data(model, path)
    model.meta[GRAPH_FILE_KEY] = str(path)
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
        "sparse initializers": any(graph.sparse_initializer for graph in graph_protos(proto)),
        "sparse tensors of attributes": any(
            attribute.HasField("sparse_tensor") or attribute.sparse_tensors for attribute in attribute_protos(proto)
        ),
        "training information": bool(proto.training_info),
    }
    for name, occurs in lost.items():
        if occurs:
            raise GraphError(
                f"{name} cannot be kept: not supported",
                where=str(path),
                fix="remove them with the tool that wrote them",
            )


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


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
    model: ir.Model,
    path: Path | str,
    *,
    storage: Storage | None = None,
    overwrite: bool = False,
    opened: Sequence[ir.Model] = (),
) -> tuple[Path, ...]:
    """Writes the model beside its target and puts it in place when it is complete, the graph file last.

    Weights are written once each, also when several initializers share one. The files are `PATH`, `PATH_data`,
    `PATH_data_1`, …. The model may have been read from the files that are replaced: its tensors then refer to the new
    ones afterwards; otherwise it is left as it was. Data files of before that the new model has no use for stay. A
    reader finds the old model or the new one at every instant, also when the process is killed (`place_models`).

    Args:
        overwrite: replace files of these names.
        opened: other models from `open_model`, as they were read: none of their data files may be replaced, unless
            the graph that reads it is replaced too. The same holds for the file that `model` was read from.

    Returns:
        The files written, the graph first, as `path` names them.

    Raises:
        UsageError: the target exists without `overwrite`, its directory does not, or an opened model needs it.
        GraphError: what stays in the graph file exceeds protobuf's 2 GB.
        EnvironmentFailure: the disk is full or read-only.
    """
    return save_models([(model, path)], storage=storage, overwrite=overwrite, opened=opened)


def save_models(
    models: Sequence[tuple[ir.Model, Path | str]],
    *,
    storage: Storage | None = None,
    overwrite: bool = False,
    opened: Sequence[ir.Model] = (),
) -> tuple[Path, ...]:
    """As `save_model` for several models: those of one directory are put in place in one step.

    All are written to every disk before the first is put in place. A process killed while it puts them there leaves
    each of them old or new, and whole; where they lie in one directory, the next that writes or reads there with this
    project finishes the work. No file system has such a step for several directories: those come one after the other,
    in the order of `models`.

    Raises:
        UsageError: also where two of them would have a file of the same name.
        EnvironmentFailure: also where a later directory refuses; the message names what lies in the earlier ones.
    """
    plans = [_plan(model, Path(path), storage or Storage()) for model, path in models]
    targets = [target for plan in plans for target in plan.targets]
    check_targets(targets, overwrite)
    check_readers(targets, [*(plan.model for plan in plans), *opened])
    needed: defaultdict[Path, int] = defaultdict(int)
    for plan in plans:
        _check_inline_bytes(plan.slots, plan.shards)
        # Weights that replace others are on the disk twice for a moment.
        times = 2 if any(map(os.path.lexists, plan.targets[1:])) else 1
        needed[plan.folder] += times * sum(slot.nbytes for slot in plan.slots)
    with environment_errors("writing the model", targets[0].parent, sum(needed.values())), ExitStack() as stack:
        staged, placed = [], []
        for folder, needed_bytes in needed.items():
            group = [plan for plan in plans if plan.folder == folder]
            first, *others = (target for plan in group for target in plan.targets)
            staged.append(stack.enter_context(staging(first, others, overwrite=overwrite)))
            check_free_space(folder, needed_bytes)
            placed += [(plan, _write(plan, staged[-1])) for plan in group]
        replaced = any(target.exists() for target in targets)
        for entry in staged:
            entry.check_targets()
        for number, entry in enumerate(staged):
            with _told_what_is_in_place([target for before in staged[:number] for target in before.targets]):
                place_models(entry, [plan.targets for plan in plans if plan.targets[0] in entry.targets])
    if replaced:
        for plan, slots in placed:
            _refer_to_new_files(plan, slots)
    return tuple(plan.given.with_name(target.name) for plan in plans for target in plan.targets)


@contextmanager
def _told_what_is_in_place(earlier: Sequence[Path]) -> Iterator[None]:
    """An error after the files of earlier directories are in place says so."""
    try:
        yield
    except (OSError, VlmExportError) as error:
        if not earlier:
            raise
        raise EnvironmentFailure(
            "only some of the models are in place: directories are written one after the other",
            where=", ".join(map(str, earlier)),
            expected="all models",
            got=str(error.strerror or error if isinstance(error, OSError) else error.what),
            fix="run the command again with --overwrite once the other directory can be written to",
        ) from error


# Of each tensor in a data file, all the slots that hold it.
_Shard: TypeAlias = list[list[TensorSlot]]


@dataclass(frozen=True)
class _Plan:
    """What becomes of a model.

    Attributes:
        given: where to write it, as the caller names it.
        shards: what each data file holds.
        targets: absolute paths of the files, the graph first.
    """

    model: ir.Model
    given: Path
    slots: list[TensorSlot]
    shards: list[_Shard]
    targets: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Returns the directory of all files, with links on the way to it resolved."""
        return self.targets[0].parent.resolve()


def _plan(model: ir.Model, given: Path, storage: Storage) -> _Plan:
    path = Path(os.path.abspath(given))
    slots = [slot for slot in tensor_slots(model) if not _lies_in(slot.tensor, storage.shared)]
    shards = _shards(_external_slots(slots, storage), storage.shard_bytes)
    names = [path.name, *(f"{path.name}_data" + (f"_{index}" if index else "") for index in range(len(shards)))]
    return _Plan(model, given, slots, shards, tuple(path.with_name(name) for name in names))


def _lies_in(tensor: ir.TensorProtocol, files: frozenset[Path]) -> bool:
    return isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) in files


def _refer_to_new_files(plan: _Plan, placed: Sequence[tuple[TensorSlot, ir.TensorProtocol]]) -> None:
    path = plan.targets[0]
    for slot, tensor in placed:
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = str(path.parent)
        slot.tensor = tensor
    plan.model.meta[GRAPH_FILE_KEY] = str(path)


def _external_slots(slots: Sequence[TensorSlot], storage: Storage) -> list[TensorSlot]:
    external = storage.external
    if external is None:
        sizes = {slot.identity: slot.nbytes for slot in slots}
        external = sum(sizes.values()) > DEFAULT_EXTERNAL_BYTES or storage.shard_bytes is not None
    return [slot for slot in slots if external and slot.can_be_external and slot.nbytes > storage.threshold_bytes]


def _shards(slots: Sequence[TensorSlot], shard_bytes: int | None) -> list[_Shard]:
    holders: dict[Hashable, list[TensorSlot]] = {}
    for slot in slots:
        holders.setdefault(slot.identity, []).append(slot)
    shards: list[_Shard] = []
    filled = 0
    for group in holders.values():
        if not shards or (shard_bytes is not None and filled and filled + group[0].nbytes > shard_bytes):
            shards.append([])
            filled = 0
        filled += group[0].nbytes
        shards[-1].append(group)
    return shards


def _check_inline_bytes(slots: Sequence[TensorSlot], shards: Sequence[_Shard]) -> None:
    external = {id(slot) for shard in shards for group in shard for slot in group}
    inline_bytes = sum(slot.nbytes for slot in slots if id(slot) not in external)
    if inline_bytes > PROTO_LIMIT_BYTES:
        raise GraphError(
            "the graph file would exceed protobuf's 2 GB",
            expected=f"at most {PROTO_LIMIT_BYTES} bytes",
            got=f"{inline_bytes} bytes of tensors in the graph file",
            fix="store the weights externally",
        )


def _write(plan: _Plan, staged: Staged) -> list[tuple[TensorSlot, ir.TensorProtocol]]:
    """Writes all files for `place_models`; returns what each slot holds in them, and leaves the slots as they were."""
    placed: dict[int, tuple[TensorSlot, ir.TensorProtocol]] = {}
    for shard, target in zip(plan.shards, plan.targets[1:], strict=True):
        tensors = [group[0].tensor for group in shard]
        folder = step_folder(staged, DATA)
        written = ir.external_data.convert_tensors_to_external(tensors, str(folder), target.name)
        for group, external in zip(shard, written, strict=True):
            # The library keeps neither.
            external.doc_string = group[0].tensor.doc_string
            external.metadata_props.update(group[0].tensor.metadata_props)
            placed |= {id(slot): (slot, external) for slot in group}
    for slot in plan.slots:
        if id(slot) not in placed and slot.is_stored_elsewhere:
            placed[id(slot)] = slot, slot.loaded()
    before = [(slot, slot.tensor) for slot, _ in placed.values()]
    try:
        for slot, tensor in placed.values():
            slot.tensor = tensor
        proto = ir.to_proto(plan.model)
        _drop_repeated_metadata(proto)
        onnx.save(proto, step_folder(staged, GRAPHS) / plan.targets[0].name, format="protobuf")
    finally:
        for slot, tensor in before:
            slot.tensor = tensor
    return list(placed.values())


def _drop_repeated_metadata(proto: onnx.ModelProto) -> None:
    """The library writes the metadata of a tensor that it keeps as it was read a second time."""
    for tensor in tensor_protos(proto):
        entries = {entry.key: entry.value for entry in tensor.metadata_props}
        if len(entries) < len(tensor.metadata_props):
            del tensor.metadata_props[:]
            for key, value in entries.items():
                tensor.metadata_props.add(key=key, value=value)
