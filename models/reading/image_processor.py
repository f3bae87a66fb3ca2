"""How a Hugging Face checkpoint has images prepared: its processor files, read as transformers reads them.

Facts of transformers 5.23. Which file counts: `get_image_processor_dict`, image_processing_base.py. Which class:
`AutoImageProcessor.from_pretrained`, models/auto/image_processing_auto.py. What a class assumes:
models/*/image_processing_pil_*.py. Forms of sizes: `get_size_dict`, image_processing_utils.py. What the steps do:
`PilBackend`, image_processing_backends.py. A field that is null is not a missing one: it takes the default away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from vlm_export.bundle.strict_json import MAX_JSON_BYTES, json_object_from_bytes
from vlm_export.errors import InputError, UsageError
from vlm_export.family import Checkpoint
from vlm_export.models.reading.shapes import is_number
from vlm_export.specs import AnyImageSpec, ImageSpec, Origins, PatchSpec, Resample, Resize
from vlm_export.specs.patches import MAX_PATCHES

PROCESSOR_FILE = "processor_config.json"
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
IMAGE_SIZE_OPTION = "--image-size"
MAX_EDGE_PIXELS = 8192
Channels: TypeAlias = tuple[float, float, float]
Prepared: TypeAlias = tuple[ImageSpec, Origins]

_SECTION = "image_processor"
# What a model is trained with; the rest follows from the size that it takes.
_PREPARATION = ("image.resize", "image.resample", "image.mean", "image.std")
_TRANSFORMERS = "transformers 5"
# By Pillow's numbers.
_RESAMPLE: tuple[Resample, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# Means and deviations of values in [0, 1] are about 1; far from it, float32 overflows.
_LARGEST_CHANNEL = 1e6
_OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
_CROPPED = {
    **_STEPS,
    **_OPENAI,
    "resample": 3,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
}
_SQUARE_224 = {"height": 224, "width": 224}
# The one class that makes patches, for models that take these.
_PATCHES = "Siglip2ImageProcessor"
# The classes that add nothing to `PilBackend` but these defaults, and the one above.
CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "CLIPImageProcessor": _CROPPED,
    "ChineseCLIPImageProcessor": _CROPPED,
    "BitImageProcessor": _CROPPED,
    "BlipImageProcessor": {
        **_STEPS,
        **_OPENAI,
        "resample": 3,
        "size": {"height": 384, "width": 384},
        "default_to_square": True,
        "do_convert_rgb": True,
    },
    "SiglipImageProcessor": {
        **_STEPS,
        **_HALVES,
        "resample": 3,
        "size": _SQUARE_224,
        "default_to_square": False,
        "do_convert_rgb": True,
    },
    _PATCHES: {**_STEPS, **_HALVES, "resample": 2, "patch_size": 16, "max_num_patches": 256},
    "ViTImageProcessor": {**_STEPS, **_HALVES, "resample": 2, "size": _SQUARE_224},
    "DeiTImageProcessor": {
        **_STEPS,
        **_HALVES,
        "resample": 3,
        "size": {"height": 256, "width": 256},
        "crop_size": _SQUARE_224,
        "do_center_crop": True,
    },
    "PvtImageProcessor": {
        **_STEPS,
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "size": _SQUARE_224,
        "default_to_square": True,
    },
}


@dataclass(frozen=True)
class _Stated:
    """What a processor file says, with the defaults of its class.

    Attributes:
        data: the fields of the file.
        where: how errors and origins begin: "processor_config.json: image_processor."; "" without a file.
        kind: the class, without its back end's suffix.
    """

    data: Mapping[str, Any]
    where: str
    kind: str

    def value(self, key: str) -> Any:
        """The field, null where it is null; else the class's default, None where it has none."""
        return self.data[key] if key in self.data else CLASS_DEFAULTS[self.kind].get(key)

    def origin(self, key: str) -> str:
        return f"{self.where}{key}" if key in self.data else f"default of {self.kind}"

    def refusal(self, key: str, what: str, expected: str, fix: str) -> InputError:
        return InputError(what, where=self.origin(key), expected=expected, got=f"{self.value(key)!r:.200}", fix=fix)

    def malformed(self, key: str, expected: str) -> InputError:
        return self.refusal(
            key,
            f"{key} of the image processor is malformed",
            expected,
            "correct the file, or get the checkpoint again from its publisher",
        )

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise self.malformed(key, "true, false or null")
        return bool(value)


