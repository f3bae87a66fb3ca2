"""Captions with the cached decoder in ONNX Runtime against transformers' `generate`, with equal weights and ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from benchmarks.measuring import bundle_or_random, interleaved, random_original
from benchmarks.report import Bars, Report, table
from vlm_export import Model, load
from vlm_export.family import Checkpoint
from vlm_export.lab.timing import median_ratio
from vlm_export.runtime.generation.loop import generate
from vlm_export.runtime.generation.options import GenerationOptions
from vlm_export.runtime.tasks.attending import decoder_state
from vlm_export.specs.tasks import CaptionSpec

GOAL_RATIO = 1.5
BATCHES, BEAMS = (1, 4), (1, 3)
# The original's lengths for captions; no row may end earlier, so that every run makes as many tokens.
MAX_LENGTH = 20
# [DEC], and "a picture of" in bert-base-uncased's vocabulary.
PROMPT_WORDS = (1037, 3861, 1997)
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Rows = list[list[int]]


def measure(name: str, bundle: Path | None, rounds: int, threads: int) -> Report:
    """Both sides in turn, `rounds` times for each batch size and number of beams, from the same image tokens."""
    torch.set_num_threads(threads)
    with bundle_or_random(name, bundle) as directory, TemporaryDirectory() as folder:
        original = random_original(name, Path(folder) / "random.safetensors")
        contest = Contest(load(directory, threads=threads), model_from_checkpoint(original))
        results = [contest.measure(batch, beams, rounds) for batch in BATCHES for beams in BEAMS]
    return report_from_results(name, results, rounds, threads)


def model_from_checkpoint(checkpoint: Checkpoint) -> BlipForConditionalGeneration:
    """The checkpoint's weights in transformers' class, in eval mode."""
    if checkpoint.config is None:
        raise SystemExit(f"{checkpoint.source} has no config.json: name a config that ends in -hf")
    config = dict(checkpoint.config)
    sections = {key: value for key, value in config.items() if key in ("text_config", "vision_config")}
    model = BlipForConditionalGeneration(BlipConfig(**sections)).eval()
    weights = {key: checkpoint.read(key) for key in checkpoint.tensors}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # Tied weights are there once.
    tied = {"text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.bias"}
    if set(missing) - tied or unexpected:
        raise SystemExit(f"transformers takes other keys: missing {missing}, unexpected {unexpected}")
    return model


@dataclass(frozen=True)
class Contest:
    """One model on both sides."""

    ours: Model
    theirs: BlipForConditionalGeneration

    @property
    def spec(self) -> CaptionSpec:
        """The task."""
        task = self.ours.manifest.task(CaptionSpec)
        assert task is not None
        return task

    def measure(self, batch: int, beams: int, rounds: int) -> dict[str, Any]:
        """Seconds of both, interleaved, after one run of each that must give the same ids."""
        tokens, prompt = self._image_tokens(batch), self._prompt(batch)
        sides: dict[str, Callable[[], Rows]] = {
            "ours": lambda: self._generate(tokens, prompt, beams),
            "theirs": lambda: self._generate_originally(tokens, prompt, beams),
        }
        equal = sides["ours"]() == sides["theirs"]()
        times = interleaved(sides, rounds, f"batch {batch}, {beams} beams")
        made = batch * (MAX_LENGTH - prompt.shape[1])
        return {
            "batch": batch,
            "beams": beams,
            "tokens": made,
            "ids_equal": equal,
            "tokens_per_s": made / median(times["ours"]),
            "original_tokens_per_s": made / median(times["theirs"]),
            "ratio": median_ratio(times["theirs"], times["ours"]),
            "seconds": list(zip(*times.values(), strict=True)),
        }

    def _image_tokens(self, batch: int) -> Floats:
        port = self.ours.session.engine("vision").inputs[0]
        sizes = [axis for axis in port.shape[1:] if isinstance(axis, int)]
        pixels = np.random.default_rng(0).standard_normal((batch, *sizes), dtype=np.float32)
        tokens: Floats = self.ours.session.engine("vision").run({port.name: pixels})["last_hidden_state"]
        return tokens

    def _prompt(self, batch: int) -> npt.NDArray[np.int64]:
        words = [word % self.ours.session.text_spec.vocab_size for word in PROMPT_WORDS]
        return np.tile(np.array([self.spec.tokens.decoder_start, *words], np.int64), (batch, 1))

    def _generate(self, tokens: Floats, prompt: npt.NDArray[np.int64], beams: int) -> Rows:
        state = decoder_state(self.ours.session, self.spec, tokens, np.ones(tokens.shape[:2], np.int64))
        end = (self.spec.tokens.sep,)
        options = GenerationOptions(eos_token_ids=end, beams=beams, min_length=MAX_LENGTH, max_length=MAX_LENGTH)
        return generate(state, prompt, options)

    def _generate_originally(self, tokens: Floats, prompt: npt.NDArray[np.int64], beams: int) -> Rows:
        with torch.inference_mode():
            rows = self.theirs.text_decoder.generate(
                input_ids=torch.from_numpy(prompt),
                encoder_hidden_states=torch.from_numpy(tokens),
                encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.int64),
                eos_token_id=self.spec.tokens.sep,
                pad_token_id=self.spec.tokens.pad,
                num_beams=beams,
                do_sample=False,
                min_length=MAX_LENGTH,
                max_length=MAX_LENGTH,
            )
        found: Rows = rows.tolist()
        return found


def report_from_results(name: str, results: Sequence[Mapping[str, Any]], rounds: int, threads: int) -> Report:
    """The page of measurements that `Contest.measure` returned."""
    slowest = min(result["ratio"] for result in results)
    equal = all(result["ids_equal"] for result in results)
    rows = [
        {**result, "label": _label(result), "same_ids": "yes" if result["ids_equal"] else "no"} for result in results
    ]
    columns = {
        "": "{label}",
        "tokens/s": "{tokens_per_s:.1f}",
        "transformers, tokens/s": "{original_tokens_per_s:.1f}",
        "ratio": "{ratio:.2f}",
        "same ids": "{same_ids}",
    }
    bars = [
        (f"{_label(result)}, {side}", result[key])
        for result in results
        for side, key in (("this project", "tokens_per_s"), ("transformers", "original_tokens_per_s"))
    ]
    title = f"{name}, random weights, {threads} threads, from image tokens to {MAX_LENGTH} tokens with the prompt"
    return Report(
        title="Captions: the cached decoder",
        goal=f"at least {GOAL_RATIO:g} times the tokens per second of transformers' generate, with the same ids.",
        reached=slowest >= GOAL_RATIO and equal,
        conclusion=f"at least {slowest:.2f} times, ids {'equal' if equal else 'differ'}.",
        tables=(table(f"{title}; {rounds} interleaved rounds; medians, ratio: median of the pairs'", columns, rows),),
        bars=Bars("Generated tokens per second", "tokens/s", bars),
        data={"model": name, "threads": threads, "max_length": MAX_LENGTH, "results": list(results)},
    )


def _label(result: Mapping[str, Any]) -> str:
    return f"batch {result['batch']}, {'greedy' if result['beams'] == 1 else str(result['beams']) + ' beams'}"
