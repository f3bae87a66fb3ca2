"""CLIP's byte-pair encoding as `tokenizer.json`, from the files in which it was published."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vlm_export.errors import InputError
from vlm_export.machine_faults import machine_fault

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
VOCAB_SIZE = 49_408
MAX_FILE_BYTES = 64 << 20
# Order matters: contractions before letters. From `SimpleTokenizer` in openai/CLIP (d05afc4). Its matching ignores
# case, which after lower-casing leaves two traces in all of Unicode 14: the long s counts as an s in a contraction,
# and U+0345, which folds to the letter iota without being one, matches nothing.
WORD_PATTERN = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}" + "\u0345]+"
_WORD_END = "</w>"
_BYTES = 256
_FIX = "use the vocabulary that the checkpoint was trained with"


def tokenizer_json_from_bpe_merges(source: str | Path | bytes, *, vocab_size: int = VOCAB_SIZE) -> str:
    """`tokenizer.json` from CLIP's merges file: ids, word splitting and special tokens as in openai/CLIP.

    Args:
        source: path or content of `bpe_simple_vocab_16e6.txt` or its `.gz`; the first line is a header, and the file
            holds more merges than the models use.
        vocab_size: 512 byte symbols, the file's first merges, and two special tokens.

    Raises:
        InputError: not such a file, or too few merges.
    """
    where = "merges" if isinstance(source, bytes) else str(source)
    vocab, merges = vocab_from_bpe_merges(source, vocab_size=vocab_size)
    return tokenizer_json_from_vocab(vocab, merges, where)


def vocab_from_bpe_merges(
    source: str | Path | bytes, *, vocab_size: int = VOCAB_SIZE
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and the merges in use; arguments and errors as in `tokenizer_json_from_bpe_merges`."""
    where = "merges" if isinstance(source, bytes) else str(source)
    raw = source if isinstance(source, bytes) else read_bounded(Path(source))
    lines = _decompressed(raw, where).decode("utf-8", "replace").split("\n")
    merges = _checked_merges(lines, vocab_size - 2 * _BYTES - 2, where)
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + _WORD_END for symbol in symbols), *(left + right for left, right in merges)]
    return {token: i for i, token in enumerate([*tokens, START_TOKEN, END_TOKEN])}, merges


def tokenizer_json_from_vocab(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], where: str) -> str:
    """`tokenizer.json` from token ids and ranked merges; InputError when they disagree.

    The normaliser is that of the published tokenizer.json, for consumers that run no cleaning of their own.
    """
    if not {START_TOKEN, END_TOKEN} <= set(vocab):
        raise InputError(
            "the vocabulary is not the published one",
            where=where,
            expected=f"{START_TOKEN} and {END_TOKEN} in it",
            fix=_FIX,
        )
    try:
        model = models.BPE(
            vocab=dict(vocab),
            merges=list(merges),
            continuing_subword_prefix="",
            end_of_word_suffix=_WORD_END,
            unk_token=END_TOKEN,
            fuse_unk=False,
        )
    except Exception as error:  # tokenizers raises bare Exception.
        raise InputError("the merges and the vocabulary disagree", where=where, got=str(error), fix=_FIX) from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (START_TOKEN, END_TOKEN)]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (END_TOKEN, vocab[END_TOKEN]), (START_TOKEN, vocab[START_TOKEN]), trim_offsets=False, add_prefix_space=False
    )
    text: str = tokenizer.to_str()
    return text


def read_bounded(path: Path) -> bytes:
    """The content of a tokenizer file; InputError when it cannot be read or exceeds MAX_FILE_BYTES."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise machine_fault(error, str(path)) or InputError(
            "a tokenizer file cannot be read", where=str(path), got=str(error)
        ) from error
    if len(raw) > MAX_FILE_BYTES:
        raise InputError("a tokenizer file is too large", where=str(path), expected=f"at most {MAX_FILE_BYTES:,} bytes")
    return raw


def _checked_merges(lines: Sequence[str], count: int, where: str) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    got = f"{len(lines) - 1} lines after the header"
    for number, line in enumerate(lines[1 : 1 + max(count, 0)], start=2):
        symbols = line.split()
        if len(symbols) != 2:
            got = f"line {number}: {line[:80]!r}"
            break
        merges.append((symbols[0], symbols[1]))
    if count < 0 or len(merges) < count:
        vocab_size = count + 2 * _BYTES + 2
        raise InputError(
            "the BPE merges do not make the model's vocabulary",
            where=where,
            expected=f"a vocabulary of {vocab_size}: {2 * _BYTES} byte symbols, {count} merges, 2 special tokens",
            got=got,
            fix=_FIX,
        )
    return merges


def byte_symbols() -> list[str]:
    """A printable character for each byte, in the order in which CLIP numbers them (GPT-2's byte-level alphabet)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(_BYTES + i) for i in range(_BYTES - len(printable))]


def _decompressed(raw: bytes, where: str) -> bytes:
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        text = decoder.decompress(raw, MAX_FILE_BYTES)
    except zlib.error as error:
        raise InputError("a gzip file is damaged", where=where, got=str(error)) from error
    if not decoder.eof:
        raise InputError(
            "a gzip file is cut off or too large", where=where, expected=f"at most {MAX_FILE_BYTES:,} bytes inside"
        )
    return text
