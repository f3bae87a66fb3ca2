"""The types that meet in a family module: Checkpoint, Part, Model and Family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from vlm_export.errors import UsageError, VlmExportError
from vlm_export.original import Original
from vlm_export.specs import MAX_IMAGE_SIZE_PIXELS, AnyImageSpec, Origins, TextSpec
from vlm_export.specs.codec import Spec, between
from vlm_export.specs.signature import Signature
from vlm_export.specs.tasks import FoundTask, TaskSpec, find_task

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
CheckpointFormat = Literal["torchscript", "state_dict", "safetensors", "hf_directory", "random"]


@dataclass(frozen=True)
class StoredTensorInfo:
    """Shape and torch dtype name ("float16", "int64", …) of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class CheckpointFile:
    """A file that was read: name relative to the checkpoint, size and sha256."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """Untrusted files on disk, opened read-only.

    Attributes:
        source: what the user named.
        format: how the tensors are stored.
        files: every file that was read.
        tensors: stored key → shape and dtype; no tensor is read yet.
        read: stored key → the tensor, memory-mapped where the format allows; treat it as read-only.
        config: `config.json` as data, or None.
        side_files: tokenizer and preprocessing files by name (`tokenizer.json`, `preprocessor_config.json`, …).
        revision: the resolved commit of a hub id, or None.
        side_configs: by name, other configs that describe the weights, as data; `config` is then None.
        notes: what was decided while reading, one sentence each: which of several state dicts, which prefix.
        left_out: stored keys of modules beside the model, which the family does not see.
        shards_left_aside: shards that the index names and nobody opened: they hold no key that the family reads.
        computed: stored keys whose tensors `read` computes anew at each call and nobody keeps.
        check_unchanged: InputError when one of the files is no longer what it was when its sha256 was taken.
    """

    source: str
    format: CheckpointFormat
    files: tuple[CheckpointFile, ...]
    tensors: Mapping[str, StoredTensorInfo]
    read: Callable[[str], Tensor]
    config: Mapping[str, Any] | None = None
    side_files: Mapping[str, Path] = field(default_factory=dict)
    revision: str | None = None
    side_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    shards_left_aside: tuple[str, ...] = ()
    computed: frozenset[str] = frozenset()
    check_unchanged: Callable[[], None] = lambda: None


class ExampleBuilder(Protocol):
    """Builds valid inputs of a Part for concrete axis sizes; same sizes and seed, same arrays."""

    def __call__(self, sizes: Mapping[str, int], seed: int) -> dict[str, Array]: ...


Reference = Callable[[Arrays], dict[str, Array]]
"""Inputs of a Part by name → its outputs by name, computed by the original."""


@dataclass(frozen=True)
class Part:
    """One static-graph module with its Signature; `module` is in eval mode and takes the inputs in order."""

    name: str
    module: nn.Module
    signature: Signature
    examples: ExampleBuilder


@dataclass(frozen=True)
class PartOutline:
    """A Part that `build` would make: its Signature and number of parameters."""

    name: str
    signature: Signature
    parameter_count: int


@dataclass(frozen=True)
class Description:
    """What a checkpoint is, from names and shapes alone.

    Attributes:
        architecture: sizes and choices, as JSON data.
        parts: how it would be split.
        notes: what is hard about exporting it, and how that is met; one sentence each.
        warnings: what is assumed because the checkpoint does not say it.
        image, text: how inputs are prepared, None where the model takes no such input.
        origins: where each value of `image` and `text` comes from.
        reserved_rows: as in Model.
    """

    architecture: Mapping[str, Any]
    parts: tuple[PartOutline, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    image: AnyImageSpec | None = None
    text: TextSpec | None = None
    origins: Origins = field(default_factory=Origins)
    reserved_rows: int = 0


@dataclass(frozen=True)
class TokenizerIds:
    """Ids that the checkpoint's tokenizer gives.

    Attributes:
        start: what every text begins with.
        end, pad: as in TextSpec.
        vocabulary: token → id, added tokens included.
    """

    start: tuple[int, ...]
    end: int
    pad: int
    vocabulary: Mapping[str, int]


@dataclass(frozen=True)
class Model:
    """What a Family builds from a Checkpoint.

    Attributes:
        family: the Family's name.
        architecture: sizes and choices, as JSON data, for the manifest.
        parts: in the order in which they are exported.
        image, text: how inputs are prepared, None where the model takes no such input.
        hub_config: `config.json` of the bundle, Hugging Face conventions.
        tasks: what the model can be asked.
        dropped_keys: stored keys that are not weights of the model, left out on purpose.
        references: part name → loads the Reference; called only by verification.
        reference_name: who computes the Reference, for the manifest.
        warnings: what is assumed because neither the checkpoint nor the options say it.
        original: what the proof of the contract runs.
        notes: what was decided while the checkpoint was read; one sentence each.
        reserved_rows: rows of the embedding table that the model's own code uses, while its tokenizer has no token for
            them.
        with_tokenizer: the model with what it takes from its tokenizer's ids.
        origins: where each value of `image` and `text` comes from.
    """

    family: str
    architecture: Mapping[str, Any]
    parts: tuple[Part, ...]
    image: AnyImageSpec | None
    text: TextSpec | None
    hub_config: Mapping[str, Any]
    tasks: tuple[TaskSpec, ...]
    dropped_keys: tuple[str, ...]
    references: Mapping[str, Callable[[], Reference]]
    reference_name: str
    warnings: tuple[str, ...] = ()
    original: Original = field(default_factory=Original)
    notes: tuple[str, ...] = ()
    reserved_rows: int = 0
    with_tokenizer: Callable[[Model, TokenizerIds], Model] = lambda model, _: model
    origins: Origins = field(default_factory=Origins)

    def task(self, kind: type[FoundTask]) -> FoundTask | None:
        """What the model can be asked of that kind, None where it cannot."""
        return find_task(self.tasks, kind)


@dataclass(frozen=True)
class NoOptions(Spec):
    """The options of a family that needs to be told nothing."""


@dataclass(frozen=True)
class BuildOptions(Spec):
    """What the user may choose about the modules themselves.

    Attributes:
        image_size: edge in pixels of the square that the vision part takes, instead of the checkpoint's own.
        dynamic_image_size: height and width become axes of the vision part.
        family_options: name → value of what some weights do not say about themselves; `Family.options` declares them.
    """

    image_size: Annotated[int, between(1, MAX_IMAGE_SIZE_PIXELS)] | None = None
    dynamic_image_size: bool = False
    family_options: Mapping[str, int | str] = field(default_factory=dict)

    def refusal(self, field: str, expected: str) -> VlmExportError:
        """The user chose it: UsageError that names the option."""
        option = f"--{field.replace('_', '-')}"
        allowed = expected.removesuffix(" or nothing (null)")
        return UsageError(f"{option} is out of range", expected=allowed, got=repr(getattr(self, field))[:80])


class WeightStore(Protocol):
    """Where weights live that cannot be used as they are stored (other dtype, transposed, packed): a mapped file."""

    def new(self, shape: tuple[int, ...]) -> Tensor:
        """A writable, memory-mapped float32 tensor, zero-filled."""
        ...


DEFAULT_BUILD = BuildOptions()


class Family(Protocol):
    """One model line; implementations stand in `models/` and are listed in `models/registry.py`.

    Attributes:
        reads: prefixes of the keys that the family reads, () for all. Shards that hold no such key are neither
            downloaded nor opened.
        options: the fields of `BuildOptions.family_options` that the family takes, with types and ranges.
        marks: keys of which each of its checkpoints has at least one; a common prefix of all keys is found by them.
        roots: first parts of its keys; tensors under others are of modules beside the model. () where it leaves aside
            whatever it does not read.
        config_types: `model_type` of a config.json → the `architectures` of that type which the family computes.
    """

    name: str
    reads: tuple[str, ...]
    options: type[Spec]
    marks: tuple[str, ...]
    roots: tuple[str, ...]
    config_types: Mapping[str, tuple[str, ...]]

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Whether the stored keys (or the config) are this family's."""
        ...

    def describe(self, checkpoint: Checkpoint) -> Description:
        """What the checkpoint is, without reading a weight; InputError when its shapes do not fit together."""
        ...

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        """Parts with weights; InputError when keys, shapes or dtypes do not fit, UsageError for what it cannot do."""
        ...

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        """Keys, shapes and dtypes of a checkpoint of that architecture, as its authors publish it."""
        ...

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        """The `config.json` of such a checkpoint, or None where its authors publish none."""
        ...


def outlines(parts: Iterable[Part]) -> tuple[PartOutline, ...]:
    """What a description tells of parts, which may be on the meta device."""
    return tuple(
        PartOutline(part.name, part.signature, sum(p.numel() for p in part.module.parameters())) for part in parts
    )


def reference_from_module(part: Part) -> Reference:
    """The part's own unpatched eager module as its Reference."""
    import torch

    def run(inputs: Arrays) -> dict[str, Array]:
        with torch.inference_mode():
            tensors = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in part.signature.input_names]
            outputs = part.module(*tensors)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        return {name: t.numpy() for name, t in zip(part.signature.output_names, outputs, strict=True)}

    return run
