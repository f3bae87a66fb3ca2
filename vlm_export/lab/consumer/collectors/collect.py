"""Asks a program what it makes of the questions beside this file; needs numpy. The answers go to `answers/` here.

A program in Python: write a module that has any of these functions, leave out what your program does not show, and run
`python collect.py MODULE`.

    ids(text) -> the token ids of one text, as your program feeds them
    pixels(path) -> float array (3, H, W), what your program feeds for one image file
    text_vector(text) -> the embedding of one text, as you store or compare it
    image_vector(path) -> the embedding of one image file, as you store or compare it

An HTTP endpoint: run `python collect.py URL [MODEL]`. It gets what OpenAI's /v1/embeddings takes, {"model": …, "input":
[text]}, and for an image what Jina's takes, {"model": …, "input": [{"image": base64}]}; both answer {"data":
[{"embedding": [numbers]}]}. Change `embedding` for another form. The key in API_KEY is sent as a bearer token.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np

QUESTIONS = Path(__file__).resolve().parent
_PLURALS = {"text_vector": "text_vectors", "image_vector": "image_vectors"}


class Endpoint:
    """A program behind HTTP."""

    def __init__(self, url: str, model: str = "default") -> None:
        self._url, self._model = url, model

    def embedding(self, item: str | Path) -> list[float]:
        """What the endpoint answers for a text or an image file."""
        content = item if isinstance(item, str) else {"image": base64.b64encode(item.read_bytes()).decode("ascii")}
        headers = {"Content-Type": "application/json"}
        if "API_KEY" in os.environ:
            headers["Authorization"] = f"Bearer {os.environ['API_KEY']}"
        body = json.dumps({"model": self._model, "input": [content]}).encode("utf-8")
        with urlopen(Request(self._url, body, headers), timeout=60) as response:
            found: list[float] = json.load(response)["data"][0]["embedding"]
        return found

    text_vector = image_vector = embedding


def collect(program: Any, folder: Path) -> None:
    """Asks all that the program answers, and writes it as `vlm-export doctor` reads it."""
    texts = json.loads((QUESTIONS / "texts.json").read_text(encoding="utf-8"))
    images = sorted((QUESTIONS / "images").iterdir())
    kept_texts, answers = _asked(program, ("ids", "text_vector"), texts)
    kept_images, of_images = _asked(program, ("pixels", "image_vector"), images)
    folder.mkdir(exist_ok=True)
    _write(folder / "texts.json", kept_texts)
    _write(folder / "images.json", [path.name for path in kept_images])
    for name, rows in (answers | of_images).items():
        if not rows:
            print(f"{name}: your program answers none", file=sys.stderr)
            continue
        target = folder / _PLURALS.get(name, name)
        if len({row.shape for row in rows}) == 1 and name != "ids":
            np.save(target.with_suffix(".npy"), np.stack(rows).astype(np.float32))
        else:
            _write(target.with_suffix(".json"), [row.tolist() for row in rows])


def _asked(
    program: Any, names: Sequence[str], items: Sequence[Any]
) -> tuple[list[Any], dict[str, list[np.ndarray[Any, Any]]]]:
    """The items that the program did not refuse, and what it answers for them; refusals are printed."""
    functions: dict[str, Callable[[Any], Any]] = {n: getattr(program, n) for n in names if hasattr(program, n)}
    kept: list[Any] = []
    answers: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in functions}
    for item in items:
        try:
            row = {name: np.asarray(function(item)) for name, function in functions.items()}
        except Exception as error:  # whatever the program raises
            print(f"{item}: left out: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        kept.append(item)
        for name, value in row.items():
            answers[name].append(value)
    return kept, answers


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, "")
    name, *more = sys.argv[1:]
    asked = Endpoint(name, *more) if "://" in name else import_module(name.removesuffix(".py"))
    collect(asked, QUESTIONS / "answers")
