"""How a bundle of nanoVLM cuts a picture into tiles, and what that is in the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_export.cli.output import print_json, print_line
from vlm_export.errors import InputError, UsageError


def report_tiles(picture: str, bundle: str, output: str | None, *, overwrite: bool, as_json: bool) -> None:
    """Print how a bundle cuts a picture; no graph is run.

    Raises:
        UsageError: an output: tiles are not drawn.
        InputError: the bundle cuts no pictures, or the picture is unreadable.
    """
    from vlm_export.bundle.opened import open_bundle
    from vlm_export.runtime.chat_inputs import ChatInputs
    from vlm_export.runtime.image import open_image
    from vlm_export.runtime.tiling import plan_tiles
    from vlm_export.specs import TileSpec

    if output is not None or overwrite:
        raise UsageError("tiles are not drawn", where=output or "", fix="leave out -o and --overwrite")
    model = ChatInputs(open_bundle(Path(bundle)))
    chat = model.chat
    tiles_spec = model.manifest.image
    if not isinstance(tiles_spec, TileSpec):
        raise InputError(
            "this bundle cuts no pictures: it makes each one a square",
            where=model.manifest.name,
            expected="a bundle whose settings name tiles",
            got=f"the layout {chat.layout!r}",
        )
    plan = plan_tiles(open_image(picture).size, tiles_spec, name=picture)
    text, tiles = model.writer.text("", [plan.grid]), model.writer.tiles(plan.grid)
    placeholder = text.removeprefix(chat.prompt.before).removesuffix(chat.prompt.after)
    features = (chat.image_token or "") * chat.tokens_per_tile
    data = {
        "what": "tiles",
        "image": picture,
        "model": model.manifest.name,
        **plan.to_json(),
        "tile": tiles_spec.tile_size_pixels,
        "tiles": tiles,
        "tokens_per_tile": chat.tokens_per_tile,
        "tokens": len(model.tokenizer.prompt_ids(placeholder)),
        "placeholder": placeholder.replace(features, f"[{chat.tokens_per_tile}]"),
    }
    print_json(data) if as_json else _print(data)


def _print(data: Mapping[str, Any]) -> None:
    (width, height), (wide, high), grid = data["picture"], data["resized"], data["grid"]
    print_line(f"{data['image']}: {width} x {height} pixels, resized to {wide} x {high}")
    whole = data["tiles"] - grid["rows"] * grid["columns"]
    seen = "and the whole picture as one more" if whole else "no other"
    print_line(f"tiles of {data['tile']} pixels: {grid['columns']} x {grid['rows']}, {seen}")
    print_line(f"tokens for the language model: {data['tokens']}, {data['tokens_per_tile']} features for each tile")
    print_line(f"in the prompt, [N] for N features: {data['placeholder']}")
