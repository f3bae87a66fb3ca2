"""Where a model's weights lie: in the graph file or beside it, each content once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import onnx_ir as ir

from vlm_export.graph.passes.share_initializers import tensor_hash
from vlm_export.graph.core.tensors import TensorSlot, tensor_slots

# Below this, a tensor stays in the graph file by default, where sharing saves nothing.
_LEAST_BYTES = 1024


@dataclass(frozen=True)
class Stored:
    """Where the weights are.

    Attributes:
        inline_bytes: in the graph file.
        external_bytes: in other files.
        files: names of these, in the order of first use.
        repeated_bytes: of external data, what several initializers hold that are stored once.
    """

    inline_bytes: int
    external_bytes: int
    files: tuple[str, ...]
    repeated_bytes: int


def share_stored_weights(model: ir.Model) -> int:
    """Makes initializers with equal content refer to one tensor, in place: `save_model` then writes it once.

    The graph stays as it is, each initializer under its name (`share_initializers` removes the others instead).

    Returns:
        How many bytes need not be written.
    """
    groups: defaultdict[Hashable, list[TensorSlot]] = defaultdict(list)
    for slot in tensor_slots(model):
        if slot.can_be_external and slot.nbytes > _LEAST_BYTES:
            groups[slot.tensor.dtype, tuple(slot.tensor.shape.numpy())].append(slot)
    saved = 0
    for group in groups.values():
        first: dict[str, TensorSlot] = {}
        for slot in group if len({slot.identity for slot in group}) > 1 else ():
            kept = first.setdefault(tensor_hash(slot.tensor), slot)
            if kept.identity != slot.identity:
                saved += slot.nbytes
                slot.tensor = kept.tensor
    return saved


def describe_storage(model: ir.Model) -> Stored:
    """Where the weights are, without reading them."""
    inline, files = 0, dict[str, None]()
    seen: dict[Hashable, int] = {}
    repeated = 0
    for slot in tensor_slots(model):
        if not isinstance(slot.tensor, ir.ExternalTensor):
            inline += slot.nbytes
            continue
        files[str(slot.tensor.location)] = None
        if slot.identity in seen:
            repeated += slot.nbytes
        seen[slot.identity] = slot.nbytes
    return Stored(inline, sum(seen.values()), tuple(files), repeated)
