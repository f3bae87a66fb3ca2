"""A chat model's tokenizer.json and tokenizer_config.json: with the tokens that the checkpoint's code appends.

Source: huggingface/nanoVLM data/processors.py (4e0c096), which hands its extra tokens to transformers' AutoTokenizer
and pads with the end token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken

from vlm_export.errors import InputError
from vlm_export.runtime.inputs.texts import check_unicode
from vlm_export.specs import TextSpec

_FIX = "use the tokenizer that the checkpoint's config names (lm_tokenizer)"


def chat_fitted(tokenizer: Any, text: str, spec: TextSpec, where: str) -> str:
    """The content of a tokenizer.json with the spec's added tokens; as it stands where it has them.

    Args:
        tokenizer: what `text` holds; changed by this.

    Raises:
        InputError: an added token is no Unicode, or they do not get the last ids of the model's vocabulary.
    """
    for token in spec.added_tokens:
        check_unicode(token, "added tokens of the checkpoint's config")
    before = tokenizer.get_vocab(with_added_tokens=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in spec.added_tokens])
    first = spec.vocab_size - len(spec.added_tokens)
    for i, token in enumerate(spec.added_tokens):
        found = tokenizer.token_to_id(token)
        if found != first + i:
            raise InputError(
                "the tokenizer's vocabulary is not the model's",
                where=where,
                expected=f"{first} tokens before the added ones: {token} has id {first + i}",
                got=f"id {found}, after a vocabulary of {len(before)}",
                fix=_FIX,
            )
    if set(spec.added_tokens) <= set(before):
        return text
    fitted: str = tokenizer.to_str()
    return fitted


def chat_config(tokenizer: Any, given: Mapping[str, Any], spec: TextSpec, where: str) -> dict[str, Any]:
    """`tokenizer_config.json`.

    Args:
        given: the fields of the tokenizer's own file.

    Raises:
        InputError: the tokenizer ends texts with another token than the model.
    """
    end = tokenizer.id_to_token(spec.end_token_id)
    stated = given.get("eos_token", end)
    stated = stated.get("content") if isinstance(stated, dict) else stated
    if end is None or stated != end:
        raise InputError(
            "the tokenizer ends texts with another token than the model",
            where=f"{where}: eos_token",
            expected=f"the token with id {spec.end_token_id}, {end!r}",
            got=repr(stated),
            fix=_FIX,
        )
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: value for key, value in given.items() if key != "added_tokens_decoder"},
        "eos_token": end,
        "pad_token": tokenizer.id_to_token(spec.pad_token_id),
        "additional_special_tokens": list(spec.added_tokens),
        "model_max_length": spec.context_length,
    }
