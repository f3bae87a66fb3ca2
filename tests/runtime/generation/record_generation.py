"""Makes tests/data/runtime/generation.json: what `generate` of transformers 4.25.1 gives for the toy decoder.

BLIP was published with that `generate`. The version imports with later releases of torch too, but not beside the
transformers of this project, so it comes from a folder of its own:

    pip install --target FOLDER transformers==4.25.1 "tokenizers<0.14" "huggingface_hub<0.20" requests
    PYTHONPATH=FOLDER python tests/runtime/generation/record_generation.py
"""

from __future__ import annotations

import json
import runpy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VERSION = "4.25.1"
TARGET = Path(__file__).parents[2] / "data" / "runtime" / "generation.json"
ToyDecoder = runpy.run_path(str(Path(__file__).with_name("toy_decoder.py")))["ToyDecoder"]
END_ID, PAD_ID, VOCABULARY = 2, 0, 17
# Processors that this project's decoders do not use; their builder wants each named.
NOT_ASKED_FOR = (
    "bad_words_ids",
    "diversity_penalty",
    "encoder_input_ids",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "no_repeat_ngram_size",
    "prefix_allowed_tokens_fn",
    "remove_invalid_values",
    "renormalize_logits",
)


class ToyModel(PreTrainedModel):  # type: ignore[misc]  # transformers is not followed, so its classes are Any
    """The toy decoder for `generate`, without a cache: each call reads the ids from the start."""

    config_class = PretrainedConfig

    def __init__(self, toy: dict[str, Any]) -> None:
        super().__init__(PretrainedConfig(vocab_size=VOCABULARY))
        self.toy = toy
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = ToyDecoder(len(input_ids), **self.toy).step(input_ids.numpy())
        return CausalLMOutput(logits=torch.from_numpy(logits.copy())[:, None])

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


def record_case(seed: int, rows: int, prompt_length: int, end_bonus: float, **arguments: Any) -> dict[str, Any]:
    """One call of `generate`: its ids come as one matrix, with pad tokens after the end of short rows."""
    toy = {"seed": seed, "vocabulary": VOCABULARY, "end_id": END_ID, "end_bonus": end_bonus}
    rng = np.random.default_rng(seed + 1000)
    prompt = rng.integers(3, VOCABULARY, (rows, prompt_length))
    model = ToyModel(toy).eval()
    ids = model.generate(torch.from_numpy(prompt), eos_token_id=END_ID, pad_token_id=PAD_ID, **arguments)
    names = {"num_beams": "beams"}
    options = {names.get(key, key): value for key, value in arguments.items()}
    return {"toy": toy, "prompt": prompt.tolist(), "options": options, "ids": ids.tolist()}


def searches() -> list[dict[str, Any]]:
    """Greedy and beam search: early, late and no ends, alone and in batches, both penalties, both bounds."""
    cases = []
    for number, (beams, rows, end_bonus) in enumerate(product((1, 2, 3, 5), (1, 4), (0.0, 1.5, 3.5))):
        shared: dict[str, Any] = {"num_beams": beams}
        cases.append(record_case(number, rows, 1 + number % 4, end_bonus, **shared, max_length=14, min_length=0))
        cases.append(record_case(100 + number, rows, 1, end_bonus, **shared, max_length=10, min_length=6))
        cases.append(record_case(200 + number, rows, 3, end_bonus, **shared, max_new_tokens=9, repetition_penalty=1.3))
        if beams > 1:
            power = (-1.0, 0.0, 0.6, 2.0)[number % 4]
            cases.append(record_case(300 + number, rows, 2, end_bonus, **shared, max_length=12, length_penalty=power))
    # Found by search: the ids change if an end token counts that is not among the best `num_beams` candidates.
    rare: dict[str, Any] = {"max_length": 16, "min_length": 12, "repetition_penalty": 0.8}
    cases.append(record_case(1297, 3, 4, 4.0, num_beams=4, **rare))
    return cases


def samplings() -> list[dict[str, Any]]:
    """The scores that sampling draws from, after processors and warpers; None is minus infinity."""
    rng = np.random.default_rng(7)
    model = ToyModel({"seed": 0})
    cases = []
    for temperature, top_k, top_p, penalty in product((1.0, 0.6, 2.0), (0, 1, 5), (1.0, 0.9, 0.3), (1.0, 1.1)):
        logits = (2 * rng.standard_normal((1, VOCABULARY))).astype(np.float32)
        ids = rng.integers(0, VOCABULARY, (1, 4))
        processors = model._get_logits_processor(
            **dict.fromkeys(NOT_ASKED_FOR),
            repetition_penalty=penalty,
            input_ids_seq_length=4,
            min_length=5,
            max_length=9,
            eos_token_id=END_ID,
            num_beams=1,
            num_beam_groups=1,
            logits_processor=[],
        )
        warpers = model._get_logits_warper(top_k=top_k, top_p=top_p, temperature=temperature, num_beams=1)
        torch_ids = torch.from_numpy(ids)
        scores = warpers(torch_ids, processors(torch_ids, torch.from_numpy(logits.copy())))
        options = {"temperature": temperature, "top_k": top_k or None, "top_p": top_p, "repetition_penalty": penalty}
        rows = [[round(value, 6) if np.isfinite(value) else None for value in row] for row in scores.tolist()]
        cases.append({"options": options, "ids": ids.tolist(), "logits": logits.round(6).tolist(), "scores": rows})
    return cases


def main() -> None:
    assert transformers.__version__ == VERSION, f"transformers {VERSION} is needed, found {transformers.__version__}"
    torch.set_num_threads(1)
    record = {"produced_by": f"transformers {VERSION}", "searches": searches(), "samplings": samplings()}
    lines = [f'"produced_by": {json.dumps(record["produced_by"])}']
    for key in ("searches", "samplings"):
        lines.append(f'"{key}": [\n' + ",\n".join(json.dumps(case) for case in record[key]) + "\n]")
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
