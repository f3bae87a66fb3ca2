"""Items of the checklist that run the bundle: its sizes, its limits, and what it costs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from vlm_export.bundle.layout import TOKENIZER_NAME
from vlm_export.bundle.manifest import PartRecord
from vlm_export.bundle.memory import anonymous_bytes, thread_count
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError
from vlm_export.graph.core.onnxruntime_session import Array
from vlm_export.lab.check_graphs import OpenedVariant
from vlm_export.lab.checklist import MEMORY_UNKNOWN, NotRunError, Seen
from vlm_export.lab.output_diff import median_seconds
from vlm_export.proof.gates import judge, variant_gate
from vlm_export.proof.golden import GoldenRecord, iterate_golden
from vlm_export.proof.grid import BATCH_AXIS, BATCHES
from vlm_export.proof.metrics import compare
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.runtime.inputs.images import MAX_PIXELS, ImageSource
from vlm_export.runtime.model import Model
from vlm_export.runtime.session import Session
from vlm_export.specs.tasks import EmbedSpec

# Of the runs the first quarter fills caches and pools.
_WARM_SHARE = 4
_MOST_GROWTH_BYTES = 8 << 20
_MOST_GROWTH_SHARE = 0.02
_FEW_THREADS = 2
_MIB = 1 << 20
_TINY, _HUGE = (1, 1), (4000, 3000)
_FEW_PIXELS = 1000
_LONG_TEXT = "a very long sentence about a photo of a cat " * 200


class Runs:
    """The sessions of a bundle, one for each precision, and its golden records."""

    def __init__(
        self,
        bundle: OpenBundle,
        variants: Sequence[OpenedVariant],
        *,
        precision: str | None,
        providers: Sequence[str] | None,
        threads: int | None,
    ) -> None:
        self.bundle, self.variants = bundle, variants
        self._precision, self._providers, self._threads = precision, providers, threads
        self._sessions: dict[str | None, Session] = {}
        self.latencies_ms: dict[str, float] = {}

    def session(self, precision: str | None) -> Session:
        if precision not in self._sessions:
            self._sessions[precision] = self._opened(precision)
        return self._sessions[precision]

    def _opened(self, precision: str | None, threads: int | None = None, max_pixels: int = MAX_PIXELS) -> Session:
        return Session(
            self.bundle,
            precision=precision,
            providers=self._providers,
            threads=threads or self._threads,
            max_pixels=max_pixels,
        )

    @cached_property
    def first_records(self) -> Mapping[str, GoldenRecord]:
        """Part → its first golden record; parts without one are left out."""
        names = dict.fromkeys(variant.part.name for variant in self.variants)
        found = {name: next(iterate_golden(self.bundle, name), None) for name in names}
        return {name: record for name, record in found.items() if record is not None}

    def _recorded(self) -> Iterator[tuple[OpenedVariant, GoldenRecord]]:
        if not self.first_records:
            raise NotRunError("the bundle holds no golden records")
        for variant in self.variants:
            if variant.part.name in self.first_records:
                yield variant, self.first_records[variant.part.name]

    def check_sizes(self, seen: Seen) -> None:
        """Every golden record, which between them have the ends of all axes."""
        sizes: dict[str, set[int]] = {}
        for variant, _ in self._recorded():
            for record in iterate_golden(self.bundle, variant.part.name):
                self._compare(variant, record.inputs, record.outputs, seen)
                for tensor in variant.part.signature.inputs:
                    for entry, size in zip(tensor.shape, record.inputs[tensor.name].shape, strict=True):
                        if isinstance(entry, str):
                            sizes.setdefault(f"{variant.part.name}.{entry}", set()).add(size)
        seen.evidence += [f"{name} ran at {', '.join(map(str, sorted(found)))}" for name, found in sizes.items()]

    def check_batches(self, seen: Seen) -> None:
        """Rows of a record, repeated to other batches, give the rows that the original gave."""
        for variant, record in self._recorded():
            batches = _batches(variant.part)
            if not batches:
                seen.evidence.append(f"{variant.label}: has no batch")
                continue
            for size in batches:
                inputs = _resized(record.inputs, size)
                self._compare(variant, inputs, _resized(record.outputs, size), seen)
            seen.evidence.append(f"{variant.label}: batches of {', '.join(map(str, batches))}")

    def _compare(
        self, variant: OpenedVariant, inputs: Mapping[str, Array], expected: Mapping[str, Array], seen: Seen
    ) -> None:
        gate = variant_gate(variant.part.name, variant.record)
        try:
            got = self.session(variant.record.precision).run(variant.part.name, inputs)
        except InputError as error:
            seen.failures.append(f"{variant.label} at {_shapes(inputs)}: {error.what}: {error.got}")
            return
        for name, array in expected.items():
            for text in judge(compare(array, got[name]), gate):
                seen.failures.append(f"{variant.label} at {_shapes(inputs)}: {name}: {text}")

    def check_boundaries(self, seen: Seen) -> None:
        """An empty and a far too long text, an image of one pixel and one of twelve million."""
        model = Model(self.session(self._precision))
        images = [Image.new("RGB", size, (200, 60, 20)) for size in (_TINY, _HUGE)]
        sizes = f"images of {_TINY[0]} x {_TINY[1]} and {_HUGE[0]} x {_HUGE[1]} pixels"
        if (call := _image_call(model)) is not None:
            _check_finite(call(images), sizes, seen)
            seen.evidence.append(sizes)
        for text in _texts(model):
            what = "a text that is cut" if text else "an empty text"
            _check_finite(model.encode_text(text, truncate=True), what, seen)
            seen.evidence.append(what)
        if not seen.evidence:
            raise NotRunError("the bundle has no task that takes images or texts alone")

    def check_long_run(self, count: int, seen: Seen) -> None:
        """Anonymous memory stays what it is after the first runs."""
        session, warm = self.session(self._precision), count // _WARM_SHARE
        before = anonymous_bytes()
        if before is None:
            raise NotRunError(MEMORY_UNKNOWN)
        records = {variant.part.name: record for variant, record in self._recorded()}
        for number in range(count):
            if number == warm:
                before = anonymous_bytes() or before
            for part, record in records.items():
                session.run(part, record.inputs)
        after = anonymous_bytes() or before
        allowed = max(_MOST_GROWTH_BYTES, _MOST_GROWTH_SHARE * before)
        text = f"{count} runs: {before / _MIB:.1f} MiB → {after / _MIB:.1f} MiB"
        seen.evidence.append(text)
        if after - before > allowed:
            seen.failures.append(f"memory grows: {text}, at most {allowed / _MIB:.1f} MiB more is allowed")

    def check_provider(self, seen: Seen) -> None:
        """The provider that was asked for is the one that computes."""
        session = self.session(self._precision)
        for name, record in self.first_records.items():
            variant = self.bundle.manifest.part(name).served_by(session.precision)
            with TemporaryDirectory(prefix="vlm-export-") as folder:
                engine = OrtEngine(
                    self.bundle.graph_file(variant),
                    providers=session.providers,
                    threads=self._threads,
                    profile=f"{folder}/profile",
                )
                engine.run(record.inputs)
                nodes = engine.profiled_nodes()
            text = ", ".join(f"{number} nodes in {provider}" for provider, number in nodes.items())
            seen.evidence.append(f"{name}: {text}")
            if not nodes.get(engine.providers[0]):
                seen.failures.append(f"{name}: {engine.providers[0]} runs no node: {text}")
        if not seen.evidence:
            raise NotRunError("the bundle holds no golden records")

    def check_latency(self, seen: Seen) -> None:
        """Every variant runs, and what one run takes is measured."""
        for variant, record in self._recorded():
            run = partial(self.session(variant.record.precision).run, variant.part.name)
            (seconds,) = median_seconds([run], record.inputs)
            for name, array in run(record.inputs).items():
                _check_finite(array, f"{variant.label}: {name}", seen)
            self.latencies_ms[variant.label] = 1000 * seconds
            taken = f"{self.latencies_ms[variant.label]:.3g} ms for {_first_shape(record.inputs)}"
            seen.evidence.append(f"{variant.label}: {taken}")

    def check_limits(self, seen: Seen) -> None:
        """As many threads as were asked for, and images above the limit are refused before they are decoded."""
        threads, part = self._threads or _FEW_THREADS, self.variants[0].part.name
        before = thread_count()
        if before is None:
            seen.evidence.append("threads: this system does not tell their number")
        else:
            session = self._opened(self._precision, threads=threads)
            session.engine(part)
            more = (thread_count() or before) - before
            seen.evidence.append(f"threads={threads}: the engine started {more} beside the caller's")
            if more > threads - 1:
                seen.failures.append(f"threads={threads} is not kept: the engine started {more} beside the caller's")
        call = _image_call(Model(self._opened(self._precision, max_pixels=_FEW_PIXELS)))
        if call is None:
            return
        what = f"max_pixels={_FEW_PIXELS}: an image of {2 * _FEW_PIXELS} pixels is"
        try:
            call([_file_of(Image.new("RGB", (_FEW_PIXELS, 2)))])
        except InputError:
            seen.evidence.append(f"{what} refused")
            return
        seen.failures.append(f"{what} taken")


def _file_of(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _shapes(inputs: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())


def _first_shape(inputs: Mapping[str, Array]) -> str:
    name, array = next(iter(inputs.items()))
    return f"{name} {list(array.shape)}" + (f", the first of {len(inputs)} inputs" if len(inputs) > 1 else "")


def _check_finite(result: object, what: str, seen: Seen) -> None:
    """Arrays hold numbers; words are what they are."""
    if isinstance(result, np.ndarray) and not np.isfinite(result).all():
        seen.failures.append(f"{what}: NaN or infinite values come out")


def _batches(part: PartRecord) -> tuple[int, ...]:
    """The sizes of batches that a part takes; none where its first axis is no batch."""
    signature = part.signature
    if not all(BATCH_AXIS in tensor.shape[:1] for tensor in (*signature.inputs, *signature.outputs) if tensor.shape):
        return ()
    axis = signature.axis(BATCH_AXIS)
    return tuple(size for size in BATCHES if axis.minimum <= size <= (axis.maximum or size))


def _resized(arrays: Mapping[str, Array], size: int) -> dict[str, Array]:
    """The rows of a batch repeated, or cut, to a size."""
    rows = np.arange(size)
    return {name: array[rows % len(array)] if array.ndim else array for name, array in arrays.items()}


def _image_call(model: Model) -> Callable[[Sequence[ImageSource]], Any] | None:
    """What the bundle does with images, None where it takes none by themselves."""
    embed = model.manifest.task(EmbedSpec)
    if embed is not None and embed.image is not None:
        return model.encode_image
    if "features" in model.tasks:
        return lambda images: np.concatenate([one.image_features.ravel() for one in model.features(images)])
    if {"caption", "chat"} & set(model.tasks):
        return model.caption
    if "answer" in model.tasks:
        return lambda images: model.answer(images, ["what is this?"] * len(images))
    return None


def _texts(model: Model) -> list[str]:
    """What is asked of a bundle that embeds texts: nothing where it does not; no empty one where that has no tokens."""
    embed = model.manifest.task(EmbedSpec)
    if embed is None or embed.text is None or TOKENIZER_NAME not in model.manifest.files:
        return []
    return [text for text in ("", _LONG_TEXT) if model.session.tokenizer.encode_rows([text], truncate=True)[0]]
