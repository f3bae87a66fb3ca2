"""What `configs/` says: the list of known names, and one of them without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlm_export.cli.output import print_json, print_line, print_table, terminal_width

if TYPE_CHECKING:
    from vlm_export.checkpoint.sources.known import KnownCheckpoint
    from vlm_export.family import Checkpoint


def list_known(*, as_json: bool) -> None:
    """Print all known names with their family and title, within the terminal's width; as JSON all about them."""
    from vlm_export.checkpoint.sources.known import known_names, load_known

    entries = [known_data(load_known(name)) for name in known_names()]
    if as_json:
        print_json({"what": "known checkpoints", "checkpoints": entries})
    else:
        rows = [(entry["name"], entry["family"], entry["title"]) for entry in entries]
        print_table(("name", "family", "checkpoint"), rows, width=terminal_width())
        print_line("vlm-export inspect NAME tells source and licence of one, --json those of all")


def known_data(known: KnownCheckpoint) -> dict[str, Any]:
    """What a config says for the reader."""
    return {
        "name": known.name,
        "family": known.family,
        "title": known.title,
        "source": str(known.source),
        "revision": known.revision,
        "sha256": known.sha256,
        "licence": known.licence,
        "paper": known.paper,
        "notes": known.notes,
    }


def checkpoint_from_config(known: KnownCheckpoint) -> Checkpoint:
    """Names and shapes as the checkpoint's authors publish them, without a file; enough for `Family.describe`."""
    from vlm_export.family import Checkpoint
    from vlm_export.models.registry import load_family

    family = load_family(known.family)
    tensors = family.published_tensors(known.architecture)
    return Checkpoint(known.name, "random", (), tensors, _refuse, family.published_config(known.architecture))


def print_known(entry: Mapping[str, Any]) -> None:
    """The lines of `known_data` that say something, below a heading."""
    print_line(f"  {entry['title']}")
    for key in ("source", "revision", "sha256", "licence", "paper", "notes"):
        if entry[key]:
            print_line(f"  {key}: {entry[key]}")


def _refuse(key: str) -> Any:
    raise AssertionError(f"a description needs no weights: {key}")
