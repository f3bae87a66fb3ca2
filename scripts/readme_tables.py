"""Writes README's table of supported checkpoints from configs/; `--check` only says whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlm_export.checkpoint.known import KnownCheckpoint, known_names, load_known
from vlm_export.cli.inspect_known import checkpoint_from_config
from vlm_export.models.registry import load_family

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- checkpoints: written by scripts/readme_tables.py -->", "<!-- /checkpoints -->"
HEADER = ("name", "checkpoint", "picture encoder", "pixels", "graphs", "published as", "sha256")


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks; returns 1 when the check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if args.check and old != new:
        print("README.md is not up to date: python scripts/readme_tables.py", file=sys.stderr)
        return 1
    if not args.check:
        README.write_text(new, encoding="utf-8")
    return 0


def updated(readme: str) -> str:
    """The README with the present table between its markers; ValueError when a marker is missing."""
    before, found, rest = readme.partition(BEGIN + "\n")
    _, closed, after = rest.partition(END + "\n")
    if not found or not closed:
        raise ValueError(f"README.md lacks the markers {BEGIN!r} and {END!r}")
    return before + found + table() + closed + after


def table() -> str:
    """One row for each config, sorted by name."""
    rows = [_row(load_known(name)) for name in known_names()]
    rule = ["---"] * len(HEADER)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (HEADER, rule, *rows))


def _row(known: KnownCheckpoint) -> tuple[str, ...]:
    architecture = known.architecture
    vision, source = architecture["vision"], known.source
    if "stages" in vision:
        encoder = f"ModifiedResNet {'-'.join(map(str, vision['stages']))}, width {vision['width']}"
    else:
        encoder = f"ViT, {vision['layers']} layers of {vision['width']}, patch {vision['patch_size']}"
    return (
        f"`{known.name}`",
        known.title.partition(" (")[0],
        encoder,
        str(vision.get("image_size") or architecture.get("image_size") or vision["grid"] * vision["patch_size"]),
        ", ".join(_parts(known)),
        f"Hub: {source.hub}" if source.hub else "download" if source.url else "part of this project",
        "pinned" if known.sha256 else "recorded",
    )


def _parts(known: KnownCheckpoint) -> list[str]:
    """Names of the graphs that an export would make."""
    family = load_family(known.family)
    return [part.name for part in family.describe(checkpoint_from_config(known)).parts]


if __name__ == "__main__":
    sys.exit(main())
