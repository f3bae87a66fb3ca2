"""The stages of a model: vectors of texts and of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_export.lab.consumer.case import Case, Outputs, Run, unit
from vlm_export.lab.consumer.inputs import pixel_options
from vlm_export.lab.consumer.pixels import geometries, scales
from vlm_export.lab.consumer.report import LEFT, Finding, Stage, explained, nearness, not_finite
from vlm_export.lab.consumer.texts import follows, text_hypotheses
from vlm_export.lab.differences import named
from vlm_export.proof.metrics import Array

_UNIT = 1e-3
_SEARCHED = 8
"""Items that mistakes are tried on."""
_EXACT, _COARSE, _FOREIGN = 0.9999, 0.98, 0.3


@dataclass(frozen=True)
class _Tried:
    """What a mistake makes of some items.

    Attributes:
        rows: float (K, N, D): K forms of the same mistake, the nearest of which counts for each item.
        left: the share of a difference that it may leave: tokens and graphs are exact, another resize is not.
    """

    word: str
    detail: str
    fix: str
    rows: Array
    left: float = 0.05


@dataclass(frozen=True)
class _Side:
    """What texts and images differ in.

    Attributes:
        kind: "text" or "image".
        names: of the items.
        before: the stage whose results the model is fed.
        runs: outputs of the model, or of a changed graph, for some items as they should be prepared; the consumer's own
            preparation where it is known. All but the first are forms in which right consumers may feed the same.
        others: rows that right consumers may have, for some items.
        tried: what mistakes in the preparation make of some items.
    """

    kind: str
    names: Sequence[str]
    before: Stage
    runs: Sequence[Callable[[Sequence[int], Run | None], Outputs]]
    others: Callable[[Sequence[int]], Iterator[Array]]
    tried: Callable[[Sequence[int]], Iterator[_Tried]]


def text_vector_stage(case: Case, ids: Stage) -> Stage:
    """A consumer's vectors of texts against the original's."""
    encoder, given = case.encoder("text"), case.answers.ids
    output = "" if encoder is None else encoder.output

    def run(numbers: Sequence[int], graph: Run | None) -> Outputs:
        if given is not None:
            own = [len(case.rows[i]) if follows(given[i], case.rows[i]) else len(given[i]) for i in numbers]
            return case.run_texts([given[i] for i in numbers], own, graph)
        return case.run_texts([case.rows[i] for i in numbers], None, graph)

    def filled(numbers: Sequence[int], graph: Run | None) -> Outputs:
        rows, limit = [(given or case.rows)[i] for i in numbers], case.session.text_spec.context_length
        lengths = [len(row) for row in rows]
        return case.run_texts([row + (case.pad,) * (limit - len(row)) for row in rows], lengths, graph)

    def others(numbers: Sequence[int]) -> Iterator[Array]:
        yield from _of(case.run_texts([case.rows_alone[i] for i in numbers]), output)

    def tried(numbers: Sequence[int]) -> Iterator[_Tried]:
        forms: dict[str, list[Array]] = {}
        fixes: dict[str, str] = {}
        for found in text_hypotheses(case.session.bundle, case.texts, case.rows, case.pad):
            lengths = None if found.lengths is None else [found.lengths[i] for i in numbers]
            for rows in _of(case.run_texts([found.rows[i] for i in numbers], lengths), output):
                forms.setdefault(found.word, []).append(rows)
                fixes.setdefault(found.word, found.fix)
        for word, made in forms.items():
            yield _Tried(word, "", fixes[word], np.stack(made))

    side = _Side("text", case.text_names, ids, (run, filled), others, tried)
    return _stage(case, "text vectors", case.answers.text_vectors, side)


def image_vector_stage(case: Case, pixels: Stage) -> Stage:
    """A consumer's vectors of images against the original's."""
    encoder, given = case.encoder("image"), case.answers.pixels
    output = "" if encoder is None else encoder.output

    def run(numbers: Sequence[int], graph: Run | None) -> Outputs:
        made = given if given is not None else case.pixels
        return {} if made is None else case.run_images([made[i] for i in numbers], graph)

    def others(numbers: Sequence[int]) -> Iterator[Array]:
        if case.pixels is not None:
            yield from forms_of(pixel_options(case, numbers, None))

    def forms_of(options: Sequence[Sequence[Array]]) -> Iterator[Array]:
        """Rows of each item's first option, of its second, and so on; of items with fewer, of the first."""
        for rows in _of(case.run_images([choices[0] for choices in options]), output):
            yield rows
            for number in range(1, max(map(len, options))):
                items = [i for i, choices in enumerate(options) if len(choices) > number]
                for some in _of(case.run_images([options[i][number] for i in items]), output):
                    form = rows.copy()
                    form[items] = some
                    yield form

    def tried(numbers: Sequence[int]) -> Iterator[_Tried]:
        spec = case.image_spec
        if spec is None or case.pixels is None:
            return
        for geometry in geometries(spec):
            options = pixel_options(case, numbers, geometry)
            if all(options) and (rows := list(forms_of(options))):
                yield _Tried(geometry.word, geometry.detail, geometry.fix, np.stack(rows), LEFT)
        for scale in scales(spec):
            ours = pixel_options(case, numbers, None)
            changed = [[scale.change(array, spec).astype(np.float32) for array in choices] for choices in ours]
            if rows := list(forms_of(changed)):
                yield _Tried(scale.word, scale.detail, scale.fix, np.stack(rows))

    side = _Side("image", case.image_names, pixels, (run,), others, tried)
    return _stage(case, "image vectors", case.answers.image_vectors, side)


