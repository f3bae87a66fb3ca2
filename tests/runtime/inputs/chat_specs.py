"""The chats of the oracle's three layouts, and their tokenizers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from vlm_export.specs.tasks import ChatSpec, PromptSpec, SamplingSpec

DATA = Path(__file__).parents[2] / "data" / "nanovlm"
VOCABULARY = {"222m": 320, "450m": 321, "split": 386}
MARKS = {f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)}
_PLACEHOLDERS = ChatSpec(
    layout="placeholders",
    tokens_per_tile=4,
    image_token="<|image|>",
    image_token_id=320,
    global_image_token=None,
    tile_tokens={},
    prompt=PromptSpec("Question: ", " Answer:"),
    context_length=512,
    max_prompt_tokens=79,
    eos_token_ids=(2,),
    pad_token_id=2,
    max_new_tokens=20,
    sampling=SamplingSpec(top_k=50, top_p=0.9, temperature=0.5),
)
CHATS: dict[str, ChatSpec] = {
    "222m": replace(_PLACEHOLDERS, layout="prepended", image_token=None, image_token_id=None),
    "450m": _PLACEHOLDERS,
    "split": replace(
        _PLACEHOLDERS,
        layout="tiles",
        prompt=PromptSpec("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        tile_tokens=MARKS,
        global_image_token="<|global_image|>",
    ),
}


def tokenizer_json(variant: str) -> str:
    """The checkpoint's tokenizer with the tokens that stand for images."""
    rust = Tokenizer.from_file(str(DATA / variant / "tokenizer" / "tokenizer.json"))
    names = {"222m": [], "450m": ["<|image|>"], "split": ["<|image|>", "<|global_image|>", *MARKS.values()]}[variant]
    rust.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    text: str = rust.to_str()
    return text
