"""Published keys to our parameters: literal tables, strict loading, one memory-mapped copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint, StoredTensorInfo, WeightStore
from vlm_export.text_display import Lines, shown

# The attribute of a parameter that holds `origins_of` it.
_ORIGINS = "_checkpoint_origins"
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Rows:
    """The stored tensor is `span` blocks from block `index` on, of `count` equal blocks of rows of parameter `name`."""

    name: str
    index: int
    count: int
    span: int = 1


@dataclass(frozen=True)
class Transposed:
    """The stored tensor is the transpose of parameter `name`."""

    name: str


@dataclass(frozen=True)
class Unsqueezed:
    """The stored tensor is parameter `name` with `axes` axes of size 1 before its own."""

    name: str
    axes: int = 1


@dataclass(frozen=True)
class Stacked:
    """The stored tensor holds the rows of several parameters, one below the other, in equal blocks."""

    names: tuple[str, ...]


Kept = str | Rows | Transposed | Unsqueezed | Stacked
Target = Kept | None
"""Where a stored key goes: a parameter, a part of one, or None for "dropped on purpose"."""
WeightTable = Mapping[str, Target]


def repeat(table: WeightTable, count: int, mark: str = "{i}", first: int = 0) -> dict[str, Target]:
    """The table with `mark` in keys and names replaced by `count` numbers, from `first` on."""
    numbered: dict[str, Target] = {}
    for i in range(first, first + count):
        for key, target in table.items():
            numbered[key.replace(mark, str(i))] = _renamed(target, mark, str(i))
    return numbered


def prefixed(table: WeightTable, key_prefix: str, name_prefix: str) -> dict[str, Target]:
    """The table with both sides prefixed."""
    return {key_prefix + key: _renamed(target, "", name_prefix) for key, target in table.items()}


def _renamed(target: Target, old: str, new: str) -> Target:
    """The target with `old` in its name replaced by `new`; an empty `old` puts `new` in front."""
    if target is None:
        return None
    if isinstance(target, Stacked):
        return Stacked(tuple(name.replace(old, new) if old else new + name for name in target.names))
    name = target if isinstance(target, str) else target.name
    changed = name.replace(old, new) if old else new + name
    return changed if isinstance(target, str) else replace(target, name=changed)


def stored_shape(target: Kept, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape under which the published checkpoint stores what goes to `target`."""
    if isinstance(target, str):
        return shapes[target]
    if isinstance(target, Transposed):
        return tuple(reversed(shapes[target.name]))
    if isinstance(target, Unsqueezed):
        return (*[1] * target.axes, *shapes[target.name])
    if isinstance(target, Stacked):
        rows, *rest = shapes[target.names[0]]
        return (rows * len(target.names), *rest)
    rows, *rest = shapes[target.name]
    return (rows // target.count * target.span, *rest)


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and persistent buffer that a checkpoint must supply."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def published_tensors(module: nn.Module, table: WeightTable, dtype: str) -> dict[str, StoredTensorInfo]:
    """Keys, shapes and dtype of a checkpoint that `table` would load into `module`; dropped keys are left out."""
    shapes = module_shapes(module)
    return {
        key: StoredTensorInfo(stored_shape(target, shapes), dtype)
        for key, target in table.items()
        if target is not None
    }


def load_weights(module: nn.Module, checkpoint: Checkpoint, table: WeightTable, store: WeightStore) -> tuple[str, ...]:
    """Assigns the checkpoint's tensors to a module built on the meta device; returns the keys dropped on purpose.

    float32 tensors are used as they lie in the mapped file; others are converted, one at a time, into `store`.

    Raises:
        InputError: keys are missing or unexpected, shapes or dtypes do not fit (all listed together), or a
            tensor holds NaN or infinity.
    """
    shapes = module_shapes(module)
    _check_keys(checkpoint, table, shapes)
    weights: dict[str, Tensor] = {}
    for key, target in table.items():
        if target is None or key not in checkpoint.tensors:
            continue
        stored = checkpoint.read(key)
        _check_finite(key, stored)
        _place(stored, target, weights, shapes, store, is_mapped=key not in checkpoint.computed)
    _assign(module, weights)
    _note_origins(module, checkpoint, table)
    return tuple(key for key, target in table.items() if target is None and key in checkpoint.tensors)


# What is behind each kind of problem, and what to do.
_CAUSES = {
    "missing": "tensors are missing: save the model's whole state dict, or get the complete file",
    "unexpected": "tensors are there that this model does not have: the model was changed, and what they add is not "
    "computed here; only where they change nothing may they be deleted from the file",
    "shape": "shapes differ from what the other tensors say: it mixes models of several sizes, or some were changed",
    "dtype": "weights of this dtype are not read: save them as float32, float16 or bfloat16 (quantised ones cannot be "
    "exported)",
}


def origins_of(tensor: Tensor) -> tuple[tuple[str, str], ...]:
    """The stored keys that a parameter was filled from, each with what became of it; () where there is none."""
    found: tuple[tuple[str, str], ...] = getattr(tensor, _ORIGINS, ())
    return found


def set_origins(tensor: Tensor, origins: tuple[tuple[str, str], ...]) -> None:
    """Notes where a parameter comes from, for the ledger of weights."""
    setattr(tensor, _ORIGINS, origins)


def _note_origins(module: nn.Module, checkpoint: Checkpoint, table: WeightTable) -> None:
    origins: dict[str, list[tuple[str, str]]] = {}
    for key, target in table.items():
        if target is None or key not in checkpoint.tensors:
            continue
        dtype = checkpoint.tensors[key].dtype
        cast = "" if dtype == "float32" else f", cast from {dtype}"
        for name, how in _places(target):
            origins.setdefault(name, []).append((key, how + cast))
    for name, tensor in module.state_dict(keep_vars=True).items():
        set_origins(tensor, tuple(origins.get(name, ())))


def _places(target: Kept) -> list[tuple[str, str]]:
    """Names of the parameters that a stored tensor fills, and how."""
    if isinstance(target, str):
        return [(target, "as stored")]
    if isinstance(target, Stacked):
        count = len(target.names)
        return [(name, f"block {i + 1} of {count} of its rows") for i, name in enumerate(target.names)]
    if isinstance(target, Rows):
        last = target.index + target.span
        blocks = f"block {last}" if target.span == 1 else f"blocks {target.index + 1} to {last}"
        return [(target.name, f"{blocks} of {target.count} of the parameter's rows")]
    return [(target.name, "transposed" if isinstance(target, Transposed) else "reshaped")]


def _check_keys(checkpoint: Checkpoint, table: WeightTable, shapes: Mapping[str, tuple[int, ...]]) -> None:
    found = checkpoint.tensors
    problems = [f"missing: {key}" for key, target in table.items() if target is not None and key not in found]
    problems += [f"unexpected: {shown(key)} {found[key].shape}" for key in found if key not in table]
    for key, target in table.items():
        if target is None or key not in found:
            continue
        expected, name = stored_shape(target, shapes), shown(key)
        if found[key].shape != expected and not _is_boxed_scalar(expected, found[key].shape):
            problems.append(f"shape: {name} expected {expected}, got {found[key].shape}")
        if found[key].dtype not in FLOAT_DTYPES:
            problems.append(f"dtype: {name} expected one of {', '.join(FLOAT_DTYPES)}, got {found[key].dtype}")
    if problems:
        listed = problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise InputError(
            f"{len(problems)} of the checkpoint's tensors do not fit its architecture",
            where=checkpoint.source,
            got=Lines.of(listed),
            fix="; ".join(cause for kind, cause in _CAUSES.items() if any(p.startswith(kind) for p in problems)),
        )


def _is_boxed_scalar(expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether one number is stored with axes of size 1, as FSDP and open_clip's `nonscalar_logit_scale` store it."""
    return expected == () and math.prod(found) == 1


def float32(tensor: Tensor, store: WeightStore) -> Tensor:
    """The tensor as it is mapped, or converted into the store: a copy in memory would be as large as the model."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float32:
        return tensor
    converted = store.new(tuple(tensor.shape))
    converted.copy_(tensor)
    return converted


def published_score(checkpoint: Checkpoint) -> dict[str, float]:
    """The numbers with which a dual encoder's cosines become scores, by their published names."""
    names = ("logit_scale", "logit_bias")
    return {name: float(checkpoint.read(name).float().reshape(-1)[0]) for name in names if name in checkpoint.tensors}


def unboxed(weights: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors with the module's shapes, where one number was stored with other axes of size 1."""
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    return {key: w.reshape(shapes[key]) if key in shapes and w.numel() == 1 else w for key, w in weights.items()}


def _check_finite(key: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        return
    # One pass without a temporary: NaN propagates through both ends, infinity is one of them.
    low, high = torch.aminmax(tensor)
    # float64 alone holds more than float32, which is what it becomes.
    if low.float().isfinite() and high.float().isfinite():
        return
    bad = int((~tensor.float().isfinite()).sum())
    raise InputError(
        "a weight is NaN, infinite, or too large for float32",
        where=f"tensor {shown(key)}",
        expected="finite values",
        got=f"{bad} of {tensor.numel()} values are not finite",
        fix="download or convert the checkpoint again",
    )


def _place(
    stored: Tensor,
    target: Kept,
    weights: dict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    store: WeightStore,
    *,
    is_mapped: bool,
) -> None:
    """Puts a stored tensor where it belongs; float32 that `is_mapped` from a file is used as it lies there."""
    if isinstance(target, Stacked):
        for name, block in zip(target.names, stored.chunk(len(target.names)), strict=True):
            _place(block, name, weights, shapes, store, is_mapped=is_mapped)
        return
    if isinstance(target, Unsqueezed):
        stored, target = stored.reshape(shapes[target.name]), target.name
    if isinstance(target, str) and shapes[target] == ():
        stored = stored.reshape(())
    name = target if isinstance(target, str) else target.name
    if is_mapped and isinstance(target, str) and stored.dtype == torch.float32 and stored.is_contiguous():
        weights[name] = stored
        return
    if name not in weights:
        weights[name] = store.new(shapes[name])
    block = weights[name]
    if isinstance(target, Rows):
        rows = block.shape[0] // target.count
        block = block.narrow(0, target.index * rows, target.span * rows)
    elif isinstance(target, Transposed):
        block = block.T
    block.copy_(stored)


def _assign(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    expected = module_shapes(module)
    absent = sorted(set(expected) - set(weights))
    if absent:
        raise AssertionError(f"the weight table fills no parameter {absent}")
    counters = {n: torch.zeros((), dtype=torch.int64) for n in module.state_dict() if n.endswith("num_batches_tracked")}
    module.load_state_dict({**weights, **counters}, strict=True, assign=True)
    module.requires_grad_(False).eval()
