"""A page of static files that searches and classifies images in a browser, with the bundle's own preparation of both.

Images go to the graph `vision_from_uint8` as the browser decodes them, so that resizing is the graph's; texts go
through the bundle's tokenizer.json. The sources of the page are the files of `browser/`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import distribution, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from vlm_export.bundle import layout
from vlm_export.bundle.manifest import VariantRecord
from vlm_export.bundle.safe_files import record_of_file
from vlm_export.errors import InputError
from vlm_export.layouts.cleaning_tables import cleaning_tables
from vlm_export.layouts.consumer_graph import ConsumerGraph, encoder_graph
from vlm_export.layouts.npm_packages import NPM_PACKAGES, package_files
from vlm_export.layouts.package import Consumer, Package, write_package
from vlm_export.layouts.packing import Packing
from vlm_export.proof.contract_record import read_record
from vlm_export.proof.metrics import Array
from vlm_export.runtime.inputs.images import MAX_PIXELS

NAME = "page"
SETTINGS_NAME = "page.json"
_PREPARED = "vision_from_uint8"
_CLEANING_NAME = "cleaning.json"
# What of tokenizer.json @huggingface/tokenizers 0.2.0 has a class for (`create_normalizer.ts` and its neighbours).
_TOKENIZER_STEPS: Mapping[str, str] = {
    "normalizer": "BertNormalizer Precompiled Sequence Replace NFC NFD NFKC NFKD Strip StripAccents Lowercase Prepend",
    "pre_tokenizer": "BertPreTokenizer Sequence Whitespace WhitespaceSplit Metaspace ByteLevel Split Punctuation "
    "Digits Replace FixedLength",
    "model": "WordPiece Unigram BPE",
    "post_processor": "TemplateProcessing ByteLevel BertProcessing RobertaProcessing Sequence",
}
_INNER_STEPS = ("normalizers", "pretokenizers", "processors")
_MOST_CHECKED_PIXELS = 1 << 16
# Python distributions whose work is in the page, beside npm's packages, which bring their own licences.
_LICENCES = {"packages/onnxruntime-web/LICENSE": "onnxruntime", "packages/ftfy/LICENSE": "ftfy"}


def page(
    path: str | Path,
    target: str | Path,
    *,
    precision: str | None = None,
    packages: str | Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
) -> Package:
    """Writes a folder that any server of static files makes a page of, its graphs proved by the bundle's records.

    Args:
        path: a bundle that was exported with the part `vision_from_uint8`.
        target: the directory that the page becomes; `verify` proves it again.
        precision: the variant of the graphs; None for the default of `load`.
        packages: a folder with the archives of `NPM_PACKAGES`; None to let npm fetch them, once.
        overwrite: replace a page, a package or a bundle.
        threads: of the engine that proves; None for as many as there are cores.

    Raises:
        UsageError: the target is there, or the precision is unknown.
        InputError: no bundle, a damaged one, one that lacks an encoder or its preparation, or a package that is not
            the pinned one.
        EnvironmentFailure: npm is missing or cannot fetch the packages.
        VerificationError: a graph does not compute what the original computed; nothing is published.
    """
    folder = None if packages is None else Path(packages)
    consumer = Consumer(partial(_lay_out, folder=folder))
    return write_package(path, target, NAME, consumer, precision=precision, overwrite=overwrite, threads=threads)


def _lay_out(packing: Packing, folder: Path | None) -> None:
    spec = packing.text_spec
    _check_tokenizer(packing)
    images, texts = _image_graph(packing), packing.text()
    for package in NPM_PACKAGES:
        for name, content in package_files(package, folder).items():
            packing.staging.file(f"packages/{package.folder}/{name}").write_bytes(content)
    _write_licences(packing)
    for source in files(__package__).joinpath("browser").iterdir():
        packing.staging.file(source.name).write_bytes(source.read_bytes())
    packing.add(_PREPARED, "model/images.onnx", images)
    packing.add("text", "model/texts.onnx", texts)
    packing.copy({layout.TOKENIZER_NAME: layout.TOKENIZER_NAME})
    if spec.cleaning != "none":
        tables = json.dumps(cleaning_tables(), ensure_ascii=True, separators=(",", ":"))
        packing.staging.file(_CLEANING_NAME).write_text(tables, encoding="ascii")
    packing.write_json(SETTINGS_NAME, _settings(packing, images, texts))


def _check_tokenizer(packing: Packing) -> None:
    """InputError where the tokenizer has a step that the page's code lacks."""
    tokenizer = packing.json(layout.TOKENIZER_NAME)
    for name, known in _TOKENIZER_STEPS.items():
        unknown = sorted({str(step.get("type")) for step in _steps(tokenizer.get(name) or {})} - {*known.split()})
        if unknown:
            raise packing.refusal(f"a {name} that its tokenizer has", ", ".join(unknown))


