"""How a checkpoint's or a bundle's inputs are prepared, each value with the file that states it: for `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlm_export.cli.output import print_line, print_table

if TYPE_CHECKING:
    from vlm_export.specs import AnyImageSpec, Origins, TextSpec

_UNKNOWN = "not stated"


def preparation_data(image: AnyImageSpec | None, text: TextSpec | None, origins: Origins) -> dict[str, Any]:
    """JSON data: for "image" and "text", field → its value and where it comes from; None where there is no such input.

    "ignored_files" holds the names of files that were found and not read, with the reason.
    """
    return {
        "image": None if image is None else _with_origins("image", image.to_json(), origins),
        "text": None if text is None else _with_origins("text", text.to_json(), origins),
        "ignored_files": dict(origins.ignored_files),
    }


def print_preparation(data: Mapping[str, Any]) -> None:
    """The same as a table on stdout; nothing where no input is described and no file was ignored."""
    rows = [
        (f"  {kind}.{name}", _value_text(entry["value"]), entry["from"])
        for kind in ("image", "text")
        for name, entry in (data[kind] or {}).items()
    ]
    if rows:
        print_line("preparation:")
        print_table(("  field", "value", "from"), rows)
    for name, reason in data["ignored_files"].items():
        print_line(f"not read: {name}: {reason}")


def _with_origins(kind: str, fields: Mapping[str, Any], origins: Origins) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        origin = origins.values.get(f"{kind}.{name}", _UNKNOWN)
        inner = {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
        found |= {key: {"value": entry, "from": origin} for key, entry in inner.items()}
    return found


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value_text, value)) or "none"
    return f"{value:.8g}" if isinstance(value, float) else str(value)
