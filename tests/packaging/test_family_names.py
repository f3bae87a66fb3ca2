"""Nothing outside `models/` and `configs/` knows a family: what differs between models is data in their specs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from vlm_export.checkpoint.sources.known import known_names
from vlm_export.models.registry import FAMILIES

PACKAGE = Path(__file__).parent.parent.parent / "vlm_export"
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if not {"models", "configs"} & set(path.parts)]
# open_clip is a library that publishes files, as transformers is, whose classes side files name.
# So are names of software that a bundle is packaged for, and of a file that one of them looks for.
NO_FAMILY = re.compile(
    r"open_?clip\w*|\w+(Tokenizer|ImageProcessor)\w*|modern-onnx-clip|clip-as-service|clip_image_processor\.onnx",
    re.IGNORECASE,
)
# Typesense's word for a config with both encoders, whatever family they are of.
FOREIGN = {("layouts/typesense.py", "clip")}
OPERATOR = "Clip"


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """Identifiers and strings with their lines; docstrings may cite sources."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {id(statement.value) for node in ast.walk(tree) for statement in _strings_alone(node)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield line, node.value
        for name in ("id", "name", "attr", "arg", "module", "asname"):
            value = getattr(node, name, None)
            if isinstance(value, str) and not (name == "attr" and value == "clip"):
                yield line, value


def _strings_alone(node: ast.AST) -> list[ast.Expr]:
    body = getattr(node, "body", [])
    statements = body if isinstance(body, list) else []
    return [s for s in statements if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]


def family_in(text: str) -> str | None:
    """The family that a text names; names of known checkpoints are data of `configs/`."""
    found = next((name for name in FAMILIES if name in text.lower()), None)
    if found is None:
        return None
    for known in known_names():
        text = text.replace(known, "")
    plain = NO_FAMILY.sub("", text).lower()
    return next((name for name in FAMILIES if name in plain), None)


def test_no_code_names_a_family() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{line}: {word!r}"
        for path in SOURCES
        for line, word in words_of(path)
        if word != OPERATOR and (path.relative_to(PACKAGE).as_posix(), word) not in FOREIGN and family_in(word)
    }
    assert not found


def test_the_reader_sees_names_and_strings(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text('"""Of clip."""\ndef blip_parts():\n    return "nanovlm"\n')
    found = [word for _, word in words_of(tmp_path / "x.py") if family_in(word)]
    assert found == ["blip_parts", "nanovlm"]
