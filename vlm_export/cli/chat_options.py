"""Options of answers that only one kind of bundle has, and what is said when another kind is asked for them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_export.cli.common import positive_integer
from vlm_export.errors import UsageError

SAMPLING = ("seed", "temperature", "top_k", "top_p")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """--seed, --temperature, --top-k and --top-p, which need --sample."""
    parser.add_argument("--seed", type=int, metavar="N", help="of --sample: the same words each time")
    parser.add_argument("--temperature", type=float, metavar="T", help="of --sample, nanoVLM: below 1 is bolder")
    parser.add_argument("--top-k", type=int, metavar="N", help="of --sample, nanoVLM: draw from so many tokens; 0: all")
    parser.add_argument("--top-p", type=float, metavar="P", help="of --sample: draw from this total probability")


def add_new_tokens_option(parser: argparse.ArgumentParser) -> None:
    """--max-new-tokens."""
    parser.add_argument("--max-new-tokens", type=positive_integer, metavar="N", help="nanoVLM: tokens at most")


def is_chat_bundle(path: str) -> bool:
    """Whether a bundle is a decoder-only model, such as nanoVLM."""
    from vlm_export.bundle.opened import open_bundle
    from vlm_export.runtime.chat_inputs import is_chat

    return is_chat(open_bundle(Path(path)).manifest)


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
    """Keyword arguments of `VisionChat.answer` and the like."""
    return {name: getattr(args, name) for name in ("max_new_tokens", "sample", *SAMPLING)}


def option(name: str) -> str:
    """The option of an attribute."""
    return "--" + name.replace("_", "-")
