"""What a side of a bench does, in its own process: it runs a part, encodes files of images, or writes words."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np

from vlm_export.api import source_runs, transformers_images
from vlm_export.bundle import layout
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.errors import InputError, UsageError
from vlm_export.lab.bench_plan import EXACT, FASTEMBED, TORCH, TRANSFORMERS
from vlm_export.proof.points import Arrays
from vlm_export.runtime.engines.choice import engine_choice
from vlm_export.runtime.engines.onnxruntime import Engine, TensorInfo, run_in_float32
from vlm_export.runtime.generation.embedding_decoder import EmbeddedDecoderState
from vlm_export.runtime.generation.loop import NewToken, stream
from vlm_export.runtime.generation.options import DecoderState, GenerationOptions, IdArray
from vlm_export.runtime.inputs.images import ImageSource
from vlm_export.runtime.model import Model
from vlm_export.runtime.session import Session
from vlm_export.runtime.tasks.answer import AnswerTask
from vlm_export.runtime.tasks.attending import HIDDEN, decoder_state, image_rows
from vlm_export.runtime.tasks.caption import CaptionTask
from vlm_export.runtime.tasks.chat import CAPTION_QUESTION, ChatTask
from vlm_export.runtime.tasks.chat_rows import ChatRow

RunPart = Callable[[Arrays], Arrays]
EncodeImages = Callable[[Sequence[str], int], Any]


class Runs(Protocol):
    """What a side does with what a request is about."""

    def seconds(self, about: Any) -> float:
        """Does it once."""
        ...

    def outputs(self, about: Any) -> Arrays:
        """Does it once, for what it gives."""
        ...


@contextmanager
def opened_side(job: Mapping[str, Any]) -> Iterator[Runs]:
    """What a job of `bench_subjects` describes; it lasts as long as the context."""
    bundle = open_bundle(job["bundle"])
    with ExitStack() as stack:
        if "part" in job:
            yield PartRuns(stack.enter_context(_part_run(bundle, job)))
        elif job["task"] == "embed":
            yield ImageRuns(stack.enter_context(_image_encoder(bundle, job)))
        else:
            yield TokenRuns(stack.enter_context(_model(bundle, job)), job["task"])


class PartRuns:
    """A part, on files of arrays."""

    def __init__(self, run: RunPart) -> None:
        self._run, self._inputs = run, cache(_read_arrays)

    def seconds(self, about: str) -> float:
        inputs = self._inputs(about)
        start = time.perf_counter()
        self._run(inputs)
        return time.perf_counter() - start

    def outputs(self, about: str) -> Arrays:
        return self._run(self._inputs(about))


class ImageRuns:
    """Files of images to embeddings: they are read, decoded, prepared and encoded."""

    def __init__(self, encode: EncodeImages) -> None:
        self._encode = encode

    def seconds(self, about: Mapping[str, Any]) -> float:
        start = time.perf_counter()
        self._encode(about["files"], about["batch"])
        return time.perf_counter() - start

    def outputs(self, about: Mapping[str, Any]) -> Arrays:
        return {"image_embeds": np.asarray(self._encode(about["files"], about["batch"]), np.float32)}


class TokenRuns:
    """Words about files of images: up to the first token of each row, or from there to the last."""

    def __init__(self, model: Model, task: str) -> None:
        self._model, self._task = model, task

    def seconds(self, about: Mapping[str, Any]) -> float:
        start = time.perf_counter()
        tokens = self._tokens(about)
        for _ in islice(tokens, len(about["files"])):
            pass
        if about["tokens"] == 1:
            return time.perf_counter() - start
        start = time.perf_counter()
        for _ in tokens:
            pass
        return time.perf_counter() - start

    def outputs(self, about: Mapping[str, Any]) -> Arrays:
        ids = [token.token_id for token in self._tokens(about)]
        return {"tokens": np.array(ids).reshape(about["tokens"], -1).T}

    def _tokens(self, about: Mapping[str, Any]) -> Iterator[NewToken]:
        return token_stream(self._model, self._task, about["files"], about["text"], about["tokens"])


def token_stream(
    model: Model, task: str, images: Sequence[ImageSource], text: str | None, new_tokens: int
) -> Iterator[NewToken]:
    """So many tokens of each row, greedily, whether or not the model would end sooner; rows in order within a step.

    Args:
        task: "caption", "answer" or "chat".
        text: the prompt, or the question about each image; None for the bundle's own.
    """
    chosen = model.tasks[task]  # type: ignore[index]
    rows = len(images)
    if isinstance(chosen, ChatTask):
        entries = [(image,) for image in images]
        return chat_tokens(chosen, chosen.rows.question_rows(entries, [text or CAPTION_QUESTION] * rows), new_tokens)
    if isinstance(chosen, CaptionTask):
        ((_, seen),) = image_rows(model.session, chosen.spec.vision, images, rows, rows)
        mask, prompt = np.ones(seen[HIDDEN].shape[:2], np.int64), chosen.prompt_ids(text)
        state = decoder_state(model.session, chosen.spec, seen[HIDDEN], mask)
    elif isinstance(chosen, AnswerTask):
        ((states, mask),) = chosen.question_states(images, [text or CAPTION_QUESTION] * rows, batch_size=rows)
        prompt = np.array([chosen.spec.tokens.decoder_start], np.int64)
        state = decoder_state(model.session, chosen.spec, states, mask)
    else:
        raise UsageError(f"the task {task!r} writes no words")
    most = model.manifest.part(chosen.spec.decoder).signature.axis("total_sequence").maximum
    _check_room(new_tokens, None if most is None else most - len(prompt) + 1)
    return _exactly(state, np.tile(prompt, (rows, 1)), new_tokens)


def chat_tokens(task: ChatTask, rows: Sequence[ChatRow], new_tokens: int) -> Iterator[NewToken]:
    """`token_stream` of prompts that are there already, of one length."""
    _check_room(new_tokens, task.spec.context_length - max(row.length for row in rows) + 1)
    state = EmbeddedDecoderState(
        task.session.engine(task.spec.decoder), task.session.engine(task.spec.embed_tokens), task.rows.prompts(rows)
    )
    return _exactly(state, np.array([row.ids for row in rows], np.int64), new_tokens)


def _exactly(state: DecoderState, prompt: IdArray, new_tokens: int) -> Iterator[NewToken]:
    return stream(state, prompt, GenerationOptions(eos_token_ids=(), max_new_tokens=new_tokens))


def _check_room(new_tokens: int, room: int | None) -> None:
    if room is not None and new_tokens > room:
        raise UsageError(
            "the decoder has no position for so many tokens", expected=f"at most {room}", got=f"{new_tokens}"
        )


@contextmanager
def _part_run(bundle: OpenBundle, job: Mapping[str, Any]) -> Iterator[RunPart]:
    part = job["part"]
    if job["engine"] == TORCH:
        with source_runs(bundle, job["source"], job["precision"], job["threads"]) as run_of:
            yield run_of(part)
        return
    if job["graph"] is not None:
        engine = engine_choice(job["engine"], None, job["threads"], in_bf16=job["in_bf16"])
        yield partial(run_in_float32, engine.open(Path(job["graph"])))
        return
    session = Session(bundle, precision=job["precision"], engine=job["engine"], threads=job["threads"])
    session.engine(part)
    yield partial(session.run, part)


@contextmanager
def _image_encoder(bundle: OpenBundle, job: Mapping[str, Any]) -> Iterator[EncodeImages]:
    if job["engine"] == TRANSFORMERS:
        yield transformers_images(job["source"], job["threads"])
    elif job["engine"] == FASTEMBED:
        with TemporaryDirectory(prefix="vlm-export-") as folder:
            yield _fastembed(bundle, Path(folder), job["threads"])
    else:
        with _model(bundle, job) as model:
            yield lambda files, batch: model.encode_image(files, batch_size=batch)


@contextmanager
def _model(bundle: OpenBundle, job: Mapping[str, Any]) -> Iterator[Model]:
    """The bundle with all engines of the task open; of PyTorch, the source's modules in the graphs' places."""
    options = {"threads": job["threads"]}
    if job["engine"] != TORCH:
        session = Session(bundle, precision=job["precision"], engine=job["engine"], **options)
        for part in job["parts"]:
            session.engine(part)
        yield Model(session)
        return
    with source_runs(bundle, job["source"], job["precision"], job["threads"]) as run_of:
        yield Model(_SourceSession(bundle, {part: run_of(part) for part in job["parts"]}, job["threads"]))


class _SourceSession(Session):
    """A bundle whose parts PyTorch runs: its own preparation and loop around the original's modules."""

    def __init__(self, bundle: OpenBundle, runs: Mapping[str, RunPart], threads: int) -> None:
        super().__init__(bundle, threads=threads)
        self._runs = {part: _SourceEngine(bundle, part, run) for part, run in runs.items()}

    def engine(self, part: str) -> Engine:
        return self._runs[part]


