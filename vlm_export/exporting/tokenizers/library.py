"""A checkpoint's tokenizer as transformers itself reads it, written out as `tokenizer.json`.

Which of a directory's files counts, and what their fields mean, differs between classes and releases: transformers 5
builds CLIPTokenizer and BertTokenizer anew from the vocabulary and ignores the normalizer of tokenizer.json, adds the
tokens of added_tokens.json, and reads special_tokens_map.json only where tokenizer_config.json has no
added_tokens_decoder. So the library's own class decides. It is taken by name from an allow-list and built in a
directory of its own from checked copies of the files: no field that names code, a template or a path is copied, and the
result is bounded by `runtime.inputs.tokenizer` as any other. A class that splits texts in Python over a SentencePiece
model has its steps written out by `sentencepiece`.

Source: transformers 5.23, `AutoTokenizer.from_pretrained` (models/auto/tokenization_auto.py), `_from_pretrained`
(tokenization_utils_base.py), `TokenizersBackend` (tokenization_utils_tokenizers.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vlm_export.errors import EnvironmentFailure, InputError
from vlm_export.exporting.tokenizers.openai_bpe import VOCAB_SIZE, read_bounded, vocab_from_bpe_merges
from vlm_export.exporting.tokenizers.parts import (
    ADDED_TOKENS,
    CONFIG,
    JSON,
    MERGES,
    OPEN_CLIP_MERGES,
    PIECES,
    SPECIAL_TOKENS,
    TOKENIZER_FILES,
    VOCAB,
    VOCAB_TEXT,
    added_tokens_checked,
    fields_checked,
    merges_checked,
    text_of,
    vocab_checked,
    wordpieces_checked,
)
from vlm_export.exporting.tokenizers.sentencepiece import canonical_tokenizer_json, checked_pieces
from vlm_export.runtime.inputs.tokenizer import named_failures
from vlm_export.specs import Side

AS_IT_STANDS = "TokenizersBackend"
"""transformers' class for a tokenizer.json that no other class describes; PreTrainedTokenizerFast is its old name."""

PUBLISHED_AS_IT_STANDS = "PreTrainedTokenizerFast"

# Splits texts in Python, over a SentencePiece model.
_CANONICAL = "SiglipTokenizer"
# Each other one builds a Rust tokenizer from the files below alone.
_CLASSES = (
    "CLIPTokenizer",
    "BertTokenizer",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "RobertaTokenizer",
    "XLMRobertaTokenizer",
    "GemmaTokenizer",
    "Siglip2Tokenizer",
    _CANONICAL,
    AS_IT_STANDS,
)
_GENERIC = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "PythonBackend", AS_IT_STANDS)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# transformers' value for "no limit" is 1e30; no model reads a text of a billion tokens.
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class LibraryTokenizer:
    """A tokenizer as transformers built it.

    Attributes:
        json: the content of `tokenizer.json`, without truncation and padding.
        class_name: the class that made it.
        tokens: the named special tokens that it has ("pad_token" → "[PAD]", …).
        extra_tokens: further special tokens.
        pad_token_id: what it fills rows with, None where it has no padding token.
        padding_side, truncation_side: where it pads and cuts.
        longest: `model_max_length`, None where it states no limit.
    """

    json: str
    class_name: str
    tokens: Mapping[str, str]
    extra_tokens: tuple[str, ...]
    pad_token_id: int | None
    padding_side: Side
    truncation_side: Side
    longest: int | None


