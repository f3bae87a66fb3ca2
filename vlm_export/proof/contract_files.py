"""The bundle's side files against its manifest and graphs, and against what was proved: without torch.

Other consumers read `preprocessor_config.json`, `config.json` and the tokenizer's files. The runtime reads the
manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vlm_export.bundle.layout import CONFIG_NAME, PREPROCESSOR_NAME, preprocessor_config
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.strict_json import MAX_JSON_BYTES, json_object_from_bytes
from vlm_export.errors import InputError
from vlm_export.specs import ImageSpec, PatchSpec

Result = tuple[str, int, list[str]]
"""A file's name, how many of its fields were compared, and what is wrong."""

SEALED = "files proved"
# Field of a section of config.json → the field of the same section of the manifest's architecture.
_SIZES = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
_SIZES |= {"intermediate_size": "hidden", "patch_size": "patch_size"}
_ABSENT = "no such field"
_EMBEDDINGS = ("image_embeds", "text_embeds")


def check_preprocessor(bundle: OpenBundle) -> Result | None:
    """`preprocessor_config.json` against the manifest's image; None where the bundle has neither."""
    spec, listed = bundle.manifest.image, PREPROCESSOR_NAME in bundle.manifest.files
    if not isinstance(spec, ImageSpec | PatchSpec) and not listed:
        return None
    if not isinstance(spec, ImageSpec | PatchSpec) or not listed:
        return PREPROCESSOR_NAME, 0, ["the manifest's image and this file: one of the two is missing"]
    expected, got = preprocessor_config(spec), _read(bundle, PREPROCESSOR_NAME)
    return PREPROCESSOR_NAME, len(expected), list(map(str, differences(expected, got)))


def check_config(bundle: OpenBundle) -> Result | None:
    """Sizes that `config.json` states against the graphs and the manifest; None where the bundle has none."""
    if CONFIG_NAME not in bundle.manifest.files:
        return None
    try:
        config = _read(bundle, CONFIG_NAME)
    except InputError as error:
        return CONFIG_NAME, 0, [f"it cannot be read: {error.what}: {error.got}"]
    compared, failures = config_failures(bundle, config)
    return CONFIG_NAME, compared, failures


def config_failures(bundle: OpenBundle, config: Mapping[str, Any]) -> tuple[int, list[str]]:
    """How many sizes of a config the graphs and the manifest tell too, and those that differ."""
    stated = [(name, config, key, expected) for name, key, expected in _top_sizes(bundle, config)]
    for section in ("vision", "text"):
        # A config of one tower alone has no sections.
        is_alone = str(config.get("model_type")).endswith(f"_{section}_model")
        inner, place = (config, "") if is_alone else (config.get(f"{section}_config"), f"{section}_config.")
        if isinstance(inner, Mapping):
            stated += [(f"{place}{key}", inner, key, size) for key, size in _section_sizes(bundle, section)]
    compared = [(name, data[key], expected) for name, data, key, expected in stated if key in data]
    return len(compared), [
        f"{name}: expected {expected!r}, as the graphs have it, got {value!r:.80}"
        for name, value, expected in compared
        if value != expected
    ]


def check_sealed(bundle: OpenBundle, files: Mapping[str, str]) -> Result:
    """The side files against the digests of those that were proved."""
    listed = {name: record.sha256 for name, record in bundle.manifest.files.items()}
    failures = [
        f"{name} is not the file that was proved with the original: expected sha256 {sha256[:12]}…, "
        f"got {listed[name][:12] + '…' if name in listed else 'no such file'}"
        for name, sha256 in files.items()
        if listed.get(name) != sha256
    ]
    return failures[0].partition(" ")[0] if failures else SEALED, len(files), failures


class Difference(NamedTuple):
    """A field of JSON data that differs, what it should be and what it is."""

    field: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, got {self.got}"


def differences(expected: Any, got: Any, field: str = "") -> Iterator[Difference]:
    """Every field of JSON data that differs; keys below objects are joined by dots."""
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        for key in dict.fromkeys([*expected, *got]):
            path = f"{field}.{key if key.isidentifier() else repr(key)}".lstrip(".")
            if key in got and key in expected:
                yield from differences(expected[key], got[key], path)
            else:
                yield Difference(
                    path, *(_short(data[key]) if key in data else "no such field" for data in (expected, got))
                )
    # To Python, true is 1.
    elif json.loads(json.dumps(expected)) != got or isinstance(expected, bool) is not isinstance(got, bool):
        yield Difference(field, _short(expected), _short(got))


def _top_sizes(bundle: OpenBundle, config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Field, its key and its right value, from the graphs: the width of embeddings."""
    outputs = [output for part in bundle.manifest.parts for output in part.signature.outputs]
    widths = {output.shape[-1] for output in outputs if output.name in _EMBEDDINGS}
    # BLIP's config has both, and its model reads the second.
    key = "image_text_hidden_size" if "image_text_hidden_size" in config else "projection_dim"
    if len(widths) == 1 and isinstance(width := widths.pop(), int):
        yield key, key, width


def _section_sizes(bundle: OpenBundle, section: str) -> Iterator[tuple[str, Any]]:
    manifest = bundle.manifest
    sizes = manifest.architecture.get(section)
    # A ModifiedResNet has stages, which no config of transformers states.
    if isinstance(sizes, Mapping) and "stages" not in sizes:
        yield from ((key, sizes[name]) for key, name in _SIZES.items() if isinstance(sizes.get(name), int))
    if section == "text" and manifest.text is not None:
        yield "vocab_size", manifest.text.vocab_size
    if section == "vision" and isinstance(manifest.image, ImageSpec):
        yield "image_size", manifest.image.size_pixels


def _read(bundle: OpenBundle, name: str) -> dict[str, Any]:
    with bundle.file(name).open("rb") as file:
        return json_object_from_bytes(file.read(MAX_JSON_BYTES + 1), name)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 200 else text[:200] + "…"
