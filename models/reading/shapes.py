"""What families read from a checkpoint to derive sizes: shapes by key, numbers of config.json."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint
from vlm_export.specs.codec import MAX_INTEGER
from vlm_export.text_display import shown

CONFIG = "config.json"
# Of texts that are read as a whole. Published: up to 512 positions.
LARGEST_CONTEXT = 4096


class Shapes:
    """Looks up shapes and counts layers; a missing key or a wrong rank is the user's InputError, not a KeyError."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def of(self, key: str, rank: int) -> tuple[int, ...]:
        info = self.checkpoint.tensors.get(key)
        if info is None or len(info.shape) != rank or 0 in info.shape:
            raise InputError(
                "a tensor that determines the architecture is missing or has another rank",
                where=f"{self.checkpoint.source}: tensor {shown(key)}",
                expected=f"{rank} axes, none empty",
                got="no such tensor" if info is None else f"shape {info.shape}",
                fix="save the whole state dict of the model: without this tensor nothing tells its sizes"
                if info is None
                else "the weights are packed, quantised or of another model: save the model's own state dict",
            )
        return info.shape

    def patches(self, key: str) -> tuple[int, int]:
        """Width of the tokens and edge of the patches that a convolution of RGB images makes.

        Raises:
            InputError: it takes images of other channels, or its patches are no squares.
        """
        width, channels, height, edge = self.of(key, 4)
        if channels != 3 or height != edge:
            raise InputError(
                "the image encoder does not take square patches of RGB images, and nothing else is supported",
                where=f"{self.checkpoint.source}: tensor {shown(key)}",
                expected=f"3 channels and a square, ({width}, 3, {edge}, {edge})",
                got=f"({width}, {channels}, {height}, {edge})",
            )
        return width, edge

    def count(self, prefix: str) -> int:
        """The number of consecutive layers, from 0, whose keys start with `prefix` and a number."""
        return _count_consecutive(key[len(prefix) :] for key in self.checkpoint.tensors if key.startswith(prefix))

    def grid(self, key: str, rank: int, prefix_tokens: int = 1) -> int:
        """Patches per side of the square whose patches have a row each in a position table, after those of a prefix.

        Raises:
            InputError: the patches make no square.
        """
        rows = self.of(key, rank)[-2]
        if rows <= prefix_tokens:
            raise InputError(
                "a position table has no row for a patch",
                where=f"{self.checkpoint.source}: tensor {key}",
                expected=f"more than {prefix_tokens} rows",
                got=str(rows),
            )
        patches = rows - prefix_tokens
        side = math.isqrt(patches)
        if side * side != patches:
            raise InputError(
                f"the position table has {patches} patches, which is no square: images that are not square are not "
                "supported",
                where=f"{self.checkpoint.source}: tensor {shown(key)}",
                expected=f"{side * side} or {(side + 1) ** 2} patches"
                + (f" and {prefix_tokens} row before them" if prefix_tokens else ""),
                got=f"{rows} rows",
                fix="resample the position table to a square grid with the code that trained the model, and save it so",
            )
        return side


def _count_consecutive(rests: Iterable[str]) -> int:
    numbers = {rest.split(".", 1)[0] for rest in rests}
    count = 0
    while str(count) in numbers:
        count += 1
    return count


def needed_config(checkpoint: Checkpoint, model: str, told: str) -> Mapping[str, Any]:
    """config.json of a checkpoint in transformers' form; InputError where there is none.

    Args:
        model: what the checkpoint is called.
        told: what config.json says and no tensor does.
    """
    if checkpoint.config is None:
        raise InputError(
            f"a Hugging Face {model} checkpoint needs its config.json",
            where=checkpoint.source,
            expected=f"config.json beside the weights: it says {told}",
            got="no config.json",
            fix="put the model's config.json beside the weights file; the code that made both saves them together",
        )
    return checkpoint.config