def library_tokenizer(
    sources: Mapping[str, Path], *, model_type: str | None, rows: int, where: str
) -> LibraryTokenizer:
    """The tokenizer in a directory's files, as AutoTokenizer of the installed transformers reads it.

    Args:
        sources: files by name; of those, only a tokenizer's are read.
        model_type: of the checkpoint's config.json, which names the class where tokenizer_config.json does not; None
            where the files alone decide.
        rows: of the model's token embedding, which say how many of a file's merges are in use.
        where: the directory, for messages.

    Raises:
        InputError: a file is malformed, the class is none that is supported, or it cannot be built.
        EnvironmentFailure: transformers is not installed.
    """
    config = fields_checked(sources[CONFIG]) if CONFIG in sources else {}
    name = _class_name(config.pop("tokenizer_class", None), model_type, sources, where)
    if name == _CANONICAL:
        sources = _only_pieces(sources, where)
    with tempfile.TemporaryDirectory(prefix="vlm-export-tokenizer-") as folder:
        for file, content in _copies(sources, config, rows).items():
            (Path(folder) / file).write_bytes(content)
        with named_failures(f"transformers cannot build a {name} from the tokenizer's files", where), _quiet():
            tokenizer = _class(name).from_pretrained(folder, local_files_only=True)
            return _read(tokenizer, _canonical(tokenizer, sources) if name == _CANONICAL else _rust(tokenizer), where)


def reads_back(files: Mapping[str, bytes], class_name: str) -> bool:
    """Whether that class, which may build a tokenizer anew, makes of a bundle's files the tokenizer.json in them.

    What is in tokenizer.json is what `tokenizers` reads from it: its reader takes scores of unigrams to the nearest
    double but one.
    """
    stands = Tokenizer.from_str(files[JSON].decode()).to_str()
    with tempfile.TemporaryDirectory(prefix="vlm-export-tokenizer-") as folder:
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content)
        try:
            with named_failures("not this class", folder), _quiet():
                back = _rust(_class(class_name).from_pretrained(folder, local_files_only=True))
                return bool(json.loads(back) == json.loads(stands))
        except InputError:
            return False


def _rust(tokenizer: Any) -> str:
    """The content of tokenizer.json, without truncation and padding."""
    rust = tokenizer.backend_tokenizer
    rust.no_truncation()
    rust.no_padding()
    text: str = rust.to_str()
    return text


def _only_pieces(sources: Mapping[str, Path], where: str) -> dict[str, Path]:
    """The files that a class over a SentencePiece model reads; InputError without the model, or with another one."""
    if PIECES not in sources:
        raise InputError(
            f"{_CANONICAL} reads a SentencePiece model, which is not there",
            where=where,
            expected=PIECES,
            got=", ".join(name for name in TOKENIZER_FILES if name in sources),
            fix=f"get {PIECES} from the checkpoint's publisher; or, where tokenizer.json says all, state "
            f"{PUBLISHED_AS_IT_STANDS} as the tokenizer_class in {CONFIG}",
        )
    checked_pieces(sources[PIECES])
    return {name: path for name, path in sources.items() if name not in (JSON, VOCAB, MERGES, VOCAB_TEXT)}


def _canonical(tokenizer: Any, sources: Mapping[str, Path]) -> str:
    return canonical_tokenizer_json(
        sources[PIECES],
        lowers=tokenizer.do_lower_case,
        end=tokenizer.eos_token,
        added=tokenizer.added_tokens_decoder,
    )


def _read(tokenizer: Any, text: str, where: str) -> LibraryTokenizer:
    if tokenizer.split_special_tokens:
        raise InputError(
            "the tokenizer splits the strings of special tokens, which tokenizer.json cannot say",
            where=f"{where}: {CONFIG}: split_special_tokens",
            expected="false, or no such field",
            got="true",
            fix="take the field out; texts with the strings of special tokens are then read as these tokens",
        )
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 1:
        raise InputError(
            "the tokenizer's longest text is not a number of tokens",
            where=f"{where}: {CONFIG}: model_max_length",
            expected="a positive number",
            got=f"{limit!r:.80}",
            fix="correct it, or take it out",
        )
    named = {key: getattr(tokenizer, key) for key in _NAMED_TOKENS}
    return LibraryTokenizer(
        json=text,
        class_name=type(tokenizer).__name__,
        tokens={key: str(token) for key, token in named.items() if token is not None},
        extra_tokens=tuple(str(token) for token in tokenizer.extra_special_tokens),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token is not None else None,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        longest=None if limit > _NO_LIMIT else int(limit),
    )


