"""How a bundle cuts an image into slices or tiles: numbers for the terminal, JSON, and a drawing of slices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import check_output
from vlm_export.cli.output import print_json, print_line, print_table
from vlm_export.errors import InputError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from vlm_export.runtime.inputs.slice_plan import SlicePlan
    from vlm_export.runtime.model import Model
    from vlm_export.specs import SliceSpec, TileSpec

IMAGE_SUFFIX = ".png"


def report_cutting(image: str, bundle: str, output: str | None, *, overwrite: bool, as_json: bool) -> None:
    """Prints how a bundle cuts an image, and draws slices to `output`; no graph is run.

    Raises:
        UsageError: `output` is no .png, is the image itself, exists and may not be replaced, or tiles are to be drawn.
        InputError: the bundle cuts no images, or the image is unreadable.
        EnvironmentFailure: the drawing cannot be written.
    """
    from vlm_export.runtime.load import load
    from vlm_export.specs import SliceSpec, TileSpec

    model = load(bundle)
    spec = model.manifest.image
    if isinstance(spec, SliceSpec):
        _report_slices(image, model.manifest.name, spec, output, overwrite=overwrite, as_json=as_json)
    elif isinstance(spec, TileSpec):
        if output is not None or overwrite:
            raise UsageError("tiles are not drawn", where=output or "", fix="leave out -o and --overwrite")
        data = _tiles(image, model, spec)
        print_json(data) if as_json else _print_tiles(data)
    else:
        raise InputError(
            "this bundle cuts no images",
            where=model.manifest.name,
            expected="a bundle that cuts images into slices or tiles",
            got="one that takes whole images" if spec is not None else "one that takes no images",
        )


def _report_slices(
    source: str, model: str, spec: SliceSpec, output: str | None, *, overwrite: bool, as_json: bool
) -> None:
    from vlm_export.runtime.inputs.images import open_image
    from vlm_export.runtime.inputs.slice_plan import plan_slices

    if output is not None:
        _check_drawing(Path(output), Path(source))
        check_output(Path(output), overwrite=overwrite)
    image = open_image(source)
    plan = plan_slices(image.size, spec, name=source)
    data = _data(source, model, plan, spec)
    if output is not None:
        _draw(image, plan, Path(output), overwrite)
        data["output"] = output
    print_json(data) if as_json else _print(data)


def _tiles(image: str, model: Model, spec: TileSpec) -> dict[str, Any]:
    from vlm_export.runtime.inputs.images import open_image
    from vlm_export.runtime.inputs.tiles import plan_tiles

    chat = model.chatting
    plan = plan_tiles(open_image(image).size, spec, name=image)
    writer, asked = chat.rows.writer, chat.spec
    text, tiles = writer.text("", [plan.grid]), writer.tiles(plan.grid)
    placeholder = text.removeprefix(asked.prompt.before).removesuffix(asked.prompt.after)
    features = (asked.image_token or "") * asked.tokens_per_tile
    return {
        "what": "tiles",
        "image": image,
        "model": model.manifest.name,
        **plan.to_json(),
        "tile": spec.tile_size_pixels,
        "tiles": tiles,
        "tokens_per_tile": asked.tokens_per_tile,
        "tokens": len(model.session.tokenizer.prompt_ids(placeholder)),
        "placeholder": placeholder.replace(features, f"[{asked.tokens_per_tile}]"),
    }


def _data(image: str, model: str, plan: SlicePlan, spec: SliceSpec) -> dict[str, Any]:
    from vlm_export.runtime.inputs.slice_placeholder import placeholder_parts

    sizes, queries = plan.to_json(), spec.placeholder.queries
    return {
        "what": "slices",
        "image": image,
        "model": model,
        **sizes,
        "tokens_per_slice": queries,
        "tokens": queries * len(plan.sizes),
        "placeholder": list(placeholder_parts(plan, spec.placeholder)),
        "query_token": spec.placeholder.query_token,
    }


def _print(data: Mapping[str, Any]) -> None:
    width, height = data["size"]
    grid, slices = data["grid"], data["slices"]
    cut = "not cut" if grid is None else f"and {grid['columns']} x {grid['rows']} slices of it"
    print_line(f"{data['image']}: {width} x {height} pixels, seen whole, {cut}")
    rows = []
    for number, entry in enumerate(slices):
        (wide, high), (patch_rows, patch_columns) = entry["size"], entry["patches"]
        place = "whole" if grid is None or number == 0 else _place(number - 1, grid["columns"])
        patches = f"{patch_columns} x {patch_rows} = {patch_columns * patch_rows}"
        rows.append((str(number), place, f"{wide} x {high}", patches))
    print_table(("slice", "place", "pixels", "patches"), rows)
    per_slice = data["tokens_per_slice"]
    print_line(f"tokens for the language model: {len(slices)} x {per_slice} = {data['tokens']}")
    text = "".join(part if isinstance(part, str) else f"[{part}]" for part in data["placeholder"])
    print_line(f"in the prompt, [N] for the {per_slice} features of slice N: {text}")
    if "output" in data:
        print_line(f"drawing: {data['output']}")


def _place(index: int, columns: int) -> str:
    return f"row {index // columns + 1}, column {index % columns + 1}"


def _check_drawing(output: Path, image: Path) -> None:
    if output.suffix.lower() != IMAGE_SUFFIX:
        raise UsageError("the drawing is a .png", where=str(output), got=output.suffix or "no suffix")
    if output.exists() and image.exists() and output.samefile(image):
        raise UsageError("the drawing would replace the image", where=str(output), fix="choose another name")


def _draw(image: Image.Image, plan: SlicePlan, output: Path, overwrite: bool) -> None:
    from vlm_export.bundle.staging import staged_file
    from vlm_export.runtime.tasks.slice_drawing import draw_plan

    drawing = draw_plan(image, plan)
    with staged_file(output, "writing the drawing", overwrite=overwrite) as staged:
        drawing.save(staged, "PNG")


def _print_tiles(data: Mapping[str, Any]) -> None:
    (width, height), (wide, high), grid = data["size"], data["resized"], data["grid"]
    print_line(f"{data['image']}: {width} x {height} pixels, resized to {wide} x {high}")
    whole = data["tiles"] - grid["rows"] * grid["columns"]
    seen = "and the whole image as one more" if whole else "no other"
    print_line(f"tiles of {data['tile']} pixels: {grid['columns']} x {grid['rows']}, {seen}")
    print_line(f"tokens for the language model: {data['tokens']}, {data['tokens_per_tile']} features for each tile")
    print_line(f"in the prompt, [N] for N features: {data['placeholder']}")
