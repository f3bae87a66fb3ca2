"""Writes the tables of README and docs/ that follow from configs/ and from the command line; `--check` compares."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from doc_pages import read_pages, write_or_check

from vlm_export.bundle.loss import BUDGET_KEYS
from vlm_export.checkpoint.sources.known import KnownCheckpoint, known_names, load_known
from vlm_export.cli.inspect import checkpoint_from_config
from vlm_export.cli.main import build_parser
from vlm_export.cli.package import NAMES
from vlm_export.models.registry import load_family
from vlm_export.quantizing.budget import DEFAULT_BUDGETS, LOST

TABLE = re.compile(r"(<!-- table: ([a-z ]+) -->\n)(.*?)(<!-- /table -->\n)", re.DOTALL)
REFUSED = Path(__file__).parent.parent / "tests" / "layouts" / "refused.json"
EVERY_VERB = ("--help", "--json", "--quiet")
"""Options that all verbs have; docs/verbs.md says once what they do."""
_CHECKPOINTS = ("name", "checkpoint", "image encoder", "pixels", "parts", "published as", "sha256")


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks; returns 1 when the check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    args = parser.parse_args(arguments)
    return write_or_check(updated_pages(), check=args.check, script="doc_tables.py")


def updated_pages() -> dict[Path, str]:
    """The pages that have written tables, with these tables as they are now."""
    return {page: updated(text) for page, text in read_pages().items() if TABLE.search(text)}


def updated(page: str) -> str:
    """The page with its tables as they are now; KeyError where one has a name that stands for no table."""
    return TABLE.sub(lambda match: match[1] + table(match[2]) + match[4], page)


@cache
def table(name: str) -> str:
    """The table of that name, in Markdown: "checkpoints", "budgets", "consumers", "graph verbs", "graph options", or
    "options of VERB"."""
    if name == "checkpoints":
        return _table(_CHECKPOINTS, (_checkpoint_row(load_known(known)) for known in known_names()))
    if name == "budgets":
        defaults = [key for key in BUDGET_KEYS if key not in LOST]
        rows = ((f"`{word}`", *(f"{budget[key]:g}" for key in defaults)) for word, budget in DEFAULT_BUDGETS.items())
        return _table(("precision", *(f"`{key}`" for key in defaults)), rows)
    if name == "consumers":
        return _table(("model", "packaged for", "refused, with the reason"), _consumer_rows())
    graph = parsers_of(parsers_of(build_parser())["graph"])
    # `graph store` has no arguments of its own: its options are those of every verb that writes a model.
    shared = {name for action in graph["store"]._actions for name in action.option_strings}
    if name == "graph verbs":
        rows = ((f"`{_usage(verb, parser, shared)}`", _help_of(parser)) for verb, parser in graph.items())
        return _table(("verb and its own arguments", "what it does"), rows)
    if name == "graph options":
        return _table(("option", "meaning"), map(_option_row, _options(graph["store"], EVERY_VERB)))
    verbs = parsers_of(build_parser())
    return _table(
        ("argument", "meaning"), map(_option_row, _options(verbs[name.removeprefix("options of ")], EVERY_VERB))
    )


def _consumer_rows() -> Iterable[tuple[str, str, str]]:
    """What the tests of packages hold each tiny model to; sizes of tiny images are no reason for a published model."""
    refused: Mapping[str, Mapping[str, str]] = json.loads(REFUSED.read_text(encoding="utf-8"))
    for model, reasons in refused.items():
        own = {consumer: reason for consumer, reason in reasons.items() if consumer != "typesense"}
        by_reason = {reason: [name for name in own if own[name] == reason] for reason in own.values()}
        taken = [name for name in NAMES if name not in own and name != "typesense"]
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
        yield model, "all" if not own else ", ".join(taken), told or "–"


def parsers_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """A parser's verbs by name, in their order; none for a verb without verbs of its own."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (header, ["---"] * len(header), *rows))


def _options(parser: argparse.ArgumentParser, without: Iterable[str]) -> list[argparse.Action]:
    return [action for action in parser._actions if not set(action.option_strings) & set(without)]


def _option_row(action: argparse.Action) -> tuple[str, str]:
    names = action.option_strings or [""]
    shown = ", ".join(f"`{f'{name} {_values(action)}'.strip()}`" for name in names)
    return shown, _cell((action.help or "").replace("%(default)s", str(action.default)))


def _values(action: argparse.Action) -> str:
    """What stands behind an option's name; nothing for a flag."""
    if action.nargs == 0:
        return ""
    name = action.metavar if isinstance(action.metavar, str) else "|".join(map(str, action.choices or [action.dest]))
    several = {"+": f"{name}…", "?": f"[{name}]"}
    return several.get(str(action.nargs), name).replace("|", "\\|")


def _usage(verb: str, parser: argparse.ArgumentParser, shared: set[str]) -> str:
    """A graph verb with the arguments that only it has; those that may be left out stand in brackets."""
    words = [verb]
    own = [action for action in _options(parser, EVERY_VERB) if not set(action.option_strings) & shared]
    for action in sorted(own, key=lambda action: bool(action.option_strings)):
        word = " ".join([*action.option_strings[:1], _values(action)]).strip()
        words.append(word if action.required else f"[{word}]")
    return " ".join(words)


def _help_of(parser: argparse.ArgumentParser) -> str:
    """The line about a graph verb in the help of `graph`."""
    graph = parsers_of(build_parser())["graph"]
    (verbs,) = (action for action in graph._actions if isinstance(action, argparse._SubParsersAction))
    name = parser.prog.rpartition(" ")[2]
    return _cell(next(str(choice.help) for choice in verbs._choices_actions if choice.dest == name))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("%%", "%").split())


def _checkpoint_row(known: KnownCheckpoint) -> tuple[str, ...]:
    architecture, source = known.architecture, known.source
    vision = architecture.get("vision") or architecture["vision_cfg"]
    return (
        f"`{known.name}`",
        known.title.partition(" (")[0],
        _encoder(vision),
        str(vision.get("image_size") or architecture.get("image_size") or vision["grid"] * vision["patch_size"]),
        ", ".join(_parts(known)),
        f"Hub: {source.hub}" if source.hub else "download" if source.url else "part of this project",
        "pinned" if known.sha256 else "recorded",
    )


def _encoder(vision: Mapping[str, Any]) -> str:
    if name := vision.get("timm_model_name"):
        return f"{name} of timm"
    if "stages" in vision:
        return f"ModifiedResNet {'-'.join(map(str, vision['stages']))}, width {vision['width']}"
    return f"ViT, {vision['layers']} layers of {vision['width']}, patch {vision['patch_size']}"


def _parts(known: KnownCheckpoint) -> list[str]:
    """Names of the parts that an export would make."""
    family = load_family(known.family)
    return [part.name for part in family.describe(checkpoint_from_config(known)).parts]


if __name__ == "__main__":
    sys.exit(main())