def _class_name(stated: Any, model_type: str | None, sources: Mapping[str, Path], where: str) -> str:
    """The class that AutoTokenizer would take; InputError when it is not on the list."""
    if stated is not None and not isinstance(stated, str):
        raise InputError(
            "tokenizer_config.json is malformed",
            where=f"{sources[CONFIG]}: tokenizer_class",
            expected="a class's name",
            got=f"{stated!r:.80}",
        )
    transformers = _transformers()
    registered = _registered(model_type)
    name = (_known_better(model_type, registered) or stated or registered or _class_of_files(sources)).removesuffix(
        "Fast"
    )
    if name in _GENERIC or (stated is not None and name != registered and name not in dir(transformers)):
        return AS_IT_STANDS
    if name not in _CLASSES:
        raise InputError(
            "the tokenizer's class is not supported",
            where=f"{where}: {CONFIG}: tokenizer_class",
            expected=", ".join(_CLASSES),
            got=name,
            fix="where its tokenizer.json says all, state PreTrainedTokenizerFast as its tokenizer_class; or pass "
            "--tokenizer PATH",
        )
    return name


def _registered(model_type: str | None) -> str | None:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    # A single tower's own type ("clip_text_model") has no tokenizer of its own.
    family = (model_type or "").removesuffix("_text_model")
    name = TOKENIZER_MAPPING_NAMES.get(family)
    return None if name is None else str(name).removesuffix("Fast")


def _known_better(model_type: str | None, registered: str | None) -> str | None:
    """The registered class, where transformers knows that published files of this type state a wrong one."""
    from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS

    return registered if model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS else None


def _class_of_files(sources: Mapping[str, Path]) -> str:
    if PIECES in sources:
        return _CANONICAL
    if JSON in sources:
        return AS_IT_STANDS
    return "BertTokenizer" if VOCAB_TEXT in sources else "CLIPTokenizer"


def _copies(sources: Mapping[str, Path], config: Mapping[str, Any], rows: int) -> dict[str, bytes]:
    """Contents by name of what the class may read: checked, and nothing in them that was not."""
    copies: dict[str, bytes] = {}
    if config:
        copies[CONFIG] = _bytes(config)
    if SPECIAL_TOKENS in sources:
        copies[SPECIAL_TOKENS] = _bytes(fields_checked(sources[SPECIAL_TOKENS]))
    if JSON in sources:
        return {**copies, JSON: text_of(sources[JSON]).encode()}
    if PIECES in sources:
        copies[PIECES] = read_bounded(sources[PIECES])
    if ADDED_TOKENS in sources:
        copies[ADDED_TOKENS] = _bytes(added_tokens_checked(sources[ADDED_TOKENS]))
    if VOCAB_TEXT in sources:
        tokens = wordpieces_checked(sources[VOCAB_TEXT], _named(config))
        copies[VOCAB_TEXT] = ("\n".join(tokens) + "\n").encode()
    if (VOCAB in sources and MERGES in sources) or OPEN_CLIP_MERGES in sources:
        vocab, merges = _byte_pairs(sources, rows)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        copies |= {VOCAB: _bytes(vocab), MERGES: ("\n".join(lines) + "\n").encode()}
    return copies


def _byte_pairs(sources: Mapping[str, Path], rows: int) -> tuple[Mapping[str, int], list[tuple[str, str]]]:
    if OPEN_CLIP_MERGES in sources:
        return vocab_from_bpe_merges(sources[OPEN_CLIP_MERGES], vocab_size=min(rows, VOCAB_SIZE))
    return vocab_checked(sources[VOCAB]), merges_checked(sources[MERGES])


def _named(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The special tokens that BERT's vocabulary must hold."""
    defaults = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    stated = {key: config.get(key, default) for key, default in defaults.items()}
    return tuple(token["content"] if isinstance(token, Mapping) else token for token in stated.values())


def _bytes(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data).encode()


def _class(name: str) -> Any:
    if name == AS_IT_STANDS:
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        return TokenizersBackend
    return getattr(_transformers(), name)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentFailure(
            "reading a tokenizer needs transformers", got=str(error), fix="pip install 'vlm-export[export]'"
        ) from error
    return transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own log, which shows what files say as it stands."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
