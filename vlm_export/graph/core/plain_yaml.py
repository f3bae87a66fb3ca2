"""YAML files that people write: plain data, and every key once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vlm_export.errors import UsageError
from vlm_export.machine_faults import machine_fault

# Aliases let a few lines stand for more than any memory holds.
_MOST_VALUES = 1_000_000


class _Loader(yaml.SafeLoader):
    """Plain data; a key that stands twice in a mapping is refused, and so are aliases that multiply, or have no end."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and self._values(node, {}) > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f"aliases make more than {_MOST_VALUES} values of it")
        return node

    def _values(self, node: yaml.Node, known: dict[yaml.Node, int | None]) -> int:
        """How many values a node stands for, those of each alias counted again."""
        if node not in known:
            known[node] = None
            entries = node.value if isinstance(node, yaml.CollectionNode) else []
            inside = [part for entry in entries for part in (entry if isinstance(entry, tuple) else (entry,))]
            known[node] = 1 + sum(self._values(part, known) for part in inside)
        count = known[node]
        if count is None:
            raise yaml.constructor.ConstructorError(None, None, "an alias stands inside what it names", node.start_mark)
        return count

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # Keys that come by `<<` are meant to be replaced.
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> Any:
    """The data of a file.

    Args:
        what: names the file in errors, such as "the recipe".

    Raises:
        UsageError: no such file, or no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise machine_fault(error, str(path)) or UsageError(
            f"{what} cannot be read", where=str(path), got=str(error)
        ) from error
    try:
        return yaml.load(text, _Loader)
    # Its constructors raise what int, datetime and others raise, too.
    except Exception as error:
        raise UsageError(f"{what} is not YAML", where=str(path), got=str(error).replace("\n", " ")[:200]) from error
