"""A consumer's answers beside what the bundle knows: the record, its own preparation, and its graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

from vlm_export.bundle.layout import PREPROCESSOR_NAME
from vlm_export.errors import InputError, VlmExportError, install_fix
from vlm_export.lab.consumer.answers import Answers
from vlm_export.lab.consumer.pixels import consumer_specs, prepared
from vlm_export.lab.consumer.questions import asked_images
from vlm_export.lab.consumer.texts import Row, tokenizer_alone
from vlm_export.proof.contract import encode
from vlm_export.proof.contract_record import ContractRecord, digest, image_content, levels
from vlm_export.proof.gates import Gate, laxest_variant, variant_gate
from vlm_export.proof.metrics import Array
from vlm_export.runtime.inputs.images import open_image, preprocess_image
from vlm_export.runtime.session import Session
from vlm_export.specs import ImageSpec
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec

if TYPE_CHECKING:
    from vlm_export.lab.consumer.graphs import GraphChange

Outputs: TypeAlias = dict[str, Array]
Run: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]
IDS, MASK = "input_ids", "attention_mask"
_UNTRIED = "pooling, projection and activation were not tried"


class Case:
    """One consumer; rows are those that it answered, in its order."""

    def __init__(self, session: Session, record: ContractRecord, answers: Answers) -> None:
        self.session, self.record, self.answers = session, record, answers
        self.gate: Gate = variant_gate("", laxest_variant(session.manifest, session.precision))
        self.untried: dict[str, str] = {}

    @property
    def far(self) -> float:
        """How far vectors are at most that the precision calls equal, as 1 - cosine."""
        return 1 - self.gate.cosine

    @property
    def is_coarse(self) -> bool:
        """Whether the precision is quantised, whose budget leaves room for small mistakes."""
        return laxest_variant(self.session.manifest, self.session.precision).loss is not None

    @property
    def other_precisions(self) -> list[str]:
        """Those that the bundle could be run in besides, in the manifest's order."""
        found = [variant.precision for part in self.session.manifest.parts for variant in part.variants]
        return [precision for precision in dict.fromkeys(found) if precision != self.session.precision]

    @cached_property
    def texts(self) -> list[str]:
        """The texts that were answered."""
        return [self.record.texts[i].text for i in self.answers.texts]

    @cached_property
    def text_names(self) -> list[str]:
        """How sentences call the texts."""
        return [repr(text if len(text) <= 40 else text[:40] + "…") for text in self.texts]

    @cached_property
    def rows(self) -> list[Row]:
        """The original's ids of the texts, without padding."""
        return [self.record.texts[i].ids for i in self.answers.texts]

    @cached_property
    def rows_alone(self) -> list[Row]:
        """The ids that tokenizer.json alone makes: all that a consumer which reads the bundle's files can know."""
        return tokenizer_alone(self.session.bundle, self.texts) or self.rows

    @property
    def pad(self) -> int:
        """The id that fills rows."""
        recorded = self.record.pad_token_id
        return self.session.text_spec.pad_token_id if recorded is None else recorded

    @cached_property
    def image_names(self) -> list[str]:
        """The files of the images that were answered."""
        return [asked_images(self.record)[i][0] for i in self.answers.images]

    @cached_property
    def images(self) -> list[Image.Image]:
        """The images, decoded."""
        records = [asked_images(self.record)[i][1] for i in self.answers.images]
        return [open_image(image_content(self.session.bundle, image), name=image.file) for image in records]

    @property
    def image_spec(self) -> ImageSpec | None:
        """How images are prepared; None where they become no single square."""
        spec = self.session.manifest.image
        return spec if isinstance(spec, ImageSpec) else None

    @cached_property
    def pixels(self) -> list[Array] | None:
        """The original's pixels, float32 (3, S, S); None where this machine does not make them from the files."""
        spec = self.image_spec
        if spec is None:
            return None
        made = []
        for number, image in zip(self.answers.images, self.images, strict=True):
            try:
                made.append(preprocess_image(image, spec))
            except InputError:
                return None
            if digest(levels(made[-1], self.record.black, self.record.white)[0]) != self._digest(number):
                return None
        return made

    @cached_property
    def other_forms(self) -> list[list[tuple[ImageSpec, Array]]]:
        """For each image what libraries may make of preprocessor_config.json, and how, where it is something else."""
        spec, own = self.image_spec, self.pixels
        if spec is None or own is None or PREPROCESSOR_NAME not in self.session.manifest.files:
            return [[] for _ in self.images]
        found: list[list[tuple[ImageSpec, Array]]] = []
        for image, ours in zip(self.images, own, strict=True):
            seen, forms = [ours], list[tuple[ImageSpec, Array]]()
            for other in consumer_specs(spec):
                made = prepared(image, other, preprocess_image)
                if made is not None and not any(np.array_equal(made, known) for known in seen):
                    seen.append(made)
                    forms.append((other, made))
            found.append(forms)
        return found

    def _digest(self, number: int) -> str:
        return asked_images(self.record)[number][1].sha256

    def encoder(self, kind: str) -> EncoderSpec | None:
        """The encoder of "image" or "text" whose recorded vectors are embeddings, None where there is none."""
        task = self.session.manifest.task(EmbedSpec)
        found: EncoderSpec | None = None if task is None else getattr(task, kind)
        if found is None or found.pooling != "in_graph" or found.part not in self.record.vectors:
            return None
        return found if found.output in self.record.vectors[found.part] else None

    def recorded(self, kind: str) -> Array | None:
        """The original's vectors, one row for each item that was answered, as the graph gives them."""
        encoder = self.encoder(kind)
        if encoder is None:
            return None
        rows: Array = self.record.vectors[encoder.part][encoder.output]
        if kind == "text":
            return rows[list(self.answers.texts)]
        places = {image.file: i for i, image in enumerate(self.record.images)}
        asked = asked_images(self.record)
        return rows[[places[asked[i][1].file] for i in self.answers.images]]

    def close(self, rows: Array, expected: Array) -> Array:
        """Which rows agree within the gate of the precision, whatever their lengths; bool (N,)."""
        left, right = unit(rows), unit(expected)
        limit = np.inf if self.gate.max_abs_relative is None else self.gate.max_abs_relative
        near: Array = (left * right).sum(axis=1) >= self.gate.cosine
        near &= np.abs(left - right).max(axis=1) <= limit
        return near

    def run_texts(self, rows: Sequence[Row], lengths: Sequence[int] | None = None, run: Run | None = None) -> Outputs:
        """Outputs of the text part.

        Args:
            rows: token ids; a row that is shorter than the graph or the spec wants is filled up, unless `lengths` say
                that rows are fed as they are.
            lengths: how many of a row's ids its mask counts.
            run: a changed graph; None for the bundle's own.

        Returns:
            float32 (N, D) by name, of outputs of that form; nothing where the graph does not take the rows.
        """
        encoder, spec = self.encoder("text"), self.session.text_spec
        if encoder is None or not rows:
            return {}
        inputs = {tensor.name: tensor for tensor in self.session.engine(encoder.part).inputs}
        ids = inputs.get(IDS) or next(iter(inputs.values()))
        if lengths is None:
            width = ids.shape[1] if isinstance(ids.shape[1], int) else spec.least_tokens
            lengths, rows = [len(row) for row in rows], [row + (self.pad,) * (width - len(row)) for row in rows]
        found: dict[str, list[Array]] = {}
        for row, length in zip([row or (self.pad,) for row in rows], lengths, strict=True):
            mask = (np.arange(len(row)) < length)[None].astype(np.int64)
            feeds = {MASK: mask, ids.name: np.array([row], np.int64)}
            outputs = self._run(encoder.part, {n: feeds[n].astype(t.dtype) for n, t in inputs.items()}, run)
            if not outputs:
                return {}
            for name, array in outputs.items():
                if array.ndim == 2:
                    found.setdefault(name, []).append(array)
        return {name: np.concatenate(arrays) for name, arrays in found.items()}

    def run_images(self, pixels: Sequence[Array], run: Run | None = None) -> Outputs:
        """Outputs of the vision part for arrays (3, S, S), as `run_texts`."""
        encoder = self.encoder("image")
        if encoder is None or self.image_spec is None or len({array.shape for array in pixels}) != 1:
            return {}
        (entry,) = self.session.engine(encoder.part).inputs
        feeds = {entry.name: np.stack(pixels).astype(np.float32)}
        return self._run(encoder.part, feeds, run)

    def changed_graphs(self, kind: str) -> Iterator[tuple[Run, tuple[GraphChange, ...]]]:
        """Changed copies of the encoder's graph in float32; none where they cannot be made, which `untried` says."""
        encoder = self.encoder(kind)
        assert encoder is not None
        try:
            from vlm_export.lab.consumer.graphs import changed_graphs

            part = self.session.manifest.part(encoder.part)
            path = self.session.bundle.model_files(part.variant("fp32"))
            yield from changed_graphs(path, encoder.output)
        except ImportError as error:
            self.untried[kind] = f"{_UNTRIED}: {install_fix('graph')} ({error.name})"
        except VlmExportError as error:
            self.untried[kind] = f"{_UNTRIED}: {error.what}"

    def _run(self, part: str, feeds: Mapping[str, Array], run: Run | None) -> Outputs:
        try:
            return encode(run or partial(self.session.run, part), feeds)
        except InputError:  # Ids beyond the vocabulary, or another size: of a mistake nothing else can be expected.
            return {}


def unit(rows: Array) -> Array:
    """float64 rows divided by their lengths; a row of zeros stays zero."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    divided: Array = rows / np.where(lengths > 0, lengths, 1.0)
    return divided
