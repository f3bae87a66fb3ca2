"""Tokenizer files of a bundle: from the checkpoint, from `--tokenizer`, or from the vocabulary of open_clip_torch.

Who reads them is who would have read them: transformers (`library_tokenizer`) for weights that its classes prepare
texts for; our own BPE (`clip_bpe`), torch-free, for OpenAI's and open_clip's, whose tokenizer is code that no
tokenizer.json holds; a chat model's tokenizer.json stands as it is.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.errors import InputError, UsageError
from vlm_export.exporting.tokenizers.fit import (
    BERT_VOCABULARIES,
    CHAT_FIX,
    chat_config,
    check_padding,
    check_rows,
    closed_up,
    has_room,
    is_wordpiece_vocab,
    letter_case,
    with_added_tokens,
)
from vlm_export.exporting.tokenizers.openai_bpe import (
    VOCAB_SIZE,
    read_bounded,
    tokenizer_json_from_bpe_merges,
    tokenizer_json_from_vocab,
)
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
    fields_checked,
    merges_checked,
    text_of,
    vocab_checked,
)
from vlm_export.machine_faults import machine_fault
from vlm_export.models.reading.transformers_classes import READ_AS
from vlm_export.runtime.inputs.texts import check_unicode
from vlm_export.runtime.inputs.tokenizer import bounded_tokenizer, ids_around, tokenizer_from_json
from vlm_export.specs import Origins, TextSpec

if TYPE_CHECKING:
    from vlm_export.exporting.tokenizers.library import LibraryTokenizer
    from vlm_export.family import Checkpoint, Model, TokenizerIds

__all__ = ["ResolvedTokenizer", "find_open_clip_merges", "resolve_tokenizer", "tokenizer_json_from_bpe_merges"]

# Fields of tokenizer_config.json that are published as they are.
_KEPT = (
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "do_lower_case",
    "errors",
    "strip_accents",
    "tokenize_chinese_chars",
)
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SPECIAL_FIELDS = (*_TOKENS, "additional_special_tokens")
_FIX = (
    "pass --tokenizer PATH (a tokenizer.json, BPE merges, BERT's vocab.txt, spiece.model, or a directory that holds "
    "one) or --no-tokenizer"
)
_CHAT_FIX = (
    "pass --tokenizer PATH (the tokenizer.json of the model that the checkpoint's config names as lm_tokenizer, or its "
    "directory) or --no-tokenizer"
)
_BERT_FIX = "pass --tokenizer PATH with the vocab.txt of {}, or --no-tokenizer"


@dataclass(frozen=True)
class ResolvedTokenizer:
    """A bundle's tokenizer.

    Attributes:
        files: contents of tokenizer.json, tokenizer_config.json and special_tokens_map.json by name.
        text: the spec with what the tokenizer says.
        ids: for what a family takes from the tokenizer; None for a chat model's.
        origins: what says the fields of `text`.
        warnings: what the tokenizer's files leave open.
    """

    files: Mapping[str, bytes]
    text: TextSpec
    ids: TokenizerIds | None = None
    origins: Origins = field(default_factory=Origins)
    warnings: tuple[str, ...] = ()


def resolve_tokenizer(
    checkpoint: Checkpoint, option: str | None, text_spec: TextSpec, *, reserved_rows: int = 0
) -> ResolvedTokenizer:
    """The bundle's tokenizer.

    Args:
        checkpoint: its `side_files` are used unless `option` is given.
        option: path of a tokenizer.json, of BPE merges (.txt, .txt.gz), of a WordPiece vocabulary (.txt), of a
            SentencePiece model (.model), or of a directory with tokenizer.json, with vocab.json and merges.txt, with
            vocab.txt, or with spiece.model.
        text_spec: what the tokenizer has to fit.
        reserved_rows: as in Model.

    Raises:
        InputError: a file is malformed, or its ids, its end token or its padding do not fit the model.
        UsageError: there is no tokenizer to be found.
    """
    sources = tokenizer_sources(checkpoint, option)
    if not text_spec.adds_eos:
        return _chat_tokenizer(sources, text_spec, option or checkpoint.source)
    if text_spec.cleaning in ("openai", "open_clip"):
        return _openai_tokenizer(sources, text_spec, option, checkpoint)
    return _transformers_tokenizer(sources, text_spec, option, checkpoint, reserved_rows)


def _chat_tokenizer(sources: Mapping[str, Path], spec: TextSpec, where: str) -> ResolvedTokenizer:
    """A tokenizer.json as it stands, with the tokens that the checkpoint's own code appends."""
    path = sources.get(JSON)
    if path is None:
        raise UsageError(
            "there is no tokenizer for this checkpoint",
            where=where,
            expected="the tokenizer.json of the language model",
            fix=_CHAT_FIX,
        )
    text = text_of(path)
    tokenizer = tokenizer_from_json(text, spec, str(path))
    text = with_added_tokens(tokenizer, text, spec, str(path), CHAT_FIX)
    given = _config_fields(sources)
    config_path = str(sources.get(CONFIG, JSON))
    config = chat_config(tokenizer, {"tokenizer_class": given.get("tokenizer_class"), **given}, spec, config_path)
    return ResolvedTokenizer(_files(text, config, sources.get(CONFIG, path)), spec)


