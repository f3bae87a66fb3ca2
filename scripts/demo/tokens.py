"""The demo's tokenizer: a byte-level BPE of at most 512 ids, trained on the demo's sentences, that takes any text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from demo.sentences import sentence
from demo.world import TRAINED

VOCAB_SIZE = 512
CONTEXT_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"
PAD_ID = 0
_SENTENCES_EACH = 12


def train_tokenizer(seed: int) -> Tokenizer:
    """Same seed, same tokenizer. The end token has the highest id, because the text encoder pools where that id is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.add_special_tokens([START, END])
    end = end_id(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, end - 1), (END, end)]
    )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that `tokenizer.json` holds."""
    return Tokenizer.from_file(str(path))


def end_id(tokenizer: Tokenizer) -> int:
    """The id of the end token: the highest of all."""
    return int(tokenizer.get_vocab_size()) - 1


def token_rows(tokenizer: Tokenizer, texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """int64 (B, T): start, text, end and padding up to the longest row; cut rows keep the end token."""
    end = end_id(tokenizer)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    rows = [row if len(row) <= CONTEXT_LENGTH else [*row[: CONTEXT_LENGTH - 1], end] for row in rows]
    ids = np.full((len(rows), max(map(len, rows))), PAD_ID, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids


def _corpus(seed: int) -> Iterator[str]:
    rng = np.random.default_rng([seed, 1])
    for composition in TRAINED:
        for _ in range(_SENTENCES_EACH):
            yield sentence(composition, rng).text
