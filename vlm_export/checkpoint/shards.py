"""Which shards of an index are read: a family may need only some of a checkpoint's modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

ReadPrefixes = Callable[[Collection[str]], tuple[str, ...]]
"""Keys of an index → the prefixes of those that are read; () when all are."""


def everything(keys: Collection[str]) -> tuple[str, ...]:
    """A ReadPrefixes: all keys are read."""
    return ()


def select_shards(shards: Mapping[str, str], reads: ReadPrefixes) -> tuple[dict[str, str], tuple[str, ...]]:
    """The entries of key → shard whose shard holds a key that is read, and the names of the other shards.

    A shard that is read keeps all its keys: its file is opened, and the index must agree with it.
    """
    prefixes = reads(shards)
    if not prefixes:
        return dict(shards), ()
    needed = {name for key, name in shards.items() if key.startswith(prefixes)}
    left_aside = sorted(set(shards.values()) - needed)
    return {key: name for key, name in shards.items() if name in needed}, tuple(left_aside)
