"""The demos' tokenizers: CLIP's small byte-level BPE, BERT's WordPiece layout for BLIP, and SmolLM2's for nanoVLM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from demo.questions import every_word
from demo.sentences import sentence
from demo.world import TRAINED

Ids = npt.NDArray[np.int64]
# CLIP's. The end token has the highest id, because the text encoder pools where that id is.
CONTEXT_LENGTH = 32
_CLIP_VOCAB_SIZE, _CLIP_START, _CLIP_END, _CLIP_SENTENCES_EACH = 512, "<|startoftext|>", "<|endoftext|>", 12
# BERT's.
PAD_ID, UNKNOWN_ID, CLS_ID, SEP_ID, MASK_ID = 0, 100, 101, 102, 103
_BERT_SPECIAL = {PAD_ID: "[PAD]", UNKNOWN_ID: "[UNK]", CLS_ID: "[CLS]", SEP_ID: "[SEP]", MASK_ID: "[MASK]"}
# SmolLM2-Instruct's first ids; the third ends answers. Training stops where every word is one token.
IMAGE_PLACEHOLDER = "<|image|>"
_CHAT_SPECIAL, _CHAT_MOST_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), 4096


def clip_tokenizer(seed: int) -> Tokenizer:
    """At most 512 ids, trained on the demo's sentences; it takes any text. Same seed, same tokenizer."""
    tokenizer = _byte_pairs(normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_CLIP_VOCAB_SIZE - 2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_clip_corpus(seed), trainer)
    tokenizer.add_special_tokens([_CLIP_START, _CLIP_END])
    end = end_id(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_CLIP_START} $A {_CLIP_END}", special_tokens=[(_CLIP_START, end - 1), (_CLIP_END, end)]
    )
    return tokenizer


def end_id(tokenizer: Tokenizer) -> int:
    """The id of CLIP's end token: the highest of all."""
    return int(tokenizer.get_vocab_size()) - 1


def clip_rows(tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
    """int64 (B, T): start, text, end and padding up to the longest row; cut rows keep the end token."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    end = end_id(tokenizer)
    return _padded([row if len(row) <= CONTEXT_LENGTH else [*row[: CONTEXT_LENGTH - 1], end] for row in rows])[0]


def bert_vocabulary() -> list[str]:
    """Tokens by id: the special ones where BERT has them, the words, then the two that BLIP adds."""
    reserved = [_BERT_SPECIAL.get(i, f"[unused{i - 1}]") for i in range(MASK_ID + 1)]
    return [*reserved, *every_word(), "[DEC]", "[ENC]"]


def bert_tokenizer_json() -> str:
    """The content of `tokenizer.json`; a word that the world lacks becomes [UNK]."""
    ids = {token: i for i, token in enumerate(bert_vocabulary())}
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


def bert_rows(tokenizer: Tokenizer, texts: Sequence[str], first_id: int) -> tuple[Ids, Ids]:
    """ids and mask, int64 (B, longest): [CLS] replaced by `first_id`, text, [SEP], padding."""
    return _padded([[first_id, *encoding.ids[1:]] for encoding in tokenizer.encode_batch(list(texts))])


def chat_tokenizer_json() -> str:
    """The content of `tokenizer.json`: a token for each of the world's words, and bytes for all others.

    Texts are lowercased, so that questions may begin as people write them. The placeholder has the last id.
    """
    tokenizer = _byte_pairs(normalizers.Lowercase(), prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_CHAT_MOST_TOKENS,
        show_progress=False,
        special_tokens=[_added(token) for token in _CHAT_SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([f"question: {word} answer:" for word in every_word()], trainer)
    tokenizer.add_special_tokens([_added(IMAGE_PLACEHOLDER)])
    return f"{tokenizer.to_str(pretty=True)}\n"


def chat_tokenizer_config_json(context_length: int) -> str:
    """The content of `tokenizer_config.json`."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _CHAT_SPECIAL[1],
        "eos_token": _CHAT_SPECIAL[2],
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(config, indent=2) + "\n"


def _byte_pairs(normalizer: normalizers.Normalizer, *, prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    return tokenizer


def _clip_corpus(seed: int) -> Iterator[str]:
    rng = np.random.default_rng([seed, 1])
    return (sentence(composition, rng).text for composition in TRAINED for _ in range(_CLIP_SENTENCES_EACH))


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    ids = np.full((len(rows), max(map(len, rows))), PAD_ID, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def _added(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)