@dataclass(frozen=True)
class Size:
    """A stated size: the shortest edge, or height and width."""

    resize: Resize
    edges: tuple[int, ...] = field(default=())

    def __str__(self) -> str:
        return " x ".join(map(str, self.edges)) + (" (shortest edge)" if self.resize == "shortest_edge" else "")


def transformers_image(checkpoint: Checkpoint, family_class: str, image_size: int, size_origin: str) -> Prepared:
    """The ImageSpec of a checkpoint in transformers' layout, and where each value comes from.

    Args:
        family_class: the class that transformers takes for models of this family.
        image_size: edge of the square that the checkpoint's image encoder takes.
        size_origin: what states it, for errors and for the case that no processor file does.

    Raises:
        InputError: a file is malformed, names a class or a step that is not computed here, or prepares images of
            another size than the encoder takes.
    """
    stated, ignored = _read(checkpoint, family_class)
    if stated is None:
        return _defaults(family_class, image_size, size_origin, ignored)
    if stated.data.get("use_square_size"):
        raise _unsupported(stated, "use_square_size", "no use_square_size")
    if stated.flag("do_pad"):
        raise _unsupported(stated, "do_pad", "false")
    size, crop = _resize(stated), _crop(stated)
    _check_size(stated, size, crop, image_size, size_origin)
    factor = _rescale_factor(stated)
    mean, std = _normalisation(stated)
    converts = stated.flag("do_convert_rgb")
    spec = ImageSpec(
        size_pixels=image_size,
        resample=_resample(stated) if size.resize != "none" else "bicubic",
        rgb_stage="before_resize" if converts else "never",
        mean=mean,
        std=std,
        resize=size.resize,
        resize_pixels=size.edges,
        crop="none" if crop is None else "down",
        transparency="white",
        rescale_factor=factor,
    )
    return spec, Origins(_origins(stated, size_origin), ignored)


def transformers_patches(checkpoint: Checkpoint, patch_size: int) -> tuple[PatchSpec, Origins]:
    """The PatchSpec of a checkpoint in transformers' layout, and where each value comes from.

    Raises:
        InputError: a file is malformed, names a class or a step that is not computed here, or makes other patches than
            the encoder takes.
    """
    read, ignored = _read(checkpoint, _PATCHES)
    stated = read or _Stated({}, "", _PATCHES)
    if not stated.flag("do_resize"):
        raise _unsupported(stated, "do_resize", "true")
    for key in ("patch_size", "max_num_patches"):
        value = stated.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_PATCHES:
            raise stated.malformed(key, f"a number from 1 to {MAX_PATCHES}")
    if stated.value("patch_size") != patch_size:
        raise stated.refusal(
            "patch_size",
            "the image processor makes patches of another size than the image encoder takes",
            str(patch_size),
            "take the processor file that was saved with these weights",
        )
    mean, std = _normalisation(stated)
    spec = PatchSpec(
        patch_size=patch_size,
        max_patches=stated.value("max_num_patches"),
        resample=_resample(stated),
        rgb_stage="before_resize" if stated.flag("do_convert_rgb") else "never",
        mean=mean,
        std=std,
        rescale_factor=_rescale_factor(stated),
    )
    keys = {"max_patches": "max_num_patches", "rgb_stage": "do_convert_rgb", "mean": "image_mean", "std": "image_std"}
    return spec, Origins({f"image.{name}": stated.origin(keys.get(name, name)) for name in spec.to_json()}, ignored)


def assumed_preparation(checkpoint: Checkpoint, origins: Origins) -> tuple[str, ...]:
    """A warning where a class's defaults stand for a processor file that is not there; none for another library's.

    Weights that nobody trained, and names of which no file is here, are prepared anyhow.
    """
    kinds = {f"default of {kind}": kind for kind in CLASS_DEFAULTS}
    found = {origin for field in _PREPARATION if (origin := origins.values.get(field)) is not None}
    if checkpoint.format == "random" or not found or not found <= kinds.keys():
        return ()
    return (
        f"no file says how images are prepared: the defaults of {', '.join(sorted(kinds[origin] for origin in found))} "
        "are taken; a model that was trained with another preparation gets wrong embeddings from them, and "
        f"verification cannot see it. Put its {IMAGE_PROCESSOR_FILE} or {PROCESSOR_FILE} beside the weights",
    )


