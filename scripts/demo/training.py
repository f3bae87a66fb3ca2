"""The harness of the demos' trainers: one command line, one loop, one report; what differs is in a `Recipe`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from demo.accuracy import Measured, held_out_images
from demo.files import CONFIGS, Demo, DemoFiles
from demo.questions import KINDS
from demo.world import HELD_OUT, IMAGE_PIXELS, TRAINED, Drawing, draw

_REPORT_STEPS = 50
# Of the images, some are drawn larger and shrunk by the preprocessing, as a user's are.
_LARGER_SHARE, _LARGER_PIXELS = 0.25, 96
# How often a kind is asked: comparing what is said with what is seen is learnt last.
_FREQUENCIES = np.array([{"exists": 4.0, "count": 2.0}.get(kind, 1.0) for kind in KINDS])


@dataclass(frozen=True)
class Schedule:
    """How long to train, with which seed; each demo adds its rates. Same seed, same numbers on the same machine."""

    steps: int
    batch: int
    seed: int = 0


class Train(Protocol):
    """Trains checkpoints and writes them with their tokenizers."""

    def __call__(self, files: Sequence[DemoFiles], schedule: Any) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """What differs between the scripts.

    Attributes:
        threads, images: defaults of the options.
        max_bytes: of all weights together.
        train, measure: make the checkpoints, and measure one that was read back from its file.
    """

    demos: tuple[Demo, ...]
    schedule: Schedule
    threads: int
    images: int
    max_bytes: int
    train: Train
    measure: Callable[[DemoFiles, Sequence[Drawing]], Measured]


def run_recipe(recipe: Recipe, description: str | None, arguments: list[str] | None) -> int:
    """Trains and measures, or measures only; returns 1 when a demo misses its accuracy or its size."""
    parser, schedule = argparse.ArgumentParser(description=description), recipe.schedule
    parser.add_argument("--output", type=Path, default=CONFIGS, help="folder laid out as configs/ (default: configs/)")
    parser.add_argument("--evaluate-only", action="store_true", help="measure what is there")
    parser.add_argument("--steps", type=int, default=schedule.steps)
    parser.add_argument("--batch", type=int, default=schedule.batch)
    parser.add_argument("--seed", type=int, default=schedule.seed)
    parser.add_argument("--threads", type=int, default=recipe.threads)
    parser.add_argument("--images", type=int, default=recipe.images, help="how many held-out images to measure on")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    files = [DemoFiles(demo, args.output) for demo in recipe.demos]
    schedule = replace(schedule, steps=args.steps, batch=args.batch, seed=args.seed)
    started, cpu_started = time.monotonic(), time.process_time()
    if not args.evaluate_only:
        recipe.train(files, schedule)
    cost = {
        "threads": args.threads,
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
    }
    passed = sum(each.weights.stat().st_size for each in files) <= recipe.max_bytes
    for each in files:
        measured = recipe.measure(each, held_out_images(args.images))
        print("\n".join((each.demo.name, *measured.lines)))
        passed = passed and measured.passed
        if not args.evaluate_only:
            each.write_config()
            world = {"trained_compositions": len(TRAINED), "held_out_compositions": len(HELD_OUT)}
            each.write_report({**world, **measured.figures, "training": asdict(schedule) | cost})
    return 0 if passed else 1


def fit(
    parameters: Iterable[nn.Parameter],
    steps: int,
    losses: Callable[[], Mapping[str, Tensor]],
    move: Callable[[int], None],
) -> None:
    """Minimises the sum of the losses of new batches. A line to stderr every 50 steps.

    Args:
        parameters: whose gradients are cut to norm 1 together.
        losses: of one new batch, by name.
        move: applies the gradients and clears them, told the step from 1 on.
    """
    parameters, started, sums = list(parameters), time.monotonic(), np.zeros(())
    for step in range(1, steps + 1):
        found = losses()
        torch.autograd.backward(sum(found.values(), torch.zeros(())))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        move(step)
        sums = sums + [loss.item() for loss in found.values()]
        if step % _REPORT_STEPS == 0:
            means = "  ".join(f"{name} {mean:.4f}" for name, mean in zip(found, sums / _REPORT_STEPS, strict=True))
            print(f"step {step}/{steps}  {means}  {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            sums = np.zeros(())


def cosine_moves(optimizers: Sequence[torch.optim.Optimizer], steps: int, warmup: int) -> Callable[[int], None]:
    """Moves with rates that rise to the optimizers' own in a line, then fall along a cosine to zero."""
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]

    def move(step: int) -> None:
        done = (step - warmup) / max(1, steps - warmup)
        factor = step / warmup if step <= warmup else 0.5 * (1 + math.cos(math.pi * done))
        for group, rate in groups:
            group["lr"] = rate * factor
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return move


def initialise(named: Iterable[tuple[str, nn.Parameter]], seed: int, deviation: Callable[[str, Tensor], float]) -> None:
    """Fills weights with normal numbers of the deviation that a name and a parameter get; norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in named:
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, deviation(name, parameter), generator=generator)


def fan_in(parameter: Tensor) -> float:
    """The deviation that keeps the spread of what a matrix is applied to."""
    return float(parameter[0].numel() ** -0.5)


def draw_trained(batch: int, rng: np.random.Generator) -> list[Drawing]:
    """Images of trained compositions alone."""
    compositions = [TRAINED[int(i)] for i in rng.integers(len(TRAINED), size=batch)]
    return [draw(composition, int(rng.integers(1 << 62)), _pixels(rng)) for composition in compositions]


def _pixels(rng: np.random.Generator) -> int:
    return _LARGER_PIXELS if rng.random() < _LARGER_SHARE else IMAGE_PIXELS


def draw_kinds(count: int, rng: np.random.Generator) -> list[str]:
    """Kinds of questions to ask about an image."""
    return [KINDS[int(i)] for i in rng.choice(len(KINDS), size=count, p=_FREQUENCIES / _FREQUENCIES.sum())]
