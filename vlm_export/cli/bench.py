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
            "images and texts. How many times as fast as the first one each is, is measured round by round in this "
            "one run. Brackets hold the middle half of the rounds."
        ),
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    _add_sizes(parser)
    parser.add_argument(
        "--graph",
        nargs="+",
        type=existing_path,
        default=(),
        metavar="FILE",
        help="graphs (.onnx, for OpenVINO also .xml) with the inputs and outputs of the one part, to run beside it",
    )
    parser.add_argument("--rounds", type=positive_integer, default=9, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--against",
        metavar="SOURCE",
        help="the checkpoint that the bundle was made from: PyTorch runs it first, eager, compiled and in bfloat16",
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


def run(args: argparse.Namespace) -> int:
    from vlm_export.bundle.staging import staged_file
    from vlm_export.lab.bench import bench
    from vlm_export.lab.bench_plan import BenchOptions
    from vlm_export.lab.bench_plot import bench_plot

    if args.plot is not None:
        check_output(args.plot, overwrite=True)
    options = BenchOptions(
        parts=args.part,
        precisions=args.precision,
        engines=args.engine,
        batches=args.batch,
        threads=args.threads,
        lengths=args.length,
        rounds=args.rounds,
        against=args.against,
        graphs=args.graph,
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
    header = ("side", "threads", "ms", "middle half", "rows/s", "speed", "middle half")
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
    header = ("side", "threads", "part", "load", "memory", "size", "1 - cosine")
    print_table(header, [_cost_row(cost) for cost in found.costs], width=terminal_width())


def _cost_row(cost: Cost) -> tuple[str, ...]:
    sizes = ("-" if size is None else size_text(size) for size in (cost.peak_bytes, cost.size_bytes))
    lost = "-" if cost.cosine is None else f"{1 - cost.cosine:.1e}"
    return cost.side.name, str(cost.side.threads), cost.part, f"{cost.load_seconds:.2f} s", *sizes, lost


def _print_recommendation(found: BenchResult) -> None:
    best, bound = found.recommendation(), found.options.least_cosine
    if best is None:
        print_line(f"no side of the bundle has a cosine of at least {bound:g} with float32 on all of its inputs")
        return
    print_line(f"fastest with a cosine of at least {bound:g}: {best.side.label}")
    print_line(f"  {best.speed:.2f} times as fast as the first side")
    print_line(f"  {best.call}")
    print_line(f"  {best.command}")
