"""The facts of the oracle's three layouts, as manifests carry them, and their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

DATA = Path(__file__).parents[1] / "data" / "nanovlm"
VOCABULARY = {"222m": 320, "450m": 321, "split": 386}
QUESTION = {"before": "Question: ", "after": " Answer:"}
CHATML = {"before": "<|im_start|>user\n", "after": "<|im_end|>\n<|im_start|>assistant\n"}
MARKS = {f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)}

_SHARED: dict[str, Any] = {
    "tokens_per_tile": 4,
    "image_token": "<|image|>",
    "image_token_id": 320,
    "global_image_token": None,
    "tile_tokens": {},
    "prompt": QUESTION,
    "context_length": 512,
    "max_prompt_tokens": 79,
    "eos_token_ids": [2],
    "pad_token_id": 2,
    "max_new_tokens": 20,
    "sampling": {"top_k": 50, "top_p": 0.9, "temperature": 0.5},
}


def facts_of(variant: str) -> dict[str, Any]:
    """Of "222m", "450m" or "split"."""
    if variant == "222m":
        return {"chat": {**_SHARED, "layout": "prepended", "image_token": None, "image_token_id": None}}
    if variant == "450m":
        return {"chat": {**_SHARED, "layout": "placeholders"}}
    chat = {**_SHARED, "layout": "tiles", "prompt": CHATML, "tile_tokens": MARKS}
    chat["global_image_token"] = "<|global_image|>"
    return {"chat": chat, "tiles": {"tile_size_pixels": 32, "max_side_pixels": 64, "resize_to_max_side": True}}


def tokenizer_json(variant: str) -> str:
    """The checkpoint's tokenizer with the tokens that stand for pictures."""
    rust = Tokenizer.from_file(str(DATA / variant / "tokenizer" / "tokenizer.json"))
    names = {"222m": [], "450m": ["<|image|>"], "split": ["<|image|>", "<|global_image|>", *MARKS.values()]}[variant]
    rust.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    text: str = rust.to_str()
    return text