def _openai_tokenizer(
    sources: Mapping[str, Path], spec: TextSpec, option: str | None, checkpoint: Checkpoint
) -> ResolvedTokenizer:
    """CLIP's byte pairs, with the special tokens that the original knows; its cleaning is the runtime's."""
    of_open_clip = option is None and spec.cleaning == "open_clip" and spec.vocab_size >= VOCAB_SIZE
    own = find_open_clip_merges() if option is None and (of_open_clip or spec.vocab_size == VOCAB_SIZE) else None
    ignored = {}
    if own is not None and of_open_clip:
        # As open_clip itself: its tokenizer has one vocabulary, whatever lies beside the weights, and however many
        # rows the embedding has beyond it.
        ignored = {name: "open_clip has its own vocabulary" for name in sources if name in TOKENIZER_FILES}
        sources, spec = {}, replace(spec, end_token_id=VOCAB_SIZE - 1)
    found = _bpe_json(sources, spec)
    if found is None and own is not None:
        found = tokenizer_json_from_bpe_merges(own), own
    if found is None:
        raise _no_tokenizer(option or checkpoint.source, spec)
    text, path = found
    tokenizer = tokenizer_from_json(text, spec, str(path))
    warning = check_rows(tokenizer, spec, str(path), is_whole=of_open_clip)
    named = _special_token_names(tokenizer, spec)
    given = _config_fields(sources)
    config = {
        # A tokenizer.json that somebody else wrote may be none that transformers' CLIPTokenizer would make.
        "tokenizer_class": "PreTrainedTokenizerFast" if path.name == JSON else "CLIPTokenizer",
        # transformers 4 sets its own default in a tokenizer.json that says otherwise.
        "add_prefix_space": bool((json.loads(text).get("pre_tokenizer") or {}).get("add_prefix_space", False)),
        "do_lower_case": True,
        **{key: value for key, value in given.items() if key in _KEPT},
        **named,
        **{key: _content(value) for key, value in given.items() if key in _TOKENS},
        "model_max_length": spec.context_length,
        "padding_side": "right",
    }
    origins = Origins(ignored_files=ignored)
    ids, warnings = _ids(tokenizer, spec, str(path)), (warning,) if warning else ()
    return ResolvedTokenizer(_files(text, config, path), spec, ids, origins, warnings)


def _transformers_tokenizer(
    sources: Mapping[str, Path], spec: TextSpec, option: str | None, checkpoint: Checkpoint, reserved_rows: int
) -> ResolvedTokenizer:
    """What transformers reads from the files, with the tokens that the checkpoint's own code appends."""
    # Its import takes seconds, which other tokenizers need not spend.
    from vlm_export.exporting.tokenizers.library import library_tokenizer

    fallback: tuple[str, ...] = ()
    if not _is_complete(sources) and option is None and spec.vocab_size == VOCAB_SIZE:
        merges = find_open_clip_merges()
        sources = {OPEN_CLIP_MERGES: merges} if merges is not None else {}
        fallback = (
            "the checkpoint has no tokenizer: the vocabulary of an installed package is used, with transformers' rules",
        )
    if not _is_complete(sources):
        raise _no_tokenizer(option or checkpoint.source, spec)
    path = next(sources[name] for name in (PIECES, JSON, VOCAB, VOCAB_TEXT, OPEN_CLIP_MERGES) if name in sources)
    if JSON in sources:
        bounded_tokenizer(text_of(path), str(path))
    stated = (checkpoint.config or {}).get("model_type") if option is None else None
    model_type = READ_AS.get(stated, stated) if isinstance(stated, str) else None
    library = library_tokenizer(sources, model_type=model_type, rows=spec.vocab_size, where=str(path))
    tokenizer = bounded_tokenizer(library.json, str(path))
    # transformers 4, which original code of its time runs on, closes up unless it is told not to; transformers 5 the
    # other way round.
    closes_up = library.closes_up or bool(spec.added_tokens)
    if not has_room(tokenizer, spec):
        spec = replace(spec, added_tokens=())
    text = with_added_tokens(tokenizer, library.json, spec, str(path))
    text = closed_up(text) if closes_up else text
    spec, origins = _with_tokenizer(spec, library, tokenizer, sources, path)
    tokenizer = tokenizer_from_json(text, spec, str(path))
    own = option is None and not fallback
    warning = check_rows(tokenizer, spec, str(path), reserved=reserved_rows, is_whole=own and _is_whole(sources))
    check_padding(tokenizer, spec, library.padding_side, str(sources.get(CONFIG, path)))
    files = _published(library, tokenizer, text, spec, sources, path)
    warnings = (*fallback, *((warning,) if warning else ()))
    return ResolvedTokenizer(files, spec, _ids(tokenizer, spec, str(path)), origins, warnings)


