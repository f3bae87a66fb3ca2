"""Tasks: what a model can be asked, as typed data that a family states and a manifest carries.

`runtime/tasks/` has one module for each kind. A task names the parts that it runs and holds what its original's own
functions take as defaults.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias, TypeVar

from vlm_export.specs.codec import Spec, above, below, between
from vlm_export.specs.text import TokenId

FirstToken: TypeAlias = Literal["cls", "enc"]
ChatLayout: TypeAlias = Literal["prepended", "placeholders", "tiles"]
Pooling: TypeAlias = Literal["in_graph", "mean"]
Activation: TypeAlias = Literal["softmax", "sigmoid"]
SamplingOrder: TypeAlias = Literal["temperature_first", "temperature_last"]
"""How temperature, top-k and top-p combine. "temperature_first" (transformers): temperature, top-k, then top-p with the
token that crosses the threshold. "temperature_last" (huggingface/nanoVLM): top-k, then top-p without that token, and
the temperature last."""
Tokens: TypeAlias = Annotated[int, between(1, 1 << 20)]
Beams: TypeAlias = Annotated[int, between(1, 1000)]
_MAX_LOG_SCALE = 100.0


class _Task(Spec):
    """What every task tells of itself; `PARTS` are the fields that name the parts that it runs."""

    PARTS: ClassVar[tuple[str, ...]] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the task runs."""
        return tuple(getattr(self, name) for name in self.PARTS)

    @property
    def token_ids(self) -> frozenset[int]:
        """Ids that the task writes, or that end what it writes."""
        return frozenset()


@dataclass(frozen=True)
class ScoreSpec(Spec):
    """How cosines become probabilities: activation(exp(logit_scale) · cosine + logit_bias).

    Attributes:
        activation: "softmax" over the labels of an image, or "sigmoid" of each label by itself.
        logit_scale: natural logarithm of the factor, as checkpoints store it.
        logit_bias: added to the scaled cosine.
    """

    activation: Activation
    logit_scale: Annotated[float, between(-_MAX_LOG_SCALE, _MAX_LOG_SCALE)]
    logit_bias: Annotated[float, between(-1e6, 1e6)] = 0.0

    @property
    def scale(self) -> float:
        """The factor on cosines."""
        return math.exp(self.logit_scale)


@dataclass(frozen=True)
class EncoderSpec(Spec):
    """The part and the output of it that hold an embedding.

    Attributes:
        pooling: "in_graph" where the output is float32 (B, D) already, "mean" where it is (B, L, D) and the embedding
            is the mean over L.
    """

    part: str
    output: str
    pooling: Pooling = "in_graph"


