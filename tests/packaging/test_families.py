"""A family is four edits: its module, its configs, its tests and its line in the registry. Here they must agree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.models.registry import FAMILIES, load_family

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_its_module_configs_and_tests(name: str) -> None:
    assert FAMILIES[name].startswith("vlm_export.models.")
    assert load_family(name).name == name
    assert any(load_known(config).family == name for config in known_names())
    assert (ROOT / "tests" / "models" / f"test_{name}.py").is_file()


@pytest.mark.parametrize("config", known_names())
def test_config_names_a_registered_family(config: str) -> None:
    family = load_known(config).family
    assert family in FAMILIES
    # A second generation may be of the first one's family ("siglip2-base-patch16-224").
    assert re.match(rf"{family}\d?-", config)


def test_every_family_in_models_is_registered() -> None:
    found = set()
    for path in (ROOT / "models").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            methods = {entry.name for entry in getattr(node, "body", []) if isinstance(entry, ast.FunctionDef)}
            # One that shares the rest with another family recognises its own files at least.
            if isinstance(node, ast.ClassDef) and "recognises" in methods:
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.add(f"vlm_export.{module}:{node.name}")
    assert found == set(FAMILIES.values())