def _with_tokenizer(
    spec: TextSpec, library: LibraryTokenizer, tokenizer: Any, sources: Mapping[str, Path], path: Path
) -> tuple[TextSpec, Origins]:
    """The spec with what the tokenizer says, and which file says it."""
    around = ids_around(tokenizer, str(path))
    name = library.class_name
    config = f"{CONFIG}, or the default of {name}" if CONFIG in sources else f"default of {name}"
    origins = {"text.case": f"{path.name}, as {name} reads it", "text.truncation_side": config}
    changes: dict[str, Any] = {"case": letter_case(tokenizer), "truncation_side": library.truncation_side}
    if spec.pooling != "end_token" and around:
        changes["end_token_id"] = around[-1]
        origins["text.end_token_id"] = f"{path.name}: what {name} puts after a text"
    if library.pad_token_id is not None:
        changes["pad_token_id"] = library.pad_token_id
        origins["text.pad_token_id"] = f"pad_token in {config}"
    # Where another library cleans texts first, as open_clip does, it cuts them at its own length.
    if spec.cleaning == "none" and library.longest is not None and library.longest < spec.context_length:
        if spec.padding == "context":
            raise InputError(
                "the tokenizer fills texts up to fewer tokens than the model was built for, which sees its padding",
                where=f"{sources.get(CONFIG, path)}: model_max_length",
                expected=str(spec.context_length),
                got=str(library.longest),
                fix="state the model's own length there, if it was trained with texts of that length",
            )
        changes["context_length"] = library.longest
        origins["text.context_length"] = f"{CONFIG}: model_max_length"
    return replace(spec, **changes), Origins(origins)


def _published(
    library: LibraryTokenizer,
    tokenizer: Any,
    text: str,
    spec: TextSpec,
    sources: Mapping[str, Path],
    path: Path,
) -> dict[str, bytes]:
    """The bundle's files, under a class that reads tokenizer.json back as it is."""
    from vlm_export.exporting.tokenizers.library import AS_IT_STANDS, PUBLISHED_AS_IT_STANDS, reads_back

    given = _config_fields(sources)
    named = {"pad_token": tokenizer.id_to_token(spec.pad_token_id), **library.tokens}
    extra = [token for token in library.extra_tokens if token not in named.values()]
    if spec.added_tokens:
        # As salesforce/BLIP names them: [DEC] starts what is decoded.
        named["bos_token"] = spec.added_tokens[0]
        extra += [token for token in spec.added_tokens[1:] if token not in extra]
    around, ends = tokenizer.encode("").ids, [name for name in ("bos_token", "eos_token") if name in named]
    # transformers 4 has classes that build what stands around a text from these, whatever tokenizer.json says.
    adds = {f"add_{name}": tokenizer.token_to_id(named[name]) in around for name in ends}
    config: dict[str, Any] = {
        **{key: value for key, value in given.items() if key in _KEPT},
        **adds,
        **named,
        **({"additional_special_tokens": extra} if extra else {}),
        "model_max_length": spec.context_length,
        "padding_side": "right",
        # A model that pools the last position reads its padding, so that a mask would change what it says.
        "model_input_names": ["input_ids", *([] if spec.pooling == "last_token" else ["attention_mask"])],
        **({"truncation_side": spec.truncation_side} if spec.truncation_side != "right" else {}),
    }
    for name in dict.fromkeys((library.class_name, AS_IT_STANDS)):
        stated = PUBLISHED_AS_IT_STANDS if name == AS_IT_STANDS else name
        files = _files(text, {"tokenizer_class": stated, **config}, sources.get(CONFIG, path))
        if reads_back(files, name):
            return files
    raise InputError(
        "transformers does not read the tokenizer back as it was",
        where=str(path),
        expected=f"a tokenizer.json that {library.class_name} or {PUBLISHED_AS_IT_STANDS} reads as it stands",
        fix="please report it; or pass --tokenizer PATH",
    )