@dataclass(frozen=True)
class EmbedSpec(_Task):
    """Images and texts to unit-length embeddings in one space.

    Attributes:
        image, text: the encoders; one of them is None where the checkpoint is the other tower alone.
        score: how cosines become probabilities; None where the model was not trained for that.
    """

    image: EncoderSpec | None
    text: EncoderSpec | None
    score: ScoreSpec | None = None
    kind: Literal["embed"] = "embed"

    def check(self) -> None:
        if self.image is None and self.text is None:
            raise self.refusal("image", "an encoder of images, of texts, or both")
        if self.score is not None and (self.image is None or self.text is None):
            raise self.refusal("score", "nothing (null): one encoder alone compares nothing")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the task runs."""
        return tuple(encoder.part for encoder in (self.image, self.text) if encoder is not None)

    def limited_to(self, parts: Collection[str]) -> EmbedSpec | None:
        """The task with the encoders among those parts, None where there is none; one alone scores nothing."""
        image, text = (None if e is None or e.part not in parts else e for e in (self.image, self.text))
        if image is None and text is None:
            return None
        return EmbedSpec(image, text, None if image is None or text is None else self.score)


@dataclass(frozen=True)
class SpecialTokens(Spec):
    """Ids of the tokens that the runtime writes itself.

    Attributes:
        cls: starts a text; sep: ends one; pad: fills a batch.
        decoder_start: starts what is decoded ([DEC]).
        encoder_start: starts a text that attends to an image ([ENC]).
    """

    cls: TokenId
    sep: TokenId
    pad: TokenId
    decoder_start: TokenId
    encoder_start: TokenId

    @property
    def ids(self) -> frozenset[int]:
        """All of them."""
        return frozenset((self.cls, self.sep, self.pad, self.decoder_start, self.encoder_start))

    def first(self, convention: FirstToken) -> int:
        """The id that starts a text under that convention."""
        return self.encoder_start if convention == "enc" else self.cls


@dataclass(frozen=True)
class MatchSpec(_Task):
    """Whether a text fits an image, from both together.

    Attributes:
        vision, text, multimodal: the parts: image states, the text alone, and the text that attends to the image.
        tokens: the special tokens' ids.
        first_token: what the text starts with.
        max_text_tokens: its greatest length.
    """

    tokens: SpecialTokens
    first_token: FirstToken
    max_text_tokens: Annotated[int, between(2, 1 << 20)]
    vision: str = "vision"
    text: str = "text"
    multimodal: str = "multimodal_text"
    kind: Literal["match"] = "match"
    PARTS = ("vision", "text", "multimodal")

    @property
    def token_ids(self) -> frozenset[int]:
        """Ids that the task writes."""
        return self.tokens.ids


@dataclass(frozen=True)
class CaptionSpec(_Task):
    """A sentence about an image; lengths count the prompt's tokens.

    Attributes:
        tokens: the special tokens' ids.
        vision, cross_key_values, decoder: the parts: image states, their keys and values, and the decoder.
    """

    tokens: SpecialTokens
    prompt: str
    beams: Beams
    max_length: Tokens
    min_length: Annotated[int, between(0)]
    vision: str = "vision"
    cross_key_values: str = "cross_key_values"
    decoder: str = "text_decoder"
    kind: Literal["caption"] = "caption"
    PARTS = ("vision", "cross_key_values", "decoder")

    def check(self) -> None:
        _check_lengths(self)

    @property
    def token_ids(self) -> frozenset[int]:
        """Ids that the task writes."""
        return self.tokens.ids


@dataclass(frozen=True)
class AnswerSpec(_Task):
    """An answer to a question about an image, decoded or ranked among candidates.

    Attributes:
        tokens: the special tokens' ids.
        question_first_token: what the question starts with.
        label_smoothing: of the loss that ranks candidates, at least 0 and below 1.
        attend_padding: whether the decoder attends to the padding of shorter questions, as the original does.
        vision, encoder, cross_key_values, decoder: the parts: image states, the question that attends to them, its
            keys and values, and the decoder.
    """

    tokens: SpecialTokens
    question_first_token: FirstToken
    max_question_tokens: Annotated[int, between(2, 1 << 20)]
    beams: Beams
    max_length: Tokens
    min_length: Annotated[int, between(0)]
    label_smoothing: Annotated[float, between(0, 1), below(1)]
    attend_padding: bool
    vision: str = "vision"
    encoder: str = "vqa_encoder"
    cross_key_values: str = "cross_key_values"
    decoder: str = "text_decoder"
    kind: Literal["answer"] = "answer"
    PARTS = ("vision", "encoder", "cross_key_values", "decoder")

    def check(self) -> None:
        _check_lengths(self)

    @property
    def token_ids(self) -> frozenset[int]:
        """Ids that the task writes."""
        return self.tokens.ids


def _check_lengths(spec: CaptionSpec | AnswerSpec) -> None:
    if spec.min_length > spec.max_length:
        raise spec.refusal("min_length", f"an integer from 0 to {spec.max_length}")


@dataclass(frozen=True)
class SamplingSpec(Spec):
    """The distribution that the original draws from; None keeps all tokens."""

    top_k: Annotated[int, between(1)] | None
    top_p: Annotated[float, above(0), between(0, 1)] | None
    temperature: Annotated[float, above(0)]
    order: SamplingOrder = "temperature_first"


@dataclass(frozen=True)
class PromptSpec(Spec):
    """The text around a question ("tiles": around the images and the question)."""

    before: str
    after: str


@dataclass(frozen=True)
class ChatSpec(_Task):
    """How a prompt of images and words is written and answered by one decoder.

    Attributes:
        layout: where an image's features go. "prepended": before the embeddings of the text, one image.
            "placeholders": in the places of `image_token`, before the text. "tiles": the same for each tile, between
            markers, inside the user's turn.
        tokens_per_tile: features of one tile, or of one image without tiles.
        image_token, image_token_id: the placeholder of one feature; None when "prepended".
        global_image_token: stands before the features of the whole image; None where the checkpoint has none.
        tile_tokens: "r1c1" → what stands before the features of the tile in the first row and column, and so on.
        prompt: the text around the question.
        context_length: positions of the decoder, features included.
        max_prompt_tokens: what the checkpoint was trained with; the original does not enforce it, nor does the runtime.
        eos_token_ids: end an answer.
        pad_token_id: fills the left of shorter rows.
        max_new_tokens: of an answer, in the original's script.
        sampling: what the original's script draws from.
        vision, embed_tokens, decoder: the parts: features of images, embeddings of tokens, and what reads both.
    """

    layout: ChatLayout
    tokens_per_tile: Tokens
    image_token: str | None
    image_token_id: TokenId | None
    global_image_token: str | None
    tile_tokens: Mapping[str, str]
    prompt: PromptSpec
    context_length: Annotated[int, between(2, 1 << 20)]
    max_prompt_tokens: Annotated[int, between(1)] | None
    eos_token_ids: tuple[TokenId, ...]
    pad_token_id: TokenId
    max_new_tokens: Tokens
    sampling: SamplingSpec
    vision: str = "vision_encoder"
    embed_tokens: str = "embed_tokens"
    decoder: str = "decoder"
    kind: Literal["chat"] = "chat"
    PARTS = ("vision", "embed_tokens", "decoder")

    @property
    def token_ids(self) -> frozenset[int]:
        """Ids that the task writes, or that end an answer."""
        placeholder = () if self.image_token_id is None else (self.image_token_id,)
        return frozenset((self.pad_token_id, *self.eos_token_ids, *placeholder))

    def check(self) -> None:
        has_token = bool(self.image_token) and self.image_token_id is not None
        if has_token == (self.layout == "prepended"):
            expected = f"a token and its id in the layout {self.layout!r}, unless 'prepended'"
            raise self.refusal("image_token", expected)
        if self.tokens_per_tile > self.context_length:
            raise self.refusal("tokens_per_tile", f"an integer from 1 to {self.context_length}")
        if self.layout != "tiles" and (self.tile_tokens or self.global_image_token is not None):
            raise self.refusal("tile_tokens", f"no markers of tiles in the layout {self.layout!r}")


@dataclass(frozen=True)
class FeatureSpec(_Task):
    """Features of an image's slices, for a language model that this project does not run.

    Attributes:
        part: what makes the features.
    """

    part: str
    kind: Literal["features"] = "features"
    PARTS = ("part",)


TaskSpec: TypeAlias = EmbedSpec | MatchSpec | CaptionSpec | AnswerSpec | ChatSpec | FeatureSpec
TaskKind: TypeAlias = Literal["embed", "match", "caption", "answer", "chat", "features"]
FoundTask = TypeVar("FoundTask", bound=TaskSpec)


def find_task(tasks: Sequence[TaskSpec], kind: type[FoundTask]) -> FoundTask | None:
    """The task of that kind, None where there is none."""
    return next((task for task in tasks if isinstance(task, kind)), None)


def limited_tasks(tasks: Sequence[TaskSpec], parts: Collection[str]) -> tuple[TaskSpec, ...]:
    """The tasks that those parts can do; embedding needs no more than one of its encoders."""
    found = (task.limited_to(parts) if isinstance(task, EmbedSpec) else task for task in tasks)
    return tuple(task for task in found if task is not None and set(task.parts) <= set(parts))
