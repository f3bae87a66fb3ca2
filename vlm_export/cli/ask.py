"""`vlm-export ask`: an answer to a question about a picture, or about several."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vlm_export.cli.chat_options import (
    SAMPLING,
    add_new_tokens_option,
    add_sampling_options,
    check_sampling,
    chosen,
    is_chat_bundle,
    refuse_options,
)
from vlm_export.cli.common import add_common_options, add_engine_options, positive_integer, providers
from vlm_export.cli.output import print_json, print_table, print_text
from vlm_export.errors import UsageError

_OF_BLIP = ("candidates", "rank_k", "beams", "max_length", "min_length")
_OF_CHAT = ("stream", "sample", *SAMPLING, "max_new_tokens")


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "ask",
        help="an answer to a question about pictures",
        description="Writes an answer, or (BLIP) ranks candidate answers. BLIP: without options the answer is the "
        "original's. nanoVLM: the most probable words, or with --sample drawn ones as the original's.",
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="a picture; of nanoVLM's later ones, also several")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    parser.add_argument("--stream", action="store_true", help="nanoVLM: print the words as they come")
    parser.add_argument("--sample", action="store_true", help="nanoVLM: draw tokens")
    add_sampling_options(parser)
    add_new_tokens_option(parser)
    parser.add_argument("--candidates", metavar="ANSWER", nargs="+", help="BLIP: rank these instead of writing")
    parser.add_argument(
        "--rank-k", type=positive_integer, metavar="N", help="BLIP: candidates that are scored (default: 128)"
    )
    parser.add_argument("--beams", type=positive_integer, metavar="N", help="BLIP: width of the search; 1 is greedy")
    parser.add_argument("--max-length", type=positive_integer, metavar="N", help="BLIP: tokens at most")
    parser.add_argument("--min-length", type=int, metavar="N", help="BLIP: tokens at least")
    parser.add_argument("--truncate", action="store_true", help="cut a question that is too long")
    add_engine_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check_options(args)
    if is_chat_bundle(args.bundle):
        refuse_options(args, _OF_BLIP, args.bundle, "it is for BLIP; nanoVLM takes --max-new-tokens and --sample")
        return _stream(args) if args.stream else _chat(args)
    refuse_options(args, _OF_CHAT, args.bundle, "it is for nanoVLM; BLIP takes --beams, --max-length and --min-length")
    if len(args.images) > 1:
        got = f"{len(args.images)} pictures"
        raise UsageError("this bundle answers about one picture at a time", where=args.bundle, got=got)
    return _write(args) if args.candidates is None else _rank(args)


def _check_options(args: argparse.Namespace) -> None:
    check_sampling(args)
    if args.stream and args.json:
        raise UsageError("--stream prints words, not JSON", fix="leave out --stream or --json")
    if args.candidates is None:
        if args.rank_k is not None:
            raise UsageError("--rank-k is for candidates", fix="add --candidates")
    elif any(option is not None for option in (args.beams, args.max_length, args.min_length)):
        raise UsageError("candidates are ranked, not written", fix="leave out --beams, --max-length and --min-length")


def _chat(args: argparse.Namespace) -> int:
    from vlm_export.runtime.vision_chat import load_vision_chat

    model = load_vision_chat(args.bundle, precision=args.precision, providers=providers(args), threads=args.threads)
    (answer,) = model.answer([args.images], args.question, truncate=args.truncate, **chosen(args))
    if args.json:
        print_json({"images": args.images, "question": args.question, "answer": answer})
    else:
        print_text(answer)
    return 0


def _stream(args: argparse.Namespace) -> int:
    from vlm_export.runtime.vision_chat import load_vision_chat

    model = load_vision_chat(args.bundle, precision=args.precision, providers=providers(args), threads=args.threads)
    for piece in model.stream_answer(args.images, args.question, truncate=args.truncate, **chosen(args)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return 0


def _write(args: argparse.Namespace) -> int:
    from vlm_export.runtime.vision_language import load_vision_language

    model = load_vision_language(args.bundle, precision=args.precision, providers=providers(args), threads=args.threads)
    (image,) = args.images
    (answer,) = model.answer(
        image,
        args.question,
        beams=args.beams,
        max_length=args.max_length,
        min_length=args.min_length,
        truncate=args.truncate,
    )
    if args.json:
        print_json({"image": image, "question": args.question, "answer": answer})
    else:
        print_text(answer)
    return 0


def _rank(args: argparse.Namespace) -> int:
    from vlm_export.runtime.answering import RANK_K
    from vlm_export.runtime.vision_language import load_vision_language

    model = load_vision_language(args.bundle, precision=args.precision, providers=providers(args), threads=args.threads)
    (image,) = args.images
    (ranked,) = model.rank_answers(
        image, args.question, args.candidates, rank_k=args.rank_k or RANK_K, truncate=args.truncate
    )
    if args.json:
        scores = [{"answer": answer.text, "score": answer.score} for answer in ranked]
        result = {"image": image, "question": args.question, "answer": ranked[0].text}
        print_json({**result, "candidates": scores})
    else:
        print_table(("score", "answer"), [(f"{answer.score:.4f}", answer.text) for answer in ranked])
    return 0
