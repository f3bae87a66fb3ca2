"""`vlm-export caption`: a sentence about each image."""

from __future__ import annotations

import argparse
from typing import Any

from vlm_export.cli.common import add_common_options, add_model_options, opened_model, positive_integer
from vlm_export.cli.generation_options import (
    add_new_tokens_option,
    add_sampling_options,
    check_sampling,
    chosen,
    refuse_options,
)
from vlm_export.cli.output import print_json, print_line, print_table

_OF_CAPTION = ("beams", "repetition_penalty", "max_length", "min_length")
_OF_CHAT = ("temperature", "top_k", "max_new_tokens")


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "caption",
        help="a sentence about an image",
        description="Captions of images. Without options they are written as the original writes them; a bundle of the "
        "task chat answers --prompt, greedily unless --sample is given.",
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="images")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="how each sentence starts, which is not printed; chat: what is asked (default: What is this?)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--beams", type=positive_integer, metavar="N", help="width of the beam search")
    how.add_argument("--greedy", action="store_true", help="take the most probable token each time")
    how.add_argument("--sample", action="store_true", help="draw tokens (nucleus sampling)")
    add_sampling_options(parser)
    add_new_tokens_option(parser)
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: fewer repeated words")
    parser.add_argument("--max-length", type=positive_integer, metavar="N", help="tokens at most, prompt included")
    parser.add_argument("--min-length", type=int, metavar="N", help="tokens at least, prompt included")
    parser.add_argument("--batch-size", type=positive_integer, default=4, metavar="N", help="default: 4")
    add_model_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlm_export.runtime.tasks.chat import ChatTask

    check_sampling(args)
    model = opened_model(args)
    task = model.captioning
    progress = not args.quiet and len(args.images) > 1
    shared = {"prompt": args.prompt, "batch_size": args.batch_size, "progress": progress}
    if isinstance(task, ChatTask):
        refuse_options(args, _OF_CAPTION, args.bundle, "the task chat takes --max-new-tokens and --sample")
        captions = task.caption(args.images, **shared, **chosen(args))
    else:
        refuse_options(args, _OF_CHAT, args.bundle, "the task caption takes --top-p, --max-length and others")
        captions = task.caption(args.images, **shared, **_beam_options(args))
    found = list(zip(args.images, captions, strict=True))
    if args.json:
        print_json({"captions": [{"image": image, "caption": caption} for image, caption in found]})
    elif len(found) == 1:
        print_line(captions[0])
    else:
        print_table(("image", "caption"), found)
    return 0


def _beam_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `CaptionTask.caption`."""
    from vlm_export.runtime.tasks.caption import SAMPLING_TOP_P

    return {
        "beams": 1 if args.greedy else args.beams,
        "max_length": args.max_length,
        "min_length": args.min_length,
        "sample": args.sample,
        "top_p": SAMPLING_TOP_P if args.top_p is None else args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
    }
