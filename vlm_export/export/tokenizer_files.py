"""Tokenizer files of a bundle: from the checkpoint, from `--tokenizer`, or from the vocabulary of open_clip_torch.

The kind of file decides: a tokenizer.json stands for itself, `vocab.txt` is BERT's WordPiece, merges are CLIP's BPE.
Torch-free: open_clip is located, not imported.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.errors import InputError, UsageError
from vlm_export.export.chat_tokens import chat_config, chat_fitted
from vlm_export.export.clip_bpe import (
    VOCAB_SIZE,
    read_bounded,
    tokenizer_json_from_bpe_merges,
    tokenizer_json_from_vocab,
)
from vlm_export.export.wordpiece import (
    BERT_VOCAB_SIZE,
    is_wordpiece,
    is_wordpiece_vocab,
    tokenizer_json_from_wordpiece_vocab,
    wordpiece_config,
    wordpiece_fitted,
)
from vlm_export.runtime.rust_tokenizer import tokenizer_from_json
from vlm_export.runtime.text import check_unicode
from vlm_export.specs import TextSpec

if TYPE_CHECKING:
    from vlm_export.family import Checkpoint

__all__ = ["find_open_clip_merges", "resolve_tokenizer", "tokenizer_json_from_bpe_merges"]

_MERGES_NAME = "bpe_simple_vocab_16e6.txt.gz"
_VOCAB_NAME = "vocab.txt"
_CONFIG_NAME = "tokenizer_config.json"
# Fields of tokenizer_config.json that describe the tokenizer; those that name code or templates stay behind.
_CONFIG_FIELDS = (
    "add_prefix_space",
    "added_tokens_decoder",
    "bos_token",
    "clean_up_tokenization_spaces",
    "cls_token",
    "do_lower_case",
    "eos_token",
    "errors",
    "mask_token",
    "pad_token",
    "sep_token",
    "strip_accents",
    "tokenize_chinese_chars",
    "tokenizer_class",
    "unk_token",
)
# A given file may be from before [DEC] and [ENC] were added; tokenizer.json states all added tokens.
_OWN_WORDPIECE_FIELDS = ("added_tokens_decoder", "bos_token")
_SPECIAL_FIELDS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "additional_special_tokens",
)
_FIX = (
    "pass --tokenizer PATH (a tokenizer.json, BPE merges, BERT's vocab.txt, or a directory that holds them) or "
    "--no-tokenizer"
)
_CHAT_FIX = (
    "pass --tokenizer PATH (the tokenizer.json of the model that the checkpoint's config names as lm_tokenizer, or its "
    "directory) or --no-tokenizer"
)
_BERT_FIX = "pass --tokenizer PATH with the vocab.txt of bert-base-uncased, or --no-tokenizer"


def resolve_tokenizer(checkpoint: Checkpoint, option: str | None, text_spec: TextSpec) -> dict[str, bytes]:
    """The bundle's tokenizer files by name: tokenizer.json, tokenizer_config.json, special_tokens_map.json.

    Args:
        checkpoint: its `side_files` are used unless `option` is given.
        option: path of a tokenizer.json, of BPE merges (.txt, .txt.gz), of a WordPiece vocabulary (.txt), or of a
            directory with tokenizer.json, with vocab.json and merges.txt, or with vocab.txt.
        text_spec: what the tokenizer has to fit. A WordPiece that is two tokens short of it gets [DEC] and [ENC]; a
            chat model's gets the spec's added tokens, and has to be a tokenizer.json.

    Raises:
        InputError: a file is malformed, or its ids or its end token do not fit the model.
        UsageError: there is no tokenizer to be found.
    """
    sources = dict(checkpoint.side_files) if option is None else _files_from_option(Path(option))
    if not text_spec.ends_texts:
        # Vocabularies and merges alone do not say how a chat model's texts are split.
        sources = {name: path for name, path in sources.items() if name in ("tokenizer.json", _CONFIG_NAME)}
    found = _find_tokenizer_json(sources, text_spec)
    if found is None and option is None and text_spec.vocab_size == VOCAB_SIZE:
        merges = find_open_clip_merges()
        found = None if merges is None else (tokenizer_json_from_bpe_merges(merges), merges)
    if found is None and not text_spec.ends_texts:
        raise UsageError(
            "there is no tokenizer for this checkpoint",
            where=option or checkpoint.source,
            expected="the tokenizer.json of the language model",
            fix=_CHAT_FIX,
        )
    if found is None:
        raise UsageError(
            "there is no tokenizer for this checkpoint",
            where=option or checkpoint.source,
            expected="tokenizer.json, or vocab.json and merges.txt, or vocab.txt, or an installed open_clip_torch",
            got=f"none of them that fits a vocabulary of {text_spec.vocab_size}",
            fix=_BERT_FIX if 0 <= text_spec.vocab_size - BERT_VOCAB_SIZE <= 2 else _FIX,
        )
    text, path = found
    tokenizer = tokenizer_from_json(text, text_spec, str(path))
    if not text_spec.ends_texts:
        text = chat_fitted(tokenizer, text, text_spec, str(path))
    elif is_wordpiece(tokenizer):
        text = wordpiece_fitted(tokenizer, text, text_spec, str(path))
    config = _tokenizer_config(sources, tokenizer, text_spec)
    special = {key: _content(config.get(key)) for key in _SPECIAL_FIELDS}
    where = str(sources.get(_CONFIG_NAME, path))
    return {
        "tokenizer.json": text.encode(),
        _CONFIG_NAME: _json_bytes(config, where),
        "special_tokens_map.json": _json_bytes({key: token for key, token in special.items() if token}, where),
    }


def find_open_clip_merges() -> Path | None:
    """The merges that an installed open_clip_torch carries, or None."""
    found = importlib.util.find_spec("open_clip")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / _MERGES_NAME
        if path.is_file():
            return path
    return None


def tokenizer_sources(checkpoint: Checkpoint, option: str | None) -> dict[str, Path]:
    """The files by name that `resolve_tokenizer` reads; arguments as there."""
    return dict(checkpoint.side_files) if option is None else _files_from_option(Path(option))


def _files_from_option(path: Path) -> dict[str, Path]:
    try:
        if path.is_dir():
            return {file.name: file for file in sorted(path.iterdir()) if file.is_file()}
        got = "" if path.is_file() else "no such file or directory"
    except OSError as error:
        got = str(error)
    if got:
        raise UsageError("--tokenizer names nothing that can be read", where=str(path), got=got, fix=_FIX)
    if path.suffix == ".json":
        return {"tokenizer.json": path}
    wordpiece = path.name == _VOCAB_NAME or is_wordpiece_vocab(read_bounded(path))
    return {_VOCAB_NAME if wordpiece else _MERGES_NAME: path}


def _find_tokenizer_json(sources: Mapping[str, Path], spec: TextSpec) -> tuple[str, Path] | None:
    """The text of a tokenizer.json, as it stands or built, and the file it came from."""
    if "tokenizer.json" in sources:
        return _text(sources["tokenizer.json"]), sources["tokenizer.json"]
    if "vocab.json" in sources and "merges.txt" in sources:
        return _tokenizer_json_from_two(sources["vocab.json"], sources["merges.txt"]), sources["vocab.json"]
    if _VOCAB_NAME in sources:
        path = sources[_VOCAB_NAME]
        return tokenizer_json_from_wordpiece_vocab(_text(path), str(path)), path
    for name in (_MERGES_NAME, _MERGES_NAME.removesuffix(".gz")):
        if name in sources:
            return tokenizer_json_from_bpe_merges(sources[name], vocab_size=spec.vocab_size), sources[name]
    return None


def _tokenizer_json_from_two(vocab_path: Path, merges_path: Path) -> str:
    """From transformers' two files, which state the ids and only the merges in use."""
    vocab = json_object_from_bytes(read_bounded(vocab_path), str(vocab_path))
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in vocab.values()):
        raise InputError("vocab.json is malformed", where=str(vocab_path), expected="token to id", fix=_FIX)
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(_text(merges_path).splitlines(), start=1):
        symbols = line.split(" ")
        if not line or line.startswith("#version"):
            continue
        if len(symbols) != 2:
            where = f"{merges_path}: line {number}"
            raise InputError("merges.txt is malformed", where=where, expected="two symbols", got=repr(line[:80]))
        merges.append((symbols[0], symbols[1]))
    return tokenizer_json_from_vocab(vocab, merges, str(vocab_path))