def config_section(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    """The object `name` of config.json, empty when there is none; InputError when it is no object."""
    section = (checkpoint.config or {}).get(name, {})
    if not isinstance(section, Mapping):
        raise InputError(
            "config.json is malformed", where=f"config.json: {name}", expected="an object", got=f"{section!r:.200}"
        )
    return section


def config_integer(section: Mapping[str, Any], key: str, default: int, file: str = CONFIG) -> int:
    """A number of config.json or another file, from 0 to MAX_INTEGER; InputError when it is anything else."""
    value = section.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INTEGER:
        expected = f"an integer from 0 to {MAX_INTEGER}"
        raise InputError(f"{file} is malformed", where=f"{file}: {key}", expected=expected, got=f"{value!r:.200}")
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of a JSON file is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def config_number(section: Mapping[str, Any], key: str, default: float, file: str = CONFIG) -> float:
    """A positive, finite number of config.json or another file; InputError when it is anything else."""
    value = section.get(key, default)
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise InputError(
            f"{file} is malformed", where=f"{file}: {key}", expected="a positive number", got=f"{value!r:.200}"
        )
    return float(value)


def image_size_of(grid: int, patch: int, stated: Any) -> int:
    """Pixels of the square that a grid of patches is made from.

    Args:
        stated: the size that a config states. One that is no multiple of the patch is kept where it gives this grid:
            the convolution leaves the margin out.
    """
    is_fit = isinstance(stated, int) and not isinstance(stated, bool) and stated // patch == grid
    return stated if is_fit else grid * patch


def check_stated(checkpoint: Checkpoint, name: str, section: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
    """InputError when a section of config.json states other sizes than the tensors have; unstated ones are right.

    Args:
        name: the section's, "" for the whole file.
        derived: key → the value that follows from the tensors.
    """
    wrong = [
        f"{key} {section[key]!r:.80}, not {value}" for key, value in derived.items() if section.get(key, value) != value
    ]
    if wrong:
        raise InputError(
            "config.json contradicts the tensors",
            where=f"{checkpoint.source}: config.json" + (f": {name}" if name else ""),
            expected="what the shapes say",
            got="; ".join(wrong),
            fix="take the config.json that was saved with these weights",
        )


def check_implemented(where: str, section: Mapping[str, Any], implemented: Mapping[str, Sequence[Any]]) -> None:
    """InputError when a key of `section` asks for another computation than the one that is exported.

    Args:
        where: the file, and the section's name if it has one.
        implemented: key → the values that are; an absent key or null stands for them.
    """
    for key, values in implemented.items():
        stated = section.get(key)
        # Of equal types: 1 is not true.
        if stated is not None and not any(type(stated) is type(value) and stated == value for value in values):
            raise InputError(
                f"{key} asks for a computation that is not the published one",
                where=f"{where}: {key}",
                expected=f"{' or '.join(map(repr, values))}, or no such key",
                got=f"{stated!r:.200}",
                fix="such a checkpoint is not supported; please report it",
            )


def check_token(checkpoint: Checkpoint, key: str, token_id: int, vocab_size: int) -> None:
    """InputError when a special token of config.json is outside the vocabulary."""
    if token_id >= vocab_size:
        raise InputError(
            "a special token is outside the vocabulary",
            where=f"{checkpoint.source}: config.json: {key}",
            expected=f"an id below {vocab_size}",
            got=str(token_id),
        )


def check_context(where: str, positions: int, largest: int = LARGEST_CONTEXT) -> None:
    """InputError when texts may be longer than `largest` tokens: masks and scores grow with the square."""
    if positions > largest:
        raise InputError(
            "the text context is too long",
            where=where,
            expected=f"at most {largest} positions",
            got=str(positions),
            fix="such a checkpoint is not supported; please report it",
        )


def check_heads(checkpoint: Checkpoint, name: str, width: int, heads: int) -> None:
    """InputError when the width is not a multiple of the number of heads."""
    if heads < 1 or width % heads:
        raise InputError(
            f"the {name} width is not a multiple of its heads",
            where=checkpoint.source,
            expected=f"a divisor of {width}",
            got=f"{heads} heads",
        )
