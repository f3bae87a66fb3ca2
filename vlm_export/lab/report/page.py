"""The report as one HTML page that requests nothing: no script, pictures as data, plots inline, all text escaped."""

from __future__ import annotations

import shlex
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from vlm_export import __version__
from vlm_export.bundle.ledger import LedgerEntry
from vlm_export.errors import VlmExportError
from vlm_export.lab.plots import MOST_NARROW_POINTS, PlottedPoint, PointGroup, bar_plot, point_plot
from vlm_export.lab.report.collect import NO_LAYER
from vlm_export.lab.report.findings import GraphFacts, OutputProof, Picture, Proof, Report
from vlm_export.lab.report.usage import usage_samples
from vlm_export.lab.report.words import failed_outputs, headline, number_text, share_text, verdict_text
from vlm_export.precision.fp16_rules import LARGEST_FLOAT16
from vlm_export.specs.signature import TensorSpec
from vlm_export.text_display import LONGEST_FIELD, shown, size_text

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MOST_LAYERS, _MOST_WEIGHTS, _MOST_FILES, _MOST_FINDINGS = 60, 2000, 20, 20
_STYLE = """
:root { color-scheme: light; --red: #c0392b; --green: #1e8449; --line: #d5d8dc; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2833; background: #fff; max-width: 62rem;
  margin: 0 auto; padding: 0 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } p { margin: .4rem 0; }
.verdict { border: 2px solid; border-radius: 8px; padding: 1rem 1.2rem; margin: 1rem 0; }
.failed { border-color: var(--red); background: #fdedec; } .failed h1 { color: var(--red); }
.passed { border-color: var(--green); background: #eafaf1; } .passed h1 { color: var(--green); }
.note { border-left: 4px solid #d68910; background: #fef9e7; padding: .5rem .8rem; margin: 1rem 0; }
.problem { background: #fff; border: 1px solid var(--red); border-radius: 6px; padding: .6rem .9rem; margin: .8rem 0; }
.problem h3 { margin: 0 0 .3rem; font-size: 1.1rem; }
dl { display: grid; grid-template-columns: 7.5rem 1fr; gap: .15rem .8rem; margin: .3rem 0; }
dt { color: #566573; } dd { margin: 0; }
.scroll { overflow-x: auto; }
.figures td { white-space: nowrap; }
.plots { margin: 1rem 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.plots svg { display: block; width: 100%; height: auto; }
.wide { grid-column: 1 / -1; overflow-x: auto; } .wide svg { min-width: 44rem; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { white-space: nowrap; color: #566573; font-weight: 600; } td.number { text-align: right; white-space: nowrap; }
tr.bad td { background: #fdedec; color: var(--red); }
pre { background: #f4f6f7; padding: .7rem; overflow-x: auto; font-size: .85rem; }
code, .code { font-family: ui-monospace, monospace; font-size: .9em; }
nav a { margin-right: .9rem; white-space: nowrap; } a { color: #1f618d; }
summary { cursor: pointer; color: #1f618d; margin: .5rem 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: .8rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; font-size: .8rem; }
figure.bad { border: 2px solid var(--red); background: #fdedec; }
figure div { display: flex; gap: .5rem; margin-bottom: .3rem; }
figure span { flex: 1; text-align: center; color: #566573; }
figure img { display: block; width: 96px; height: 96px; object-fit: contain; margin: 0 auto; background: #eaecee;
  image-rendering: pixelated; }
.wrong { color: var(--red); font-weight: 600; }
@media (max-width: 40rem) { body { font-size: 15px; } dl { grid-template-columns: 1fr; } dt { margin-top: .35rem; }
  .pictures { grid-template-columns: 1fr 1fr; } figure img { width: 64px; height: 64px; } }
"""
_BAD, _WIDE = ' class="bad"', ' class="wide"'
_Cell = str | float


def html_page(report: Report) -> str:
    """The page as one document in UTF-8."""
    title = f"{report.bundle.manifest.name}: {'passes' if report.proof.passed else 'FAILS'}"
    sections = [
        ("proof", "Proof", _proof(report)),
        ("source", "What was exported from what", _source(report)),
        ("images", "Images of the contract", _pictures(report)),
        ("ledger", "Where the weights come from", _ledger(report)),
        ("operators", "Operators", _operators(report)),
        ("sizes", "Sizes by layer", _sizes(report)),
        ("ranges", "Ranges", _ranges(report)),
        ("latency", "Latency", _latency(report)),
        ("use", "How to load it", _usage(report)),
    ]
    kept = [section for section in sections if section[2]]
    links = " ".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in kept)
    body = "\n".join(f'<section id="{anchor}"><h2>{heading}</h2>\n{text}</section>' for anchor, heading, text in kept)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f"{_verdict(report)}\n<nav>{links}</nav>\n{body}\n"
        f"<p><small>Written by vlm-export {__version__}.</small></p>\n</body></html>\n"
    )


