"""How a checkpoint's or a bundle's inputs are prepared, each value with the file that states it: for `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlm_export.cli.output import print_line, print_table, terminal_width

if TYPE_CHECKING:
    from vlm_export.specs import AnyImageSpec, Origins, TextSpec

_UNKNOWN = "not stated"


def preparation_data(image: AnyImageSpec | None, text: TextSpec | None, origins: Origins) -> dict[str, Any]:
    """JSON data: for "image" and "text", field → its value and where it comes from; None where there is no such input.

    A field of an object is `outer.inner`. "ignored_files" holds the names of files that were found and not read, with
    the reason.
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
        for name, entry in (data.get(kind) or {}).items()
    ]
    if rows:
        print_line("preparation:")
        print_table(("  field", "value", "from"), rows, width=terminal_width())
    for name, reason in data["ignored_files"].items():
        print_line(f"not read: {name}: {reason}")


def _with_origins(kind: str, fields: Mapping[str, Any], origins: Origins) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        inside = value if isinstance(value, Mapping) else {"": value}
        for key, entry in inside.items():
            path = f"{name}.{key}".removesuffix(".")
            origin = origins.values.get(f"{kind}.{path}", origins.values.get(f"{kind}.{name}", _UNKNOWN))
            found[path] = {"value": list(entry) if isinstance(entry, tuple) else entry, "from": origin}
    return found


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value_text, value)) or "none"
    if value is None or value == "":
        return "none" if value is None else '""'
    return f"{value:.8g}" if isinstance(value, float) else str(value)