def _of(outputs: Outputs, name: str) -> Iterator[Array]:
    if name in outputs:
        yield outputs[name]


def _stage(case: Case, name: str, given: Array | None, side: _Side) -> Stage:
    if given is None:
        return Stage(name, "not given")
    encoder, expected = case.encoder(side.kind), case.recorded(side.kind)
    if encoder is None or expected is None:
        return Stage(name, "not compared", notes=(f"the bundle has no record of embeddings of {side.kind}s",))
    overflow = "run the model in float32: half precision overflows beyond 65504"
    if (odd := not_finite(name, list(given), side.names, overflow)) is not None:
        return odd
    stage = Stage(name, "differs", len(given))
    if given.shape[1] != expected.shape[1]:
        return replace(stage, differing=tuple(side.names), findings=(_of_width(case, side, given, expected),))
    wrong, cosines, notes = _wrong_rows(case, side, given, expected)
    scaled = _unscaled(given, expected)
    if not wrong:
        if case.is_coarse:
            within = f"within what {case.session.precision} may lose, a cosine of {case.gate.cosine:g}"
            notes = (*notes, f"{within}: to see mistakes that cost less, compare a run in float32")
        return replace(stage, verdict="differs" if scaled else "equal", findings=scaled, notes=notes)
    stage = replace(stage, differing=tuple(side.names[i] for i in wrong), notes=notes)
    own = side.runs[0](wrong, None).get(encoder.output) if side.before.verdict == "differs" else None
    if side.before.verdict == "differs" and own is None:
        note = f"the bundle's graph does not take your {side.before.name}: mend them first"
        return replace(stage, verdict="not compared", notes=(*notes, note))
    if own is not None and case.close(given[wrong], own).all():
        note = f"the bundle's graph makes these vectors of your {side.before.name}"
        return replace(stage, verdict="differs" if scaled else "follows", findings=scaled, notes=(*notes, note))
    if own is not None:
        cosines[wrong] = np.maximum(cosines[wrong], _cosines(given[wrong], own))
    # Spread over those that differ much and those that differ little: they may differ by other mistakes.
    ranked = sorted(wrong, key=lambda i: cosines[i])
    chosen = [ranked[i] for i in np.unique(np.linspace(0, len(ranked) - 1, _SEARCHED).astype(int))]
    found = tuple(_explained(case, side, given, expected, cosines, chosen))
    tried = tuple(side.names[i] for i in chosen) if any(finding.items for finding in found) or not found else ()
    more = [case.untried[side.kind]] if side.kind in case.untried else []
    if side.before.verdict == "not given" and not found:
        more.append(f"with your {side.before.name} as well, doctor tells whether you part before the model or in it")
    return replace(stage, tried=tried, findings=(*found, *scaled), notes=(*notes, *more))


def _wrong_rows(case: Case, side: _Side, given: Array, expected: Array) -> tuple[list[int], Array, tuple[str, ...]]:
    """The rows that are none of a right consumer's, the cosine of every row with the nearest that a right consumer may
    have, and what is to be said of those that are not the original's."""
    encoder = case.encoder(side.kind)
    assert encoder is not None
    first = [int(i) for i in np.flatnonzero(~case.close(given, expected))]
    cosines, right = _cosines(given, expected), list[Array]()
    if first and side.before.verdict == "equal":
        right += _of(side.runs[0](first, None), encoder.output)
    elif first and side.before.verdict == "not given":
        right += side.others(first)
    fine = np.zeros(len(first), bool)
    for rows in right:
        fine |= case.close(given[first], rows)
        cosines[first] = np.maximum(cosines[first], _cosines(given[first], rows))
    wrong = [i for i, near in zip(first, fine, strict=True) if not near]
    accepted = tuple(side.names[i] for i in first if i not in wrong)
    if not accepted:
        return wrong, cosines, ()
    files = "tokenizer.json" if side.kind == "text" else "preprocessor_config.json"
    return wrong, cosines, (f"as {files} says, which cannot say all that the original does: {named(accepted)}",)


def _cosines(given: Array, rows: Array) -> Array:
    """The cosine of each row with the same row of the other; float64 (N,)."""
    found: Array = (unit(given) * unit(rows)).sum(axis=1)
    return found


