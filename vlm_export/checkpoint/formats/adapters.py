"""LoRA adapters as PEFT saves them: a base checkpoint whose weights are merged one at a time, when they are read.

Nothing of PEFT is needed: the adapter's settings and tensors are data. Source of the file names, keys and formulas:
peft 0.21.2 (tuners/lora/config.py, layer.py, dora.py; utils/save_and_load.py). With A (r, in), B (out, r) and the
scaling s = alpha / r, or alpha / sqrt(r) with rank-stabilised scaling, a layer's weight becomes W + s · B A; with
weight decomposition (DoRA) each of its rows is scaled to the stored magnitude. Sums are made in float32, whatever the
dtypes of the base and the adapter are, so that nothing is rounded to half precision in between.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.checkpoint.directory import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS, SIDE_FILES
from vlm_export.checkpoint.formats.safetensors_file import read_bounded
from vlm_export.checkpoint.formats.tensors import StoredTensors
from vlm_export.checkpoint.formats.weights_file import read_weights_file
from vlm_export.checkpoint.seen_file import Progress, SeenFile, hash_file, see_file
from vlm_export.errors import InputError, UsageError
from vlm_export.family import Checkpoint, StoredTensorInfo

_PREFIX = "base_model.model."
# Ends of keys; what is left of them is a module's name. An embedding's matrices have no `.weight` behind them.
_ROLES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
}
# Settings that change how weights are merged, with the values that are computed here.
_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "kasa_config": (None,),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "use_monte_clora": (None, False),
}
_LARGEST_RANK = 1 << 16
Layer = dict[str, str]
"""Role of a tensor (`a`, `b`, …) → its stored key."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, before it is put on a base.

    Attributes:
        path: its directory.
        base: what its settings name as the base, or None.
        rank, alpha: of every layer that `rank_pattern` and `alpha_pattern` do not name otherwise.
        rank_stabilised: the scaling is alpha / sqrt(rank).
        has_magnitudes: every layer has a magnitude vector (DoRA).
        targets: says of a module's name whether the settings put an adapter there.
        stored: its tensors.
        files: the files that were read.
    """

    path: Path
    base: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    rank_stabilised: bool
    has_magnitudes: bool
    targets: Callable[[str], bool]
    stored: StoredTensors
    files: tuple[SeenFile, ...]

    def scaling(self, module: str) -> float:
        """What B A is multiplied with in that module."""
        rank = _by_pattern(self.rank_pattern, module, self.rank)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return float(alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank)


def adapter_folder(path: Path) -> Path | None:
    """The directory of the adapter that a path names, itself or its weights; None where it names none.

    Its settings stand there, by which transformers recognises it too.
    """
    folder = path.parent if path.name in ADAPTER_WEIGHTS else path
    return folder if (folder / ADAPTER_CONFIG_FILE).is_file() else None


def read_adapter(path: Path) -> Adapter:
    """The adapter in a directory.

    Raises:
        InputError: its settings are malformed, or ask for another method than LoRA or for a merge that is not
            computed here; there are no weights, or they are damaged.
    """
    config_file = see_file(path / ADAPTER_CONFIG_FILE)
    config = json_object_from_bytes(read_bounded(config_file), str(config_file))
    where = str(config_file)
    _check_method(config, where)
    weights = next((path / name for name in ADAPTER_WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise InputError(
            "the adapter has no weights",
            where=str(path),
            expected=" or ".join(ADAPTER_WEIGHTS),
            got="neither",
            fix="copy the whole directory that save_pretrained wrote",
        )
    base = config.get("base_model_name_or_path")
    seen = see_file(weights)
    return Adapter(
        path=path,
        base=base if isinstance(base, str) and base else None,
        rank=int(_number(config, "r", 8, where)),
        alpha=_number(config, "lora_alpha", 8, where),
        rank_pattern=_patterns(config, "rank_pattern", where),
        alpha_pattern=_patterns(config, "alpha_pattern", where),
        rank_stabilised=bool(config.get("use_rslora", False)),
        has_magnitudes=bool(config.get("use_dora", False)),
        targets=_targets(config, where),
        stored=read_weights_file(seen),
        files=(config_file, seen),
    )


def base_of(adapter: Adapter, given: str | None) -> str:
    """What the adapter is put on: what the user names, or what its settings name.

    Raises:
        UsageError: neither names a base.
    """
    base = given or adapter.base
    if base is None:
        raise UsageError(
            "a LoRA adapter needs the model that it was trained on",
            where=str(adapter.path / ADAPTER_CONFIG_FILE),
            expected="base_model_name_or_path, or --base",
            got="no base model",
            fix="name the base's directory or file with --base",
        )
    return base


def merge_adapter(source: str, adapter: Adapter, base: Checkpoint, progress: Progress | None = None) -> Checkpoint:
    """The base checkpoint with the adapter in its weights.

    A weight is merged when it is read, so that there is never more than one of them in memory. Tokenizer and
    preprocessing files beside the adapter take the place of the base's of the same kind.

    Raises:
        InputError: the adapter speaks of layers that the base does not have, or of others' shapes.
    """
    layers, whole = _sorted_keys(adapter, base)
    merged: dict[str, Layer] = {}
    tensors = dict(base.tensors)
    problems: list[str] = []
    for module, layer in layers.items():
        key = _weight_key(module, tensors)
        if key is None:
            problems.append(f"the base has no layer {module}")
            continue
        problems += _layer_problems(adapter, module, layer, tensors, key)
        merged[key] = layer
        if "b_bias" in layer:
            merged[f"{module}.bias"] = layer
    for key, stored in whole.items():
        if key not in tensors:
            problems.append(f"the base has no tensor {key}")
        tensors[key] = adapter.stored.tensors[stored]
    if problems:
        raise _does_not_fit(source, base, problems)
    tensors |= {key: StoredTensorInfo(tensors[key].shape, "float32") for key in merged}

    def read(key: str) -> Tensor:
        if key in merged:
            inner = adapter.stored.read(whole[key]) if key in whole else base.read(key)
            return _merged(adapter, merged[key], inner, _module_of(key), is_bias=key.endswith(".bias"))
        return adapter.stored.read(whole[key]) if key in whole else base.read(key)

    def check_unchanged() -> None:
        base.check_unchanged()
        for file in seen:
            file.check_unchanged()

    own = {name: see_file(adapter.path / name) for name in SIDE_FILES if (adapter.path / name).is_file()}
    seen = (*adapter.files, *own.values())
    files = tuple(hash_file(file, file.path.name, progress) for file in seen)
    return replace(
        base,
        source=source,
        files=(*base.files, *files),
        tensors=tensors,
        read=read,
        computed=frozenset(merged),
        notes=(*base.notes, f"a LoRA adapter of {len(layers)} layers was merged into {Path(base.source).name}"),
        side_files=_side_files(base.side_files, {name: file.path for name, file in own.items()}),
        check_unchanged=check_unchanged,
    )


def _side_files(base: Mapping[str, Path], own: Mapping[str, Path]) -> dict[str, Path]:
    """The base's files, but of a kind that stands beside the adapter only those there."""
    kinds = {_is_tokenizer_file(name) for name in own}
    return {**{name: path for name, path in base.items() if _is_tokenizer_file(name) not in kinds}, **own}


