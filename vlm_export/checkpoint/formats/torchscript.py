"""TorchScript archives (OpenAI's downloads) as data: tensors by dotted name, memory-mapped; no code of it is run.

The module tree is `data.pkl`: an object per module whose state is a dict of attributes. Class names and code differ
from one archive to another and are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_export.checkpoint.formats.pickle_data import Call, Global, Instance
from vlm_export.checkpoint.formats.pickled_tensors import is_weights_global, load_archive_pickle, tensor_call
from vlm_export.checkpoint.formats.tensors import MAX_TENSORS, StoredTensors, View, stored_views
from vlm_export.checkpoint.formats.zipcheck import ZipMembers
from vlm_export.errors import InputError

_INERT = {
    Global("torch", "device"),
    Global("builtins", "complex"),
    *(
        Global("torch.jit._pickle", name)
        for name in (
            "build_intlist",
            "build_tensorlist",
            "build_doublelist",
            "build_boollist",
            "build_tensor_from_id",
            "restore_type_tag",
        )
    ),
}
_MAX_DEPTH = 100
_MAX_VISITS = 300_000
_MAX_NAME_CHARACTERS = 1000


def read_torchscript(archive: ZipMembers) -> StoredTensors:
    """The parameters and buffers of the archive's module, by dotted name.

    Raises:
        InputError: the pickle names foreign code, or a tensor reaches outside its member of the archive.
    """
    root, reader = load_archive_pickle(archive, _is_allowed)
    views: dict[str, View] = {}
    for key, call in _named_tensors(root, reader.where):
        if key in views or len(views) >= MAX_TENSORS:
            raise InputError(
                "a tensor stands twice in the archive, or there are too many", where=f"{reader.where}: {key}"
            )
        views[key] = reader.view(key, call)
    if not views:
        raise InputError("the TorchScript archive holds no tensors", where=reader.where, got=type(root).__name__)
    return stored_views("torchscript", archive.file, views)


def _is_allowed(name: Global) -> bool:
    if name.module == "__torch__" or name.module.startswith("__torch__."):
        return True
    return name in _INERT or is_weights_global(name)


def _named_tensors(root: Any, where: str) -> Iterator[tuple[str, Call]]:
    """The tensors among the modules' attributes, depth first; shared modules appear under each of their names."""
    # Bounded, because a small pickle can nest itself, or refer to one module from two attributes 60 times over.
    pending = [("", root, 0)]
    visits = 0
    while pending:
        prefix, node, depth = pending.pop()
        if not isinstance(node, Instance) or not isinstance(node.state, dict):
            continue
        children = []
        for name, value in node.state.items():
            visits += 1
            if visits > _MAX_VISITS or depth > _MAX_DEPTH:
                raise InputError("the TorchScript archive nests its modules without end", where=where)
            if not isinstance(name, str) or len(prefix) + len(name) > _MAX_NAME_CHARACTERS:
                raise InputError("the TorchScript archive has an attribute without a proper name", where=where)
            key = prefix + name
            if isinstance(value, Instance):
                children.append((f"{key}.", value, depth + 1))
            elif (call := tensor_call(value)) is not None:
                yield key, call
        pending.extend(reversed(children))
