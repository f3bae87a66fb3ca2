"""Whether a tokenizer is the model's: ids against rows, padding against pooling, case, and the tokens added to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders

from vlm_export.errors import InputError
from vlm_export.runtime.inputs.texts import check_unicode
from vlm_export.specs import TextCase, TextSpec

# Embedding tables are padded to multiples of these (transformers' `pad_to_multiple_of`, for matrix units).
_ROW_MULTIPLES = (8, 16, 32, 64, 128)
_FIX = "use the tokenizer that the checkpoint was trained with: --tokenizer PATH"
CHAT_FIX = "use the tokenizer that the checkpoint's config names (lm_tokenizer)"
BERT_VOCABULARIES: Mapping[int, str] = {30_522: "bert-base-uncased", 21_128: "bert-base-chinese"}
"""Number of tokens → the model whose vocabulary has so many."""
_MARKS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # in order: one may make the next


def check_rows(tokenizer: Any, spec: TextSpec, where: str, *, reserved: int = 0, is_whole: bool = False) -> str | None:
    """Compares a tokenizer's ids with the rows of the model's token embedding; more ids than rows are refused before.

    Args:
        reserved: rows that the model's own code uses.
        is_whole: the tokenizer is the checkpoint's own, and its files would name added tokens. Rows without an id are
            then the checkpoint's own, and its library has no token for them either.

    Returns:
        A warning where rows are left over, or None.

    Raises:
        InputError: rows are left over that neither padding of the table nor the checkpoint's own files explain.
    """
    rows, known = spec.vocab_size, max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    spare = rows - known
    if spare <= reserved:
        return None
    stated = f"the token embedding has {rows} rows, and the tokenizer knows {known} ids"
    if any(rows == -(-known // multiple) * multiple for multiple in _ROW_MULTIPLES):
        return f"{stated}: the table was padded, and no text reaches the last {spare} rows"
    if is_whole:
        return f"{stated}: no text reaches the last {spare} rows, with the original neither"
    raise InputError(
        "the vocabulary is not the model's",
        where=where,
        expected=f"{rows} ids, as many as the token embedding has rows",
        got=f"{known} ids; the {spare} others may be tokens that were added in training, which a vocabulary alone does "
        "not name (added_tokens.json or tokenizer.json does)",
        fix=f"put added_tokens.json beside the vocabulary, or {_FIX}",
    )


def check_padding(tokenizer: Any, spec: TextSpec, side: str, where: str) -> None:
    """InputError where padding would change what the model makes of a text, so that its batch decides the result.

    Args:
        side: where the tokenizer pads.
        where: the file that says so.
    """
    if side != "right":
        raise InputError(
            "the tokenizer pads texts on the left, which moves their tokens to other positions: what the model makes "
            "of a text then depends on the others of its batch",
            where=f"{where}: padding_side",
            expected="right",
            got=side,
            fix="if the model was trained with padding on the right, as published ones are, state padding_side right",
        )
    if spec.pooling == "highest_id" and spec.pad_token_id > spec.end_token_id:
        shown = [tokenizer.id_to_token(token_id) for token_id in (spec.end_token_id, spec.pad_token_id)]
        raise InputError(
            "the model pools a text at its highest id, and padding has a higher one than the end of the text",
            where=f"{where}: pad_token",
            expected=f"an id up to that of {shown[0]!r:.80}, {spec.end_token_id}",
            got=f"{shown[1]!r:.80}, {spec.pad_token_id}",
            fix="if the model was trained with the end token as padding, state it as pad_token; or state the end "
            "token's id as eos_token_id in config.json, where the model was trained so",
        )


def letter_case(tokenizer: Any) -> TextCase:
    """Whether a tokenizer's own normalizer makes letters lower case."""
    if tokenizer.normalizer is None:
        return "kept"
    return "lower" if any(map(_lowers, _steps(json.loads(tokenizer.normalizer.__getstate__())))) else "kept"


def _steps(stage: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for step in stage.get("normalizers", ()):
        yield from _steps(step)
    yield stage


def _lowers(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Lowercase" or (step["type"] == "BertNormalizer" and bool(step["lowercase"]))


def is_wordpiece_vocab(raw: bytes) -> bool:
    """Whether the content is a BERT vocabulary: one token a line, with [CLS] and [SEP] among them."""
    return {b"[CLS]", b"[SEP]"} <= {line.rstrip(b"\r") for line in raw.split(b"\n")}


def has_room(tokenizer: Any, spec: TextSpec) -> bool:
    """Whether the model has rows for the tokens that its code appends, behind those of the tokenizer's vocabulary."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    return max(vocab.values()) + 1 != spec.vocab_size or bool(set(spec.added_tokens) & set(vocab))


def with_added_tokens(tokenizer: Any, text: str, spec: TextSpec, where: str, fix: str = _FIX) -> str:
    """The content of a tokenizer.json with the tokens that the checkpoint's own code appends, as special ones.

    Where it has them already it stays as it is. Sources: `init_tokenizer` in salesforce/BLIP models/blip.py (056a169)
    adds [DEC], then [ENC]; huggingface/nanoVLM data/processors.py (4e0c096) adds what its config names.

    Args:
        tokenizer: what `text` holds; changed by this.

    Raises:
        InputError: an added token is no Unicode, or they do not get the last ids of the model's vocabulary.
    """
    added = spec.added_tokens
    for token in added:
        check_unicode(token, "added tokens of the checkpoint's config")
    before = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    known = len(tokenizer.get_vocab(with_added_tokens=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    first = spec.vocab_size - len(added)
    wanted = {token: first + i for i, token in enumerate(added)}
    found = {token: tokenizer.token_to_id(token) for token in added}
    if found != wanted:
        raise InputError(
            "the tokenizer's vocabulary is not the model's: its added tokens have other ids",
            where=where,
            expected=f"{_few_ids(wanted)}, after {first} others",
            got=f"{_few_ids(found)}, after a vocabulary of {known}",
            fix=fix,
        )
    return text if set(added) <= before else str(tokenizer.to_str())


def closed_up(text: str) -> str:
    """The content of a tokenizer.json whose decoder closes up the spaces before marks; of WordPieces alone.

    transformers did so behind every decoder up to its release 4, and does where tokenizer_config.json says so.
    WordPiece's own `cleanup` acts on one token at a time. Source: `clean_up_tokenization` of transformers 4.25 and 5.23
    (tokenization_utils_base.py).
    """
    tokenizer = Tokenizer.from_str(text)
    if not isinstance(tokenizer.decoder, decoders.WordPiece):
        return text
    replaced = [decoders.Replace(mark, mark.strip()) for mark in _MARKS]
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Fuse(), *replaced])
    return str(tokenizer.to_str())


def chat_config(tokenizer: Any, given: Mapping[str, Any], spec: TextSpec, where: str) -> dict[str, Any]:
    """The `tokenizer_config.json` of a chat model, which pads with its end token.

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
            fix=CHAT_FIX,
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


def _few_ids(ids: Mapping[str, Any]) -> str:
    return ", ".join(f"{token} {token_id}" for token, token_id in list(ids.items())[:4])
