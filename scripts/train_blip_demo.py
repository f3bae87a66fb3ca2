"""Trains the two BLIP demo checkpoints on the CPU in minutes, offline: `python scripts/train_blip_demo.py`.

One says what a picture of the demo's world shows, the other answers questions about it. Their vision encoder starts
from the CLIP demo's, so `scripts/train_demo.py` comes first. What is measured are the files that are written, read
back as every other checkpoint is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from demo.blip_accuracy import Exactness, answer_exactness, caption_exactness, held_out_images
from demo.blip_checkpoint import published_checkpoint, torch_parts
from demo.blip_files import CAPTION, NAMES, VQA, BlipDemoFiles, write_config
from demo.blip_model import BlipDemoSizes, DemoPair, build_pair, initialise, warm_start
from demo.blip_training import BlipSchedule, train
from demo.blip_vocab import load_tokenizer, tokenizer_json
from demo.checkpoint import load_model
from demo.files import DemoFiles, sha256_of, write_report
from demo.world import HELD_OUT, TRAINED, draw

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
REQUIRED_EXACT = 0.9
MAX_SIZE_BYTES = 12_000_000
# BLIP's own default; greedy search is what the demo has to pass.
_BEAMS = 3


def main(arguments: list[str] | None = None) -> int:
    """Trains and evaluates, or evaluates only; returns 1 when the demo misses its accuracy or its size."""
    parser = argparse.ArgumentParser(description="trains and measures the BLIP demo checkpoints")
    parser.add_argument("--output", type=Path, default=CONFIGS, help="folder laid out as configs/ (default: configs/)")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoints that are there")
    parser.add_argument("--steps", type=int, default=BlipSchedule.steps)
    parser.add_argument("--batch", type=int, default=BlipSchedule.batch)
    parser.add_argument("--seed", type=int, default=BlipSchedule.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=4 * len(HELD_OUT), help="how many held-out images to measure on")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    files = BlipDemoFiles(args.output)
    schedule = BlipSchedule(steps=args.steps, batch=args.batch, seed=args.seed)
    cost = None if args.evaluate_only else train_checkpoints(files, schedule)
    measured = {name: measure(files, name, args.images) for name in NAMES}
    for name, exactness in measured.items():
        print_exactness(name, exactness)
        if cost is not None:
            write_config(files, name, load_model(files.checkpoint(name)))
            write_report(
                files.report(name), build_report(files, name, exactness) | {"training": asdict(schedule) | cost}
            )
    passed = all(exactness["greedy"].exact >= REQUIRED_EXACT for exactness in measured.values())
    return 0 if passed and files.size_bytes() <= MAX_SIZE_BYTES else 1


def train_checkpoints(files: BlipDemoFiles, schedule: BlipSchedule) -> dict[str, float]:
    """Writes the tokenizer and both checkpoints when all is trained; returns what it took."""
    files.tokenizer.parent.mkdir(parents=True, exist_ok=True)
    started, cpu_started = time.monotonic(), time.process_time()
    files.tokenizer.write_text(tokenizer_json(), encoding="utf-8")
    tokenizer = load_tokenizer(files.tokenizer)
    pair = build_pair(tokenizer.get_vocab_size(), BlipDemoSizes())
    initialise(pair, schedule.seed)
    images = [draw(composition, (schedule.seed, i)).image for i, composition in enumerate(TRAINED[::20])]
    warm_start(pair.captioner.vision, DemoFiles(CONFIGS).checkpoint, images)
    train(pair, tokenizer, schedule, _log)
    _save(files, pair)
    return {
        "threads": torch.get_num_threads(),
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
    }


def _save(files: BlipDemoFiles, pair: DemoPair) -> None:
    checkpoints = {
        CAPTION: published_checkpoint(pair.captioner, pair.captioner_architecture),
        VQA: published_checkpoint(pair.answerer, pair.answerer_architecture),
    }
    for name, checkpoint in checkpoints.items():
        temporary = files.checkpoint(name).with_suffix(".tmp")
        torch.save(checkpoint, temporary)
        os.replace(temporary, files.checkpoint(name))


def measure(files: BlipDemoFiles, name: str, images: int) -> dict[str, Exactness]:
    """The exactness of a checkpoint file in PyTorch, greedily and with beams."""
    parts = torch_parts(load_model(files.checkpoint(name)), load_tokenizer(files.tokenizer))
    exactness, drawings = caption_exactness if name == CAPTION else answer_exactness, held_out_images(images)
    return {"greedy": exactness(parts, drawings), f"beams_{_BEAMS}": exactness(parts, drawings, _BEAMS)}


def build_report(files: BlipDemoFiles, name: str, exactness: dict[str, Exactness]) -> dict[str, Any]:
    """Everything that documents may quote about a checkpoint."""
    state = torch.load(files.checkpoint(name), weights_only=True)["model"]
    return {
        "what": "a BLIP demo checkpoint, written by scripts/train_blip_demo.py",
        "sha256": sha256_of(files.checkpoint(name)),
        "size_bytes": files.checkpoint(name).stat().st_size,
        "stored_values": sum(tensor.numel() for tensor in state.values()),
        "vocab_size": load_tokenizer(files.tokenizer).get_vocab_size(),
        "trained_compositions": len(TRAINED),
        "held_out_compositions": len(HELD_OUT),
        "exact_match": {search: result.to_json() for search, result in exactness.items()},
    }


def print_exactness(name: str, exactness: dict[str, Exactness]) -> None:
    """On stdout, for people."""
    print(name)
    for search, result in exactness.items():
        print(f"  {search:<10}{result.exact:.2%} of {result.texts:,} held-out texts are exactly right")
        for kind, share in result.by_kind.items():
            print(f"    {kind:<10}{share:.2%}")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
