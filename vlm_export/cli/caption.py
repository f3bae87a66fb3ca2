"""`vlm-export caption`: a sentence about each picture."""

from __future__ import annotations

import argparse
from typing import Any

from vlm_export.cli.chat_options import (
    add_new_tokens_option,
    add_sampling_options,
    check_sampling,
    chosen,
    is_chat_bundle,
    refuse_options,
)
from vlm_export.cli.common import add_common_options, add_engine_options, positive_integer, providers
from vlm_export.cli.output import print_json, print_line, print_table

_OF_BLIP = ("beams", "repetition_penalty", "max_length", "min_length")
_OF_CHAT = ("temperature", "top_k", "max_new_tokens")


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "caption",
        help="a sentence about a picture",
        description="Captions of pictures. BLIP: without options they are written as the original writes them. "
        "nanoVLM: the answer to --prompt, greedily unless --sample is given.",
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="pictures")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="BLIP: how each sentence starts; it is not printed. nanoVLM: what is asked (default: What is this?)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--beams", type=positive_integer, metavar="N", help="BLIP: width of the beam search")
    how.add_argument("--greedy", action="store_true", help="take the most probable token each time")
    how.add_argument("--sample", action="store_true", help="draw tokens (nucleus sampling)")
    add_sampling_options(parser)
    add_new_tokens_option(parser)
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="BLIP: above 1: fewer repeated words")
    parser.add_argument(
        "--max-length", type=positive_integer, metavar="N", help="BLIP: tokens at most, prompt included"
    )
    parser.add_argument("--min-length", type=int, metavar="N", help="BLIP: tokens at least, prompt included")
    parser.add_argument("--batch-size", type=positive_integer, default=4, metavar="N", help="default: 4")
    add_engine_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_sampling(args)
    if is_chat_bundle(args.bundle):
        refuse_options(args, _OF_BLIP, args.bundle, "it is for BLIP; nanoVLM takes --max-new-tokens and --sample")
        captions = _chat(args)
    else:
        refuse_options(args, _OF_CHAT, args.bundle, "it is for nanoVLM; BLIP takes --top-p, --max-length and others")
        captions = _captions(args)
    found = list(zip(args.images, captions, strict=True))
    if args.json:
        print_json({"captions": [{"image": image, "caption": caption} for image, caption in found]})
    elif len(found) == 1:
        print_line(captions[0])
    else:
        print_table(("picture", "caption"), found)
    return 0


def _chat(args: argparse.Namespace) -> list[str]:
    from vlm_export.runtime.vision_chat import load_vision_chat

    model = load_vision_chat(args.bundle, precision=args.precision, providers=providers(args), threads=args.threads)
    progress = not args.quiet and len(args.images) > 1
    return model.caption(args.images, prompt=args.prompt, batch_size=args.batch_size, progress=progress, **chosen(args))


def _captions(args: argparse.Namespace) -> list[str]:
    from vlm_export.runtime.captioning import SAMPLING_TOP_P
    from vlm_export.runtime.vision_language import load_vision_language

    model = load_vision_language(args.bundle, precision=args.precision, providers=providers(args), threads=args.threads)
    return model.caption(
        args.images,
        prompt=args.prompt,
        beams=1 if args.greedy else args.beams,
        max_length=args.max_length,
        min_length=args.min_length,
        sample=args.sample,
        top_p=SAMPLING_TOP_P if args.top_p is None else args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=not args.quiet and len(args.images) > 1,
    )
