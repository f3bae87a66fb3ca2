"""`vlm-export ask`: an answer to a question about an image, or about several."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, add_model_options, opened_model, positive_integer
from vlm_export.cli.generation_options import (
    SAMPLING,
    add_new_tokens_option,
    add_sampling_options,
    check_sampling,
    chosen,
    refuse_options,
)
from vlm_export.cli.output import print_json, print_table, print_text
from vlm_export.errors import UsageError

if TYPE_CHECKING:
    from vlm_export.runtime.tasks.answer import AnswerTask
    from vlm_export.runtime.tasks.chat import ChatTask

_OF_ANSWER = ("candidates", "rank_k", "beams", "max_length", "min_length")
_OF_CHAT = ("stream", "sample", *SAMPLING, "max_new_tokens")


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "ask",
        help="an answer to a question about images",
        description="Writes an answer, or ranks candidate answers. A bundle of the task answer writes the original's "
        "answer; one of the task chat the most probable words, or with --sample drawn ones.",
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="an image; several where the chat takes several")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    parser.add_argument("--stream", action="store_true", help="chat: print the words as they come")
    parser.add_argument("--sample", action="store_true", help="chat: draw tokens")
    add_sampling_options(parser)
    add_new_tokens_option(parser)
    parser.add_argument("--candidates", metavar="ANSWER", nargs="+", help="answer: rank these instead of writing")
    parser.add_argument(
        "--rank-k", type=positive_integer, metavar="N", help="answer: candidates that are scored (default: 128)"
    )
    parser.add_argument("--beams", type=positive_integer, metavar="N", help="answer: width of the search; 1 is greedy")
    parser.add_argument("--max-length", type=positive_integer, metavar="N", help="answer: tokens at most")
    parser.add_argument("--min-length", type=int, metavar="N", help="answer: tokens at least")
    parser.add_argument("--truncate", action="store_true", help="cut a question that is too long")
    add_model_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlm_export.runtime.tasks.chat import ChatTask

    _check_options(args)
    task = opened_model(args).answering
    if isinstance(task, ChatTask):
        refuse_options(args, _OF_ANSWER, args.bundle, "the task chat takes --max-new-tokens and --sample")
        return _stream(task, args) if args.stream else _chat(task, args)
    refuse_options(args, _OF_CHAT, args.bundle, "the task answer takes --beams, --max-length and --min-length")
    if len(args.images) > 1:
        got = f"{len(args.images)} images"
        raise UsageError("this bundle answers about one image at a time", where=args.bundle, got=got)
    return _write(task, args) if args.candidates is None else _rank(task, args)


def _check_options(args: argparse.Namespace) -> None:
    check_sampling(args)
    if args.stream and args.json:
        raise UsageError("--stream prints words, not JSON", fix="leave out --stream or --json")
    if args.candidates is None:
        if args.rank_k is not None:
            raise UsageError("--rank-k is for candidates", fix="add --candidates")
    elif any(option is not None for option in (args.beams, args.max_length, args.min_length)):
        raise UsageError("candidates are ranked, not written", fix="leave out --beams, --max-length and --min-length")


def _chat(task: ChatTask, args: argparse.Namespace) -> int:
    (answer,) = task.answer([args.images], args.question, truncate=args.truncate, **chosen(args))
    if args.json:
        print_json({"images": args.images, "question": args.question, "answer": answer})
    else:
        print_text(answer)
    return 0


def _stream(task: ChatTask, args: argparse.Namespace) -> int:
    for piece in task.stream_answer(args.images, args.question, truncate=args.truncate, **chosen(args)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return 0


def _write(task: AnswerTask, args: argparse.Namespace) -> int:
    (image,) = args.images
    (answer,) = task.answer(
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


def _rank(task: AnswerTask, args: argparse.Namespace) -> int:
    from vlm_export.runtime.tasks.answer import RANK_K

    (image,) = args.images
    (ranked,) = task.rank_answers(
        image, args.question, args.candidates, rank_k=args.rank_k or RANK_K, truncate=args.truncate
    )
    if args.json:
        scores = [{"answer": answer.text, "score": answer.score} for answer in ranked]
        result = {"image": image, "question": args.question, "answer": ranked[0].text}
        print_json({**result, "candidates": scores})
    else:
        print_table(("score", "answer"), [(f"{answer.score:.4f}", answer.text) for answer in ranked])
    return 0