def _verdict(report: Report) -> str:
    passed, name = report.proof.passed, _text(report.bundle.manifest.name)
    parts = [
        f"<h1>{'✓' if passed else '✗'} {name} {'passes' if passed else 'fails'}</h1>",
        f"<p>{headline(report)}</p>",
    ]
    if not passed:
        parts.append(_failure(report))
    source = f"Exported from {report.bundle.manifest.source.name}. Compared by: {report.proof.by}."
    parts.append(f"<p><small>{_text(source)}</small></p>")
    box = f'<header class="verdict {"passed" if passed else "failed"}">{"".join(parts)}</header>'
    warnings = [*report.bundle.manifest.export.warnings, *(f"Not run: {text}" for text in report.proof.not_run)]
    if not report.compared_pixels:
        warnings.insert(0, "Nothing was run for this report: figures are those that the export recorded.")
    return box + (f'<div class="note">{_list(warnings)}</div>' if warnings else "")


def _failure(report: Report) -> str:
    """The first problem in full, what it does to the outputs, and where else it shows."""
    problems = report.proof.problems
    parts = ["<p>Nothing was compared.</p>"]
    if problems:
        head = f"<h3>What failed first: {_text(problems[0].what)}</h3>"
        parts = [f'<div class="problem">{head}{_problem_fields(problems[0])}</div>']
    outputs = failed_outputs(report)
    if outputs:
        parts.append(f"<p><b>What it does:</b></p>{_list(outputs)}")
        command = shlex.join(["vlm-export", "bisect", report.bundle.root.name, report.bundle.manifest.source.name])
        told = "This command names the first module that differs from the checkpoint:"
        parts.append(f"<p>{told} <code>{_text(command)}</code></p>")
    if problems[1:]:
        more = "1 more check fails" if len(problems) == 2 else f"{len(problems) - 1} more checks fail"
        parts.append(f"<p><b>{more}, often for the same reason:</b></p>")
        parts += [_details(problem.what, _problem_fields(problem)) for problem in problems[1:]]
    return "".join(parts)


def _problem_fields(problem: VlmExportError) -> str:
    names = ("where", "expected", "got", "what to do")
    return _pairs(zip(names, (problem.where, problem.expected, problem.got, problem.fix), strict=True))


def _source(report: Report) -> str:
    manifest = report.bundle.manifest
    source, tools = manifest.source, ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    total = sum(record.size_bytes for record in manifest.files.values())
    seed = source.random_weights_seed
    pairs = [
        ("checkpoint", source.name + ("" if seed is None else f" (random weights, seed {seed})")),
        ("stored as", source.format),
        ("revision", source.revision or ""),
        ("licence", source.licence or "not stated"),
        ("family", manifest.family),
        ("tasks", ", ".join(task.kind for task in manifest.tasks)),
        ("bundle", f"{len(manifest.files) + 1} files, {size_text(total)}"),
        ("identity", manifest.identity()),
        ("compared with", manifest.export.reference),
        ("tools", tools),
    ]
    files = [(file.name, size_text(file.size_bytes), file.sha256) for file in source.files]
    notes = [*manifest.export.notes, *manifest.export.image_processor_differs]
    parts = [_pairs(pairs)]
    if files:
        more = f"<p>and {len(files) - _MOST_FILES} more</p>" if len(files) > _MOST_FILES else ""
        parts.append(
            _details("Files of the checkpoint", _table(("file", "size", "sha256"), files[:_MOST_FILES]) + more)
        )
    return "".join(parts) + (_details("Notes of the export", _list(notes)) if notes else "")


def _proof(report: Report) -> str:
    parts = [
        "<p>Each dot is one input: how far the graph's output is from the original's, as the relative error of a row. "
        "It must stay below the red line, its gate. The dashed line is the floor: the noise of the original itself.</p>"
    ]
    plots = []
    for (part, variant), outputs in groupby(report.proof.outputs, lambda output: (output.part, output.variant)):
        groups = [PointGroup(shown(o.output), _dots(o), o.floor, o.gate) for o in outputs]
        wide = sum(len(group.points) for group in groups) > MOST_NARROW_POINTS
        plots.append(f"<div{_WIDE if wide else ''}>{point_plot(shown(f'{part} {variant}'), groups)}</div>")
    parts.append(f'<div class="plots">{"".join(plots)}</div>')
    parts.append(_output_table(report.proof) + "<h3>The contract: from images and texts to vectors</h3>")
    parts.append(_stage_table(report.proof))
    if report.proof.made_by:
        parts.append(_list(f"{what}: made by {who}" for what, who in report.proof.made_by.items()))
    if report.compared_pixels and report.recorded.outputs:
        parts.append(_details("What the export itself compared", _output_table(report.recorded)))
    return "".join(parts)


