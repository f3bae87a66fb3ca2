"""What a consumer is asked: the contract's texts and image files, and programs that collect its answers."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError, UsageError
from vlm_export.proof.contract_record import RECORD_NAME, ContractRecord, ImageRecord, image_content, read_record

COLLECTORS = ("collect.py", "collect.mjs")
TEXTS_NAME, IMAGES_FOLDER, README_NAME = "texts.json", "images", "README.txt"
_README = """What your program is asked
==========================

texts.json   {texts} texts
images/      {images} image files

Answer with any of these, in the order of texts.json and of the images' names; leave out what your program does not
show:

ids.json             token ids of each text, as your program feeds them to the model
pixels.npy           float32 (images, 3, height, width), as your program feeds them to the model
text_vectors.npy     float32 (texts, width), the embeddings as you store or compare them
image_vectors.npy    float32 (images, width), the same of images

Each may be .json or .npy, and one .json file may hold them all: {{"ids": [[…], …], "text_vectors": [[…], …]}}.
Where your program refuses a text or an image, leave its row out, and name those that you answer: texts.json (the texts
themselves) and images.json (the files' names) beside the answers.

Two programs collect them: collect.py from Python and from HTTP endpoints, collect.mjs from transformers.js on Node.js.
Their heads say how. Then:

    vlm-export doctor {bundle} answers
"""


def required_record(bundle: OpenBundle) -> ContractRecord:
    """The bundle's record of the contract; InputError where it has none, or no texts and images in it."""
    record = read_record(bundle)
    if record is None or not (record.texts or record.images):
        raise InputError(
            "this bundle holds no record of what the original makes of images and texts",
            where=str(bundle.root),
            expected=f"{RECORD_NAME} with texts or images",
            got="none" if record is None else "; ".join(record.not_run) or "neither",
            fix="export the model again" if record is None else "",
        )
    return record


def asked_images(record: ContractRecord) -> tuple[tuple[str, ImageRecord], ...]:
    """The files' names and their records, in the order of the names."""
    return tuple(sorted((image.file.rpartition("/")[2], image) for image in record.images))


def write_questions(bundle: OpenBundle, folder: Path) -> tuple[int, int]:
    """Writes the questions and the collectors into an empty or new folder.

    Returns:
        How many texts and images there are.

    Raises:
        UsageError: the folder holds something, or is none.
        InputError: the bundle has no record of the contract, or a file of it was changed.
    """
    record = required_record(bundle)
    images = asked_images(record)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("the folder for the questions is not empty", where=str(folder), fix="name a new folder")
    (folder / IMAGES_FOLDER).mkdir(parents=True)
    for name, image in images:
        (folder / IMAGES_FOLDER / name).write_bytes(image_content(bundle, image))
    texts = json.dumps([text.text for text in record.texts], indent=1) + "\n"
    (folder / TEXTS_NAME).write_text(texts, encoding="ascii")
    readme = _README.format(texts=len(record.texts), images=len(images), bundle=bundle.root)
    (folder / README_NAME).write_text(readme, encoding="utf-8")
    for name in COLLECTORS:
        (folder / name).write_bytes(files("vlm_export.lab.consumer").joinpath("collectors").joinpath(name).read_bytes())
    return len(record.texts), len(images)