class _SourceEngine:
    """A part of a source as an engine."""

    def __init__(self, bundle: OpenBundle, part: str, run: RunPart) -> None:
        signature = bundle.manifest.part(part).signature
        self.inputs, self.outputs = (
            tuple(TensorInfo(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
            for tensors in (signature.inputs, signature.outputs)
        )
        self._run = run

    def run(self, feeds: Arrays) -> dict[str, Any]:
        return dict(self._run(feeds))


def _fastembed(bundle: OpenBundle, folder: Path, threads: int) -> EncodeImages:
    """fastembed on the float32 graph, in a folder as it reads one.

    Source: fastembed 0.9.1, `image/onnx_embedding.py`: `model.onnx`, whose first output it takes and brings to unit
    length, and `preprocessor_config.json` beside it.
    """
    from fastembed import ImageEmbedding

    embed = next(task for task in bundle.manifest.tasks if task.kind == "embed")
    part = bundle.manifest.part(embed.parts[0])
    variant = part.variant(EXACT)
    if part.signature.output_names[0] != "image_embeds":
        raise InputError("fastembed takes the first output", where=part.name, got=part.signature.output_names[0])
    bundle.model_files(variant)
    files = {variant.file: "model.onnx", **{name: Path(name).name for name in variant.external_data}}
    files |= {name: name for name in (layout.PREPROCESSOR_NAME, layout.CONFIG_NAME)}
    for name, own in files.items():
        shutil.copyfile(bundle.root / name, folder / own)
    # Any of its models whose graph has that name: all that is read lies in the folder.
    name = next(
        known["model"] for known in ImageEmbedding.list_supported_models() if known["model_file"] == "model.onnx"
    )
    model = ImageEmbedding(name, specific_model_path=str(folder), threads=threads)
    return lambda paths, batch: np.stack(list(model.embed(paths, batch_size=batch)))


def _read_arrays(path: str) -> Arrays:
    with np.load(Path(path)) as arrays:
        return dict(arrays)
