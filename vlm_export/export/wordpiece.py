"""BERT's WordPiece as `tokenizer.json`, from the vocabulary file, with the two tokens that BLIP adds to it.

Facts: `BasicTokenizer` and `WordpieceTokenizer` in google-research/bert tokenization.py (eedf571), uncased;
`init_tokenizer` in salesforce/BLIP models/blip.py (056a169) adds [DEC], then [ENC].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vlm_export.errors import InputError
from vlm_export.specs import TextSpec

BERT_VOCAB_SIZE = 30_522
"""Of bert-base-uncased."""

DECODER_TOKEN = "[DEC]"
ENCODER_TOKEN = "[ENC]"
_ADDED = (DECODER_TOKEN, ENCODER_TOKEN)
_PAD, _UNKNOWN, _START, _END, _MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
_REQUIRED = (_PAD, _UNKNOWN, _START, _END)
_CONTINUED = "##"
_LONGEST_WORD_CHARACTERS = 100
_FIX = "use the vocabulary that the checkpoint was trained with"


def is_wordpiece_vocab(raw: bytes) -> bool:
    """Whether the content is a BERT vocabulary: one token a line, with [CLS] and [SEP] among them."""
    return {_START.encode(), _END.encode()} <= {line.rstrip(b"\r") for line in raw.split(b"\n")}


def is_wordpiece(tokenizer: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` splits words into WordPieces."""
    return isinstance(tokenizer.model, models.WordPiece)


def tokenizer_json_from_wordpiece_vocab(text: str, where: str) -> str:
    """`tokenizer.json` from an uncased `vocab.txt`, whose line numbers are the ids; texts become [CLS] … [SEP].

    Raises:
        InputError: a line is no token or repeats one, or a special token is missing.
    """
    vocab = _vocab_from_lines(text, where)
    tokenizer = Tokenizer(
        models.WordPiece(
            vocab,
            unk_token=_UNKNOWN,
            max_input_chars_per_word=_LONGEST_WORD_CHARACTERS,
            continuing_subword_prefix=_CONTINUED,
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUED, cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START}:0 $A:0 {_END}:0",
        pair=f"{_START}:0 $A:0 {_END}:0 $B:1 {_END}:1",
        special_tokens=[(_START, vocab[_START]), (_END, vocab[_END])],
    )
    tokenizer.add_special_tokens([_special(token) for token in (*_REQUIRED, _MASK, *_ADDED) if token in vocab])
    result: str = tokenizer.to_str()
    return result


def wordpiece_fitted(tokenizer: Any, text: str, spec: TextSpec, where: str) -> str:
    """The content of a tokenizer.json with [DEC] and [ENC], where the model has ids for them.

    A vocabulary of the model's size stays as it is, apart from these two being special tokens. One that is two smaller
    gets them as its last ids.

    Args:
        tokenizer: what `text` holds; changed by this.

    Raises:
        InputError: the vocabulary has another size, the two tokens stand elsewhere, or its padding is not the model's.
    """
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    size, wanted = max(vocab.values()) + 1, spec.vocab_size
    if size not in (wanted, wanted - len(_ADDED)):
        raise InputError(
            "the vocabulary is not the model's",
            where=where,
            expected=f"{wanted} tokens, or {wanted - len(_ADDED)} to which {' and '.join(_ADDED)} are added",
            got=f"{size} tokens",
            fix=_FIX,
        )
    _check_padding(tokenizer, spec, where)
    if size == wanted and not set(_ADDED) & set(vocab):
        return text
    before = _special_tokens(tokenizer)
    tokenizer.add_special_tokens([_special(token) for token in _ADDED])
    _check_places(tokenizer, spec, where)
    if set(_ADDED) <= before:
        return text
    fitted: str = tokenizer.to_str()
    return fitted


def wordpiece_config(tokenizer: Any, spec: TextSpec) -> dict[str, Any]:
    """Fields of `tokenizer_config.json` for transformers' BertTokenizer."""
    present = set(tokenizer.get_vocab(with_added_tokens=True))
    first, *_ = tokenizer.encode("").ids
    named = {
        "unk_token": tokenizer.model.unk_token,
        "sep_token": tokenizer.id_to_token(spec.end_token_id),
        "pad_token": tokenizer.id_to_token(spec.pad_token_id),
        "cls_token": tokenizer.id_to_token(first),
        "mask_token": _MASK,
        "bos_token": DECODER_TOKEN,
    }
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        **{key: token for key, token in named.items() if token in present},
        **({"additional_special_tokens": [ENCODER_TOKEN]} if ENCODER_TOKEN in present else {}),
    }


def _vocab_from_lines(text: str, where: str) -> dict[str, int]:
    # Only at line feeds: a token may be another of Unicode's line separators.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    vocab: dict[str, int] = {}
    for number, token in enumerate(lines, start=1):
        if not token or any(character.isspace() for character in token) or token in vocab:
            raise InputError(
                "vocab.txt is malformed",
                where=f"{where}: line {number}",
                expected="one token, without white space, that no other line holds",
                got=repr(token[:80]),
                fix=_FIX,
            )
        vocab[token] = number - 1
    missing = [token for token in _REQUIRED if token not in vocab]
    if missing:
        raise InputError(
            "vocab.txt is not BERT's",
            where=where,
            expected=f"lines {', '.join(_REQUIRED)}",
            got=f"no {', '.join(missing)} in {len(lines)} lines",
            fix=_FIX,
        )
    return vocab


def _check_padding(tokenizer: Any, spec: TextSpec, where: str) -> None:
    pad_token_id = tokenizer.token_to_id(_PAD)
    if pad_token_id != spec.pad_token_id:
        raise InputError(
            "the vocabulary's padding is not the model's",
            where=where,
            expected=f"{_PAD} with id {spec.pad_token_id}",
            got="no such token" if pad_token_id is None else f"id {pad_token_id}",
            fix=_FIX,
        )


def _check_places(tokenizer: Any, spec: TextSpec, where: str) -> None:
    wanted = {token: spec.vocab_size - len(_ADDED) + i for i, token in enumerate(_ADDED)}
    found: Mapping[str, int] = {token: tokenizer.token_to_id(token) for token in _ADDED}
    if found != wanted:
        raise InputError(
            f"{' and '.join(_ADDED)} do not have the model's ids",
            where=where,
            expected=", ".join(f"{token} {token_id}" for token, token_id in wanted.items()),
            got=", ".join(f"{token} {token_id}" for token, token_id in found.items()),
            fix=_FIX,
        )


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _special_tokens(tokenizer: Any) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
