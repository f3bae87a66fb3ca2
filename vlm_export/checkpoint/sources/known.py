"""The published checkpoints that `configs/` describes: one YAML file each, data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from vlm_export.errors import EnvironmentFailure, InputError, UsageError, suggestion
from vlm_export.specs import ImageSpec, Origins, PatchSpec, TextSpec
from vlm_export.specs.codec import Check, Spec, matches

if TYPE_CHECKING:
    # It imports torch, which a list of names does not need.
    from vlm_export.family import CheckpointFile

_PACKAGE = "vlm_export.configs"


def _stays_inside(path: str) -> bool:
    return not path.startswith("/") and "\\" not in path and ".." not in path.split("/")


Name: TypeAlias = Annotated[str, matches(r"[a-z0-9][a-z0-9.-]*", "lower-case letters, digits, '.' and '-'")]
Sha256: TypeAlias = Annotated[str, matches(r"[0-9a-f]{64}", "64 lower-case hexadecimal digits")]
Inside: TypeAlias = Annotated[str, Check("a path inside configs/", _stays_inside)]


@dataclass(frozen=True)
class KnownSource(Spec):
    """Where the checkpoint is; exactly one of the three.

    Attributes:
        url: an https address.
        hub: a Hugging Face Hub id.
        file: a path inside `configs/`, of a file or of a checkpoint's directory.
    """

    url: str | None = None
    hub: str | None = None
    file: Inside | None = None

    def check(self) -> None:
        if len([source for source in (self.url, self.hub, self.file) if source is not None]) != 1:
            raise InputError("a source needs exactly one of url, hub and file", got=str(self.to_json()))

    def __str__(self) -> str:
        return self.url or self.hub or f"configs/{self.file}"


@dataclass(frozen=True)
class Tolerance(Spec):
    """Largest absolute difference (times max(1, max|reference|)) and smallest cosine of a variant's outputs."""

    cosine: float
    max_abs: float | None = None


@dataclass(frozen=True)
class KnownCheckpoint(Spec):
    """One published checkpoint.

    Attributes:
        name: what the user types; the YAML file's name.
        family: the Family that reads it.
        title: what people call it.
        source: where it is.
        sha256: of the weights file, where the publisher states it.
        revision: commit, branch or tag of a hub id.
        architecture: what the family derives from its shapes, for random weights and as a check.
        image, text: how its authors prepare inputs, None where the file does not say.
        tolerances: by variant ("fp32", …).
        licence, paper, notes: for the reader.
        tokenizer: a path inside `configs/`, where the project ships one.
    """

    name: Name
    family: str
    title: str
    source: KnownSource
    architecture: Mapping[str, Any]
    tolerances: Mapping[str, Tolerance]
    sha256: Sha256 | None = None
    revision: str | None = None
    image: ImageSpec | PatchSpec | None = None
    text: TextSpec | None = None
    licence: str | None = None
    paper: str | None = None
    notes: str | None = None
    tokenizer: Inside | None = None

    @property
    def origins(self) -> Origins:
        """That this config states each value of `image` and `text`."""
        specs = {"image": self.image, "text": self.text}
        fields = [f"{kind}.{field}" for kind, spec in specs.items() if spec is not None for field in spec.to_json()]
        return Origins({field: f"configs/{self.name}.yaml: {field}" for field in fields})


def known_names() -> tuple[str, ...]:
    """The names of all configs, sorted."""
    entries = resources.files(_PACKAGE).iterdir()
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml")))


def load_known(name: str) -> KnownCheckpoint:
    """The config of that name.

    Raises:
        UsageError: there is none.
        InputError: the file has unknown, missing or wrongly typed fields.
    """
    names = known_names()
    if name not in names:
        raise UsageError("no config has this name", where=name, fix=suggestion(name, names))
    text = (resources.files(_PACKAGE) / f"{name}.yaml").read_text(encoding="utf-8")
    return known_from_yaml(name, text)


def is_pinned(files: Iterable[CheckpointFile]) -> bool:
    """Whether one of the files is, by its sha256, the weights of a checkpoint that `configs/` describes."""
    return any(file.sha256 in _pinned() for file in files)


@cache
def _pinned() -> frozenset[str | None]:
    # Read once: the configs are part of the installation, and an export asks more than once.
    return frozenset(load_known(name).sha256 for name in known_names())


def packaged_path(relative: str) -> Path:
    """The file or directory at `relative` inside `configs/`; EnvironmentFailure when the installation lacks it."""
    path = Path(str(resources.files(_PACKAGE))).joinpath(*relative.split("/"))
    if not path.exists():
        raise EnvironmentFailure(
            "a file that the configs name is not installed",
            where=str(path),
            fix="install vlm-export again; in a clone, run the script that makes the file",
        )
    return path


def known_from_yaml(name: str, text: str) -> KnownCheckpoint:
    """The checkpoint that the YAML text describes; `name` is the file's, without its ending."""
    import yaml

    where = f"configs/{name}.yaml"
    try:
        # libyaml's loader, where PyYAML was built with it, is ten times as fast: to export is to read all configs.
        data = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise InputError("a config is not valid YAML", where=where, got=str(error)) from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError("a config holds no mapping", where=where, got=type(data).__name__)
    return KnownCheckpoint.from_config({"name": name, **data}, where)
