"""Captions with the cached decoder in ONNX Runtime against transformers' `generate`, with equal weights and ids."""

from __future__ import annotations

import sys
import time
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

from benchmarks.export import export_random
from benchmarks.report import Bars, Report, Table
from vlm_export import Model, load
from vlm_export.checkpoint.random import random_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.family import Checkpoint
from vlm_export.models.registry import load_family
from vlm_export.runtime.generation.cross_attention_decoder import CrossAttentionState
from vlm_export.runtime.generation.loop import generate
from vlm_export.runtime.generation.options import GenerationOptions
from vlm_export.specs.tasks import CaptionSpec, SpecialTokens

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
    with TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / name
            export_random(name, bundle, "--no-tokenizer")
        model = load(bundle, threads=threads)
        contest = Contest(model, build_original(name, Path(folder) / "random.safetensors"))
        results = [contest.measure(batch, beams, rounds) for batch in BATCHES for beams in BEAMS]
    return report_from_results(name, results, rounds, threads)


def build_original(name: str, path: Path) -> BlipForConditionalGeneration:
    """transformers' model with the weights that `--random-weights 0` gives a config of Hugging Face key names."""
    known = load_known(name)
    family = load_family(known.family)
    config = family.published_config(known.architecture)
    if config is None:
        raise SystemExit(f"{name} has no config.json: name a config that ends in -hf")
    checkpoint = random_checkpoint(name, family.published_tensors(known.architecture), 0, path, config)
    return model_from_checkpoint(checkpoint)


def model_from_checkpoint(checkpoint: Checkpoint) -> BlipForConditionalGeneration:
    """The checkpoint's weights in transformers' class, in eval mode."""
    config = dict(checkpoint.config or {})
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
    def tokens(self) -> SpecialTokens:
        """Ids of the special tokens."""
        task = self.ours.manifest.task(CaptionSpec)
        assert task is not None
        return task.tokens

    def measure(self, batch: int, beams: int, rounds: int) -> dict[str, Any]:
        """Seconds of both, interleaved, after one run of each that must give the same ids."""
        tokens, prompt = self._image_tokens(batch), self._prompt(batch)
        sides: tuple[Callable[[], Rows], ...] = (
            lambda: self._generate(tokens, prompt, beams),
            lambda: self._generate_originally(tokens, prompt, beams),
        )
        rows, original_rows = (side() for side in sides)
        times = [tuple(map(_seconds, sides)) for _ in range(rounds)]
        print(f"batch {batch}, {beams} beams: {rounds} rounds", file=sys.stderr)
        made = batch * (MAX_LENGTH - prompt.shape[1])
        ours, theirs = (median(pair[i] for pair in times) for i in range(2))
        return {
            "batch": batch,
            "beams": beams,
            "tokens": made,
            "ids_equal": rows == original_rows,
            "tokens_per_s": made / ours,
            "original_tokens_per_s": made / theirs,
            "ratio": median(second / first for first, second in times),
            "seconds": times,
        }

    def _image_tokens(self, batch: int) -> Floats:
        port = self.ours.session.engine("vision").inputs[0]
        sizes = [axis for axis in port.shape[1:] if isinstance(axis, int)]
        pixels = np.random.default_rng(0).standard_normal((batch, *sizes), dtype=np.float32)
        tokens: Floats = self.ours.session.engine("vision").run({port.name: pixels})["last_hidden_state"]
        return tokens

    def _prompt(self, batch: int) -> npt.NDArray[np.int64]:
        words = [word % self.ours.session.text_spec.vocab_size for word in PROMPT_WORDS]
        return np.tile(np.array([self.tokens.decoder_start, *words], np.int64), (batch, 1))

    def _generate(self, tokens: Floats, prompt: npt.NDArray[np.int64], beams: int) -> Rows:
        keys_values = self.ours.session.engine("cross_key_values").run({"encoder_hidden_states": tokens})
        mask = np.ones(tokens.shape[:2], np.int64)
        state = CrossAttentionState(self.ours.session.engine("text_decoder"), keys_values, mask)
        end = (self.tokens.sep,)
        options = GenerationOptions(eos_token_ids=end, beams=beams, min_length=MAX_LENGTH, max_length=MAX_LENGTH)
        return generate(state, prompt, options)

    def _generate_originally(self, tokens: Floats, prompt: npt.NDArray[np.int64], beams: int) -> Rows:
        with torch.inference_mode():
            rows = self.theirs.text_decoder.generate(
                input_ids=torch.from_numpy(prompt),
                encoder_hidden_states=torch.from_numpy(tokens),
                encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.int64),
                eos_token_id=self.tokens.sep,
                pad_token_id=self.tokens.pad,
                num_beams=beams,
                do_sample=False,
                min_length=MAX_LENGTH,
                max_length=MAX_LENGTH,
            )
        found: Rows = rows.tolist()
        return found


def _seconds(side: Callable[[], Rows]) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def report_from_results(name: str, results: Sequence[Mapping[str, Any]], rounds: int, threads: int) -> Report:
    """The page of measurements that `Contest.measure` returned."""
    slowest = min(result["ratio"] for result in results)
    equal = all(result["ids_equal"] for result in results)
    rows = [
        (
            _label(result),
            f"{result['tokens_per_s']:.1f}",
            f"{result['original_tokens_per_s']:.1f}",
            f"{result['ratio']:.2f}",
            "yes" if result["ids_equal"] else "no",
        )
        for result in results
    ]
    bars = [
        (f"{_label(result)}, {side}", result[key])
        for result in results
        for side, key in (("this project", "tokens_per_s"), ("transformers", "original_tokens_per_s"))
    ]
    header = ("", "tokens/s", "transformers, tokens/s", "ratio", "same ids")
    return Report(
        name="caption",
        title="Captions: the cached decoder",
        goal=f"at least {GOAL_RATIO:g} times the tokens per second of transformers' generate, with the same ids.",
        reached=slowest >= GOAL_RATIO and equal,
        conclusion=f"at least {slowest:.2f} times, ids {'equal' if equal else 'differ'}.",
        command=f"python scripts/benchmark.py caption --name {name} --rounds {rounds} --threads {threads}",
        tables=(
            Table(
                f"{name}, random weights, {threads} threads, from image tokens to {MAX_LENGTH} tokens with the prompt; "
                f"{rounds} interleaved rounds; medians, ratio: median of the pairs'",
                header,
                rows,
            ),
        ),
        bars=Bars("Generated tokens per second", "tokens/s", bars),
        data={"model": name, "threads": threads, "max_length": MAX_LENGTH, "results": list(results)},
    )


def _label(result: Mapping[str, Any]) -> str:
    return f"batch {result['batch']}, {'greedy' if result['beams'] == 1 else str(result['beams']) + ' beams'}"