def _dots(output: OutputProof) -> Sequence[PlottedPoint]:
    return output.dots or (PlottedPoint(f"worst of {output.points} points", output.seen, output.failed > 0),)


def _output_table(proof: Proof) -> str:
    header = (
        "part",
        "variant",
        "output",
        "verdict",
        "points",
        "floor",
        "gate",
        "seen",
        "of the gate",
        "max-abs",
        "cosine",
    )
    rows: list[Sequence[_Cell]] = [
        (
            *(output.part, output.variant, output.output or "-", verdict_text(output), output.points),
            *map(number_text, (output.floor, output.gate, output.seen)),
            share_text(output),
            number_text(output.max_abs),
            number_text(output.cosine, ".6f"),
        )
        for output in proof.outputs
    ]
    bad = [number for number, output in enumerate(proof.outputs) if output.failed]
    return f'<div class="figures">{_table(header, rows, bad)}</div>'


def _stage_table(proof: Proof) -> str:
    rows = [
        (
            stage.stage,
            stage.variant or "-",
            stage.compared,
            "pass" if stage.passed else f"FAIL: {stage.failures[0] if stage.failures else 'no reason recorded'}",
        )
        for stage in proof.stages
    ]
    bad = [number for number, stage in enumerate(proof.stages) if not stage.passed]
    return _table(("stage", "variant", "compared", "verdict"), rows, bad)


def _pictures(report: Report) -> str:
    if not report.pictures:
        return ""
    told = "Left the file, right the pixels that the bundle gives its model. "
    told += (
        "All of them were compared with the original's, by their digests."
        if report.compared_pixels
        else "They were not compared in this run."
    )
    shown_first = sorted(report.pictures, key=lambda picture: not picture.failure)
    figures = "".join(_figure(picture, report.compared_pixels) for picture in shown_first)
    return f'<p>{told}</p><div class="pictures">{figures}</div>'


def _figure(picture: Picture, compared: bool) -> str:
    sides = (("file", picture.original), ("prepared", picture.prepared))
    images = "".join(f"<span>{_image(content, f'{picture.name}: {label}')}{label}</span>" for label, content in sides)
    height, width = picture.size
    verdict = f'<br><span class="wrong">{_text(picture.failure)}</span>' if picture.failure else ""
    if compared and not picture.failure:
        verdict = "<br>equal to the original"
    caption = f"<figcaption>{_text(picture.name)}, {width} × {height}{verdict}</figcaption>"
    return f"<figure{_BAD if picture.failure else ''}><div>{images}</div>{caption}</figure>"


def _image(content: bytes | None, label: str) -> str:
    if content is None:
        return "none<br>"
    return f'<img alt="{_text(label)}" src="data:image/png;base64,{b64encode(content).decode()}">'


def _ledger(report: Report) -> str:
    parts = []
    for graph in report.graphs:
        if graph.ledger is None:
            parts.append(f"<p>{_text(graph.file)}: {_text(graph.refusal or 'the bundle has no ledger')}</p>")
            continue
        made = Counter(entry.transformation for entry in graph.ledger if entry.parameters)
        counts = [f"{count} {how}" for how, count in made.most_common()]
        constants = sum(not entry.parameters for entry in graph.ledger)
        text = f"{graph.file}: {len(graph.ledger)} initializers: {'; '.join([*counts, f'{constants} constants'])}"
        rows = [_weight(entry) for entry in graph.ledger[:_MOST_WEIGHTS]]
        table = _table(("initializer", "shape", "made of", "how", "sha256"), rows)
        parts.append(_details(text, table))
    return "".join(parts)


def _weight(entry: LedgerEntry) -> Sequence[_Cell]:
    made_of = ", ".join(tensor.key for tensor in entry.checkpoint) or ", ".join(entry.parameters) or "the code"
    return (
        entry.name,
        " × ".join(map(str, entry.shape)) or "one number",
        made_of,
        entry.transformation,
        entry.sha256[:12],
    )


def _operators(report: Report) -> str:
    kinds = Counter[str]()
    for graph in report.graphs:
        kinds.update(graph.operators)
    header = ("operator", *(f"{graph.part} {graph.variant}" for graph in report.graphs))
    rows: list[Sequence[_Cell]] = [
        (kind, *(graph.operators.get(kind, 0) for graph in report.graphs)) for kind, _ in kinds.most_common()
    ]
    return _table(header, [*rows, ("all", *(sum(graph.operators.values()) for graph in report.graphs))])


