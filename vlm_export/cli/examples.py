"""What `--help` shows at its end: two commands as a user would type them, for every verb."""

from __future__ import annotations

import argparse

EXAMPLES: dict[str, tuple[str, str]] = {
    "inspect": ("inspect clip-demo", "inspect photo.jpg --bundle features -o slices.png"),
    "export": ("export clip-demo -o bundle", "export model.safetensors -o bundle --precision fp32 --precision fp16"),
    "quantize": (
        "quantize bundle --precision int8",
        "quantize bundle --precision int4 --part decoder --budget exact-match=0.9 -o smaller",
    ),
    "verify": ("verify bundle", "verify bundle --source clip-demo --json"),
    "package": (
        "package bundle --for immich -o for-immich",
        "package bundle --for transformers.js -o web --precision fp16",
    ),
    "page": ("page bundle -o site", "page bundle -o site --packages archives --overwrite"),
    "classify": ("classify bundle photo.jpg cat dog", "classify bundle photo.jpg red blue --template 'a {} circle'"),
    "caption": ("caption captions photo.jpg", "caption chat a.jpg b.jpg --prompt 'Describe this image.'"),
    "ask": ("ask answers photo.jpg 'what colour is it?'", "ask chat photo.jpg 'What is this?' --stream"),
    "match": ("match bundle photo.jpg 'a cat' 'a dog'", "match retrieval photo.jpg 'a red circle' --json"),
    "embed": ("embed bundle photos -o photos.npy", "embed bundle captions.txt -o captions.parquet --truncate"),
    "index": ("index photos -o photos.index", "index photos -o photos.index --queries captions.npy --recall 0.99"),
    "search": ("search bundle photos.npy 'a red circle' -k 3", "search bundle photos.index 'at night' --image a.jpg"),
    "diff": ("diff before after", "diff bundle clip-demo --json"),
    "bisect": ("bisect bundle --against fp16", "bisect before after -o culprit --plot errors.svg"),
    "regress": (
        "regress tests/exports.yaml --junit report.xml",
        "regress --bundles bundles/a bundles/b --strict",
    ),
    "ranges": ("ranges bundle", "ranges bundle --part vision --fail-on overflow --fail-on non-finite"),
    "check": ("check bundle", "check bundle --items items.yaml --json"),
    "bench": ("bench bundle --recommend", "bench bundle --batch 4 16 --against clip-demo --plot bench.svg"),
    "doctor": ("doctor bundle --questions questions", "doctor bundle questions/answers"),
    "report": ("report bundle -o page.html", "report bundle -o page.html --markdown summary.md --latency"),
    "graph": ("graph show model.onnx", "graph verify original.onnx changed.onnx"),
    "graph show": ("graph show model.onnx", "graph show model.onnx --json"),
    "graph find": ("graph find model.onnx 'MatMul -> Add'", "graph find model.onnx '*Gelu' --json"),
    "graph check": ("graph check model.onnx", "graph check model.onnx --json"),
    "graph verify": ("graph verify a.onnx b.onnx", "graph verify a.onnx b.onnx --inputs x.npz --tolerance 1e-5"),
    "graph apply": (
        "graph apply model.onnx edits.yaml -o out.onnx",
        "graph apply model.onnx edits.yaml -o out.onnx --verify",
    ),
    "graph store": ("graph store model.onnx -o out.onnx --external", "graph store model.onnx -o out.onnx --embedded"),
    "graph split": (
        "graph split model.onnx --at hidden -o first.onnx --second second.onnx",
        "graph split model.onnx --at hidden mask -o first.onnx --second second.onnx --verify",
    ),
}
_HEAD = "examples:"
_METAVARS = {"IN": "model.onnx", "OUT": "out.onnx"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps descriptions, and keeps the lines of what has several."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def help_with_examples(parser: argparse.ArgumentParser) -> str:
    """The help of a verb's parser with two examples at its end; that of the program itself has none."""
    words = parser.prog.partition(" ")[2]
    if not words:
        return argparse.ArgumentParser.format_help(parser)
    examples = EXAMPLES.get(words) or _made(words, parser)
    lines = "\n".join([_HEAD, *(f"  vlm-export {example}" for example in examples)])
    epilog, formatter = parser.epilog, parser.formatter_class
    parser.epilog = f"{epilog.rstrip()}\n\n{lines}" if epilog else lines
    parser.formatter_class = HelpFormatter
    try:
        return argparse.ArgumentParser.format_help(parser)
    finally:
        parser.epilog, parser.formatter_class = epilog, formatter


def _made(words: str, parser: argparse.ArgumentParser) -> tuple[str, str]:
    """Of a verb that changes a model: what it requires, by the names of its usage, without and with a proof."""
    required = [action for action in parser._actions if action.required]
    ordered = sorted(required, key=lambda action: bool(action.option_strings))
    command = " ".join([words, *map(_example_of, ordered)])
    return command, f"{command} --verify"


def _example_of(action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    value = _METAVARS.get(metavar, metavar)
    return f"{action.option_strings[0]} {value}" if action.option_strings else value
