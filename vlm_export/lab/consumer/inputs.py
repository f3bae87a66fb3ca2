"""The stages before a model: token ids and pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vlm_export.lab.consumer.case import Case
from vlm_export.lab.consumer.pixels import Geometry, Scale, geometries, prepared, scales
from vlm_export.lab.consumer.report import Finding, Stage, explained, nearness, not_finite
from vlm_export.lab.consumer.texts import follows, made_by, text_hypotheses
from vlm_export.lab.differences import named
from vlm_export.proof.metrics import Array
from vlm_export.specs import ImageSpec

# Levels of 255. torchvision's resize of tensors stays below both against Pillow's (docs/numerics.md).
_MEAN_LEVELS, _FAR_LEVELS, _FAR_PERCENT = 0.75, 6.0, 99
_FOREIGN_IDS = 0.3


def ids_stage(case: Case) -> Stage:
    """A consumer's ids against the original's."""
    given = case.answers.ids
    if given is None:
        return Stage("ids", "not given")
    if case.session.manifest.text is None or not case.record.texts:
        return Stage("ids", "not compared", notes=("the bundle has no record of token ids",))
    bases = zip(given, case.rows, case.rows_alone, strict=True)
    matched = [next((base for base in own if follows(row, base)), None) for row, *own in bases]
    wrong = [i for i, base in enumerate(matched) if base is None]
    if wrong:
        names = tuple(case.text_names[i] for i in wrong)
        return Stage("ids", "differs", len(given), names, names, tuple(_id_findings(case, given, wrong)))
    notes = []
    uncleaned = [i for i, base in enumerate(matched) if base != case.rows[i]]
    if uncleaned:
        names = tuple(case.text_names[i] for i in uncleaned)
        notes.append(f"as tokenizer.json alone makes them, without the original's cleaning of texts: {named(names)}")
    odd = [i for i, base in enumerate(matched) if base is not None and _is_padded_otherwise(case, given[i], base)]
    if not odd:
        return Stage("ids", "equal", len(given), notes=tuple(notes))
    finding = _padding_finding(case, given, [matched[i] or () for i in range(len(given))], odd)
    if finding is None:
        notes.append("padded otherwise than the original pads, which changes no vector")
        return Stage("ids", "equal", len(given), notes=tuple(notes))
    names = tuple(case.text_names[i] for i in odd)
    return Stage("ids", "differs", len(given), names, findings=(finding,), notes=tuple(notes))


def _id_findings(case: Case, given: Sequence[tuple[int, ...]], wrong: Sequence[int]) -> Iterator[Finding]:
    """The mistakes that make the rows that differ."""
    left: dict[str, Array] = {}
    fixes: dict[str, str] = {}
    for found in text_hypotheses(case.session.bundle, case.texts, case.rows, case.pad):
        missed = np.array([not made_by(given[i], found, i) for i in wrong], float)
        left[found.word] = np.minimum(left.get(found.word, 1.0), missed)
        if not missed.all():
            fixes.setdefault(found.word, found.fix)
    mistakes = explained(left.items(), np.ones(len(wrong)), 0.0)
    for word, items in mistakes:
        evidence = f"{len(items)} of the {len(wrong)} texts that differ have exactly the ids of this mistake"
        yield Finding(word, evidence, fixes[word], tuple(case.text_names[wrong[i]] for i in items))
    pairs = [zip(given[i], case.rows[i], strict=False) for i in wrong]
    agreeing = float(np.mean([a == b for pair in pairs for a, b in pair] or [False]))
    if not mistakes and agreeing < _FOREIGN_IDS:
        number = wrong[0]
        evidence = (
            f"{case.text_names[number]} is {list(given[number][:8])}, the original's {list(case.rows[number][:8])}"
        )
        yield Finding("another tokenizer", evidence, "use the bundle's tokenizer.json")


def _is_padded_otherwise(case: Case, row: tuple[int, ...], base: tuple[int, ...]) -> bool:
    spec = case.session.text_spec
    short = spec.padding == "context" and len(row) != spec.context_length
    return short or any(token != case.pad for token in row[len(base) :])


def _padding_finding(
    case: Case, given: Sequence[tuple[int, ...]], bases: Sequence[tuple[int, ...]], odd: Sequence[int]
) -> Finding | None:
    """What is wrong with the padding; None where the model's vectors are the same with it."""
    expected, encoder = case.recorded("text"), case.encoder("text")
    if expected is not None and encoder is not None:
        outputs = case.run_texts([given[i] for i in odd], [len(bases[i]) for i in odd])
        if outputs and case.close(outputs[encoder.output], expected[list(odd)]).all():
            return None
    spec, first = case.session.text_spec, given[odd[0]]
    if spec.padding == "context" and len(first) < spec.context_length:
        evidence = f"{len(odd)} texts have from {min(len(given[i]) for i in odd)} tokens"
        return Finding("not padded", evidence, f"pad every text to {spec.context_length} tokens with id {case.pad}")
    used = sorted({token for i in odd for token in given[i][len(bases[i]) :]})
    return Finding("another padding id", f"padded with {used}", f"pad with id {case.pad}")