def _tokenizer_config(sources: Mapping[str, Path], tokenizer: Any, spec: TextSpec) -> dict[str, Any]:
    path = sources.get(_CONFIG_NAME)
    given = {} if path is None else json_object_from_bytes(read_bounded(path), str(path))
    kept = {key: given[key] for key in _CONFIG_FIELDS if key in given}
    if not spec.ends_texts:
        return chat_config(tokenizer, kept, spec, str(path or "tokenizer.json"))
    if is_wordpiece(tokenizer):
        derived = wordpiece_config(tokenizer, spec)
        for key in _OWN_WORDPIECE_FIELDS:
            kept.pop(key, None)
    else:
        derived = _clip_config(tokenizer, spec)
    return {**derived, **kept, "model_max_length": spec.context_length}


def _clip_config(tokenizer: Any, spec: TextSpec) -> dict[str, Any]:
    first, *rest = tokenizer.encode("").ids
    end = tokenizer.id_to_token(spec.end_token_id)
    # The causal mask hides padding, so the ecosystem's padding token serves models that were trained with id 0, too.
    return {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": tokenizer.id_to_token(first) if rest else None,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "add_prefix_space": False,
        "do_lower_case": True,
    }


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _json_bytes(data: Mapping[str, Any], where: str) -> bytes:
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    check_unicode(text, where)
    return text.encode()


def _text(path: Path) -> str:
    try:
        return read_bounded(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("a tokenizer file is not UTF-8", where=str(path), got=str(error)) from error
