"""Trains the nanoVLM demo checkpoint on the CPU in minutes, offline: `python scripts/train_nanovlm_demo.py`.

It answers questions about images of the demo's world, and captions them. Its vision encoder starts from the CLIP
demo's, so `scripts/train_demo.py` comes first. What is measured are the files that are written, read back as every
other checkpoint is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from demo.blip_accuracy import Exactness, held_out_images
from demo.checkpoint import load_model
from demo.files import DemoFiles, sha256_of, write_report
from demo.nanovlm_accuracy import answer_exactness
from demo.nanovlm_chat import TorchChat, chat_texts
from demo.nanovlm_files import NanoVlmDemoFiles, write_checkpoint, write_config
from demo.nanovlm_model import NanoVlmDemoSizes, demo_architecture, initialise, warm_start
from demo.nanovlm_training import NanoVlmSchedule, train
from demo.nanovlm_vocab import tokenizer_json
from demo.world import HELD_OUT, TRAINED, draw
from tokenizers import Tokenizer

from vlm_export.models.nanovlm.parts import NanoVlmModules

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
REQUIRED_EXACT = 0.9
MAX_SIZE_BYTES = 5_000_000


def main(arguments: list[str] | None = None) -> int:
    """Trains and evaluates, or evaluates only; returns 1 when the demo misses its accuracy or its size."""
    parser = argparse.ArgumentParser(description="trains and measures the nanoVLM demo checkpoint")
    parser.add_argument("--output", type=Path, default=CONFIGS, help="folder laid out as configs/ (default: configs/)")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint that is there")
    parser.add_argument("--steps", type=int, default=NanoVlmSchedule.steps)
    parser.add_argument("--batch", type=int, default=NanoVlmSchedule.batch)
    parser.add_argument("--seed", type=int, default=NanoVlmSchedule.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=2 * len(HELD_OUT), help="how many held-out images to measure on")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    files = NanoVlmDemoFiles(args.output)
    schedule = NanoVlmSchedule(steps=args.steps, batch=args.batch, seed=args.seed)
    cost = None if args.evaluate_only else train_checkpoint(files, schedule)
    exactness = answer_exactness(TorchChat(files.checkpoint).answer, held_out_images(args.images))
    print_exactness(exactness)
    if cost is not None:
        write_config(files, load_model(files.checkpoint))
        write_report(files.report, build_report(files, exactness) | {"training": asdict(schedule) | cost})
    passed = min(exactness.by_kind["caption"], exactness.exact) >= REQUIRED_EXACT
    return 0 if passed and files.weights.stat().st_size <= MAX_SIZE_BYTES else 1


def train_checkpoint(files: NanoVlmDemoFiles, schedule: NanoVlmSchedule) -> dict[str, float]:
    """Writes the checkpoint when all is trained; returns what it took."""
    started, cpu_started = time.monotonic(), time.process_time()
    sizes = NanoVlmDemoSizes()
    architecture = demo_architecture(Tokenizer.from_str(tokenizer_json()).get_vocab_size(), sizes)
    modules = NanoVlmModules(architecture)
    initialise(modules, schedule.seed)
    images = [draw(composition, (schedule.seed, i)).image for i, composition in enumerate(TRAINED[::20])]
    warm_start(modules.vision, DemoFiles(CONFIGS).checkpoint, images)
    with tempfile.TemporaryDirectory() as folder:
        # Prompts and preprocessing are what the project derives from the files, so files come first.
        untrained = Path(folder)
        write_checkpoint(untrained, modules, architecture)
        texts = chat_texts(load_model(untrained), untrained)
    train(modules, texts, architecture.pixel_shuffle, schedule, _log)
    write_checkpoint(files.checkpoint, modules, architecture)
    return {
        "threads": torch.get_num_threads(),
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
    }


def build_report(files: NanoVlmDemoFiles, exactness: Exactness) -> dict[str, Any]:
    """Everything that documents may quote about the checkpoint."""
    model = load_model(files.checkpoint)
    assert model.text is not None
    return {
        "what": "the nanoVLM demo checkpoint, written by scripts/train_nanovlm_demo.py",
        "sha256": sha256_of(files.weights),
        "size_bytes": files.weights.stat().st_size,
        "vocab_size": model.text.vocab_size,
        "trained_compositions": len(TRAINED),
        "held_out_compositions": len(HELD_OUT),
        "exact_match": {"greedy": exactness.to_json()},
    }


def print_exactness(exactness: Exactness) -> None:
    """On stdout, for people."""
    print(f"{exactness.exact:.2%} of {exactness.texts:,} held-out captions and answers are exactly right")
    for kind, share in exactness.by_kind.items():
        print(f"  {kind:<10}{share:.2%}")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