def pixel_stage(case: Case) -> Stage:
    """A consumer's pixels against the original's."""
    given, spec = case.answers.pixels, case.image_spec
    if given is None:
        return Stage("pixels", "not given")
    if spec is None or not case.record.images:
        return Stage("pixels", "not compared", notes=("the bundle's images become no single square",))
    ours = case.pixels
    if ours is None:
        note = "this machine makes other pixels than the record has: run vlm-export verify"
        return Stage("pixels", "not compared", notes=(note,))
    sizes = sorted({array.shape for array in given if sorted(array.shape) != sorted((3, *[spec.size_pixels] * 2))})
    if sizes:
        got = " x ".join(map(str, sizes[0]))
        fix = f"resize and cut to {spec.size_pixels} x {spec.size_pixels} pixels"
        finding = Finding("another size", f"arrays of {got}", fix)
        return Stage("pixels", "differs", len(given), findings=(finding,))
    divided = "divide by 255 and by image_std, neither of which is 0, in float32"
    if (odd := not_finite("pixels", given, case.image_names, divided)) is not None:
        return odd
    wrong = [i for i, array in enumerate(given) if not _is_close(array, ours[i], spec)]
    forms = [i for i in wrong if any(_is_close(given[i], other, spec) for _, other in case.other_forms[i])]
    wrong = [i for i in wrong if i not in forms]
    notes = []
    if forms:
        unlike = named(tuple(case.image_names[i] for i in forms))
        notes.append(f"as preprocessor_config.json says, which cannot say all that the original does: {unlike}")
    if not wrong:
        return Stage("pixels", "equal", len(given), notes=tuple(notes))
    findings = _pixel_findings(case, spec, [given[i] for i in wrong], wrong)
    names = tuple(case.image_names[i] for i in wrong)
    return Stage("pixels", "differs", len(given), names, names, tuple(findings), tuple(notes))


def _pixel_findings(case: Case, spec: ImageSpec, given: Sequence[Array], numbers: Sequence[int]) -> Iterator[Finding]:
    """Single mistakes; and for the images that none explains, one before and one with the levels together."""
    before = _distances(given, pixel_options(case, numbers, None), None, spec)
    singles = _tried(case, spec, given, numbers, pairs=False)
    found = explained(singles, before, _MEAN_LEVELS)
    rest = sorted(set(range(len(numbers))) - {item for _, items in found for item in items})
    if rest:
        chosen = [given[i] for i in rest], [numbers[i] for i in rest]
        pairs = explained(_tried(case, spec, *chosen, pairs=True), before[rest], _MEAN_LEVELS)
        found += [(mistake, [rest[i] for i in items]) for mistake, items in pairs]
    for mistake, items in found:
        some = [given[i] for i in items], [numbers[i] for i in items]
        left = _distances(some[0], pixel_options(case, some[1], mistake[0]), mistake[1], spec).mean()
        evidence = f"your pixels {nearness(left, _MEAN_LEVELS)} ours made so, to {left:.2g} levels of 255"
        if np.isfinite(before[items]).all():
            evidence += f"; as they should be made, to {before[items].mean():.2g}"
        for part in mistake:
            if part is not None:
                text = f"{part.detail}: {evidence}" if part.detail else evidence
                yield Finding(part.word, text, part.fix, tuple(case.image_names[i] for i in some[1]))


def _tried(
    case: Case, spec: ImageSpec, given: Sequence[Array], numbers: Sequence[int], *, pairs: bool
) -> Iterator[tuple[tuple[Geometry | None, Scale | None], Array]]:
    """Mistakes, or with `pairs` two at once, and what they leave of each image's difference."""
    for geometry in (None, *geometries(spec)):
        options = pixel_options(case, numbers, geometry)
        for scale in (None, *scales(spec)):
            if (geometry is not None and scale is not None) if pairs else (geometry is None) != (scale is None):
                yield (geometry, scale), _distances(given, options, scale, spec)


def pixel_options(case: Case, numbers: Sequence[int], geometry: Geometry | None) -> list[list[Array]]:
    """For each image what a mistake makes of it, or what right consumers make of it; nothing where it cannot be."""
    spec, ours = case.image_spec, case.pixels
    assert spec is not None
    assert ours is not None
    if geometry is None:
        return [[ours[i], *(made for _, made in case.other_forms[i])] for i in numbers]
    forms = ((case.images[i], (spec, *(other for other, _ in case.other_forms[i]))) for i in numbers)
    made = ([prepared(image, form, geometry.prepare) for form in some] for image, some in forms)
    return [[array for array in arrays if array is not None] for arrays in made]


def _distances(
    given: Sequence[Array], options: Sequence[Sequence[Array]], scale: Scale | None, spec: ImageSpec
) -> Array:
    """For each image the mean difference from the nearest option, in levels of 255; infinity where there is none."""
    each = []
    for array, choices in zip(given, options, strict=True):
        made = [choice if scale is None else scale.change(choice, spec) for choice in choices]
        differences = [np.abs(array - other).mean() for other in made if other.shape == array.shape]
        each.append(min(differences, default=np.inf))
    found: Array = np.array(each) * np.mean(spec.std) / spec.rescale_factor
    return found


def _is_close(array: Array, other: Array, spec: ImageSpec) -> bool:
    """Whether pixels are equal but for the rounding of another resize."""
    if array.shape != other.shape or not np.isfinite(array).all():
        return False
    difference = np.abs(array - other) * (np.mean(spec.std) / spec.rescale_factor)
    return bool(difference.mean() <= _MEAN_LEVELS and np.percentile(difference, _FAR_PERCENT) <= _FAR_LEVELS)
