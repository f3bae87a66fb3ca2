"""Measures this project on this machine; the figures in docs/benchmarks come from here and from nowhere else.

    python scripts/benchmark.py export [--names NAME …] [--precision P …] [--part PART …] [--report NAME]
                                                           time and peak anonymous memory of each stage, and sizes
    python scripts/benchmark.py text   [--bundle DIR]      8-token captions against the same padded to 77
    python scripts/benchmark.py start  [--bundle DIR]      process start to first embedding, beside fastembed's
    python scripts/benchmark.py resample [--threads N]     interpolation in its forms against torch eager
    python scripts/benchmark.py caption [--bundle DIR]     cached decoder against transformers' generate
    python scripts/benchmark.py chat [--bundle DIR]        nanoVLM's first token, tokens per second and memory
    python scripts/benchmark.py decoding [--name NAME] [--precision P …]
                                                           a decoder's variants against float32, and its profile
    python scripts/benchmark.py vision [--bundle DIR]      ViT-B/16's graphs in every engine against PyTorch
    python scripts/benchmark.py sizes  [--names NAME …] [--precision P …]
                                                           bytes of each precision, of float32's
    python scripts/benchmark.py outliers --encoder DIR     a real sentence encoder's rankings in each precision
    python scripts/benchmark.py embed [--fastembed PYTHON] [--modern-onnx-clip PYTHON] [--many N]
                                                           a folder of JPEGs to vectors against other libraries
    python scripts/benchmark.py optimum --optimum FILE     an export with its proof against optimum-cli's
    python scripts/benchmark.py search [--rows N]          an index of a million embeddings: building, opening, asking

Without --bundle, one of ViT-B/32 with random weights is exported for the measurement. Needs the export extra.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    caption,
    chat,
    decoding,
    embed,
    export,
    optimum,
    outliers,
    resample,
    search,
    sizes,
    start,
    text,
    vision,
)
from benchmarks.report import REPORTS, Report, write_report

from vlm_export.precision.recipes import QUANTISED

MEASURES: dict[str, Callable[..., Report]] = {
    "export": export.measure,
    "text": text.measure,
    "start": start.measure,
    "resample": resample.measure,
    "caption": caption.measure,
    "chat": chat.measure,
    "decoding": decoding.measure,
    "vision": vision.measure,
    "sizes": sizes.measure,
    "outliers": outliers.measure,
    "embed": embed.measure,
    "optimum": optimum.measure,
    "search": search.measure,
}

EXPORT_NAMES = ("clip-vit-b-32", "clip-rn50", "clip-vit-l-14-336px")
PAIR_NAME = "clip-vit-b-32"
CAPTION_NAME = "blip-image-captioning-base-hf"
CHAT_NAME = "nanovlm-222m"
VISION_NAME = "clip-vit-b-16"
EMBED_NAME = "clip-vit-base-patch32-hf"
SIZE_NAMES = ("clip-vit-b-32", "nanovlm-222m")


def main(arguments: list[str] | None = None) -> int:
    """Runs one benchmark; returns 1 when its result misses the goal that the project states."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPORTS, help="folder of the reports (default: docs/benchmarks)")
    kinds = parser.add_subparsers(dest="kind", required=True)
    exporting = kinds.add_parser("export")
    exporting.add_argument("--names", nargs="+", default=EXPORT_NAMES, metavar="NAME", help="names from configs/")
    exporting.add_argument("--precision", nargs="+", default=(), metavar="P", help="variants (default: the export's)")
    exporting.add_argument("--part", nargs="+", default=(), metavar="PART", help="only these parts (default: all)")
    # With more threads, each library's idle ones keep the cores busy that the other one is measured on.
    _add(kinds, "resample", None, rounds=21, threads=1)
    _add(kinds, "text", PAIR_NAME, rounds=21)
    starting = _add(kinds, "start", PAIR_NAME, rounds=7)
    starting.add_argument("--fastembed", type=Path, metavar="PYTHON", help="of an environment with fastembed")
    _add(kinds, "caption", CAPTION_NAME, rounds=9, threads=1)
    chatting = _add(kinds, "chat", CHAT_NAME, rounds=9, threads=2)
    steps = _add(kinds, "decoding", CHAT_NAME, rounds=9, threads=2)
    steps.add_argument("--precision", nargs="+", default=("int8", "int4"), metavar="P", help="default: int8 int4")
    for each in (chatting, steps):
        each.add_argument("--prompt-tokens", type=int, default=12, help="of text, besides the image's (default: 12)")
        each.add_argument("--new-tokens", type=int, default=32, help="default: 32")
    seeing = _add(kinds, "vision", VISION_NAME, rounds=9, threads=2)
    seeing.add_argument("--graphs", type=Path, nargs="+", default=(), metavar="FILE", help="further ones for OpenVINO")
    sizing = kinds.add_parser("sizes")
    sizing.add_argument("--names", nargs="+", default=SIZE_NAMES, metavar="NAME", help="names from configs/")
    sizing.add_argument("--precision", nargs="+", default=QUANTISED, metavar="P", help="beside fp16 (default: all)")
    ranking = kinds.add_parser("outliers")
    ranking.add_argument("--encoder", type=Path, required=True, metavar="DIR", help="that sentence-transformers saved")
    embedding = _add(kinds, "embed", EMBED_NAME, rounds=5, threads=2)
    embedding.add_argument("--images", type=int, default=2000, metavar="N", help="of the folder (default: 2000)")
    embedding.add_argument("--round-images", type=int, default=128, metavar="N", help="of a round (default: 128)")
    embedding.add_argument("--many", type=int, default=0, metavar="N", help="also a folder of so many, for its memory")
    for consumer in ("fastembed", "modern-onnx-clip"):
        embedding.add_argument(f"--{consumer}", type=Path, metavar="PYTHON", help="an interpreter that has it")
    exported = _add(kinds, "optimum", None, rounds=7)
    exported.add_argument("--optimum", type=Path, required=True, metavar="FILE", help="optimum-cli of its environment")
    searching = kinds.add_parser("search")
    searching.add_argument("--rows", type=int, default=1_000_000, help="default: 1,000,000")
    searching.add_argument("--dimension", type=int, default=512, help="default: 512")
    searching.add_argument("--queries", type=int, default=500, help="default: 500")
    searching.add_argument("--threads", type=int, help="of the building (default: all cores)")
    for each in kinds.choices.values():
        each.add_argument("--report", metavar="NAME", help="of the files (default: that of the benchmark)")
    options = vars(parser.parse_args(arguments))
    output, kind, name = options.pop("output"), options.pop("kind"), options.pop("report")
    report: Report = MEASURES[kind](**options)
    words = arguments or sys.argv[1:]
    command = shlex.join(["python", "scripts/benchmark.py", *words[words.index(kind) :]])
    print(write_report(report, output, name or kind, command))
    return 0 if report.reached else 1


def _add(kinds: Any, kind: str, name: str | None, *, rounds: int, threads: int | None = None) -> Any:
    """A benchmark, with the defaults of its options; None: it has no such option."""
    parser = kinds.add_parser(kind)
    if name is not None:
        parser.add_argument("--name", default=name, help=f"from configs/ (default: {name})")
        parser.add_argument("--bundle", type=Path, help="measure this bundle of it, exported with --random-weights 0")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads, help=f"of each library (default: {threads})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
