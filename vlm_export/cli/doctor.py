"""`vlm-export doctor`: whose mistake it is where another program's answers are not the original's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.cli.common import add_common_options, add_engine_options, existing_path, providers
from vlm_export.cli.output import print_json, print_line, print_table
from vlm_export.errors import UsageError

if TYPE_CHECKING:
    from vlm_export.lab.consumer.report import Diagnosis, Stage

_WRONG = 1


def add_parser(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "doctor",
        help="find the mistake of a program that uses a bundle",
        description=(
            "Compare what another program makes of a bundle's test texts and images with what the original makes: "
            "token ids, pixels, vectors. Names the first stage that is wrong and the likely mistake. First write what "
            "the program must be asked, and programs that collect its answers, with --questions. Ends with status 1 "
            "where something is wrong."
        ),
    )
    parser.add_argument("bundle", metavar="DIR", help="directory of the bundle")
    parser.add_argument(
        "answers",
        metavar="ANSWERS",
        nargs="?",
        help="a .json file, or a folder with any of ids, pixels, text_vectors and image_vectors as .json or .npy",
    )
    parser.add_argument("--questions", metavar="FOLDER", help="write the questions and the collectors to a new folder")
    add_engine_options(parser, "the variant that the program runs (default: fp32, or the only one)")
    add_common_options(parser)
    parser.set_defaults(run=run, extra="graph")


def run(args: argparse.Namespace) -> int:
    if (args.answers is None) == (args.questions is None):
        got = "neither" if args.answers is None else "both"
        raise UsageError("name either ANSWERS or --questions", where="doctor", got=got)
    if args.questions is not None:
        return _write_questions(args)
    from vlm_export.lab.doctor import doctor

    found = doctor(
        args.bundle,
        existing_path(args.answers),
        precision=args.precision,
        providers=providers(args),
        threads=args.threads,
    )
    if args.json:
        print_json(found.to_json())
    else:
        _print(found)
    return 0 if found.passed else _WRONG


def _write_questions(args: argparse.Namespace) -> int:
    from vlm_export.bundle.opened import open_bundle
    from vlm_export.lab.consumer.questions import write_questions

    texts, images = write_questions(open_bundle(args.bundle), Path(args.questions))
    if args.json:
        print_json({"questions": args.questions, "texts": texts, "images": images})
    else:
        print_line(f"{texts} texts, {images} images and programs that collect answers: see {args.questions}/README.txt")
    return 0


def _print(found: Diagnosis) -> None:
    print_table(("stage", "compared", "verdict", "likely mistake"), [_row(stage) for stage in found.stages])
    for stage in found.stages:
        for finding in stage.findings:
            print_line()
            print_line(f"{stage.name}: {finding.mistake}")
            if finding.items:
                print_line(f"  where: {_several(finding.items)}")
            print_line(f"  evidence: {finding.evidence}")
            print_line(f"  fix: {finding.fix}")
        if stage.unexplained:
            print_line()
            print_line(f"{stage.name}: not explained: {_several(stage.unexplained)}")
    notes = [f"{stage.name}: {note}" for stage in found.stages for note in stage.notes]
    for line in ("", *notes) if notes else ():
        print_line(line)


def _row(stage: Stage) -> tuple[str, str, str, str]:
    mistakes = ", ".join(dict.fromkeys(finding.mistake for finding in stage.findings))
    unknown = "none that is known" if stage.verdict == "differs" else ""
    return stage.name, str(stage.compared or "-"), stage.verdict, mistakes or unknown


def _several(items: Sequence[str]) -> str:
    from vlm_export.lab.differences import named

    return named(tuple(items))
