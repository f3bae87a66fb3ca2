"""The published checkpoints that `configs/` describes: one YAML file each, data only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.bundle.strict_json import Fields
from vlm_export.errors import EnvironmentFailure, InputError, UsageError, suggestion
from vlm_export.specs import ImageSpec, TextSpec, record_from_json

if TYPE_CHECKING:
    # It imports torch, which a list of names does not need.
    from vlm_export.family import CheckpointFile

_PACKAGE = "vlm_export.configs"
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REQUIRED = ("family", "title", "source", "architecture", "tolerances")
_OPTIONAL = ("sha256", "revision", "image", "text", "licence", "paper", "notes", "tokenizer")


@dataclass(frozen=True)
class KnownSource:
    """Where the checkpoint is; exactly one of the three.

    Attributes:
        url: an https address.
        hub: a Hugging Face Hub id.
        file: a path inside `configs/`, of a file or of a checkpoint's directory.
    """

    url: str | None = None
    hub: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.url or self.hub or f"configs/{self.file}"


@dataclass(frozen=True)
class Tolerance:
    """Largest absolute difference (times max(1, max|reference|)) and smallest cosine of a variant's outputs."""

    max_abs: float | None
    cosine: float


@dataclass(frozen=True)
class KnownCheckpoint:
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

    name: str
    family: str
    title: str
    source: KnownSource
    architecture: Mapping[str, Any]
    tolerances: Mapping[str, Tolerance]
    sha256: str | None = None
    revision: str | None = None
    image: ImageSpec | None = None
    text: TextSpec | None = None
    licence: str | None = None
    paper: str | None = None
    notes: str | None = None
    tokenizer: str | None = None


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
    padded = {**dict.fromkeys(_OPTIONAL), **data}
    fields = Fields(padded, where).only([*_REQUIRED, *_OPTIONAL])
    image, spec = fields.data["image"], fields.data["text"]
    return KnownCheckpoint(
        name=_matching(name, _NAME, where, "name"),
        family=fields.text("family"),
        title=fields.text("title"),
        source=_source(fields.fields("source")),
        architecture=fields.mapping("architecture"),
        tolerances=_tolerances(fields.fields("tolerances")),
        sha256=_sha256(fields),
        revision=fields.text_or_none("revision"),
        image=None if image is None else record_from_json(ImageSpec, fields.mapping("image")),
        text=None if spec is None else record_from_json(TextSpec, fields.mapping("text")),
        licence=fields.text_or_none("licence"),
        paper=fields.text_or_none("paper"),
        notes=fields.text_or_none("notes"),
        tokenizer=_inside(fields, "tokenizer"),
    )


def _source(fields: Fields) -> KnownSource:
    kinds = ("url", "hub", "file")
    fields = Fields({**dict.fromkeys(kinds), **fields.data}, fields.where).only(kinds)
    if len([kind for kind in kinds if fields.data[kind] is not None]) != 1:
        raise InputError("a source needs exactly one of url, hub and file", where=fields.where, got=str(fields.data))
    return KnownSource(fields.text_or_none("url"), fields.text_or_none("hub"), _inside(fields, "file"))


def _tolerances(fields: Fields) -> dict[str, Tolerance]:
    tolerances = {}
    for variant in fields.data:
        entry = fields.fields(variant)
        entry = Fields({"max_abs": None, **entry.data}, entry.where).only(("max_abs", "cosine"))
        max_abs = None if entry.data["max_abs"] is None else _number(entry, "max_abs")
        tolerances[variant] = Tolerance(max_abs, _number(entry, "cosine"))
    return tolerances


def _number(fields: Fields, key: str) -> float:
    value = fields.data[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        # YAML 1.1 reads 1e-4 as text; numbers need a point and a signed exponent, or no exponent.
        raise fields.fail(key, "a number (write 0.0001, not 1e-4)")
    return float(value)


def _sha256(fields: Fields) -> str | None:
    value = fields.text_or_none("sha256")
    return None if value is None else _matching(value, _SHA256, fields.where, "sha256")


def _inside(fields: Fields, key: str) -> str | None:
    value = fields.text_or_none(key)
    if value is not None and (value.startswith("/") or "\\" in value or ".." in value.split("/")):
        raise fields.fail(key, "a path inside configs/")
    return value


def _matching(value: str, pattern: re.Pattern[str], where: str, what: str) -> str:
    if pattern.fullmatch(value) is None:
        raise InputError(f"a config has a malformed {what}", where=where, expected=pattern.pattern, got=value[:100])
    return value