def with_image_size(spec: ImageSpec, image_size: int) -> ImageSpec:
    """The spec for an encoder that takes another size.

    Raises:
        UsageError: the images are not resized to the encoder's size, so that nothing says what to resize them to.
    """
    if image_size == spec.size_pixels:
        return spec
    if spec.resize == "none" or any(edge != spec.size_pixels for edge in spec.resize_pixels):
        raise UsageError(
            "another image size is not defined by how this checkpoint prepares images",
            where=IMAGE_SIZE_OPTION,
            expected="a checkpoint whose images are resized to the size that the image encoder takes",
            got=f"resize {spec.resize} {', '.join(map(str, spec.resize_pixels))}, encoder {spec.size_pixels}",
            fix="leave the option out",
        )
    return replace(spec, size_pixels=image_size, resize_pixels=(image_size,) * len(spec.resize_pixels))


def _read(checkpoint: Checkpoint, family_class: str) -> tuple[_Stated | None, dict[str, str]]:
    """What the file that counts says, None without any; and the files that do not count, with the reason."""
    files, ignored = checkpoint.side_files, {}
    found: tuple[str, Mapping[str, Any]] | None = None
    if PROCESSOR_FILE in files:
        whole = read_json_object(files[PROCESSOR_FILE])
        if _SECTION in whole:
            section = whole[_SECTION]
            if not isinstance(section, Mapping):
                raise _malformed_file(files[PROCESSOR_FILE], f"{_SECTION}: an object", f"{section!r:.200}")
            found = f"{PROCESSOR_FILE}: {_SECTION}.", section
    if IMAGE_PROCESSOR_FILE in files:
        if found is None:
            found = f"{IMAGE_PROCESSOR_FILE}: ", read_json_object(files[IMAGE_PROCESSOR_FILE])
        else:
            ignored[IMAGE_PROCESSOR_FILE] = f"{PROCESSOR_FILE} has an {_SECTION}, which transformers reads instead"
    if found is None:
        return None, ignored
    where, stated = found
    return _Stated(stated, where, _class_name(where, stated, checkpoint, family_class)), ignored


