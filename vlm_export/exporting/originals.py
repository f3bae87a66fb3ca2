"""The original's own preparation of images and texts: the classes and functions of the library that owns a format.

transformers' classes are taken by name from a list (`models/transformers_classes.py`), and read checked copies of the
checkpoint's side files: known names only, strict JSON, nothing that names code. open_clip's transform and tokenizer,
and the torchvision pipelines that other authors publish, are built from values that the Family states.

Sources: transformers 5 models/auto (`image_processor_type`, `tokenizer_class`, `backend`), open_clip 3.3.0 transform.py
(`image_transform_v2`) and factory.py (`get_tokenizer`), openai/CLIP clip.py (d05afc4), salesforce/BLIP (056a169).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.errors import InputError
from vlm_export.exporting.tokenizers.openai_bpe import read_bounded
from vlm_export.family import Array
from vlm_export.models.reading.transformers_classes import IMAGE_CLASSES, TOKENIZER_CLASSES
from vlm_export.original import (
    OPENAI_SPECIAL_TOKENS,
    OpenClipOriginal,
    OpenClipTokenizer,
    Original,
    SimpleTokenizerOriginal,
    TorchvisionPipeline,
    TransformersOriginal,
)
from vlm_export.proof.image_samples import processed_pixels

_IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
)
_CODE_KEYS = frozenset({"auto_map", "chat_template", "custom_pipelines", "trust_remote_code", "tokenizer_file"})
# SimpleTokenizer's own pattern, after the names of the special tokens.
_WORDS = r"""|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class NotRunError(Exception):
    """The original cannot be run here; the text says why."""


@dataclass(frozen=True)
class ImagePreparation:
    """An original's image processor.

    Attributes:
        name: the class or function, with the library's version.
        run: an opened image → float32 (3, H, W).
        other: a second back end of the library, whose difference is measured, or None.
        own: a class of transformers, so that the bundle's file must prepare the same in its AutoImageProcessor.
    """

    name: str
    run: Callable[[Image.Image], Array]
    other: tuple[str, Callable[[Image.Image], Array]] | None = None
    own: bool = False


@dataclass(frozen=True)
class TextPreparation:
    """An original's tokenizer.

    Attributes:
        name: the class, with the library's version.
        run: texts → ids of each, start and end included, cut to the context, without padding.
        pad_token_id: what fills a batch on the right; None where that is not compared.
        added_tokens: tokens besides the vocabulary, for a text of their own.
        own: a class of transformers alone, so that the bundle's files must give the same in its AutoTokenizer.
        decode: ids → their text without special tokens; None where the original decodes nothing.
    """

    name: str
    run: Callable[[Sequence[str]], list[list[int]]]
    pad_token_id: int | None = None
    added_tokens: tuple[str, ...] = ()
    own: bool = True
    decode: Callable[[Sequence[int]], str] | None = None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' own warnings, which are about what this project compares, kept off stderr."""
    try:
        logging = import_module("transformers.utils.logging")
    except ImportError:
        yield
        return
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def image_preparation(original: Original, files: Mapping[str, Path], folder: Path, edge: int) -> ImagePreparation:
    """The original's image processor for an encoder of `edge` pixels.

    Args:
        files: the checkpoint's side files by name.
        folder: an empty directory for checked copies.

    Raises:
        NotRunError: it is not installed, or the files name a class that is not on the list.
    """
    if isinstance(original.images, TransformersOriginal):
        return _transformers_images(original.images, files, folder, edge)
    if isinstance(original.images, OpenClipOriginal):
        return _open_clip_images(original.images, edge)
    if isinstance(original.images, TorchvisionPipeline):
        return ImagePreparation(original.images.name, _torchvision_run(original.images, edge))
    raise NotRunError("images: the original is remote code; recorded outputs of it stand in, in the project's tests")


