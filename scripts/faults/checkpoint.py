"""A tiny CLIP as transformers saves it, with its own processor and tokenizer, for the proof of the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

IMAGE_SIZE, CONTEXT, EMBED_DIM = 32, 24, 16
_MERGED = ("th", "the</w>", "an", "ph", "photo</w>", "ca", "cat</w>", "of</w>", "ro", "row", "in</w>", "er", "ing</w>")
_START, _END = "<|startoftext|>", "<|endoftext|>"


def write_checkpoint(folder: Path, seed: int = 0, layers: int = 2, **image_settings: Any) -> Path:
    """Writes config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.

    Args:
        layers: of each encoder.
        image_settings: of the image processor, instead of CLIP's.
    """
    tokenizer = tiny_tokenizer()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        projection_dim=EMBED_DIM,
        text_config={"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **ids, **sizes},
        vision_config={"image_size": IMAGE_SIZE, "patch_size": 8, **sizes},
    )
    torch.manual_seed(seed)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    settings = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": square, **image_settings}
    CLIPImageProcessorPil(**settings).save_pretrained(folder)
    return folder


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte pairs with a dozen merges."""
    letters = _byte_letters()
    vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = [*_merges(vocab)]
    tokens = [*vocab, *("".join(pair) for pair in merges), _START, _END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=CONTEXT,
    )


def _byte_letters() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def _merges(vocab: list[str]) -> list[tuple[str, str]]:
    """Pairs that make the merged tokens, each of two that are there before it."""
    known, merges = dict.fromkeys(vocab), list[tuple[str, str]]()
    for token in _MERGED:
        ends = token.endswith("</w>")
        symbols = [*token.removesuffix("</w>")]
        if ends:
            symbols[-1] += "</w>"
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
                known["".join(pair)] = None
            symbols = ["".join(pair), *symbols[2:]]
    return merges
