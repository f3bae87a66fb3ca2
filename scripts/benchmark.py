"""Measures this project on this machine; the figures in docs/benchmarks come from here and from nowhere else.

    python scripts/benchmark.py export [--names NAME …] [--precision P …] [--part PART …] [--report NAME]
                                                           time and peak anonymous memory of each stage, and sizes
    python scripts/benchmark.py text   [--bundle DIR]      8-token captions against the same padded to 77
    python scripts/benchmark.py start  [--bundle DIR]      process start to first embedding
    python scripts/benchmark.py resample [--threads N]     interpolation in its forms against torch eager
    python scripts/benchmark.py caption [--bundle DIR]     cached decoder against transformers' generate
    python scripts/benchmark.py chat [--bundle DIR]        nanoVLM's first token, tokens per second and memory

Without --bundle, one of ViT-B/32 with random weights is exported for the measurement. Needs the export extra.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import caption, chat, export, resample, start, text
from benchmarks.report import REPORTS, write_report

EXPORT_NAMES = ("clip-vit-b-32", "clip-rn50", "clip-vit-l-14-336px")
PAIR_NAME = "clip-vit-b-32"
CAPTION_NAME = "blip-image-captioning-base-hf"
CHAT_NAME = "nanovlm-222m"


def main(arguments: list[str] | None = None) -> int:
    """Runs one benchmark; returns 1 when its result misses the goal that the project states."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPORTS, help="folder of the reports (default: docs/benchmarks)")
    kinds = parser.add_subparsers(dest="kind", required=True)
    exporting = kinds.add_parser("export")
    exporting.add_argument("--names", nargs="+", default=EXPORT_NAMES, metavar="NAME", help="names from configs/")
    exporting.add_argument("--precision", nargs="+", default=(), metavar="P", help="variants (default: the export's)")
    exporting.add_argument("--part", nargs="+", default=(), metavar="PART", help="only these parts (default: all)")
    exporting.add_argument("--report", default="export", metavar="NAME", help="of the files (default: export)")
    for kind, rounds in (("text", 21), ("start", 5)):
        measured = kinds.add_parser(kind)
        measured.add_argument("--name", default=PAIR_NAME, help=f"name from configs/ (default: {PAIR_NAME})")
        measured.add_argument("--bundle", type=Path, help="measure this bundle of it")
        measured.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    resampling = kinds.add_parser("resample")
    resampling.add_argument("--rounds", type=int, default=21, help="default: 21")
    # With more, each library's idle threads keep the cores busy that the other one is measured on.
    resampling.add_argument("--threads", type=int, default=1, help="of torch and of the engine (default: 1)")
    captioning = kinds.add_parser("caption")
    captioning.add_argument("--name", default=CAPTION_NAME, help=f"an -hf name from configs/ (default: {CAPTION_NAME})")
    captioning.add_argument("--bundle", type=Path, help="measure this bundle of it, exported with --random-weights 0")
    captioning.add_argument("--rounds", type=int, default=9, help="default: 9")
    captioning.add_argument("--threads", type=int, default=1, help="of torch and of the engine (default: 1)")
    chatting = kinds.add_parser("chat")
    chatting.add_argument("--name", default=CHAT_NAME, help=f"name from configs/ (default: {CHAT_NAME})")
    chatting.add_argument("--bundle", type=Path, help="measure this bundle of it, exported with --random-weights 0")
    chatting.add_argument("--rounds", type=int, default=9, help="default: 9")
    chatting.add_argument("--threads", type=int, default=2, help="of torch and of the engine (default: 2)")
    chatting.add_argument("--prompt-tokens", type=int, default=12, help="of text, besides the image's (default: 12)")
    chatting.add_argument("--new-tokens", type=int, default=32, help="default: 32")
    chatting.add_argument("--report", default="chat", metavar="NAME", help="of the files (default: chat)")
    args = parser.parse_args(arguments)
    if args.kind == "export":
        report = export.measure(args.names, args.precision, args.part, args.report)
    elif args.kind == "resample":
        report = resample.measure(args.rounds, args.threads)
    elif args.kind == "caption":
        report = caption.measure(args.name, args.bundle, args.rounds, args.threads)
    elif args.kind == "chat":
        prompt = chat.Prompt(args.prompt_tokens, args.new_tokens)
        report = chat.measure(args.name, args.bundle, args.rounds, args.threads, prompt, args.report)
    else:
        report = (text if args.kind == "text" else start).measure(args.name, args.bundle, args.rounds)
    print(write_report(report, args.output))
    return 0 if report.reached else 1


if __name__ == "__main__":
    sys.exit(main())
