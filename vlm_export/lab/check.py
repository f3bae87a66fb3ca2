"""The checklist of a deployment, run: what must hold of a bundle before it serves, each item with its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm_export.bundle.memory import anonymous_bytes
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.errors import suggestion
from vlm_export.graph.core.files import open_model
from vlm_export.lab import check_graphs
from vlm_export.lab.check_graphs import OpenedVariant
from vlm_export.lab.check_runs import Runs
from vlm_export.lab.checklist import MEMORY_UNKNOWN, Checklist, NotRunError, OwnItems, Seen, looked_at
from vlm_export.lab.graph_diff import normalised
from vlm_export.runtime.engines.choice import ONNXRUNTIME, chosen_precision, engine_choice

LONG_RUN = 200
_MB = 1e6


@dataclass(frozen=True)
class CheckOptions:
    """What the user may choose.

    Attributes:
        precision: only these variants; None for all, and the default one where one is enough.
        providers, threads: of the engine, as in `vlm_export.load`.
        runs: of the long run; its first quarter warms up.
        items: what is demanded beside the checklist.
    """

    precision: str | None = None
    providers: Sequence[str] | None = None
    threads: int | None = None
    runs: int = LONG_RUN
    items: OwnItems = field(default_factory=OwnItems)


def check(bundle: str | Path, options: CheckOptions | None = None) -> Checklist:
    """Looks at every item; none is left out because another failed.

    Args:
        bundle: the bundle's directory.

    Raises:
        InputError: no bundle, or one whose graphs cannot be opened.
        UsageError: no variant of that precision, or an option is out of its range.
        EnvironmentFailure: a provider is not available.
    """
    options = options or CheckOptions()
    opened = open_bundle(bundle)
    chosen = chosen_precision(opened.manifest, options.precision)
    engine_choice(ONNXRUNTIME, options.providers, options.threads, in_bf16=chosen.in_bf16)
    variants = _opened_variants(opened, options.precision)
    runs = Runs(opened, variants, precision=options.precision, providers=options.providers, threads=options.threads)
    items = [looked_at(name, item) for name, item in _items(opened, variants, runs, options.runs)]
    items += [looked_at(name, item) for name, item in _own_items(opened, runs, options.items)]
    return Checklist(str(bundle), tuple(items))


def _opened_variants(bundle: OpenBundle, precision: str | None) -> tuple[OpenedVariant, ...]:
    found = []
    for part in bundle.manifest.parts:
        for variant in part.variants:
            if precision in (None, variant.precision):
                found.append(OpenedVariant(part, variant, normalised(open_model(bundle.model_files(variant)))))
    return tuple(found)


def _items(
    bundle: OpenBundle, variants: Sequence[OpenedVariant], runs: Runs, count: int
) -> Iterator[tuple[str, Callable[[Seen], None]]]:
    yield "eval mode", lambda seen: check_graphs.check_eval_mode(variants, seen)
    yield "no training operators", lambda seen: check_graphs.check_training_operators(variants, seen)
    yield "no control flow on data", lambda seen: check_graphs.check_control_flow(variants, seen)
    yield "names", lambda seen: check_graphs.check_names(variants, seen)
    yield "axes", lambda seen: check_graphs.check_interfaces(variants, seen)
    yield "simplified", lambda seen: check_graphs.check_simplified(variants, seen)
    yield "gates passed", lambda seen: check_graphs.check_gates(bundle, variants, seen)
    yield "oldest ONNX Runtime", lambda seen: check_graphs.check_oldest_runtime(bundle, variants, seen)
    yield "several sizes", runs.check_sizes
    yield "several batches", runs.check_batches
    yield "boundary inputs", runs.check_boundaries
    yield "long run", lambda seen: runs.check_long_run(count, seen)
    yield "provider", runs.check_provider
    yield "latency", runs.check_latency
    yield "threads and limits", runs.check_limits


def _own_items(bundle: OpenBundle, runs: Runs, items: OwnItems) -> Iterator[tuple[str, Callable[[Seen], None]]]:
    manifest = bundle.manifest
    if items.max_size_mb is not None:
        size = sum(file.size_bytes for file in manifest.files.values()) / _MB
        yield "max_size_mb", _at_most("size", size, items.max_size_mb, "MB")
    if items.max_latency_ms is not None:
        yield "max_latency_ms", _latency_within(runs, items.max_latency_ms)
    if items.max_memory_mb is not None:
        yield "max_memory_mb", _memory_within(items.max_memory_mb)
    outputs = [tensor.name for part in manifest.parts for tensor in part.signature.outputs]
    for name, required, present in (
        ("required_outputs", items.required_outputs, outputs),
        ("required_parts", items.required_parts, [part.name for part in manifest.parts]),
        ("required_precisions", items.required_precisions, _shared_precisions(bundle)),
        ("required_tasks", items.required_tasks, [task.kind for task in manifest.tasks]),
    ):
        if required:
            yield name, _all_present(required, present)
    if items.oldest_onnxruntime is not None:
        yield "oldest_onnxruntime", _loads_in(bundle, items.oldest_onnxruntime)


def _at_most(what: str, value: float, limit: float, unit: str) -> Callable[[Seen], None]:
    def item(seen: Seen) -> None:
        seen.evidence.append(f"{what}: {value:.4g} {unit}, at most {limit:g} {unit} is allowed")
        if value > limit:
            seen.failures.append(f"{what}: {value:.4g} {unit} is more than {limit:g} {unit}")

    return item


def _memory_within(limit: float) -> Callable[[Seen], None]:
    def item(seen: Seen) -> None:
        size = anonymous_bytes()
        if size is None:
            raise NotRunError(MEMORY_UNKNOWN)
        _at_most("memory", size / _MB, limit, "MB")(seen)

    return item


def _latency_within(runs: Runs, limit: float) -> Callable[[Seen], None]:
    def item(seen: Seen) -> None:
        for label, value in runs.latencies_ms.items():
            _at_most(label, value, limit, "ms")(seen)
        if not runs.latencies_ms:
            seen.failures.append("no variant could be measured")

    return item


def _all_present(required: Sequence[str], present: Sequence[str]) -> Callable[[Seen], None]:
    def item(seen: Seen) -> None:
        seen.evidence.append(f"the bundle has {', '.join(present) or 'none'}")
        for name in required:
            if name not in present:
                seen.failures.append(f"{name!r} is missing; {suggestion(name, present)}")

    return item


def _loads_in(bundle: OpenBundle, release: str) -> Callable[[Seen], None]:
    def item(seen: Seen) -> None:
        for part in bundle.manifest.parts:
            for variant in part.variants:
                needed, label = variant.oldest_onnxruntime, f"{part.name} {variant.precision}"
                seen.evidence.append(f"{label}: {needed}")
                if needed is None:
                    seen.failures.append(f"{label} is OpenVINO's own form, which no ONNX Runtime loads")
                elif _numbers(needed) > _numbers(release):
                    seen.failures.append(f"{label} needs {needed}, which is newer than {release}")

    return item


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def _shared_precisions(bundle: OpenBundle) -> list[str]:
    found = [[variant.precision for variant in part.variants] for part in bundle.manifest.parts]
    return [name for name in found[0] if all(name in names for names in found)]
