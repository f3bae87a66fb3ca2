"""The nanoVLM demo's tokenizer: byte-level BPE as SmolLM2's, with a token for each of the world's words.

Texts are lowercased, so that questions may begin as people write them. A word that the world lacks becomes bytes.
"""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from demo.questions import every_word

IMAGE_PLACEHOLDER = "<|image|>"
# SmolLM2-Instruct's first ids; the third ends answers.
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# More than there are merges: training stops where every word is one token.
_MOST_TOKENS = 4096


def tokenizer_json() -> str:
    """The content of `tokenizer.json`; the placeholder has the last id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MOST_TOKENS,
        show_progress=False,
        special_tokens=[_added(token) for token in _SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([f"question: {word} answer:" for word in every_word()], trainer)
    tokenizer.add_special_tokens([_added(IMAGE_PLACEHOLDER)])
    text: str = tokenizer.to_str(pretty=True)
    return text + "\n"


def tokenizer_config_json(context_length: int) -> str:
    """The content of `tokenizer_config.json`."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[1],
        "eos_token": _SPECIAL[2],
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(config, indent=2) + "\n"


def _added(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)