def _sizes(report: Report) -> str:
    rows = [(graph.part, graph.variant, graph.file, size_text(graph.size_bytes)) for graph in report.graphs]
    table, plots = _table(("part", "variant", "file", "size"), rows), list[str]()
    for _, graphs in groupby(report.graphs, lambda graph: graph.part):
        graph = next(graphs)
        if graph.layer_bytes:
            title = shown(f"{graph.part} {graph.variant}: weights by layer")
            plots.append(f"<div>{bar_plot(title, _bars(graph))}</div>")
    return f'{table}<div class="plots">{"".join(plots)}</div>'


def _bars(graph: GraphFacts) -> list[tuple[str, float, str]]:
    """In the graph's order, what belongs to no layer last, and the smallest together where there are too many."""
    by_size = sorted(graph.layer_bytes, key=lambda layer: -graph.layer_bytes[layer])
    kept = set(by_size[:_MOST_LAYERS])
    sizes = {layer: size for layer, size in graph.layer_bytes.items() if layer in kept and layer != NO_LAYER}
    for name, layers in (("other layers", by_size[_MOST_LAYERS:]), (NO_LAYER, [NO_LAYER])):
        rest = sum(graph.layer_bytes.get(layer, 0) for layer in layers)
        sizes |= {name: rest} if rest else {}
    return [(shown(layer, 28), size, size_text(size)) for layer, size in sizes.items()]


def _ranges(report: Report) -> str:
    """The largest value of each part against what float16 holds, and what float16 would lose."""
    if not report.ranges:
        return ""
    rows = list[Sequence[_Cell]]()
    for part in report.ranges:
        name, stats = max(part.tensors.items(), key=lambda item: item[1].peak, default=("-", None))
        peak = "–" if stats is None else f"{stats.peak:.3g}"
        rows.append((part.part, len(part.tensors), part.samples, peak, name, len(part.keep)))
    header = ("part", "tensors", "samples", "largest value", "in", "operators that must stay in float32")
    told = (
        f"<p>What the tensors of the float32 graphs are on real inputs. float16 holds up to {LARGEST_FLOAT16:.0f}.</p>"
    )
    found = [(each.kind, each.where, each.operator, each.what) for part in report.ranges for each in part.findings]
    more = f"<p>and {len(found) - _MOST_FINDINGS} more: see vlm-export ranges</p>" if found[_MOST_FINDINGS:] else ""
    table = _table(("finding", "module", "operator", "what"), found[:_MOST_FINDINGS]) + more if found else ""
    return told + _table(header, rows) + table


def _latency(report: Report) -> str:
    rows = [(graph.part, graph.variant, graph.latency) for graph in report.graphs if graph.latency]
    told = f"<p>The median of several runs, by {_text(report.proof.by)}.</p>"
    return told + _table(("part", "variant", "one run"), rows) if rows else ""


def _usage(report: Report) -> str:
    manifest = report.bundle.manifest
    rows = [
        (part.name, *(_tensors(side) for side in (part.signature.inputs, part.signature.outputs)))
        for part in manifest.parts
    ]
    samples = usage_samples(manifest, report.bundle.root.name)
    code = "".join(f"<h3>{name}</h3><pre><code>{_lines(text)}</code></pre>" for name, text in samples)
    return code + "<h3>Inputs and outputs of the graphs</h3>" + _table(("part", "inputs", "outputs"), rows)


def _tensors(tensors: Iterable[TensorSpec]) -> str:
    return "; ".join(f"{tensor.name} {tensor.dtype} ({', '.join(map(str, tensor.shape))})" for tensor in tensors)


def _table(header: Sequence[str], rows: Sequence[Sequence[_Cell]], bad: Sequence[int] = ()) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    lines = [f"<tr{_BAD if number in bad else ''}>{''.join(map(_cell, row))}</tr>" for number, row in enumerate(rows)]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _cell(cell: _Cell) -> str:
    return f"<td>{_text(cell)}</td>" if isinstance(cell, str) else f'<td class="number">{cell}</td>'


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    """Those that have a text."""
    lines = (f"<dt>{_text(label)}</dt><dd>{_text(text)}</dd>" for label, text in pairs if text)
    return f"<dl>{''.join(lines)}</dl>"


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _text(text: object) -> str:
    """Foreign text: hidden characters as escapes, and nothing that HTML reads."""
    return escape(shown(text, LONGEST_FIELD))


def _lines(text: str) -> str:
    return "\n".join(_text(line) for line in text.split("\n"))
