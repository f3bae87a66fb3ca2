"""The rooms of the graph library import downwards only."""

from __future__ import annotations

import ast
from pathlib import Path

import vlm_export.graph

ROOT = Path(vlm_export.graph.__file__).parent
# Room → the rooms that its files may import; "" holds the table of verbs and recipes.
ALLOWED = {
    "core": {"core"},
    "look": {"look", "core"},
    "prove": {"prove", "core"},
    "edits": {"edits", "prove", "core"},
    "passes": {"passes", "prove", "core"},
    "": {"", "core"},
}


def _room(module: str) -> str:
    name = module.removeprefix("vlm_export.graph").strip(".").partition(".")[0]
    return name if name in ALLOWED else ""


def test_rooms_import_downwards_only() -> None:
    seen: set[str] = set()
    for path in ROOT.rglob("*.py"):
        room = _room(".".join(("vlm_export.graph", *path.relative_to(ROOT).with_suffix("").parts)))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlm_export.graph"):
                assert _room(node.module or "") in ALLOWED[room], f"{path} imports {node.module}"
                seen.add(room)
    assert seen == {*ALLOWED}
