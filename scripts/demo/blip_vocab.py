"""The BLIP demo's tokenizer: a WordPiece vocabulary of the world's words, laid out as bert-base-uncased's is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from demo.questions import every_word

PAD_ID, UNKNOWN_ID, CLS_ID, SEP_ID, MASK_ID = 0, 100, 101, 102, 103
_SPECIAL = {PAD_ID: "[PAD]", UNKNOWN_ID: "[UNK]", CLS_ID: "[CLS]", SEP_ID: "[SEP]", MASK_ID: "[MASK]"}
Ids = npt.NDArray[np.int64]


def vocabulary() -> list[str]:
    """Tokens by id: the special ones where BERT has them, the words, then the two that BLIP adds."""
    reserved = [_SPECIAL.get(i, f"[unused{i - 1}]") for i in range(MASK_ID + 1)]
    return [*reserved, *every_word(), "[DEC]", "[ENC]"]


def tokenizer_json() -> str:
    """The content of `tokenizer.json`; a word that the world lacks becomes [UNK]."""
    tokens = vocabulary()
    ids = {token: i for i, token in enumerate(tokens)}
    model = models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100, continuing_subword_prefix="##")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS_ID), ("[SEP]", SEP_ID)],
    )
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return str(tokenizer.to_str())


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that `tokenizer.json` holds."""
    return Tokenizer.from_file(str(path))


def token_rows(tokenizer: Tokenizer, texts: Sequence[str], first_id: int) -> tuple[Ids, Ids]:
    """ids and mask, int64 (B, longest): [CLS] replaced by `first_id`, text, [SEP], padding."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    ids = np.full((len(rows), max(map(len, rows))), PAD_ID, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = [first_id, *row[1:]], 1
    return ids, mask