def _is_tokenizer_file(name: str) -> bool:
    return "processor" not in name


def _check_method(config: Mapping[str, Any], where: str) -> None:
    method = config.get("peft_type")
    if method != "LORA":
        raise InputError(
            "the adapter was made with a method that is not merged here",
            where=f"{where}: peft_type",
            expected="'LORA'",
            got=f"{method!r:.80}",
            fix="merge it with peft (merge_and_unload, then save_pretrained), and export what that saves",
        )
    for key, values in _COMPUTED.items():
        if config.get(key) not in values and key in config:
            raise InputError(
                f"{key} changes weights in a way that is not merged here",
                where=f"{where}: {key}",
                expected=" or ".join(map(repr, values)),
                got=f"{config[key]!r:.200}",
                fix="merge it with peft (merge_and_unload, then save_pretrained), and export what that saves",
            )


def _number(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = config.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or (key == "r" and not 1 <= value <= _LARGEST_RANK):
        raise InputError(
            "the adapter's settings are malformed",
            where=f"{where}: {key}",
            expected=f"a whole number from 1 to {_LARGEST_RANK}" if key == "r" else "a number",
            got=f"{value!r:.80}",
        )
    return float(value)


def _targets(config: Mapping[str, Any], where: str) -> Callable[[str], bool]:
    """Which modules the settings put an adapter on; peft leaves tensors of others aside (tuners_utils.py, 0.18).

    A list names ends of module names, and so is what is excluded. A string is a regular expression, or "all-linear":
    it is not run here, where a hostile one could take forever, and what the file holds is what was trained.
    """
    wanted, excluded, layers = (config.get(key) for key in ("target_modules", "exclude_modules", "layers_to_transform"))
    for key, value in (("target_modules", wanted), ("exclude_modules", excluded)):
        names = [value] if isinstance(value, str) else value
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise InputError(
                "the adapter's settings are malformed",
                where=f"{where}: {key}",
                expected="names of modules",
                got=f"{value!r:.80}",
            )
    numbers = None if layers is None else {layers} if isinstance(layers, int) else set(layers)

    def named(names: Any, module: str) -> bool:
        return any(module == name or module.endswith(f".{name}") for name in names)

    def is_target(module: str) -> bool:
        if numbers is not None and not numbers & {int(part) for part in module.split(".") if part.isdecimal()}:
            return False
        if isinstance(wanted, list) and not named(wanted, module):
            return False
        return not (isinstance(excluded, list) and named(excluded, module))

    return is_target


def _patterns(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(
            "the adapter's settings are malformed", where=f"{where}: {key}", expected="an object", got=f"{value!r:.80}"
        )
    for name in value:
        _number(value, name, 0, f"{where}: {key}")
        if re.fullmatch(r"[\w.^$]+", name) is None:
            raise InputError(
                "the adapter's settings name layers by a pattern that is not read here",
                where=f"{where}: {key}",
                expected="ends of module names",
                got=f"{name!r:.200}",
                fix="merge it with peft (merge_and_unload, then save_pretrained), and export what that saves",
            )
    return value


def _by_pattern(patterns: Mapping[str, Any], module: str, default: float) -> float:
    """The value of the first name that the module's own ends with."""
    for name, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({name})", module):
            return float(value)
    return default


def _sorted_keys(adapter: Adapter, base: Checkpoint) -> tuple[dict[str, Layer], dict[str, str]]:
    """module → its matrices; and key of the base → the stored key of a tensor that replaces it whole."""
    layers: dict[str, Layer] = defaultdict(dict)
    whole: dict[str, str] = {}
    for stored in adapter.stored.tensors:
        key = stored.removeprefix(_PREFIX).replace("base_layer.", "").replace("modules_to_save.", "")
        end = next((end for end in _ROLES if key.endswith(f".{end}")), None)
        if end is None:
            whole[key] = stored
        else:
            layers[key[: -len(end) - 1]][_ROLES[end]] = stored
    prefix = _prefix_in(base, next(iter(layers), ""))
    return {prefix + name: layer for name, layer in layers.items()}, {prefix + key: whole[key] for key in whole}


def _prefix_in(base: Checkpoint, module: str) -> str:
    """What stands before the module's name in a base whose keys a trainer prefixed (`module.`, …); mostly nothing."""
    name = f"{module}.weight"
    return next((key.removesuffix(name) for key in base.tensors if key == name or key.endswith(f".{name}")), "")


def _layer_problems(
    adapter: Adapter, module: str, layer: Layer, tensors: Mapping[str, StoredTensorInfo], key: str
) -> list[str]:
    """What keeps a layer's adapter from the base's weight `key`: the settings, a shape, a bias that is not there."""
    problems = []
    if not adapter.targets(module):
        problems.append(f"{module}: the settings put no adapter there")
    if adapter.has_magnitudes and "magnitude" not in layer:
        problems.append(f"{module}: the settings say use_dora, and there is no magnitude vector")
    if problem := _shape_problem(adapter, module, layer, tensors[key].shape):
        problems.append(f"{module}: {problem}")
    if "b_bias" in layer and f"{module}.bias" not in tensors:
        problems.append(f"the base has no {module}.bias")
    return problems


def _weight_key(module: str, tensors: Mapping[str, StoredTensorInfo]) -> str | None:
    """The weight of a layer; of an attention that stores query, key and value in one matrix, that matrix."""
    candidates = (f"{module}.weight", f"{module}.in_proj_weight")
    return next((key for key in candidates if key in tensors), None)


def _module_of(key: str) -> str:
    return key.rpartition(".")[0]


def _shape_problem(adapter: Adapter, module: str, layer: Layer, shape: tuple[int, ...]) -> str | None:
    """Why the layer's matrices do not fit a weight of that shape, or None."""
    names = ("embedding_a", "embedding_b") if "embedding_a" in layer or "embedding_b" in layer else ("a", "b")
    if not all(name in layer for name in names):
        return f"one of the matrices A and B is missing (there are {', '.join(sorted(layer.values()))})"
    a, b = (adapter.stored.tensors[layer[name]].shape for name in names)
    if names[0] == "a":
        expected_a, expected_b = (a[0], *shape[1:]), (shape[0], a[0], *[1] * (len(shape) - 2))
    else:
        expected_a, expected_b = (a[0], shape[0]), (shape[1], a[0])
    if a != expected_a or b != expected_b:
        return f"A {a} and B {b} do not fit the base's weight {shape}"
    if a[0] != (rank := _by_pattern(adapter.rank_pattern, module, adapter.rank)):
        return f"A {a} has {a[0]} rows, and the settings say rank {rank:g}"
    if "magnitude" in layer and (len(shape) != 2 or names[0] != "a"):
        return "weight decomposition (DoRA) of a layer that is not linear is not merged here"
    return None


def _merged(adapter: Adapter, layer: Layer, inner: Tensor, module: str, *, is_bias: bool) -> Tensor:
    """The layer's weight, or bias, with the adapter in it; float32."""

    def tensor(role: str) -> Tensor:
        return adapter.stored.read(layer[role]).float()

    scaling = adapter.scaling(module)
    weight = inner.float()
    if is_bias:
        return weight + tensor("b_bias") * scaling
    if "embedding_a" in layer:
        return weight + (tensor("embedding_b") @ tensor("embedding_a")).T * scaling
    a, b = tensor("a"), tensor("b")
    merged = weight + (b.flatten(1) @ a.flatten(1)).reshape(weight.shape) * scaling
    if "magnitude" not in layer:
        return merged
    factor: Tensor = tensor("magnitude").flatten() / torch.linalg.norm(merged, dim=1)
    return merged * factor[:, None]


def _does_not_fit(source: str, base: Checkpoint, problems: list[str]) -> InputError:
    shown = [*problems[:10], *([f"… and {len(problems) - 10} more"] if len(problems) > 10 else [])]
    return InputError(
        f"the adapter does not fit its base {base.source}",
        where=source,
        expected="layers that the base has, and matrices of their shapes",
        got="\n    " + "\n    ".join(shown),
        fix="name the checkpoint that the adapter was trained on with --base",
    )
