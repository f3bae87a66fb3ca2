"""The state of an export as text that a person reviews, and what differs between two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from vlm_export.graph.core.plain_yaml import read_yaml
from vlm_export.lab.bundle_diff import field_differences
from vlm_export.lab.canonical import SEPARATOR
from vlm_export.lab.differences import SECTIONS, Difference, in_order, named
from vlm_export.specs.codec import Check, Spec

WHOLE = "(whole graph)"
_KNOWN = Check(f"of the kinds {', '.join(SECTIONS)}", lambda found: set(found) <= set(SECTIONS))


@dataclass(frozen=True)
class State(Spec):
    """What an export is, without what another machine or day changes.

    Attributes:
        case: name of the case.
        tools: name → version; shown beside differences, and none itself.
        sections: kind of difference → name → what is recorded.
        figures: name → number, of three digits.
    """

    schema: Literal[1]
    case: str
    tools: Mapping[str, str]
    sections: Annotated[Mapping[str, Mapping[str, Any]], _KNOWN]
    figures: Mapping[str, float] = field(default_factory=dict)

    def to_text(self) -> str:
        """The content of the file: the same state gives the same text."""
        return str(yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True, width=1000))


def read_state(path: Path) -> State:
    """What is recorded; UsageError or InputError where the file is no state."""
    fix = "restore it from your version control, or record it again with --update"
    return State.from_json(read_yaml(path, "the recorded state"), str(path), fix=fix)


def compare_states(then: State, now: State) -> tuple[Difference, ...]:
    """All that differs but figures and tools, causes first."""
    found: list[Difference] = []
    for section in SECTIONS:
        before, after = then.sections.get(section, {}), now.sections.get(section, {})
        if section == "structure":
            found += _structure_differences(before, after)
        else:
            found += field_differences(section, "", before, after)
    return in_order(found)


def tool_changes(then: State, now: State) -> str:
    """`torch 2.10.0 → 2.11.0`; "" where the versions are those that were recorded."""
    names = dict.fromkeys([*then.tools, *now.tools])
    sides = ((name, then.tools.get(name, "none"), now.tools.get(name, "none")) for name in names)
    return ", ".join(f"{name} {before} → {after}" for name, before, after in sides if before != after)


def _structure_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    """By module, equal changes of several as one difference; of the whole graph only where no module differs."""
    found: dict[tuple[str, str, str], list[str]] = {}
    whole = list[str]()
    for name in dict.fromkeys([*then, *now]):
        before, after = (str(side.get(name, "")) for side in (then, now))
        if before == after:
            continue
        if name.endswith(WHOLE):
            whole.append(name)
            continue
        sides = before.partition(SEPARATOR)[0], after.partition(SEPARATOR)[0]
        what = "operators" if sides[0] != sides[1] else "attributes, constants or inputs of operators"
        found.setdefault((what, *(sides if what == "operators" else ("", ""))), []).append(name)
    for (what, left, right), names in found.items():
        yield Difference("structure", named(names), what, left, right)
    told = {name for names in found.values() for name in names}
    for name in whole:
        if not any(module.startswith(name.removesuffix(WHOLE)) for module in told):
            yield Difference("structure", name, "connections of operators")
