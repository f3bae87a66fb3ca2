"""Options of generated words: those of each task, and what is said when a bundle of another task gets them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from vlm_export.cli.common import positive_integer
from vlm_export.errors import UsageError

SAMPLING = ("seed", "temperature", "top_k", "top_p")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """--seed, --temperature, --top-k and --top-p, which need --sample."""
    parser.add_argument("--seed", type=int, metavar="N", help="of --sample: the same words each time")
    parser.add_argument("--temperature", type=float, metavar="T", help="of --sample, chat: below 1 is bolder")
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="of --sample, chat: draw from the N most probable tokens; 0: all"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="of --sample: draw from this total probability")


def add_new_tokens_option(parser: argparse.ArgumentParser) -> None:
    """--max-new-tokens."""
    parser.add_argument("--max-new-tokens", type=positive_integer, metavar="N", help="chat: tokens at most")


def check_sampling(args: argparse.Namespace) -> None:
    """UsageError when an option of --sample is given without it."""
    for name in SAMPLING:
        if getattr(args, name) is not None and not args.sample:
            raise UsageError(f"{option(name)} is for sampling", fix="add --sample")


def refuse_options(args: argparse.Namespace, names: Iterable[str], bundle: str, fix: str) -> None:
    """UsageError that names the first of these options that is given, for a bundle that has no use for it."""
    for name in names:
        # 0 equals False, and is a value.
        if getattr(args, name) is not None and getattr(args, name) is not False:
            raise UsageError(f"this bundle has no use for {option(name)}", where=bundle, got=option(name), fix=fix)


def chosen(args: argparse.Namespace) -> Mapping[str, Any]:
    """Keyword arguments of `ChatTask.answer` and the like."""
    return {name: getattr(args, name) for name in ("max_new_tokens", "sample", *SAMPLING)}


def option(name: str) -> str:
    """The option of an attribute."""
    return "--" + name.replace("_", "-")
