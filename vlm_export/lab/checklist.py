"""What the checklist of a deployment found, and the items that a user adds in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from vlm_export.bundle.manifest import Release
from vlm_export.errors import InputError, VerificationError, VlmExportError
from vlm_export.graph.core.plain_yaml import read_yaml
from vlm_export.specs.codec import Spec, above

Verdict = Literal["PASS", "FAIL", "NOT RUN"]


MEMORY_UNKNOWN = "this system does not tell how much memory a process has"


class NotRunError(Exception):
    """An item cannot be looked at here; the text says why."""


@dataclass(frozen=True)
class Item:
    """One line of the checklist.

    Attributes:
        evidence: what was seen, a statement each; of what is not run, why.
        failures: one sentence each.
    """

    name: str
    verdict: Verdict
    evidence: tuple[str, ...]
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checklist:
    """All items, in their order."""

    bundle: str
    items: tuple[Item, ...]

    @property
    def failed(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.verdict == "FAIL")

    def item(self, name: str) -> Item:
        """The item of that name; KeyError where there is none."""
        return {item.name: item for item in self.items}[name]

    def raise_if_failed(self) -> None:
        """VerificationError that names the items that failed."""
        if self.failed:
            first = self.failed[0]
            raise VerificationError(
                f"{len(self.failed)} of {len(self.items)} items fail: {', '.join(item.name for item in self.failed)}",
                where=self.bundle,
                got=f"{first.name}: {first.failures[0]}",
            )

    def to_json(self) -> dict[str, Any]:
        """What `check --json` prints."""
        return {"bundle": self.bundle, "passed": not self.failed, "items": [asdict(item) for item in self.items]}


@dataclass
class Seen:
    """What a check collects: failures, and evidence for either verdict."""

    failures: list[str] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)


def looked_at(name: str, check: Callable[[Seen], None]) -> Item:
    """The item that a check makes; an error of the bundle's inside it is a failure, and one of the user's call is not.

    Raises:
        UsageError, EnvironmentFailure: as the check raises them.
    """
    seen = Seen()
    try:
        check(seen)
    except NotRunError as reason:
        return Item(name, "NOT RUN", (str(reason),))
    except (InputError, VerificationError) as error:
        seen.failures.append(sentence(error))
    verdict: Verdict = "FAIL" if seen.failures else "PASS"
    return Item(name, verdict, tuple(seen.evidence), tuple(seen.failures))


def sentence(error: VlmExportError) -> str:
    """An error in one line."""
    got = f": {error.got}" if error.got else ""
    return f"{error.where}: {error.what}{got}" if error.where else f"{error.what}{got}"


@dataclass(frozen=True)
class OwnItems(Spec):
    """What a user demands beside the checklist; None and nothing: no demand.

    Attributes:
        max_size_mb: of all listed files, in MB of 1e6 bytes.
        max_latency_ms: median of one run of any variant on its first golden record.
        max_memory_mb: anonymous memory of the process after the long run.
        required_outputs: names of outputs, each of some part.
        required_parts, required_precisions, required_tasks: names; precisions are those of every part.
        oldest_onnxruntime: a release that must load every graph.
    """

    max_size_mb: Annotated[float, above(0)] | None = None
    max_latency_ms: Annotated[float, above(0)] | None = None
    max_memory_mb: Annotated[float, above(0)] | None = None
    required_outputs: tuple[str, ...] = ()
    required_parts: tuple[str, ...] = ()
    required_precisions: tuple[str, ...] = ()
    required_tasks: tuple[str, ...] = ()
    oldest_onnxruntime: Release | None = None


def read_items(path: Path) -> OwnItems:
    """The items of a YAML file: a mapping of the fields of `OwnItems`.

    Raises:
        UsageError: no such file, or no YAML.
        InputError: an unknown item (with the nearest known one), or a value of another type or range.
    """
    return OwnItems.from_config(read_yaml(path, "the file of items"), str(path))
