"""What `load` returns: one class for every bundle, whose tasks the bundle states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn, TypeAlias

import numpy.typing as npt

from vlm_export.bundle.manifest import Manifest
from vlm_export.errors import InputError
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.inputs.sources import Images, Unreadable
from vlm_export.runtime.session import Session
from vlm_export.runtime.tasks.answer import AnswerTask, RankedAnswer
from vlm_export.runtime.tasks.caption import CaptionTask
from vlm_export.runtime.tasks.chat import ChatTask
from vlm_export.runtime.tasks.chat_rows import RowImages
from vlm_export.runtime.tasks.embed import IMAGE_BATCH_SIZE, TEXT_BATCH_SIZE, EmbedTask
from vlm_export.runtime.tasks.features import SLICE_BATCH_SIZE, FeatureTask, SliceFeatures
from vlm_export.runtime.tasks.match import ImageTextMatch, MatchTask
from vlm_export.specs.tasks import AnswerSpec, CaptionSpec, ChatSpec, EmbedSpec, FeatureSpec, MatchSpec, TaskKind

Task: TypeAlias = AnswerTask | CaptionTask | ChatTask | EmbedTask | FeatureTask | MatchTask

_ABILITIES: Mapping[TaskKind, tuple[str, str]] = {
    "embed": ("embed images or texts", "a checkpoint with embeddings in one space for images and texts"),
    "match": ("match texts with images", "a checkpoint for retrieval, whose texts attend to images"),
    "caption": ("caption images", "a checkpoint that was trained for captions"),
    "answer": ("answer questions", "a checkpoint that was trained for questions about images"),
    "chat": ("answer in words of its own", "a checkpoint of images and words with one decoder"),
    "features": ("make features of an image's slices", "a checkpoint whose images are cut into slices"),
}
"""Kind of task → what it is, and what to export to have it; for the one error about tasks."""


class Model:
    """A bundle and all that it can do. Made by `vlm_export.load`.

    It can be pickled, also after use, and shared between threads. A method whose task the bundle lacks raises one
    InputError that says what the bundle can do.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def __reduce__(self) -> tuple[Callable[[Session], Model], tuple[Session]]:
        return Model, (self.session,)

    def __repr__(self) -> str:
        return f"<vlm_export.Model {self.manifest.name!r}: {', '.join(self.tasks) or 'no tasks'}>"

    @property
    def manifest(self) -> Manifest:
        """All that the bundle says about itself."""
        return self.session.manifest

    @property
    def precision(self) -> str:
        """The variant that is run: "fp32", "fp16", …; "bf16" for float32's graphs computed in bfloat16."""
        return self.session.precision_text

    @property
    def identity(self) -> str:
        """sha256 that names the model: equal for bundles of one checkpoint, whatever their opset or precision."""
        return self.session.identity

    @cached_property
    def tasks(self) -> Mapping[TaskKind, Task]:
        """What this bundle can do: kind of task → the object that does it, whose methods have further options."""
        made: dict[TaskKind, Task] = {}
        session, manifest = self.session, self.manifest
        if (embed := manifest.task(EmbedSpec)) is not None:
            made["embed"] = EmbedTask(session, embed)
        if (match := manifest.task(MatchSpec)) is not None and embed is not None:
            made["match"] = MatchTask(session, match, EmbedTask(session, embed))
        if (caption := manifest.task(CaptionSpec)) is not None:
            made["caption"] = CaptionTask(session, caption)
        if (answer := manifest.task(AnswerSpec)) is not None:
            made["answer"] = AnswerTask(session, answer)
        if (chat := manifest.task(ChatSpec)) is not None:
            made["chat"] = ChatTask(session, chat)
        if (features := manifest.task(FeatureSpec)) is not None:
            made["features"] = FeatureTask(session, features)
        return made

    @property
    def embedding(self) -> EmbedTask:
        """The task "embed", with all its options; InputError when the bundle has no such task."""
        task = self.tasks.get("embed")
        return task if isinstance(task, EmbedTask) else self._cannot("embed")

    @property
    def matching(self) -> MatchTask:
        """The task "match"; InputError as in `embedding`."""
        task = self.tasks.get("match")
        return task if isinstance(task, MatchTask) else self._cannot("match")

    @property
    def captioning(self) -> CaptionTask | ChatTask:
        """The task "caption" or "chat"; InputError as in `embedding`."""
        task = self.tasks.get("caption", self.tasks.get("chat"))
        return task if isinstance(task, CaptionTask | ChatTask) else self._cannot("caption")

    @property
    def answering(self) -> AnswerTask | ChatTask:
        """The task "answer" or "chat"; InputError as in `embedding`."""
        task = self.tasks.get("answer", self.tasks.get("chat"))
        return task if isinstance(task, AnswerTask | ChatTask) else self._cannot("answer")

    @property
    def chatting(self) -> ChatTask:
        """The task "chat"; InputError as in `embedding`."""
        task = self.tasks.get("chat")
        return task if isinstance(task, ChatTask) else self._cannot("chat")

    @property
    def slices(self) -> FeatureTask:
        """The task "features"; InputError as in `embedding`."""
        task = self.tasks.get("features")
        return task if isinstance(task, FeatureTask) else self._cannot("features")

    @property
    def embed_dim(self) -> int:
        """D of the embeddings."""
        return self.embedding.embed_dim

    def encode_image(
        self,
        images: Images,
        *,
        batch_size: int = IMAGE_BATCH_SIZE,
        progress: bool = False,
        unreadable: Unreadable | None = None,
    ) -> FloatArray:
        """Embeddings of images, float32 (N, D), rows of unit length; see `EmbedTask.encode_image`."""
        return self.embedding.encode_image(images, batch_size=batch_size, progress=progress, unreadable=unreadable)

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = TEXT_BATCH_SIZE,
        truncate: bool = False,
        progress: bool = False,
    ) -> FloatArray:
        """Embeddings of texts, float32 (N, D), rows of unit length; see `EmbedTask.encode_text`."""
        return self.embedding.encode_text(texts, batch_size=batch_size, truncate=truncate, progress=progress)

    def encode_ids(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> FloatArray:
        """Embeddings of token ids (N, T), float32 (N, D), rows of unit length; see `EmbedTask.encode_ids`."""
        return self.embedding.encode_ids(input_ids, attention_mask)

    def classify(
        self, images: Images, labels: Sequence[str], *, template: str = "a photo of a {}", truncate: bool = False
    ) -> FloatArray:
        """Zero-shot probabilities of labels, float32 (N, L); see `EmbedTask.classify`."""
        return self.embedding.classify(images, labels, template=template, truncate=truncate)

    def match(self, images: Images, texts: str | Sequence[str], **options: Any) -> list[ImageTextMatch]:
        """How well each text fits its image; options of `MatchTask.match`."""
        return self.matching.match(images, texts, **options)

    def caption(self, images: Images, **options: Any) -> list[str]:
        """A sentence about each image; options of `CaptionTask.caption`, or of `ChatTask.caption`."""
        return self.captioning.caption(images, **options)

    def answer(self, images: Any, questions: str | Sequence[str], **options: Any) -> list[str]:
        """An answer to each question about its images; options of `AnswerTask.answer`, or of `ChatTask.answer`."""
        return self.answering.answer(images, questions, **options)

    def rank_answers(
        self, images: Images, questions: str | Sequence[str], candidates: Sequence[str], **options: Any
    ) -> list[list[RankedAnswer]]:
        """Candidate answers to each question, best first; options of `AnswerTask.rank_answers`.

        Raises:
            InputError: the bundle ranks no answers.
        """
        task = self.answering
        if isinstance(task, ChatTask):
            return self._cannot("answer")
        return task.rank_answers(images, questions, candidates, **options)

    def stream(self, images: RowImages, question: str, **options: Any) -> Iterator[str]:
        """The answer to one question in pieces, as they come; options of `ChatTask.stream_answer`."""
        return self.chatting.stream_answer(images, question, **options)

    def features(
        self, images: Images, *, batch_size: int = SLICE_BATCH_SIZE, progress: bool = False
    ) -> list[SliceFeatures]:
        """Features of each image's slices, and the text around them; see `FeatureTask.encode_slices`."""
        return self.slices.encode_slices(images, batch_size=batch_size, progress=progress)

    def _cannot(self, kind: TaskKind) -> NoReturn:
        ability, checkpoint = _ABILITIES[kind]
        abilities = [_ABILITIES[known][0] for known in self.tasks]
        raise InputError(
            f"this bundle cannot {ability}",
            where=self.manifest.name,
            expected=f"a bundle with the task {kind!r}",
            got=f"it can {', '.join(abilities)}" if abilities else "a bundle without tasks",
            fix=f"export {checkpoint}, with all its parts",
        )
