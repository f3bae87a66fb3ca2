"""Trains the demo checkpoint on the CPU in minutes, offline, and measures it: `python scripts/train_demo.py`.

The demo is a tiny CLIP that knows generated images of coloured shapes. What is measured is the file that is
written, read back as every other checkpoint is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from demo.accuracy import Accuracy, evaluate
from demo.checkpoint import load_model, openai_state_dict, torch_encoders
from demo.files import DemoFiles, sha256_of, write_config, write_images, write_report
from demo.tokens import load_tokenizer, train_tokenizer
from demo.training import DemoSizes, Schedule, demo_architecture, initialise, train
from demo.world import HELD_OUT, TRAINED

from vlm_export.models.clip.encoders import ClipEncoders

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
REQUIRED_TOP1 = 0.95
MAX_SIZE_BYTES = 8_000_000


@dataclass(frozen=True)
class Cost:
    """What the training took."""

    wall_seconds: float
    cpu_seconds: float


def main(arguments: list[str] | None = None) -> int:
    """Trains and evaluates, or evaluates only; returns 1 when the demo misses its accuracy or its size."""
    parser = argparse.ArgumentParser(description="trains and measures the demo checkpoint")
    parser.add_argument("--output", type=Path, default=CONFIGS, help="folder laid out as configs/ (default: configs/)")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint that is there")
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--batch", type=int, default=Schedule.batch)
    parser.add_argument("--seed", type=int, default=Schedule.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images-each", type=int, default=4, help="held-out images of each composition")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    files = DemoFiles(args.output)
    if args.evaluate_only:
        print_accuracy(measure(files, args.images_each))
        return 0
    schedule = Schedule(
        steps=args.steps, batch=args.batch, seed=args.seed, warmup_steps=min(Schedule.warmup_steps, args.steps // 2)
    )
    cost = train_checkpoint(files, schedule, DemoSizes())
    accuracy = measure(files, args.images_each)
    write_config(files, load_model(files.checkpoint))
    write_images(files)
    write_report(files.report, build_report(files, schedule, accuracy, cost))
    print_accuracy(accuracy)
    return 0 if accuracy.top1 >= REQUIRED_TOP1 and files.checkpoint.stat().st_size <= MAX_SIZE_BYTES else 1


def train_checkpoint(files: DemoFiles, schedule: Schedule, sizes: DemoSizes) -> Cost:
    """Writes the tokenizer and the checkpoint; both replace what is there only when they are complete."""
    files.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    started, cpu_started = time.monotonic(), time.process_time()
    tokenizer = train_tokenizer(schedule.seed)
    architecture = demo_architecture(tokenizer, sizes)
    encoders = ClipEncoders(architecture)
    initialise(encoders, schedule.seed)
    train(encoders, tokenizer, schedule, _log)
    temporary = files.checkpoint.with_suffix(".tmp")
    torch.save(openai_state_dict(encoders, architecture), temporary)
    os.replace(temporary, files.checkpoint)
    tokenizer.save(str(files.tokenizer))
    return Cost(round(time.monotonic() - started, 1), round(time.process_time() - cpu_started, 1))


def measure(files: DemoFiles, images_each: int) -> Accuracy:
    """The accuracy of the checkpoint file in PyTorch."""
    return evaluate(*torch_encoders(load_model(files.checkpoint), files.tokenizer), each=images_each)


def build_report(files: DemoFiles, schedule: Schedule, accuracy: Accuracy, cost: Cost) -> dict[str, Any]:
    """Everything that documents may quote about the demo."""
    return {
        "what": "the demo checkpoint, written by scripts/train_demo.py",
        "sha256": sha256_of(files.checkpoint),
        "size_bytes": files.checkpoint.stat().st_size,
        "parameters": sum(tensor.numel() for tensor in torch.load(files.checkpoint, weights_only=True).values()),
        "vocab_size": load_tokenizer(files.tokenizer).get_vocab_size(),
        "trained_compositions": len(TRAINED),
        "held_out_compositions": len(HELD_OUT),
        "accuracy": accuracy.to_json(),
        "training": {**asdict(schedule), "threads": torch.get_num_threads(), **asdict(cost)},
    }


def print_accuracy(accuracy: Accuracy) -> None:
    """On stdout, for people."""
    print(f"held-out images {accuracy.images}, candidate captions {accuracy.candidates:,}")
    print(f"all five attributes right  {accuracy.top1:.2%}")
    for name, share in accuracy.by_attribute.items():
        print(f"  {name:<25}{share:.2%}")
    print(f"colour and shape alone     {accuracy.colour_and_shape:.2%}")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
