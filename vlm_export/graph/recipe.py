"""Recipes: YAML lists of verbs with their arguments, applied in order to one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.errors import UsageError, suggestion
from vlm_export.graph.core.plain_yaml import read_yaml
from vlm_export.graph.verb_arguments import value_from_yaml
from vlm_export.graph.verbs import BY_NAME, Verb

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Step:
    """A verb with its arguments, by name."""

    verb: Verb
    values: dict[str, Any]

    @property
    def models(self) -> list[ir.Model]:
        """Returns the models among the arguments."""
        names = [entry.name for entry in self.verb.arguments if entry.kind == "model"]
        return [self.values[name] for name in names if name in self.values]


@dataclass(frozen=True)
class Applied:
    """What steps made of a model.

    Attributes:
        results: per step what the verb says it did.
        renamed: new name of a tensor → the name it had at first.
    """

    model: ir.Model
    results: list[Any]
    renamed: dict[str, str]


def read_recipe(path: Path) -> list[Step]:
    """Reads the steps of a file; each entry is a verb's name, or that name with a mapping of its arguments.

    Raises:
        UsageError: no such file, no YAML, or an unknown verb or argument (with the nearest known one).
    """
    data = read_yaml(path, "the recipe")
    if not isinstance(data, list) or not data:
        raise UsageError("a recipe is a list of verbs", where=str(path), got=type(data).__name__)
    return [_step(entry, f"{path}, step {number}") for number, entry in enumerate(data, 1)]


def _step(entry: Any, where: str) -> Step:
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UsageError("a step is one verb, with a mapping of its arguments", where=where, got=repr(entry)[:200])
    ((name, given),) = entry.items()
    if name not in BY_NAME:
        raise UsageError(f"there is no verb {name!r}", where=where, fix=suggestion(str(name), BY_NAME))
    if given is not None and not isinstance(given, dict):
        raise UsageError(f"{name} takes a mapping of arguments", where=where, got=repr(given)[:200])
    verb = BY_NAME[name]
    known = {argument.name: argument for argument in verb.arguments}
    for key in given or {}:
        if key not in known:
            raise UsageError(f"{name} has no argument {key!r}", where=where, fix=suggestion(str(key), known))
    try:
        values = {key: value_from_yaml(known[key], value) for key, value in (given or {}).items()}
        verb.check_complete(values)
    except UsageError as error:
        raise UsageError(error.what, where=where, expected=error.expected, got=error.got) from error
    return Step(verb, values)


def apply_steps(model: ir.Model, steps: list[Step]) -> Applied:
    """Runs the steps on the model, which may be changed in place; the result is in `model`."""
    results, renamed = [], dict[str, str]()
    for step in steps:
        model, result = step.verb.run(model, step.values)
        results.append(result)
        names: dict[str, str] = step.values.get(step.verb.renames, {}) if "function" not in step.values else {}
        renamed |= {new: renamed.pop(old, old) for old, new in list(names.items())}
    return Applied(model, results, renamed)
