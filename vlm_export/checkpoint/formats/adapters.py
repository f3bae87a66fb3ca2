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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import torch
from torch import Tensor

from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.checkpoint.directory import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS, SIDE_FILES
from vlm_export.checkpoint.formats.safetensors_file import read_bounded
from vlm_export.checkpoint.formats.tensors import StoredTensors
from vlm_export.checkpoint.formats.weights_file import read_weights_file
from vlm_export.checkpoint.hashing import Progress, hash_file
from vlm_export.checkpoint.seen_file import SeenFile, see_file
from vlm_export.errors import InputError, UsageError
from vlm_export.family import Checkpoint, StoredTensorInfo
from vlm_export.specs.codec import Check, Spec, between, field_words

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
_MERGE = "merge it with peft (merge_and_unload, then save_pretrained), and export what that saves"
Layer = dict[str, str]
"""Role of a tensor (`a`, `b`, …) → its stored key."""
Names: TypeAlias = str | tuple[str, ...] | None
Pattern: TypeAlias = Mapping[str, float] | None
Off: TypeAlias = Literal[False] | None


@dataclass(frozen=True)
class _Settings(Spec):
    """What of `adapter_config.json` decides how weights are merged.

    Fields that allow one value alone stand for methods that are not computed here.
    """

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    r: Annotated[int, between(1, 1 << 16)] = 8
    lora_alpha: float = 8.0
    rank_pattern: Pattern = None
    alpha_pattern: Pattern = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: int | tuple[int, ...] | None = None
    trainable_token_indices: None = None
    target_parameters: Annotated[tuple[str, ...], Check("no entries", lambda names: not names)] | None = None
    alora_invocation_tokens: None = None
    arrow_config: None = None
    layer_replication: None = None
    megatron_config: None = None
    kasa_config: None = None
    use_qalora: Off = False
    use_bdlora: Off = False
    use_monte_clora: Off = False

    def check(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not all(re.fullmatch(r"[\w.^$]+", key) for key in getattr(self, name) or ()):
                raise self.refusal(name, "ends of module names as its keys")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, before it is put on a base.

    Attributes:
        path: its directory.
        settings: what `adapter_config.json` says.
        stored: its tensors.
        files: the files that were read.
    """

    path: Path
    settings: _Settings
    stored: StoredTensors
    files: tuple[SeenFile, ...]

    def rank(self, module: str) -> float:
        """The rank in that module."""
        return _by_pattern(self.settings.rank_pattern, module, self.settings.r)

    def scaling(self, module: str) -> float:
        """What B A is multiplied with in that module."""
        rank = self.rank(module)
        alpha = _by_pattern(self.settings.alpha_pattern, module, self.settings.lora_alpha)
        return float(alpha / math.sqrt(rank) if self.settings.use_rslora else alpha / rank)

    def targets(self, module: str) -> bool:
        """Whether the settings put an adapter there; peft leaves tensors of others aside (tuners_utils.py, 0.18).

        A list names ends of module names, and so is what is excluded. A string is a regular expression, or
        "all-linear": it is not run here, where a hostile one could take forever, and what the file holds is what was
        trained.
        """
        layers, wanted = self.settings.layers_to_transform, self.settings.target_modules
        if layers is not None:
            numbers = {layers} if isinstance(layers, int) else set(layers)
            if not numbers & {int(part) for part in module.split(".") if part.isdecimal()}:
                return False
        excluded = self.settings.exclude_modules
        is_wanted = not isinstance(wanted, tuple) or _is_named(wanted, module)
        return is_wanted and not (isinstance(excluded, tuple) and _is_named(excluded, module))


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
    known = {key: value for key, value in config.items() if key in field_words(_Settings)}
    settings = _Settings.from_json(known, str(config_file), complete=False, fix=_MERGE)
    weights = next((path / name for name in ADAPTER_WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise InputError(
            "the adapter has no weights",
            where=str(path),
            expected=" or ".join(ADAPTER_WEIGHTS),
            got="neither",
            fix="copy the whole directory that save_pretrained wrote",
        )
    seen = see_file(weights)
    return Adapter(path, settings, read_weights_file(seen), (config_file, seen))


def base_of(adapter: Adapter, given: str | None) -> str:
    """What the adapter is put on: what the user names, or what its settings name.

    Raises:
        UsageError: neither names a base.
    """
    base = given or adapter.settings.base_model_name_or_path
    if not base:
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


def _is_named(names: Sequence[str], module: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Pattern, module: str, default: float) -> float:
    """The value of the first name that the module's own ends with."""
    found = (value for name, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({name})", module))
    return next(found, default)


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
    if adapter.settings.use_dora and "magnitude" not in layer:
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
    if a[0] != (rank := adapter.rank(module)):
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
