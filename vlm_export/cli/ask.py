"""`vlm-export ask`: an answer to a question about a picture."""

from __future__ import annotations

import argparse
from typing import Any

from vlm_export.cli.common import add_common_options, add_engine_options, positive_integer, providers
from vlm_export.cli.output import print_json, print_table
from vlm_export.errors import UsageError


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "ask",
        help="an answer to a question about a picture",
        description="Writes an answer, or ranks candidate answers. Without options the answer is the original's.",
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("image", metavar="IMAGE", help="a picture")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    parser.add_argument("--candidates", metavar="ANSWER", nargs="+", help="rank these instead of writing an answer")
    parser.add_argument(
        "--rank-k", type=positive_integer, metavar="N", help="candidates that are scored (default: 128)"
    )
    parser.add_argument("--beams", type=positive_integer, metavar="N", help="width of the beam search; 1 is greedy")
    parser.add_argument("--max-length", type=positive_integer, metavar="N", help="tokens at most")
    parser.add_argument("--min-length", type=int, metavar="N", help="tokens at least")
    parser.add_argument("--truncate", action="store_true", help="cut a question that is too long")
    add_engine_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check_options(args)
    return _write(args) if args.candidates is None else _rank(args)


def _check_options(args: argparse.Namespace) -> None:
    if args.candidates is None:
        if args.rank_k is not None:
            raise UsageError("--rank-k is for candidates", fix="add --candidates")
    elif any(option is not None for option in (args.beams, args.max_length, args.min_length)):
        raise UsageError("candidates are ranked, not written", fix="leave out --beams, --max-length and --min-length")


def _write(args: argparse.Namespace) -> int:
    from vlm_export.runtime.vision_language import load_vision_language

    model = load_vision_language(args.bundle, precision=args.precision, providers=providers(args), threads=args.threads)
    (answer,) = model.answer(
        args.image,
        args.question,
        beams=args.beams,
        max_length=args.max_length,
        min_length=args.min_length,
        truncate=args.truncate,
    )
    if args.json:
        print_json({"image": args.image, "question": args.question, "answer": answer})
    else:
        print(answer)
    return 0


def _rank(args: argparse.Namespace) -> int:
    from vlm_export.runtime.answering import RANK_K
    from vlm_export.runtime.vision_language import load_vision_language

    model = load_vision_language(args.bundle, precision=args.precision, providers=providers(args), threads=args.threads)
    (ranked,) = model.rank_answers(
        args.image, args.question, args.candidates, rank_k=args.rank_k or RANK_K, truncate=args.truncate
    )
    if args.json:
        scores = [{"answer": answer.text, "score": answer.score} for answer in ranked]
        result = {"image": args.image, "question": args.question, "answer": ranked[0].text}
        print_json({**result, "candidates": scores})
    else:
        print_table(("score", "answer"), [(f"{answer.score:.4f}", answer.text) for answer in ranked])
    return 0