def text_preparation(
    original: Original, files: Mapping[str, Path], folder: Path, context_length: int
) -> TextPreparation:
    """The original's tokenizer; arguments and errors as in `image_preparation`."""
    if isinstance(original.texts, TransformersOriginal):
        copies = checked_copies(files, TOKENIZER_FILES, folder, original.texts)
        return transformers_tokenizer(copies, context_length, original.texts.added_tokens)
    if isinstance(original.texts, SimpleTokenizerOriginal):
        return _simple_tokenizer(original.texts, files, context_length)
    if isinstance(original.texts, OpenClipTokenizer):
        copies = checked_copies(files, TOKENIZER_FILES, folder, TransformersOriginal("", ""))
        return _open_clip_tokenizer(copies, original.texts, context_length)
    raise NotRunError("texts: the original is remote code; recorded outputs of it stand in, in the project's tests")


def checked_copies(
    files: Mapping[str, Path], names: Sequence[str], folder: Path, original: TransformersOriginal
) -> Path:
    """A directory with copies of those files that transformers' Auto classes read, and a config of the model's type.

    Raises:
        InputError: a file is not strict JSON.
        NotRunError: a file names a class that is not on the list.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name not in files:
            continue
        raw = read_bounded(files[name])
        if name.endswith(".json") and name not in ("tokenizer.json", "vocab.json"):
            raw = json.dumps(_without_code(json_object_from_bytes(raw, str(files[name])), name)).encode()
        (folder / name).write_bytes(raw)
    if original.model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": original.model_type}), encoding="ascii")
    return folder


def transformers_tokenizer(folder: Path, context_length: int, added_tokens: Sequence[str] = ()) -> TextPreparation:
    """AutoTokenizer on a directory of checked files, with the special tokens that the original's code adds."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")):
        raise NotRunError("texts: the checkpoint has no tokenizer files")
    auto = _transformers("AutoTokenizer")
    tokenizer = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    if added_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(added_tokens)})

    def run(texts: Sequence[str]) -> list[list[int]]:
        encoded = tokenizer(list(texts), truncation=True, max_length=context_length, padding=False)
        return [list(map(int, row)) for row in encoded["input_ids"]]

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    known = tokenizer.get_vocab()
    added = [token for token in tokenizer.get_added_vocab() if known[token] >= tokenizer.vocab_size]
    name = f"{type(tokenizer).__name__} of transformers {version('transformers')}"
    pad = None if tokenizer.pad_token is None else int(tokenizer.pad_token_id)
    return TextPreparation(name, run, pad, tuple(added), decode=decode)


def transformers_images(folder: Path, edge: int | None = None) -> ImagePreparation:
    """AutoImageProcessor on a directory of checked files; with `edge`, for images of another size than it states."""
    auto = _transformers("AutoImageProcessor")

    def load(backend: str) -> tuple[str, Callable[[Image.Image], Array]]:
        options = {"local_files_only": True, "trust_remote_code": False, "backend": backend}
        processor = auto.from_pretrained(folder, **options)
        sizes = {} if edge is None else _sizes(processor, edge)
        return f"{type(processor).__name__} of transformers {version('transformers')}", _processed(processor, sizes)

    name, run = load("pil")
    return ImagePreparation(name, run, load("torchvision"), own=True)


def _transformers_images(
    original: TransformersOriginal, files: Mapping[str, Path], folder: Path, edge: int
) -> ImagePreparation:
    if not any(name in files for name in _IMAGE_FILES):
        processor = _transformers(f"{original.image_class}Pil")()
        name = f"{type(processor).__name__} of transformers {version('transformers')}, its defaults"
        return ImagePreparation(name, _processed(processor, _sizes(processor, edge)), own=True)
    return transformers_images(checked_copies(files, _IMAGE_FILES, folder, original), edge)


def _processed(processor: Any, sizes: Mapping[str, Any]) -> Callable[[Image.Image], Array]:
    def run(image: Image.Image) -> Array:
        return processed_pixels(processor, image, **sizes)

    return run


