"""How a bundle cuts a picture: numbers for the terminal, JSON, and a drawing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import check_output
from vlm_export.cli.output import print_json, print_line, print_table
from vlm_export.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from vlm_export.runtime.slice_plan import SlicePlan
    from vlm_export.specs.slices import SliceSpec

PICTURE_SUFFIX = ".png"


def report_slices(picture: str, bundle: str, output: str | None, *, overwrite: bool, as_json: bool) -> None:
    """Print how a bundle cuts a picture, and draw it to `output`; no graph is run.

    Raises:
        UsageError: `output` is no .png, is the picture itself, or exists and may not be replaced.
        InputError: the bundle cuts no pictures, or the picture is unreadable.
        EnvironmentFailure: the drawing cannot be written.
    """
    from vlm_export.bundle.opened import open_bundle
    from vlm_export.runtime.image import open_image
    from vlm_export.runtime.slice_features import slice_spec_of
    from vlm_export.runtime.slice_plan import plan_slices

    if output is not None:
        _check_drawing(Path(output), Path(picture))
        check_output(Path(output), overwrite=overwrite)
    opened = open_bundle(Path(bundle))
    spec = slice_spec_of(opened)
    image = open_image(picture)
    plan = plan_slices(image.size, spec, name=picture)
    data = _data(picture, opened.manifest.name, plan, spec)
    if output is not None:
        _draw(image, plan, Path(output), overwrite)
        data["output"] = output
    if as_json:
        print_json(data)
    else:
        _print(data)


def _data(picture: str, model: str, plan: SlicePlan, spec: SliceSpec) -> dict[str, Any]:
    from vlm_export.runtime.slice_placeholder import placeholder_parts

    sizes, queries = plan.to_json(), spec.placeholder.queries
    return {
        "what": "slices",
        "image": picture,
        "model": model,
        **sizes,
        "tokens_per_slice": queries,
        "tokens": queries * len(plan.sizes),
        "placeholder": list(placeholder_parts(plan, spec.placeholder)),
        "query_token": spec.placeholder.query_token,
    }


def _print(data: Mapping[str, Any]) -> None:
    width, height = data["picture"]
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


def _check_drawing(output: Path, picture: Path) -> None:
    if output.suffix.lower() != PICTURE_SUFFIX:
        raise UsageError("the drawing is a .png", where=str(output), got=output.suffix or "no suffix")
    if output.exists() and picture.exists() and output.samefile(picture):
        raise UsageError("the drawing would replace the picture", where=str(output), fix="choose another name")


def _draw(image: Image.Image, plan: SlicePlan, output: Path, overwrite: bool) -> None:
    from vlm_export.bundle.staging import staged_file
    from vlm_export.runtime.slice_drawing import draw_plan

    drawing = draw_plan(image, plan)
    with staged_file(output, "writing the drawing", overwrite=overwrite) as staged:
        drawing.save(staged, "PNG")
