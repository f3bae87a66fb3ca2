"""`vlm-export caption`: a sentence about each picture."""

from __future__ import annotations

import argparse
from typing import Any

from vlm_export.cli.common import add_common_options, add_engine_options, positive_integer, providers
from vlm_export.cli.output import print_json, print_table
from vlm_export.errors import UsageError


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "caption",
        help="a sentence about a picture",
        description="Captions of pictures. Without options they are written as the original writes them.",
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="pictures")
    parser.add_argument("--prompt", metavar="TEXT", help="how each sentence starts; it is not printed")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--beams", type=positive_integer, metavar="N", help="width of the beam search")
    how.add_argument("--greedy", action="store_true", help="take the most probable token each time")
    how.add_argument("--sample", action="store_true", help="draw tokens (nucleus sampling)")
    parser.add_argument("--seed", type=int, metavar="N", help="of --sample: the same captions each time")
    parser.add_argument("--top-p", type=float, metavar="P", help="of --sample: draw from this total probability")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: fewer repeated words")
    parser.add_argument("--max-length", type=positive_integer, metavar="N", help="tokens at most, prompt included")
    parser.add_argument("--min-length", type=int, metavar="N", help="tokens at least, prompt included")
    parser.add_argument("--batch-size", type=positive_integer, default=4, metavar="N", help="default: 4")
    add_engine_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlm_export.runtime.captioning import SAMPLING_TOP_P
    from vlm_export.runtime.vision_language import load_vision_language

    for option, name in ((args.seed, "--seed"), (args.top_p, "--top-p")):
        if option is not None and not args.sample:
            raise UsageError(f"{name} is for sampling", fix="add --sample")
    model = load_vision_language(args.bundle, precision=args.precision, providers=providers(args), threads=args.threads)
    captions = model.caption(
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
    found = list(zip(args.images, captions, strict=True))
    if args.json:
        print_json({"captions": [{"image": image, "caption": caption} for image, caption in found]})
    elif len(found) == 1:
        print(captions[0])
    else:
        print_table(("picture", "caption"), found)
    return 0
