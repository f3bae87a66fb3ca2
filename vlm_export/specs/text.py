"""How texts become token ids: what a family and a tokenizer state and the runtime executes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from vlm_export.specs.codec import Spec, between

MAX_CONTEXT_LENGTH = 1 << 20
MAX_VOCABULARY = (1 << 31) - 1

TextCleaning = Literal["openai", "open_clip", "whitespace", "lower", "canonicalize", "none"]
TextPooling = Literal["end_token", "highest_id", "first_token", "last_token", "mean"]
TextCase = Literal["lower", "kept"]
TextPadding = Literal["longest", "context"]
Side = Literal["left", "right"]
TokenId: TypeAlias = Annotated[int, between(0, MAX_VOCABULARY - 1)]


@dataclass(frozen=True)
class TextSpec(Spec):
    """Text preparation around `tokenizer.json`.

    Attributes:
        context_length: longest row of token ids, start and end tokens included.
        vocab_size: ids are in [0, vocab_size).
        end_token_id: id of end-of-text, kept by truncation.
        pad_token_id: fills the rows of a batch on the right; the model does not see it, or it was trained with it.
        cleaning: "openai" repairs mojibake, unescapes HTML twice and collapses white space before tokenizing; so does
            "open_clip", whose texts spell special tokens in another way. The next three do the same before a tokenizer
            that finds special tokens itself: "whitespace" without lower case, "lower" with it, "canonicalize" also
            without punctuation.
        adds_eos: the tokenizer itself ends every text with the end token, as encoders' do; chat models' do not.
        added_tokens: what the checkpoint's own code appends to its tokenizer, in order; the last ids of the vocabulary.
        pooling: whose state stands for a text: that of the first `end_token_id`, of the highest id, of the first
            token, or of the last position, which may be padding; or the mean of all that is not padding.
        case: whether letters become lower case before they are tokenized.
        truncation_side: where a text that is too long is cut; the special tokens around it stay.
        padding: rows become as long as the longest of their batch, or as the context, whatever the batch.

    Raises:
        InputError: a value is of another type or out of range, or an id is outside the vocabulary.
    """

    context_length: Annotated[int, between(1, MAX_CONTEXT_LENGTH)]
    vocab_size: Annotated[int, between(1, MAX_VOCABULARY)]
    end_token_id: TokenId
    pad_token_id: TokenId
    cleaning: TextCleaning
    adds_eos: bool = True
    added_tokens: tuple[str, ...] = ()
    pooling: TextPooling = "end_token"
    case: TextCase = "lower"
    truncation_side: Side = "right"
    padding: TextPadding = "longest"

    @property
    def least_tokens(self) -> int:
        """The shortest row of a batch."""
        return self.context_length if self.padding == "context" else 1

    def check(self) -> None:
        for name in ("end_token_id", "pad_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise self.refusal(name, f"an integer from 0 to {self.vocab_size - 1}")