def _steps(step: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if step:
        yield step
    for name in _INNER_STEPS:
        for inner in step.get(name, ()):
            yield from _steps(inner)


def _image_graph(packing: Packing) -> ConsumerGraph:
    """The graph that takes `pixels` uint8 (B, H, W, 3); InputError where the bundle has none."""
    encoder, names = packing.embed.image, [part.name for part in packing.bundle.manifest.parts]
    if encoder is None:
        raise packing.refusal("an image encoder", "a bundle of a text encoder alone")
    if packing.image_spec and _PREPARED not in names:
        raise InputError(
            "the page needs the graph that prepares images itself, and this bundle lacks it",
            where=packing.bundle.manifest.name,
            expected=f"the part {_PREPARED}",
            got=", ".join(names),
            fix="export the model again: vlm-export export SOURCE -o BUNDLE --with-preprocessing",
        )
    return encoder_graph(packing.bundle, replace(encoder, part=_PREPARED), packing.precision)


def _settings(packing: Packing, images: ConsumerGraph, texts: ConsumerGraph) -> dict[str, Any]:
    """The content of page.json: where the files lie, and all that the page's code needs to know of the model."""
    image, text = (part.variants[0] for part in packing.parts)
    score = packing.embed.score
    cleaning = _CLEANING_NAME if (packing.staging.path / _CLEANING_NAME).exists() else None
    loaded = [*_files_of(image), *_files_of(text), layout.TOKENIZER_NAME, *([cleaning] if cleaning else [])]
    return {
        "name": packing.bundle.manifest.name,
        "identity": _identity(packing, image),
        "images": {
            **_interface(image, images),
            "spec": packing.image_spec.to_json(),
            "max_pixels": MAX_PIXELS,
            "pillow": int(version("pillow").partition(".")[0]),
        },
        "texts": {
            **_interface(text, texts),
            "spec": packing.text_spec.to_json(),
            "tokenizer": layout.TOKENIZER_NAME,
            "cleaning": cleaning,
        },
        "score": score and {"activation": score.activation, "scale": score.scale, "bias": score.logit_bias},
        "files": [{"path": name, "size_bytes": _path(packing, name).stat().st_size} for name in loaded],
        "check": _check(packing, images, texts),
    }


def _interface(variant: VariantRecord, graph: ConsumerGraph) -> dict[str, Any]:
    (output,) = graph.signature.output_names
    return {
        "file": variant.file,
        "data": list(variant.external_data),
        "inputs": list(graph.signature.input_names),
        "output": output,
    }


def _check(packing: Packing, images: ConsumerGraph, texts: ConsumerGraph) -> dict[str, Any]:
    """What the page computes before it trusts a browser: an image's and a text's vector, and ids of texts."""
    fitting = [row for row in _rows(images) if row[0].size <= _MOST_CHECKED_PIXELS]
    pixels, seen = max(fitting or [min(_rows(images), key=_size)], key=_size)
    ids, read = max(_rows(texts), key=_size)
    record = read_record(packing.bundle)
    return {
        "pixels": {
            "shape": list(pixels.shape[:2]),
            "base64": base64.b64encode(pixels.tobytes()).decode("ascii"),
            "vector": seen.tolist(),
        },
        "ids": {"row": ids.tolist(), "vector": read.tolist()},
        "texts": [{"text": text.text, "ids": list(text.ids)} for text in (record.texts if record else ())],
    }


def _rows(graph: ConsumerGraph) -> Iterator[tuple[Array, Array]]:
    """Each recorded input whose mask, where there is one, leaves nothing out, and its vector."""
    first, *masks = graph.signature.input_names
    for record in graph.records():
        (output,) = record.outputs.values()
        for i, row in enumerate(record.inputs[first]):
            if all(record.inputs[name][i].all() for name in masks):
                yield row, np.asarray(output[i], np.float32)


def _size(row: tuple[Array, Array]) -> int:
    return row[0].size


def _identity(packing: Packing, image: VariantRecord) -> str:
    """Vectors of images that another graph or another preparation made are none of this page's index."""
    digests = [record_of_file(packing.staging.path, name).sha256 for name in _files_of(image)]
    stated = json.dumps([digests, packing.image_spec.to_json()], sort_keys=True)
    return hashlib.sha256(stated.encode("utf-8")).hexdigest()


def _files_of(variant: VariantRecord) -> tuple[str, ...]:
    return (variant.file, *variant.external_data)


def _path(packing: Packing, name: str) -> Path:
    return packing.staging.path / name


def _write_licences(packing: Packing) -> None:
    for target, name in _LICENCES.items():
        found = distribution(name)
        licence = next((file for file in found.files or () if file.name.upper().startswith("LICENSE")), None)
        if licence is None:
            packing.notes.append(f"{name} is installed without its licence: put it to the page before you publish it")
        else:
            shutil.copyfile(str(found.locate_file(licence)), packing.staging.file(target))