def _ids(tokenizer: Any, spec: TextSpec, where: str) -> TokenizerIds:
    from vlm_export.family import TokenizerIds

    around = tuple(ids_around(tokenizer, where))
    return TokenizerIds(around[:-1], spec.end_token_id, spec.pad_token_id, tokenizer.get_vocab(with_added_tokens=True))


def _is_complete(sources: Mapping[str, Path]) -> bool:
    one = any(name in sources for name in (JSON, VOCAB_TEXT, OPEN_CLIP_MERGES, PIECES))
    return one or (VOCAB in sources and MERGES in sources)


def _is_whole(sources: Mapping[str, Path]) -> bool:
    """Whether the files would name tokens that were added to the vocabulary."""
    return JSON in sources or ADDED_TOKENS in sources or "added_tokens_decoder" in _config_fields(sources)


def _no_tokenizer(where: str, spec: TextSpec) -> UsageError:
    bert = next((name for rows, name in BERT_VOCABULARIES.items() if 0 <= spec.vocab_size - rows <= 2), None)
    return UsageError(
        "there is no tokenizer for this checkpoint",
        where=where,
        expected="tokenizer.json, or vocab.json and merges.txt, or vocab.txt, or spiece.model, or an installed "
        "open_clip_torch",
        got=f"none of them that fits a vocabulary of {spec.vocab_size}",
        fix=_FIX if bert is None else _BERT_FIX.format(bert),
    )


def find_open_clip_merges() -> Path | None:
    """The merges that an installed open_clip_torch carries, or None."""
    found = importlib.util.find_spec("open_clip")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / OPEN_CLIP_MERGES
        if path.is_file():
            return path
    return None


def model_with_tokenizer(model: Model, found: ResolvedTokenizer) -> Model:
    """The model with what its tokenizer says."""
    warnings, origins = (*model.warnings, *found.warnings), model.origins | found.origins
    model = replace(model, text=found.text, warnings=warnings, origins=origins)
    return model if found.ids is None else model.with_tokenizer(model, found.ids)


def tokenizer_sources(checkpoint: Checkpoint, option: str | None) -> dict[str, Path]:
    """The files by name that `resolve_tokenizer` reads; arguments as there."""
    return dict(checkpoint.side_files) if option is None else _files_from_option(Path(option))


def _files_from_option(path: Path) -> dict[str, Path]:
    try:
        if path.is_dir():
            return {file.name: file for file in sorted(path.iterdir()) if file.is_file()}
        got = "" if path.is_file() else "no such file or directory"
    except OSError as error:
        fault = machine_fault(error, str(path))
        if fault is not None:
            raise fault from error
        got = str(error)
    if got:
        raise UsageError("--tokenizer names nothing that can be read", where=str(path), got=got, fix=_FIX)
    if path.suffix == ".json":
        return {JSON: path}
    if path.suffix == ".model":
        return {PIECES: path}
    wordpiece = path.name == VOCAB_TEXT or is_wordpiece_vocab(read_bounded(path))
    return {VOCAB_TEXT if wordpiece else OPEN_CLIP_MERGES: path}


def _bpe_json(sources: Mapping[str, Path], spec: TextSpec) -> tuple[str, Path] | None:
    """The text of a tokenizer.json, as it stands or built from byte pairs, and the file it came from."""
    if JSON in sources:
        return text_of(sources[JSON]), sources[JSON]
    if VOCAB in sources and MERGES in sources:
        path = sources[VOCAB]
        return tokenizer_json_from_vocab(vocab_checked(path), merges_checked(sources[MERGES]), str(path)), path
    if OPEN_CLIP_MERGES in sources:
        path = sources[OPEN_CLIP_MERGES]
        return tokenizer_json_from_bpe_merges(path, vocab_size=spec.vocab_size), path
    return None


def _special_token_names(tokenizer: Any, spec: TextSpec) -> dict[str, Any]:
    first, *rest = tokenizer.encode("").ids
    end = tokenizer.id_to_token(spec.end_token_id)
    # The causal mask hides padding, so the ecosystem's padding token serves models that were trained with id 0, too.
    return {
        "bos_token": tokenizer.id_to_token(first) if rest else None,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
    }


def _config_fields(sources: Mapping[str, Path]) -> dict[str, Any]:
    return fields_checked(sources[CONFIG]) if CONFIG in sources else {}


def _files(text: str, config: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    special = {key: config[key] for key in _SPECIAL_FIELDS if config.get(key)}
    return {
        JSON: text.encode(),
        CONFIG: _json_bytes(config, str(path)),
        SPECIAL_TOKENS: _json_bytes(special, str(path)),
    }


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _json_bytes(data: Mapping[str, Any], where: str) -> bytes:
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    check_unicode(text, where)
    return text.encode()