def _unscaled(given: Array, expected: Array) -> tuple[Finding, ...]:
    lengths = np.linalg.norm(given, axis=1)
    if np.abs(lengths - 1).max() <= _UNIT:
        return ()
    raw = np.linalg.norm(expected.astype(np.float64), axis=1)
    is_raw = np.allclose(lengths, raw, rtol=1e-2)
    what = ", as the graph gives them" if is_raw else ""
    evidence = f"rows are {lengths.min():.3g} to {lengths.max():.3g} long{what}, where cosines need rows of length 1"
    return (Finding("un-normalised", evidence, "divide each vector by its length before products are compared"),)


def _of_width(case: Case, side: _Side, given: Array, expected: Array) -> Finding:
    """A value of the graph that is theirs, or another model."""
    numbers = list(range(len(given)))[:_SEARCHED]
    before = np.ones(len(numbers))
    found = explained(_left(_graph_changes(case, side, numbers), given[numbers], before), before, case.far)
    if found:
        return _finding(case, found[0][0], given[numbers], None, ())
    width, whole = given.shape[1], expected.shape[1]
    # Not all of them: right consumers have other rows where the bundle's files cannot say all.
    if width < whole and case.close(given, expected[:, :width]).mean() >= 0.5:
        fix = f"keep all {whole} numbers, or cut everything that is compared alike"
        return Finding("cut vectors", f"your vectors are the first {width} of our {whole} numbers", fix)
    evidence = f"vectors of {width} numbers; this model's have {whole}"
    return Finding("another model", evidence, "take the output that the manifest names, of this bundle's graph")


def _explained(
    case: Case, side: _Side, given: Array, expected: Array, cosines: Array, chosen: Sequence[int]
) -> Iterator[Finding]:
    """The mistakes that explain the chosen items, or what all items tell."""
    if _in_another_order(given, expected):
        fix = "keep the order of the questions: that of texts.json, and images by name"
        yield Finding("another order", "each vector is one of ours, of another item", fix)
        return

    def every() -> Iterator[_Tried]:
        if side.before.verdict == "not given":
            yield from side.tried(chosen)
        yield from _graph_changes(case, side, chosen)

    before = 1 - cosines[chosen]
    mistakes = explained(_left(every(), given[chosen], before), before, case.far)
    for mistake, items in mistakes:
        names = tuple(side.names[chosen[i]] for i in items)
        rows = replace(mistake, rows=mistake.rows[:, items])
        yield _finding(case, rows, given[[chosen[i] for i in items]], float(before[items].mean()), names)
    if not mistakes:
        yield from _unexplained(case, cosines)


def _in_another_order(given: Array, expected: Array) -> bool:
    matrix = unit(given) @ unit(expected).T
    nearest = matrix.argmax(axis=1).tolist()
    return sorted(nearest) == list(range(len(given))) != nearest and bool((matrix.max(axis=1) >= _EXACT).all())


def _unexplained(case: Case, cosines: Array) -> Iterator[Finding]:
    if cosines.min() >= _COARSE:
        evidence = f"cosines are {cosines.min():.6f} to {cosines.max():.6f}, and no other mistake explains them"
        kept = f"run {case.session.precision} and keep vectors in more than 8 bits"
        others = " or ".join(f"--precision {precision}" for precision in case.other_precisions)
        fix = f"compare with {others} if that is what you run, or {kept}" if others else kept
        yield Finding("lower precision", evidence, fix)
    elif np.abs(cosines).mean() <= _FOREIGN:
        evidence = f"cosines with ours are {cosines.min():.2f} to {cosines.max():.2f}"
        yield Finding("another model", evidence, "load this bundle's graphs, and compare vectors of one model alone")


def _graph_changes(case: Case, side: _Side, numbers: Sequence[int]) -> Iterator[_Tried]:
    for graph, changes in case.changed_graphs(side.kind):
        for run in side.runs:
            outputs = run(numbers, graph)
            for change in changes:
                if change.output in outputs:
                    yield _Tried(change.word, change.detail, change.fix, outputs[change.output][None])


def _left(tried: Iterator[_Tried], given: Array, before: Array) -> Iterator[tuple[_Tried, Array]]:
    """What mistakes leave of each row's difference, 1 - cosine; infinity where it is too much."""
    for found in tried:
        if found.rows.shape[1:] == given.shape and np.isfinite(found.rows).all():
            left = _nearest(given, found.rows)
            yield found, np.where(left <= found.left * before, left, np.inf)


def _nearest(given: Array, forms: Array) -> Array:
    """1 - cosine of each row (N, D) with the nearest of its forms (K, N, D)."""
    each: Array = np.array([1 - _cosines(given, rows) for rows in forms])
    nearest: Array = each.min(axis=0)
    return nearest


def _finding(case: Case, tried: _Tried, given: Array, before: float | None, items: tuple[str, ...]) -> Finding:
    left = float(_nearest(given, tried.rows).mean())
    evidence = f"your vectors {nearness(left, case.far)} ours made so: 1 - cosine is {left:.1e}"
    evidence += "" if before is None else f"; as they should be made: {before:.1e}"
    return Finding(tried.word, f"{tried.detail}: {evidence}" if tried.detail else evidence, tried.fix, items)
