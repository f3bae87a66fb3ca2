"""The specification of a regression test: sources × options × tolerances, as a YAML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from vlm_export.errors import UsageError
from vlm_export.graph.core.plain_yaml import read_yaml
from vlm_export.specs.codec import Check, Spec, above, matches, not_empty

_NAME = matches(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "letters, digits, '.', '_' and '-'")
_NAMED = Check("names of letters, digits, '.', '_' and '-'", lambda names: all(map(_NAME.holds, names)))
Ratios: TypeAlias = Mapping[str, Annotated[float, above(0)]]
"""Pattern of a figure's name, such as "vision.*.max_abs" → how many times the recorded one it may be."""
# Options that name files: a path beside the specification is taken from there.
_PATHS = ("tokenizer", "base")
STATES = "states"


@dataclass(frozen=True)
class Entry(Spec):
    """One source, with the options of its exports.

    Attributes:
        name: of the case, and of the file with its state.
        source: a path relative to the specification, a known name, or a Hugging Face Hub id.
        options: fields of `ExportOptions` and `BuildOptions`, as `vlm_export.export` takes them.
        variants: name → further options; each is a case NAME-VARIANT of its own. None: one case.
        tolerances: beside those of the specification, and before them.
    """

    name: Annotated[str, _NAME]
    source: Annotated[str, not_empty("a source")]
    options: Mapping[str, Any] = field(default_factory=dict)
    variants: Annotated[Mapping[str, Mapping[str, Any]], _NAMED] = field(default_factory=dict)
    tolerances: Ratios = field(default_factory=dict)


@dataclass(frozen=True)
class RegressSpec(Spec):
    """What the file holds: the entries, and tolerances for all of them."""

    entries: Annotated[tuple[Entry, ...], not_empty("at least one entry")]
    tolerances: Ratios = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One export.

    Attributes:
        name: unique in the specification.
        options: keyword arguments of `vlm_export.export`, as JSON data.
        tolerances: the first pattern that fits a figure holds.
        state: the file with what is recorded.
    """

    name: str
    source: str
    options: Mapping[str, Any]
    tolerances: Mapping[str, float]
    state: Path


def read_cases(path: Path) -> tuple[Case, ...]:
    """The cases of a specification, in its order.

    Raises:
        UsageError: no such file, no YAML, or a name that stands twice.
        InputError: an unknown or missing field, or a value of another type.
    """
    spec = RegressSpec.from_config(read_yaml(path, "the specification"), str(path))
    cases = tuple(case for entry in spec.entries for case in _cases_of(entry, spec, path.parent))
    names = [case.name for case in cases]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UsageError(f"two cases have the name {name!r}", where=str(path), fix="give each entry its own name")
    return cases


def _cases_of(entry: Entry, spec: RegressSpec, folder: Path) -> Iterator[Case]:
    tolerances = {**entry.tolerances, **{k: v for k, v in spec.tolerances.items() if k not in entry.tolerances}}
    for variant, further in (entry.variants or {"": {}}).items():
        name = f"{entry.name}-{variant}" if variant else entry.name
        options = {**entry.options, **further}
        options |= {key: _beside(folder, options[key]) for key in _PATHS if isinstance(options.get(key), str)}
        if isinstance(options.get("images"), list):
            options["images"] = [_beside(folder, str(image)) for image in options["images"]]
        state = folder / STATES / f"{name}.yaml"
        yield Case(name, _beside(folder, entry.source), options, tolerances, state)


def _beside(folder: Path, name: str) -> str:
    """The path from the specification's directory where something is there, or else the name as it stands."""
    path = folder / name
    return str(path) if path.exists() else name