def _class_name(where: str, data: Mapping[str, Any], checkpoint: Checkpoint, family_class: str) -> str:
    key, stated = "image_processor_type", data.get("image_processor_type")
    if stated is None:
        key, stated = "feature_extractor_type", data.get("feature_extractor_type")
    if stated is None:
        config = checkpoint.config or {}
        where, key, stated = "config.json: ", "image_processor_type", config.get("image_processor_type")
    if stated is None:
        return family_class
    # The class of a file that transformers wrote before version 4.25, and the suffixes of the back ends.
    name = stated.replace("FeatureExtractor", "ImageProcessor") if isinstance(stated, str) else ""
    name = name.removesuffix("Fast").removesuffix("Pil")
    usable = [kind for kind in CLASS_DEFAULTS if (kind == _PATCHES) == (family_class == _PATCHES)]
    if name not in usable:
        raise InputError(
            "what this class of image processors does is not computed here",
            where=f"{where}{key}",
            expected=f"one of {', '.join(usable)}",
            got=f"{stated!r:.200}",
            fix="take the processor file that was saved with the model; or, where one of these classes prepares images "
            "alike, state it instead",
        )
    return name


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a side file; InputError that names the file when it cannot be read or holds anything else."""
    try:
        with path.open("rb") as file:
            return json_object_from_bytes(file.read(MAX_JSON_BYTES + 1), str(path))
    except InputError as error:
        raise _malformed_file(path, "a JSON object", ": ".join(filter(None, (error.what, error.got)))) from error
    except OSError as error:
        raise InputError("a file of the checkpoint cannot be read", where=str(path), got=str(error)) from error


def _malformed_file(path: Path, expected: str, got: str) -> InputError:
    return InputError(f"{path.name} is malformed", where=str(path), expected=expected, got=got)


def _unsupported(stated: _Stated, key: str, expected: str) -> InputError:
    return stated.refusal(
        key,
        f"the image processor's {key} asks for a step that is not computed here",
        expected,
        "prepare images in your own code, and export a copy of the checkpoint whose file states what is left to do",
    )


def _undefined(stated: _Stated, key: str, step: str) -> InputError:
    return stated.refusal(
        key,
        f"the image processor's {key} is null, and {step} is on: transformers refuses it too",
        "a value",
        f"correct the file: state {key}, or {step} false",
    )


def _resize(stated: _Stated) -> Size:
    if not stated.flag("do_resize"):
        return Size("none")
    if stated.value("size") is None:
        raise _undefined(stated, "size", "do_resize")
    return _size(stated, "size", square=bool(stated.value("default_to_square") in (None, True)))


def _crop(stated: _Stated) -> tuple[int, int] | None:
    """Height and width of the centre crop; None where nothing is cropped."""
    if not stated.flag("do_center_crop"):
        return None
    if stated.value("crop_size") is None:
        raise _undefined(stated, "crop_size", "do_center_crop")
    size = _size(stated, "crop_size", square=True)
    if size.resize != "stretch":
        raise stated.malformed("crop_size", "a number, two, or height and width")
    return size.edges[0], size.edges[1]


def _size(stated: _Stated, key: str, *, square: bool) -> Size:
    """Every form of `get_size_dict` that this project computes."""
    value = stated.value(key)
    if isinstance(value, Mapping):
        keys = set(value)
        if keys == {"shortest_edge"} or (keys == {"shortest_edge", "longest_edge"} and value["longest_edge"] is None):
            return Size("shortest_edge", (_edge(stated, key, value["shortest_edge"]),))
        if keys == {"height", "width"}:
            return Size("stretch", (_edge(stated, key, value["height"]), _edge(stated, key, value["width"])))
        raise _unsupported(stated, key, "shortest_edge, or height and width")
    if isinstance(value, list) and len(value) == 2:
        return Size("stretch", (_edge(stated, key, value[0]), _edge(stated, key, value[1])))
    edge = _edge(stated, key, value)
    return Size("stretch", (edge, edge)) if square else Size("shortest_edge", (edge,))


def _edge(stated: _Stated, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_EDGE_PIXELS:
        raise stated.malformed(key, f"edges of 1 to {MAX_EDGE_PIXELS} pixels")
    return value


def _check_size(stated: _Stated, size: Size, crop: tuple[int, int] | None, image_size: int, size_origin: str) -> None:
    """That images come out in the size that the encoder takes; without resize and crop, each image must have it."""
    if size.resize == "shortest_edge" and crop is None:
        raise InputError(
            "the image processor keeps the shape of an image and cuts nothing off, and the image encoder takes squares",
            where=stated.origin("size"),
            expected="height and width, or do_center_crop",
            got=f"{stated.value('size')!r:.200}",
            fix=f"state what the model was trained with in the file: size as height and width of {image_size}, or "
            f"do_center_crop with a crop_size of {image_size}",
        )
    key, made = ("size", size.edges) if crop is None else ("crop_size", crop)
    if any(edge != image_size for edge in made):
        raise InputError(
            "the image processor and the image encoder are of different sizes",
            where=stated.origin(key),
            expected=f"{image_size}, as {size_origin} says",
            got=" x ".join(map(str, made)),
            fix="these files belong to different models, or one of them was changed: correct the wrong one",
        )


def _resample(stated: _Stated) -> Resample:
    value = stated.value("resample")
    if value is None:
        raise _undefined(stated, "resample", "do_resize")
    if value == "bilinear":
        return "bilinear"
    if isinstance(value, str):
        # `PilBackend.resize` takes every name for bilinear, `TorchvisionBackend.resize` takes it for what it says.
        raise stated.refusal(
            "resample",
            "a filter is stated by its name: transformers' Pillow back end takes every name for bilinear, its "
            "torchvision back end does not",
            "Pillow's number of the filter: " + ", ".join(f"{i} {name}" for i, name in enumerate(_RESAMPLE)),
            "write the number of the filter that the model was trained with into the file",
        )
    if type(value) is not int or not 0 <= value < len(_RESAMPLE):
        raise stated.malformed("resample", f"one of Pillow's filters, 0 to {len(_RESAMPLE) - 1}")
    return _RESAMPLE[value]


def _rescale_factor(stated: _Stated) -> float:
    if not stated.flag("do_rescale"):
        return 1.0
    value = stated.value("rescale_factor")
    if value is None:
        raise _undefined(stated, "rescale_factor", "do_rescale")
    if not is_number(value) or not 1 / _LARGEST_CHANNEL <= value <= _LARGEST_CHANNEL:
        raise stated.malformed("rescale_factor", f"a number from {1 / _LARGEST_CHANNEL:g} to {_LARGEST_CHANNEL:g}")
    return float(value)


def _normalisation(stated: _Stated) -> tuple[Channels, Channels]:
    """Mean and deviation."""
    mean, std = _channels(stated, "image_mean", (0.0, 0.0, 0.0)), _channels(stated, "image_std", (1.0, 1.0, 1.0))
    if min(std) < 1 / _LARGEST_CHANNEL:
        raise stated.malformed("image_std", "positive numbers")
    return mean, std


def _channels(stated: _Stated, key: str, identity: Channels) -> Channels:
    """Three numbers, or one for all channels; `identity` where nothing is normalised."""
    if not stated.flag("do_normalize"):
        return identity
    value = stated.value(key)
    if value is None:
        raise _undefined(stated, key, "do_normalize")
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or not all(is_number(item) and abs(item) <= _LARGEST_CHANNEL for item in values):
        raise stated.malformed(key, f"three numbers of at most {_LARGEST_CHANNEL:g}, or one")
    red, green, blue = map(float, values)
    return red, green, blue


def _origins(stated: _Stated, size_origin: str) -> dict[str, str]:
    def by(step: str, key: str) -> str:
        return stated.origin(key if stated.flag(step) else step)

    return {
        "image.size_pixels": size_origin,
        "image.resample": by("do_resize", "resample"),
        "image.rgb_stage": stated.origin("do_convert_rgb"),
        "image.mean": by("do_normalize", "image_mean"),
        "image.std": by("do_normalize", "image_std"),
        "image.resize": by("do_resize", "size"),
        "image.resize_pixels": by("do_resize", "size"),
        "image.crop": f"{stated.origin('do_center_crop')}; rounded as in {_TRANSFORMERS}",
        "image.transparency": f"{_TRANSFORMERS} (convert_to_rgb)",
        "image.rescale_factor": by("do_rescale", "rescale_factor"),
        "image.fill": f"{_TRANSFORMERS} (center_crop pads with zeros)",
    }


def _defaults(family_class: str, image_size: int, size_origin: str, ignored: Mapping[str, str]) -> Prepared:
    """The class's own defaults, for the size of the encoder: no file says anything."""
    stated = _Stated({}, "", family_class)
    size = _resize(stated)
    spec = ImageSpec(
        size_pixels=image_size,
        resample=_resample(stated),
        rgb_stage="before_resize" if stated.flag("do_convert_rgb") else "never",
        mean=_channels(stated, "image_mean", (0.0, 0.0, 0.0)),
        std=_channels(stated, "image_std", (1.0, 1.0, 1.0)),
        resize=size.resize,
        resize_pixels=(image_size,) * len(size.edges),
        crop="none" if _crop(stated) is None else "down",
        transparency="white",
        rescale_factor=_rescale_factor(stated),
    )
    return spec, Origins({**_origins(stated, size_origin), "image.resize_pixels": size_origin}, ignored)


def processor_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names of the checkpoint's files that may say how images are prepared."""
    return tuple(name for name in (PROCESSOR_FILE, IMAGE_PROCESSOR_FILE) if name in checkpoint.side_files)


def same_origin(spec: AnyImageSpec, origin: str) -> dict[str, str]:
    """That one origin for all of the spec's values."""
    return {f"image.{name}": origin for name in spec.to_json()}


def with_chosen_size(prepared: Prepared, image_size: int) -> Prepared:
    """`with_image_size`, and that the user chose it."""
    spec, origins = prepared
    if image_size == spec.size_pixels:
        return prepared
    chosen = dict.fromkeys(("image.size_pixels", "image.resize_pixels"), IMAGE_SIZE_OPTION)
    return with_image_size(spec, image_size), origins | Origins(chosen)


def image_size_origin(checkpoint: Checkpoint) -> str:
    """What states the size of the image encoder's square, where its weights have transformers' names."""
    config = checkpoint.config or {}
    section = config.get("vision_config")
    if isinstance(section, Mapping) and section.get("image_size") is not None:
        return "config.json: vision_config.image_size"
    # A single tower's config has it at the top.
    return "config.json: image_size" if config.get("image_size") is not None else "the image encoder's weights"