def _sizes(processor: Any, edge: int) -> dict[str, Any]:
    """Options of a call that make a processor prepare squares of `edge`; none where it does so already."""
    if hasattr(processor, "max_num_patches"):
        return {}
    square = {"height": edge, "width": edge}
    stated = {name: dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size")}
    cropped = bool(getattr(processor, "do_center_crop", False)) and bool(stated["crop_size"])
    if (stated["crop_size"] if cropped else stated["size"]) in (square, {"shortest_edge": edge}):
        return {}
    if cropped:
        size = {"shortest_edge": edge} if "shortest_edge" in stated["size"] else square
        return {"size": size, "crop_size": square}
    return {"size": square}


def _without_code(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    kept = {key: value for key, value in data.items() if key not in _CODE_KEYS}
    for key, allowed in (("image_processor_type", IMAGE_CLASSES), ("feature_extractor_type", IMAGE_CLASSES)):
        _check_class(kept, key, allowed, name)
    _check_class(kept, "tokenizer_class", TOKENIZER_CLASSES, name)
    for key, value in list(kept.items()):
        if isinstance(value, Mapping) and key in ("image_processor", "feature_extractor"):
            kept[key] = _without_code(value, name)
    return kept


def _check_class(data: Mapping[str, Any], key: str, allowed: frozenset[str], name: str) -> None:
    stated = data.get(key)
    if stated is not None and stated not in allowed:
        raise NotRunError(
            f"{name}: {key} {stated!r:.80} is not one of the classes that are run: {', '.join(sorted(allowed))}"
        )


def _transformers(name: str) -> Any:
    try:
        return getattr(import_module("transformers"), name)
    except (ImportError, AttributeError) as error:
        raise NotRunError(f"transformers has no {name}: {error}") from error


def _open_clip(module: str) -> Any:
    try:
        return import_module(f"open_clip.{module}")
    except ImportError as error:
        raise NotRunError(f"open_clip_torch is not installed: {error}") from error


def _open_clip_images(original: OpenClipOriginal, edge: int) -> ImagePreparation:
    transform = _open_clip("transform")
    stated = transform.merge_preprocess_dict(transform.PreprocessCfg(), {**original.preprocess, "size": edge})
    pipeline = transform.image_transform_v2(transform.PreprocessCfg(**stated), is_train=False)
    name = f"image_transform_v2 of open_clip {version('open_clip_torch')}"

    def run(image: Image.Image) -> Array:
        return np.asarray(pipeline(image.convert("RGB") if original.rgb_first else image).numpy(), dtype=np.float32)

    return ImagePreparation(f"{name}, in RGB first" if original.rgb_first else name, run)


def _open_clip_tokenizer(folder: Path, original: OpenClipTokenizer, context_length: int) -> TextPreparation:
    """HFTokenizer on a directory of checked files. It fills texts up to the context; the rows are those before that."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise NotRunError("texts: the checkpoint has no tokenizer files")
    library = _open_clip("tokenizer").HFTokenizer(
        str(folder), context_length, clean=original.clean, local_files_only=True, trust_remote_code=False
    )
    tokenizer = library.tokenizer

    def run(texts: Sequence[str]) -> list[list[int]]:
        filled = library(list(texts)).tolist()
        cleaned = [library.clean_fn(text) for text in texts]
        rows = tokenizer(cleaned, truncation=True, max_length=context_length, padding=False)["input_ids"]
        for row, whole in zip(rows, filled, strict=True):
            if [*row, *[tokenizer.pad_token_id] * (context_length - len(row))] != whole:
                raise NotRunError("texts: HFTokenizer fills rows with something else than padding on the right")
        return [list(map(int, row)) for row in rows]

    kind = f"{type(tokenizer).__name__} of transformers {version('transformers')}"
    name = f"HFTokenizer of open_clip {version('open_clip_torch')}, with {kind}"
    return TextPreparation(name, run, int(tokenizer.pad_token_id), own=False)


def _torchvision_run(pipeline: TorchvisionPipeline, edge: int) -> Callable[[Image.Image], Array]:
    transforms = import_module("torchvision.transforms")  # carries no types
    filter_ = transforms.InterpolationMode(pipeline.interpolation)
    if pipeline.crop:
        cut = [transforms.Resize(edge, interpolation=filter_), transforms.CenterCrop(edge)]
    else:
        cut = [transforms.Resize((edge, edge), interpolation=filter_)]

    def to_rgb(image: Image.Image) -> Image.Image:
        return image.convert("RGB")

    ordered = [to_rgb, *cut] if pipeline.rgb_first else [*cut, to_rgb]
    normalise = [transforms.Normalize(pipeline.mean, pipeline.std)] if pipeline.std else []
    composed = transforms.Compose([*ordered, transforms.ToTensor(), *normalise])
    return lambda image: np.asarray(composed(image).numpy(), dtype=np.float32)


def _simple_tokenizer(
    original: SimpleTokenizerOriginal, files: Mapping[str, Path], context_length: int
) -> TextPreparation:
    """SimpleTokenizer in open_clip's copy, with the special tokens' names of the publisher.

    It has the checkpoint's own vocabulary where there is one. A tokenizer.json of another kind than CLIP's byte pairs
    goes through transformers, behind the same cleaning of texts.
    """
    named = original.special_tokens
    has_own = named is not None and "tokenizer.json" in files
    if has_own and not _is_openai_bpe(files["tokenizer.json"]):
        return _cleaned_fast_tokenizer(files["tokenizer.json"], context_length)
    tokenizer = _open_clip("tokenizer").SimpleTokenizer(context_length=context_length)
    ids = tuple(tokenizer.all_special_ids[:2])
    own = ""
    if has_own:
        ids = _set_vocabulary(tokenizer, files["tokenizer.json"])
        own = ", on the checkpoint's vocabulary"
    if named is not None:
        _name_special_tokens(tokenizer, named, ids)

    def run(texts: Sequence[str]) -> list[list[int]]:
        rows = [[ids[0], *tokenizer.encode(text), ids[1]] for text in texts]
        return [row if len(row) <= context_length else [*row[: context_length - 1], ids[1]] for row in rows]

    name = f"SimpleTokenizer of open_clip {version('open_clip_torch')}{own}"
    return TextPreparation(name, run, 0, own=False)


def _is_openai_bpe(path: Path) -> bool:
    model = json_object_from_bytes(read_bounded(path), str(path)).get("model")
    return isinstance(model, dict) and model.get("type") == "BPE" and model.get("end_of_word_suffix") == "</w>"


def _cleaned_fast_tokenizer(path: Path, context_length: int) -> TextPreparation:
    clean = _open_clip("tokenizer").get_clean_fn("lower")
    tokenizer = _transformers("PreTrainedTokenizerFast")(tokenizer_file=str(path))

    def run(texts: Sequence[str]) -> list[list[int]]:
        cleaned = [clean(text) for text in texts]
        encoded = tokenizer(cleaned, truncation=True, max_length=context_length, padding=False)
        return [list(map(int, row)) for row in encoded["input_ids"]]

    name = f"PreTrainedTokenizerFast of transformers {version('transformers')} behind open_clip's cleaning"
    return TextPreparation(name, run, 0, own=False)


def _set_vocabulary(tokenizer: Any, path: Path) -> tuple[int, int]:
    """Gives the tokenizer the byte pairs of a tokenizer.json; returns the ids of start and end."""
    data = json_object_from_bytes(read_bounded(path), str(path))
    model, special = data.get("model"), data.get("added_tokens")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(special, list):
        raise NotRunError("texts: tokenizer.json holds no byte pairs, which is all that SimpleTokenizer knows")
    try:
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        names = {entry["content"]: int(entry["id"]) for entry in special}
        tokenizer.encoder = {str(token): int(token_id) for token, token_id in model["vocab"].items()} | names
        start, end = (tokenizer.encoder[name] for name in OPENAI_SPECIAL_TOKENS)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError("tokenizer.json is malformed", where=str(path), got=got) from error
    tokenizer.bpe_ranks = dict(zip(merges, range(len(merges)), strict=True))
    return start, end


def _name_special_tokens(tokenizer: Any, names: tuple[str, str], ids: tuple[int, ...]) -> None:
    """Makes these two names the only ones that stand for the special tokens in a text."""
    regex = import_module("regex")
    tokenizer.encoder = {**tokenizer.encoder, **dict(zip(names, ids, strict=True))}
    tokenizer.cache = {name: name for name in names}
    special = "|".join(map(regex.escape, names))
    tokenizer.pat = regex.compile(special + _WORDS, regex.IGNORECASE)
