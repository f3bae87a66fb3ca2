"""What families read from a checkpoint to derive sizes: shapes by key, numbers of config.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint

CONFIG = "config.json"


class Shapes:
    """Looks up shapes and counts layers; a missing key or a wrong rank is the user's InputError, not a KeyError."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def of(self, key: str, rank: int) -> tuple[int, ...]:
        info = self.checkpoint.tensors.get(key)
        if info is None or len(info.shape) != rank or 0 in info.shape:
            raise InputError(
                "a tensor that determines the architecture is missing or has another rank",
                where=f"{self.checkpoint.source}: tensor {key}",
                expected=f"{rank} axes, none empty",
                got="no such tensor" if info is None else f"shape {info.shape}",
                fix="check that the file is complete",
            )
        return info.shape

    def count(self, prefix: str) -> int:
        """The number of consecutive layers, from 0, whose keys start with `prefix` and a number."""
        return _count_consecutive(key[len(prefix) :] for key in self.checkpoint.tensors if key.startswith(prefix))


def _count_consecutive(rests: Iterable[str]) -> int:
    numbers = {rest.split(".", 1)[0] for rest in rests}
    count = 0
    while str(count) in numbers:
        count += 1
    return count


def grid_of(positions: int, prefix_tokens: int = 1) -> int:
    """Patches per side of a square grid whose position table has that many rows."""
    return round(math.sqrt(positions - prefix_tokens))


def config_section(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    """The object `name` of config.json, empty when there is none; InputError when it is no object."""
    section = (checkpoint.config or {}).get(name, {})
    if not isinstance(section, Mapping):
        raise InputError(
            "config.json is malformed", where=f"config.json: {name}", expected="an object", got=repr(section)
        )
    return section


def config_integer(section: Mapping[str, Any], key: str, default: int, file: str = CONFIG) -> int:
    """A number of config.json or another file, at least 0; InputError when it is anything else."""
    value = section.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{file} is malformed", where=f"{file}: {key}", expected="an integer", got=repr(value))
    return value


def config_number(section: Mapping[str, Any], key: str, default: float, file: str = CONFIG) -> float:
    """A positive number of config.json or another file; InputError when it is anything else."""
    value = section.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InputError(f"{file} is malformed", where=f"{file}: {key}", expected="a positive number", got=repr(value))
    return float(value)


def check_heads(checkpoint: Checkpoint, name: str, width: int, heads: int) -> None:
    """InputError when the width is not a multiple of the number of heads."""
    if heads < 1 or width % heads:
        raise InputError(
            f"the {name} width is not a multiple of its heads",
            where=checkpoint.source,
            expected=f"a divisor of {width}",
            got=f"{heads} heads",
        )
