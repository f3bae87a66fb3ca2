"""The planted faults: each damages a copy of a bundle as a careless or hostile hand would, and hashes its files again.

A fault of a file changes the file and its sha256 in the manifest, so that no check of hashes alone sees it. A fault of
code (`prepare`) stands for another implementation of the runtime's preparation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image, ImageOps

from vlm_export.bundle.manifest import MANIFEST_NAME
from vlm_export.runtime.inputs.images import FloatArray, preprocess_image
from vlm_export.specs import ImageSpec

Prepare: TypeAlias = Callable[[Image.Image, ImageSpec], FloatArray]
Json: TypeAlias = dict[str, Any]

PREPROCESSOR, CONFIG = "preprocessor_config.json", "config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VISION, TEXT = "onnx/vision_model.onnx", "onnx/text_model.onnx"
IMAGES, TOKENS = "image preparation", "tokenizer"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: for people.
        named: the file or the stage that the message must name.
        plant: changes a bundle's directory.
        prepare: takes the place of the runtime's preparation of images while the bundle is verified, or None.
    """

    name: str
    named: str
    plant: Callable[[Path], None]
    prepare: Prepare | None = None


def rehash(root: Path, name: str) -> None:
    """Writes the size and the sha256 that a file has now into the manifest."""

    def change(manifest: Json) -> None:
        raw = (root / name).read_bytes()
        manifest["files"][name] = {"size_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    edit_json(root / MANIFEST_NAME, change)


def edit_json(path: Path, change: Callable[[Json], None]) -> None:
    """Applies a change to a JSON file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")


def _json_fault(name: str, file: str, change: Callable[[Json], None]) -> Fault:
    def plant(root: Path) -> None:
        edit_json(root / file, change)
        if file != MANIFEST_NAME:
            rehash(root, file)

    return Fault(name, file, plant)


def _field(name: str, file: str, path: str, value: Any) -> Fault:
    """A field of a JSON file set to a value; `path` has dots between keys, and numbers of list entries."""
    *parents, last = path.split(".")

    def change(data: Any) -> None:
        for key in parents:
            data = data[int(key) if isinstance(data, list) else key]
        data[last] = value

    return _json_fault(name, file, change)


def _manifest(name: str, section: str, values: Mapping[str, Any], named: str) -> Fault:
    """Fields of the manifest, which the runtime prepares by, and of the side file that repeats them."""

    def plant(root: Path) -> None:
        edit_json(root / MANIFEST_NAME, lambda manifest: manifest[section].update(values))

    return Fault(name, named, plant)


def _both(name: str, values: Mapping[str, Any], published: Mapping[str, Any]) -> Fault:
    """The manifest and `preprocessor_config.json` changed alike: only images can tell."""

    def plant(root: Path) -> None:
        edit_json(root / MANIFEST_NAME, lambda manifest: manifest["image"].update(values))
        edit_json(root / PREPROCESSOR, lambda config: config.update(published))
        rehash(root, PREPROCESSOR)

    return Fault(name, IMAGES, plant)


def _code(name: str, prepare: Prepare) -> Fault:
    return Fault(name, IMAGES, lambda root: None, prepare)


def _graph(name: str, file: str, change: Callable[[onnx.ModelProto], None]) -> Fault:
    def plant(root: Path) -> None:
        model = onnx.load(root / file)
        change(model)
        onnx.save(model, root / file)
        rehash(root, file)

    return Fault(name, file, plant)


def _swap_towers(root: Path) -> None:
    vision, text = (root / VISION).read_bytes(), (root / TEXT).read_bytes()
    (root / VISION).write_bytes(text)
    (root / TEXT).write_bytes(vision)
    rehash(root, VISION)
    rehash(root, TEXT)


def _swap_tokens(data: Json) -> None:
    vocab = data["model"]["vocab"]
    first, second = "an", "th"
    vocab[first], vocab[second] = vocab[second], vocab[first]


def _swap_rare_tokens(data: Json) -> None:
    """Two tokens that no text of the contract has."""
    vocab = data["model"]["vocab"]
    vocab["\u0143"], vocab["\u0142"] = vocab["\u0142"], vocab["\u0143"]


def _leave_out_merge(data: Json) -> None:
    merges = data["model"]["merges"]
    del merges[next(i for i, merge in enumerate(merges) if tuple(merge) == ("c", "a"))]


def _without_special(token: str) -> Callable[[Json], None]:
    """The token no longer put around texts, whichever post-processor puts it."""

    def change(data: Json) -> None:
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}} if name == "A" else {"SpecialToken": {"id": name, "type_id": 0}}
                for name in ("<|startoftext|>", "A", "<|endoftext|>")
                if name != token
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                entry["content"]: {"id": entry["content"], "ids": [entry["id"]], "tokens": [entry["content"]]}
                for entry in data["added_tokens"]
            },
        }

    return change


def _case_kept(data: Json) -> None:
    steps = data["normalizer"]["normalizers"]
    data["normalizer"]["normalizers"] = [step for step in steps if step["type"] != "Lowercase"]


def _drop_added_token(data: Json) -> None:
    del data["added_tokens"][-1]


def _other_vocabulary(data: Json) -> None:
    vocab = data["model"]["vocab"]
    special = {entry["content"] for entry in data["added_tokens"]}
    words = [token for token in vocab if token not in special]
    ids = [vocab[token] for token in words]
    vocab.update(zip(words, [*ids[1:], ids[0]], strict=True))


def _bgr(image: Image.Image, spec: ImageSpec) -> FloatArray:
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
    levels = preprocess_image(image, spec) * std + mean
    return np.ascontiguousarray((levels[::-1] - mean) / std)


def _no_antialias(image: Image.Image, spec: ImageSpec) -> FloatArray:
    width, height = image.size
    scale = spec.size_pixels / min(width, height)
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return preprocess_image(image.resize(size, Image.Resampling.NEAREST), spec)


def _rotated(image: Image.Image, spec: ImageSpec) -> FloatArray:
    return preprocess_image(ImageOps.exif_transpose(image), spec)


def _shifted_crop(image: Image.Image, spec: ImageSpec) -> FloatArray:
    """The crop's half pixel on the other side, where there is one."""
    width, height = image.size
    edge = spec.size_pixels
    odd = (max(width, height) - edge) % 2 == 1 and min(width, height) == edge
    if odd:
        box = (1, 0, width, height) if width > height else (0, 1, width, height)
        image = image.crop(box)
    return preprocess_image(image, spec)


def _hidden_colours(image: Image.Image, spec: ImageSpec) -> FloatArray:
    """Alpha dropped before anything else, so that hidden colours show."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.fromarray(np.asarray(image.convert("RGBA"))[:, :, :3].copy())
    return preprocess_image(image, spec)


def _on_black(image: Image.Image, spec: ImageSpec) -> FloatArray:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return preprocess_image(image, spec)


def _normalise_rows(model: onnx.ModelProto) -> None:
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [f"{name}_raw" if name == output else name for name in node.output]
    model.graph.node.append(helper.make_node("LpNormalization", [f"{output}_raw"], [output], axis=1, p=2))


def _scaled_activation(model: onnx.ModelProto) -> None:
    _replace_scalar(model, 1.702, 1.0)


def _other_end_token(model: onnx.ModelProto) -> None:
    """Pools at the start token instead."""
    _replace_scalar(model, 529, 528)


def _replace_scalar(model: onnx.ModelProto, old: float, new: float) -> None:
    tensors = [*model.graph.initializer]
    tensors += [node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"]
    found = 0
    for tensor in tensors:
        array = numpy_helper.to_array(tensor)
        if array.size == 1 and abs(float(array.reshape(())) - old) < 1e-3:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, new), tensor.name))
            found += 1
    if not found:
        raise ValueError(f"the graph has no constant {old}")


def _stale_weights(model: onnx.ModelProto) -> None:
    """Every matrix as another training run would leave it: the same sizes and spread."""
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 2 and array.dtype == np.float32 and np.isfinite(array).all():
            other = rng.permutation(array.ravel()).reshape(array.shape)
            tensor.CopyFrom(numpy_helper.from_array(other, tensor.name))


def _one_matrix(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if "fc1" in t.name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array * np.float32(1.01)).astype(np.float32), tensor.name))


HALF = [0.5, 0.5, 0.5]
FILE_FAULTS: tuple[Fault, ...] = (
    _field("mean of another family", PREPROCESSOR, "image_mean", HALF),
    _field("deviation of another family", PREPROCESSOR, "image_std", HALF),
    _field("channels reversed (BGR's mean)", PREPROCESSOR, "image_mean", [0.40821073, 0.4578275, 0.48145466]),
    _field("bilinear filter", PREPROCESSOR, "resample", 2),
    _field("another size", PREPROCESSOR, "size", {"shortest_edge": 40}),
    _field("crop switched off", PREPROCESSOR, "do_center_crop", False),
    _field("stretched instead of cropped", PREPROCESSOR, "size", {"height": 32, "width": 32}),
    _field("rescale factor of 1/256", PREPROCESSOR, "rescale_factor", 1 / 256),
    _field("normalisation switched off", PREPROCESSOR, "do_normalize", False),
    _field("rescaling switched off", PREPROCESSOR, "do_rescale", False),
    _field("transparency not composed", PREPROCESSOR, "do_convert_rgb", False),
    _field("another class of processor", PREPROCESSOR, "image_processor_type", "SiglipImageProcessor"),
    _field("projection_dim", CONFIG, "projection_dim", 512),
    _field("vocabulary size", CONFIG, "text_config.vocab_size", 49408),
    _field("image size", CONFIG, "vision_config.image_size", 224),
    _field("layers", CONFIG, "text_config.num_hidden_layers", 12),
    _field("heads", CONFIG, "vision_config.num_attention_heads", 1),
    _field("end token", CONFIG, "text_config.eos_token_id", 2),
    _field("activation", CONFIG, "vision_config.hidden_act", "gelu"),
    _field("model type", CONFIG, "model_type", "siglip"),
    _json_fault("two tokens swapped", TOKENIZER, _swap_tokens),
    _json_fault("two rare tokens swapped", TOKENIZER, _swap_rare_tokens),
    _json_fault("a merge left out", TOKENIZER, _leave_out_merge),
    _json_fault("an added token left out", TOKENIZER, _drop_added_token),
    _json_fault("the start token not put", TOKENIZER, _without_special("<|startoftext|>")),
    _json_fault("the end token not put", TOKENIZER, _without_special("<|endoftext|>")),
    _json_fault("letters keep their case", TOKENIZER, _case_kept),
    _json_fault("another vocabulary", TOKENIZER, _other_vocabulary),
    _field("another padding token", TOKENIZER_CONFIG, "pad_token", "!"),
    _field("padding on the left", TOKENIZER_CONFIG, "padding_side", "left"),
    _field("truncation at another length", TOKENIZER_CONFIG, "model_max_length", 77),
    _field("another class of tokenizer", TOKENIZER_CONFIG, "tokenizer_class", "BertTokenizer"),
)
PREPARATION_FAULTS: tuple[Fault, ...] = (
    _both("mean, in both files", {"mean": HALF}, {"image_mean": HALF}),
    _both("deviation, in both files", {"std": HALF}, {"image_std": HALF}),
    _both("filter, in both files", {"resample": "bilinear"}, {"resample": 2}),
    _manifest("padding", "text", {"pad_token_id": 0}, TOKENS),
    _manifest("context", "text", {"context_length": 16}, TOKENS),
    _code("blue and red exchanged", _bgr),
    _code("no antialiasing", _no_antialias),
    _code("EXIF orientation applied", _rotated),
    _code("crop rounded up", _shifted_crop),
    _code("hidden colours shown", _hidden_colours),
    _code("transparency on black", _on_black),
)
GRAPH_FAULTS: tuple[Fault, ...] = (
    _graph("another activation", VISION, _scaled_activation),
    _graph("pooling at another token", TEXT, _other_end_token),
    _graph("embeddings of unit length", VISION, _normalise_rows),
    _graph("weights of another checkpoint", TEXT, _stale_weights),
    _graph("one matrix 1 % too large", VISION, _one_matrix),
    Fault("towers exchanged", VISION, _swap_towers),
    _field("scale of the logits", MANIFEST_NAME, "tasks.0.score.logit_scale", 4.6052),
)
MANIFEST_FAULTS: tuple[Fault, ...] = (
    _field("activation of the scores", MANIFEST_NAME, "tasks.0.score.activation", "sigmoid"),
    _field("bias of the scores", MANIFEST_NAME, "tasks.0.score.logit_bias", -10.0),
    _field("output that holds the embedding", MANIFEST_NAME, "tasks.0.image.pooling", "mean"),
    _field("tokens that code adds", MANIFEST_NAME, "text.added_tokens", ["<sks>"]),
    _field("case of letters", MANIFEST_NAME, "text.case", "kept"),
    _field("smallest size of an axis", MANIFEST_NAME, "parts.0.signature.axes.0.minimum", 2),
    _field("greatest size of an axis", MANIFEST_NAME, "parts.1.signature.axes.1.maximum", 1024),
    _field("steps of an axis", MANIFEST_NAME, "parts.1.signature.axes.1.multiple_of", 4),
    _field("opset", MANIFEST_NAME, "parts.0.variants.0.opset", 18),
    _field("oldest ONNX Runtime", MANIFEST_NAME, "parts.1.variants.0.oldest_onnxruntime", "1.14.0"),
)
FAULTS: tuple[Fault, ...] = (*FILE_FAULTS, *PREPARATION_FAULTS, *GRAPH_FAULTS, *MANIFEST_FAULTS)
