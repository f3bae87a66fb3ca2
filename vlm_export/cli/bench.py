"""`vlm-export bench`: what a bundle's variants cost on this machine, in each engine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, check_output, existing_path, positive_integer
from vlm_export.cli.output import StagePrinter, print_json, print_line, print_table, terminal_width
from vlm_export.text_display import size_text

if TYPE_CHECKING:
    from vlm_export.lab.bench import Progress
    from vlm_export.lab.bench_plan import Load
    from vlm_export.lab.bench_result import BenchResult, Cost

_LEAST_COSINE = 0.999


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "bench",
        help="what a bundle's variants cost on this machine, in each engine",
        description=(
            "Run the variants of a bundle in every engine that is installed, all in turn and each in a process of its "
            "own: time, throughput, time to load, memory, size, and how far each is from float32 on the bundle's own "
            "images and texts. With --images or --task, the bundle's tasks from files of images on instead of its "
            "parts. How many times as fast as the first one each is, is measured round by round in this one run. "
            "Brackets hold the middle half of the rounds."
        ),
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    _add_sizes(parser)
    _add_tasks(parser)
    parser.add_argument(
        "--graph",
        nargs="+",
        type=Path,
        default=(),
        metavar="FILE",
        help="graphs (.onnx, for OpenVINO also .xml) with the inputs and outputs of the one part, to run beside it",
    )
    parser.add_argument("--rounds", type=positive_integer, default=9, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--against",
        metavar="SOURCE",
        help="the checkpoint that the bundle was made from: PyTorch runs it first, eager, compiled and in bfloat16; on "
        "images, transformers too where it reads the checkpoint",
    )
    parser.add_argument(
        "--recommend", action="store_true", help="say how to load and run the fastest one within --least-cosine"
    )
    parser.add_argument(
        "--least-cosine",
        type=float,
        default=_LEAST_COSINE,
        metavar="X",
        help="with float32's outputs, of what --recommend may take (default: %(default)s)",
    )
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="write loss against time and throughput against threads as SVG"
    )
    add_common_options(parser)
    parser.set_defaults(run=run, extra="graph")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    """What is measured, and at which sizes."""
    parser.add_argument("--part", nargs="+", default=(), metavar="NAME", help="only these parts (default: all)")
    parser.add_argument(
        "--precision",
        nargs="+",
        default=(),
        metavar="NAME",
        help="only these variants (default: all, and bf16 where OpenVINO computes in it)",
    )
    parser.add_argument(
        "--engine", nargs="+", default=(), metavar="NAME", help="only these: onnxruntime, openvino (default: all)"
    )
    parser.add_argument(
        "--batch", nargs="+", type=positive_integer, default=(1, 8), metavar="N", help="rows of a run (default: 1 8)"
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=positive_integer,
        default=(),
        metavar="N",
        help="threads of one operator (default: as many as there are cores)",
    )
    parser.add_argument(
        "--length",
        nargs="+",
        type=positive_integer,
        default=(),
        metavar="N",
        help="tokens of a row, of parts whose length is free (default: as recorded)",
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """What is measured from images on."""
    parser.add_argument(
        "--images",
        nargs="+",
        type=Path,
        default=(),
        metavar="PATH",
        help="images, or folders of them: read, decoded, prepared and embedded, beside fastembed where it is installed",
    )
    parser.add_argument(
        "--task",
        nargs="+",
        default=(),
        metavar="NAME",
        help="embed, or to the first token and per token: caption, answer, chat (on --images, or the bundle's own)",
    )
    parser.add_argument(
        "--new-tokens",
        type=positive_integer,
        default=32,
        metavar="N",
        help="that caption, answer and chat write for each image, ends or not (default: %(default)s)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="how captions begin, or the question about each image")


def run(args: argparse.Namespace) -> int:
    from vlm_export.bundle.staging import staged_file
    from vlm_export.lab.bench import bench
    from vlm_export.lab.bench_plan import BenchOptions
    from vlm_export.lab.bench_plot import bench_plot

    if args.plot is not None:
        check_output(args.plot, overwrite=True)
    options = BenchOptions(
        parts=args.part,
        images=[existing_path(path) for path in args.images],
        tasks=args.task,
        new_tokens=args.new_tokens,
        prompt=args.prompt,
        precisions=args.precision,
        engines=args.engine,
        batches=args.batch,
        threads=args.threads,
        lengths=args.length,
        rounds=args.rounds,
        against=args.against,
        graphs=[existing_path(path) for path in args.graph],
        least_cosine=args.least_cosine,
    )
    found = bench(existing_path(args.bundle), options, progress=(lambda *_: None) if args.quiet else _progress())
    if args.plot is not None:
        with staged_file(args.plot, "plot", overwrite=True, wait=True) as staged:
            staged.write_text(bench_plot(found), encoding="utf-8")
    if args.json:
        print_json(found.to_json())
        return 0
    _print(found)
    if args.recommend:
        _print_recommendation(found)
    return 0


def _progress() -> Progress:
    printer = StagePrinter()

    def told(name: str, done: int, total: int) -> None:
        if done == 0:
            printer.started(name)
        printer.progressed(name, done, total)

    return told


def _print(found: BenchResult) -> None:
    for load in found.loads:
        print_line(load.label)
        _print_load(found, load)
        print_line()
    _print_costs(found)
    for text in found.not_run:
        print_line(f"not run: {text}")


def _print_load(found: BenchResult, load: Load) -> None:
    header = ("side", "threads", "ms", "middle half", f"{load.unit}/s", "speed", "middle half")
    rows = []
    for one in found.on(load):
        taken, speed = one.spread, found.speed(one)
        ms = [_three_digits(1000 * value) for value in (taken.median, taken.low, taken.high)]
        rows.append(
            (
                one.side.name,
                str(one.side.threads),
                ms[0],
                f"{ms[1]}-{ms[2]}",
                _three_digits(one.rows_per_second),
                f"{speed.median:.2f}",
                f"{speed.low:.2f}-{speed.high:.2f}",
            )
        )
    print_table(header, rows, width=terminal_width())


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _print_costs(found: BenchResult) -> None:
    header = ("side", "threads", "part", "load", "memory", "size")
    writing = [cost for cost in found.costs if cost.same_tokens is not None]
    others = [cost for cost in found.costs if cost.same_tokens is None]
    for costs, last in ((others, "1 - cosine"), (writing, "same tokens")):
        if costs:
            print_table((*header, last), [_cost_row(cost) for cost in costs], width=terminal_width())


def _cost_row(cost: Cost) -> tuple[str, ...]:
    sizes = ("-" if size is None else size_text(size) for size in (cost.peak_bytes, cost.size_bytes))
    lost = "-" if cost.cosine is None else f"{1 - cost.cosine:.1e}"
    if cost.same_tokens is not None:
        lost = f"{cost.same_tokens:.0%}"
    return cost.side.name, str(cost.side.threads), cost.part, f"{cost.load_seconds:.2f} s", *sizes, lost


def _print_recommendation(found: BenchResult) -> None:
    best = found.recommendation()
    demands = {
        f"a cosine of at least {found.options.least_cosine:g}": any(cost.same_tokens is None for cost in found.costs),
        "the same tokens": any(cost.same_tokens is not None for cost in found.costs),
    }
    bound = " and ".join(text for text, holds in demands.items() if holds)
    if best is None:
        print_line(f"no side of the bundle has {bound} as float32 on all inputs")
        return
    print_line(f"fastest with {bound} as float32: {best.side.label}")
    print_line(f"  {best.speed:.2f} times as fast as the first side")
    print_line(f"  {best.call}")
    print_line(f"  {best.command}")
