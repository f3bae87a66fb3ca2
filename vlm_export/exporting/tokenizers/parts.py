"""The files that a tokenizer may come in, read as data: bounded, of the right types, without what names code.

Torch-free. What the fields mean is transformers' business (`library_tokenizer`); here it is made sure that they are
what their names say before the library sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.errors import InputError
from vlm_export.exporting.tokenizers.openai_bpe import read_bounded
from vlm_export.runtime.inputs.texts import check_unicode

JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
VOCAB, MERGES, VOCAB_TEXT, PIECES = "vocab.json", "merges.txt", "vocab.txt", "spiece.model"
TOKENIZER_FILES = (JSON, CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, VOCAB, MERGES, VOCAB_TEXT, PIECES)
OPEN_CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"

MAX_ADDED_TOKENS = 1 << 16
_MAX_TOKEN_ID = (1 << 31) - 1
# Of tokenizer_config.json and special_tokens_map.json; those that name code, files or templates stay behind.
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "add_bos_token": (bool,),
    "add_eos_token": (bool,),
    "add_prefix_space": (bool,),
    "clean_up_tokenization_spaces": (bool,),
    "do_lower_case": (bool,),
    "errors": (str,),
    "max_len": (int, float),
    "model_max_length": (int, float),
    "pad_token_type_id": (int,),
    "padding_side": (str,),
    "split_special_tokens": (bool,),
    "strip_accents": (bool,),
    "tokenize_chinese_chars": (bool,),
    "tokenizer_class": (str,),
    "trim_offsets": (bool,),
    "truncation_side": (str,),
}
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
_FIX = "get the tokenizer's files again from the checkpoint's publisher, or pass --tokenizer PATH"


def text_of(path: Path) -> str:
    """The content of a text file; InputError when it is too large or not UTF-8."""
    try:
        return read_bounded(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("a tokenizer file is not UTF-8", where=str(path), got=str(error)) from error


def fields_checked(path: Path) -> dict[str, Any]:
    """What tokenizer_config.json or special_tokens_map.json says about the tokenizer; null fields are left out.

    Tokens that are objects are marked as transformers marks them where it does not know them by their place.

    Raises:
        InputError: a field has another type than its meaning needs.
    """
    data = json_object_from_bytes(read_bounded(path), str(path))
    kept: dict[str, Any] = {}
    for key, value in data.items():
        where = f"{path}: {key}"
        if value is None:
            continue
        if key in _FIELDS:
            if not isinstance(value, _FIELDS[key]) or (isinstance(value, bool) and bool not in _FIELDS[key]):
                raise _malformed(where, " or ".join(kind.__name__ for kind in _FIELDS[key]), value)
            kept[key] = value
        elif key == "added_tokens_decoder":
            kept[key] = _tokens_by_id(value, where)
        elif key in _LISTS:
            by_place = path.name == SPECIAL_TOKENS and key == "extra_special_tokens"
            kept[key] = _token_list(value, where, by_place)
        elif key.endswith("_token") and isinstance(value, str | dict):
            kept[key] = _token(value, where, path.name == SPECIAL_TOKENS)
    return kept


def added_tokens_checked(path: Path) -> dict[str, int]:
    """added_tokens.json: token → id; InputError when it is anything else."""
    data = json_object_from_bytes(read_bounded(path), str(path))
    if len(data) > MAX_ADDED_TOKENS:
        raise _malformed(str(path), f"at most {MAX_ADDED_TOKENS} tokens", len(data))
    for token, token_id in data.items():
        _check_id(token_id, f"{path}: {token!r:.80}")
        _check_token(token, str(path))
    if len(set(data.values())) < len(data):
        raise _malformed(str(path), "an id of its own for each token", "two tokens with one id")
    return data


def vocab_checked(path: Path) -> dict[str, int]:
    """vocab.json: token → id; InputError when it is anything else."""
    vocab = json_object_from_bytes(read_bounded(path), str(path))
    if not vocab or not all(
        isinstance(token_id, int) and not isinstance(token_id, bool) and 0 <= token_id <= _MAX_TOKEN_ID
        for token_id in vocab.values()
    ):
        raise InputError("vocab.json is malformed", where=str(path), expected="token to id", fix=_FIX)
    return vocab


def merges_checked(path: Path) -> list[tuple[str, str]]:
    """merges.txt: two symbols a line; InputError when a line has another number."""
    merges: list[tuple[str, str]] = []
    # Only at line feeds: a symbol may be another of Unicode's line separators.
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        symbols = line.removesuffix("\r").split(" ")
        if symbols == [""] or line.startswith("#version"):
            continue
        if len(symbols) != 2 or not all(symbols):
            where = f"{path}: line {number}"
            raise InputError("merges.txt is malformed", where=where, expected="two symbols", got=repr(line[:80]))
        merges.append((symbols[0], symbols[1]))
    return merges


def wordpieces_checked(path: Path, required: tuple[str, ...]) -> list[str]:
    """The tokens of vocab.txt in the order of their ids.

    Args:
        required: special tokens that it has to hold.

    Raises:
        InputError: a line is no token or repeats one, or a special token is missing.
    """
    # Only at line feeds, as above.
    lines = [line.removesuffix("\r") for line in text_of(path).removesuffix("\n").split("\n")]
    seen: set[str] = set()
    for number, token in enumerate(lines, start=1):
        if not token or any(character.isspace() for character in token) or token in seen:
            raise InputError(
                "vocab.txt is malformed",
                where=f"{path}: line {number}",
                expected="one token, without white space, that no other line holds",
                got=repr(token[:80]),
                fix=_FIX,
            )
        seen.add(token)
    missing = [token for token in required if token not in seen]
    if missing:
        raise InputError(
            "vocab.txt is not BERT's",
            where=str(path),
            expected=f"lines {', '.join(required)}",
            got=f"no {', '.join(missing)} in {len(lines)} lines",
            fix=_FIX,
        )
    return lines


def _tokens_by_id(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > MAX_ADDED_TOKENS:
        raise _malformed(where, f"at most {MAX_ADDED_TOKENS} tokens by id", type(value).__name__)
    for key in value:
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise _malformed(where, "ids as keys", key)
        _check_id(int(key), where)
    tokens = {key: _token(token, f"{where}: {key}", by_place=True) for key, token in value.items()}
    if any(isinstance(token, str) for token in tokens.values()):
        raise _malformed(where, "an object for each token", next(iter(tokens.values())))
    return tokens


def _token_list(value: Any, where: str, by_place: bool) -> Any:
    if isinstance(value, dict):
        return {key: _token(token, where, by_place) for key, token in value.items()}
    if not isinstance(value, list) or len(value) > MAX_ADDED_TOKENS:
        raise _malformed(where, "a list of tokens", value)
    tokens = [_token(token, where, by_place) for token in value]
    for token in tokens:
        if by_place and isinstance(token, dict):
            token.pop("special", None)
    return tokens


def _token(value: Any, where: str, by_place: bool) -> Any:
    """A token as a string, or as an object of its content and flags.

    Args:
        by_place: its place alone says that it is a token, and a special one.
    """
    if isinstance(value, str):
        _check_token(value, where)
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise _malformed(where, "a token, or an object with its content", value)
    _check_token(value["content"], where)
    flags = {key: value[key] for key in _FLAGS if key in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise _malformed(where, "true or false for each flag", value)
    return {"content": value["content"], **flags, **({} if by_place else {"__type": "AddedToken"})}


def _check_token(token: str, where: str) -> None:
    check_unicode(token, where)
    if not token:
        raise _malformed(where, "a token", token)


def _check_id(token_id: Any, where: str) -> None:
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id <= _MAX_TOKEN_ID:
        raise _malformed(where, "an id", token_id)


def _malformed(where: str, expected: str, got: Any) -> InputError:
    return InputError("a tokenizer's file is malformed", where=where, expected=expected, got=f"{got!r:.80}", fix=_FIX)
