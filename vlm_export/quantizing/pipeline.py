"""`vlm_export.quantize`: variants of fewer bits for a published bundle, measured, and published within their budget."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vlm_export.bundle import layout
from vlm_export.bundle.environment import check_free_space
from vlm_export.bundle.loss import BudgetKey, Loss, LossRecord, OutputLoss, Samples, over_budget
from vlm_export.bundle.manifest import PRECISIONS, PartRecord
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.bundle.publish import Staging, publication
from vlm_export.bundle.safe_files import check_path
from vlm_export.errors import InputError, UsageError, suggestion
from vlm_export.exporting.stages import StageListener, Stages
from vlm_export.precision.quantised import Calibration
from vlm_export.precision.recipes import QUANTISED, RECIPES, Recipe
from vlm_export.proof.golden import iterate_golden
from vlm_export.quantizing.budget import budget_for, stated_budget
from vlm_export.quantizing.graphs import (
    QuantisedGraph,
    float32_bytes,
    part_calibration,
    part_weights,
    write_naive,
    write_quantised,
    write_tried,
)
from vlm_export.quantizing.losses import Agreement, agreement, loss_of, output_losses
from vlm_export.quantizing.publishing import Measured, Publishing
from vlm_export.quantizing.result import OverBudgetError, PartLoss, QuantizeResult
from vlm_export.quantizing.samples import TEMPLATE, NamedSamples, SampleSet, sample_set
from vlm_export.quantizing.search import PartSearch, WeightCost, cost_of, few, fewest
from vlm_export.quantizing.task_runs import Answers, Feeds, run_tasks
from vlm_export.runtime.engines.onnxruntime import Engine, OrtEngine

_SCRATCH = "scratch"
_MAX_CAUSE = 160
_MEASURED_ON: Mapping[BudgetKey, str] = {
    "zero-shot": "name labelled images: --labels DIR",
    "retrieval@1": "name images and the texts that belong to them: --images DIR --texts FILE",
}
FLOAT32 = PRECISIONS[0]


@dataclass(frozen=True)
class QuantizeOptions:
    """What the user may choose.

    Attributes:
        parts: only these; none for all.
        budget: in the place of the precision's defaults, as `budget_for` reads it.
        images: files and folders of images to measure on, beside the contract's.
        texts: a file with one text a line, likewise. A line may begin with the name of an image and a tab: its text
            belongs to that image, so that retrieval is measured, and where the bundle answers, it is asked about it.
        output: the directory that the bundle with its variants becomes; None: the bundle itself, in one step.
        overwrite: replace a bundle at `output`.
        reduce_range: weights of 7 bits instead of 8, for CPUs without VNNI; of int8 and int8-static.
        labels: a folder with a folder of images for each label, named as the label (torchvision's ImageFolder): the
            zero-shot accuracy is measured on it.
        template: the sentence around a label, with `{}` in its place.
        threads: of one operator; None for as many as there are cores.
        search: where a part is over budget, find the fewest of its weights that must stay in float32.
    """

    parts: Sequence[str] = ()
    budget: str | Mapping[str, float] | None = None
    images: Sequence[str | Path] = ()
    texts: str | Path | None = None
    labels: str | Path | None = None
    template: str = TEMPLATE
    output: str | Path | None = None
    overwrite: bool = False
    reduce_range: bool = False
    threads: int | None = None
    search: bool = False


def quantize(
    bundle: str | Path, precision: str, *, progress: StageListener | None = None, **options: object
) -> QuantizeResult:
    """Adds variants of fewer bits to a bundle, made of its float32 graphs, if they are within their budget.

    Args:
        bundle: the bundle's directory.
        precision: "int8", "int8-static", "w8a16" or "int4".
        progress: told of the stages.
        options: the fields of `QuantizeOptions`, by name.

    Returns:
        The new manifest, and what each part loses.

    Raises:
        VerificationError: a part loses more than its budget (`OverBudgetError`), or a variant is not what the ledger
            says; nothing is published.
        UsageError: an unknown precision, part, option or budget, or an output that may not be replaced.
        InputError: no bundle, a damaged one, one without float32 graphs, or an image that cannot be read.
        EnvironmentFailure: disk, memory, a missing package.
    """
    check_path(bundle, "a bundle")
    if precision not in QUANTISED:
        raise UsageError(
            f"there is no precision {precision!r:.60} to quantize to", fix=suggestion(precision, QUANTISED)
        )
    known = QuantizeOptions.__dataclass_fields__
    for name in options:
        if name not in known:
            raise UsageError(f"quantize has no option {name!r}", fix=suggestion(name, known))
    chosen = QuantizeOptions(**options)  # type: ignore[arg-type]
    budget = budget_for(precision, chosen.budget)
    in_place = chosen.output is None
    if in_place:
        open_bundle(bundle)  # What is no bundle is told as such, before its lock is taken.
    target = Path(bundle) if chosen.output is None else Path(chosen.output)
    stages = Stages(progress)
    with publication(target, overwrite=in_place or chosen.overwrite) as staging:
        opened = open_bundle(bundle)
        return _Job(opened, RECIPES[precision], budget, chosen, staging, stages).run()


@dataclass(frozen=True)
class _Baseline:
    """What every variant is measured on and compared with.

    Attributes:
        calibrations: of each part.
        before: what the bundle's tasks give in float32.
        naive, failed: part → the naive recipe's graph, or why there is none.
        naive_tasks: what is left of tasks with these.
    """

    samples: SampleSet
    calibration: SampleSet
    calibrations: Mapping[str, Calibration]
    before: Answers
    naive: Mapping[str, Path]
    failed: Mapping[str, str]
    naive_tasks: Agreement


@dataclass(frozen=True)
class _Job:
    bundle: OpenBundle
    recipe: Recipe
    budget: Mapping[BudgetKey, float]
    options: QuantizeOptions
    staging: Staging
    stages: Stages

    @property
    def precision(self) -> str:
        return self.recipe.precision

    @property
    def scratch(self) -> Path:
        return self.staging.path / _SCRATCH

    def run(self) -> QuantizeResult:
        parts = self._chosen_parts()
        self.scratch.mkdir()
        with self.stages.stage("read samples"):
            samples = sample_set(self.bundle, self._named())
            needed = sum(record.size_bytes for record in self.bundle.manifest.files.values())
            check_free_space(self.staging.path, needed + sum(float32_bytes(self.bundle, part) for part in parts))
        left_out: dict[str, str] = {}
        graphs: dict[str, QuantisedGraph] = {}
        calibrations: dict[str, Calibration] = {}
        calibration, feeds = SampleSet((), ()), dict[str, list[Feeds]]()
        if self.recipe.kind == "static":
            calibration, samples = samples.part(0, 2), samples.part(1, 2)
            with self.stages.stage("ask for calibration"):
                feeds = dict(self._tasks(calibration, {}).feeds)
        for part in parts:
            if self.recipe.kind == "static" and not feeds.get(part.name):
                left_out[part.name] = "no image or text leads to it, so that its ranges cannot be calibrated"
                continue
            with self.stages.stage(f"quantize {part.name}"):
                calibrations[part.name] = part_calibration(
                    self.bundle, part, self.recipe, self.scratch, feeds.pop(part.name, []), self.options.threads
                )
                graph = self._quantised(part, calibrations[part.name], self._target(part))
                if graph.weights:
                    graphs[part.name] = graph
                else:
                    left_out[part.name] = "it has no product or table that this precision changes"
                    _delete(graph)
        if not graphs:
            raise UsageError(
                f"nothing of the bundle becomes {self.precision}",
                where=self.bundle.manifest.name,
                got="; ".join(f"{name}: {why}" for name, why in left_out.items()),
                fix="choose other parts",
            )
        quantised = [part for part in parts if part.name in graphs]
        base = self._baseline(quantised, samples, calibration, calibrations)
        measured = self._measure(quantised, graphs, base, {})
        if self.options.search and any(one.loss.over for one in measured):
            measured = self._searched(measured, base)
        losses = tuple(one.loss for one in measured)
        if any(loss.over for loss in losses):
            raise OverBudgetError(losses)
        shutil.rmtree(self.scratch)
        publishing = Publishing(self.bundle, self.staging, self.stages, self.precision, self.options.threads)
        return QuantizeResult(publishing.publish(measured), losses, left_out)

    def _named(self) -> NamedSamples:
        chosen = self.options
        return NamedSamples(
            tuple(Path(image) for image in chosen.images),
            None if chosen.texts is None else Path(chosen.texts),
            None if chosen.labels is None else Path(chosen.labels),
            chosen.template,
        )

    def _chosen_parts(self) -> list[PartRecord]:
        manifest = self.bundle.manifest
        parts = [manifest.part(name) for name in dict.fromkeys(self.options.parts)] or list(manifest.parts)
        for part in parts:
            part.variant(FLOAT32)
        return parts

    def _target(self, part: PartRecord) -> Path:
        return self.staging.file(layout.graph_path(part.name, self.precision))

    def _quantised(
        self,
        part: PartRecord,
        calibration: Calibration,
        target: Path,
        keep: Mapping[str, str] | None = None,
    ) -> QuantisedGraph:
        return write_quantised(
            self.bundle,
            part,
            self.recipe,
            target,
            self.scratch,
            calibration=calibration,
            reduce_range=self.options.reduce_range,
            keep=keep or {},
        )

    def _engine(self, path: Path) -> Engine:
        return OrtEngine(path, threads=self.options.threads)

    def _float32(self, part: PartRecord) -> Engine:
        return self._engine(self.bundle.graph_file(part.variant(FLOAT32)))

    def _baseline(
        self,
        parts: Sequence[PartRecord],
        samples: SampleSet,
        calibration: SampleSet,
        calibrations: Mapping[str, Calibration],
    ) -> _Baseline:
        naive: dict[str, Path] = {}
        failed: dict[str, str] = {}
        for part in parts:
            with self.stages.stage(f"naive recipe of {part.name}"):
                target = self.scratch / f"{part.name}.naive.onnx"
                failed[part.name] = write_naive(self.bundle, part, target)
                if not failed[part.name]:
                    naive[part.name] = target
        with self.stages.stage("ask in float32"):
            before = self._tasks(samples, {})
        with self.stages.stage("ask the naive recipe"):
            naive_tasks = self._naive_tasks(samples, before, naive, failed)
        return _Baseline(samples, calibration, calibrations, before, naive, failed, naive_tasks)

    def _measure(
        self,
        parts: Sequence[PartRecord],
        graphs: Mapping[str, QuantisedGraph],
        base: _Baseline,
        searches: Mapping[str, PartSearch],
    ) -> list[Measured]:
        with self.stages.stage(f"ask in {self.precision}"):
            tasks = self._agreement(graphs, base)
        measured = []
        for part in parts:
            with self.stages.stage(f"measure {part.name}"):
                record = self._record(part, graphs[part.name], tasks, base)
                if part.name in searches:
                    record = replace(record, searched=searches[part.name].record())
                loss = PartLoss(part.name, self.precision, graphs[part.name].size_bytes, record)
                measured.append(Measured(part, graphs[part.name], loss))
        return measured

    def _agreement(self, graphs: Mapping[str, QuantisedGraph], base: _Baseline) -> Agreement:
        ours = {name: graph.paths[0] for name, graph in graphs.items()}
        return agreement(base.before, self._tasks(base.samples, ours))

    def _searched(self, measured: Sequence[Measured], base: _Baseline) -> list[Measured]:
        """Measured again, with the fewest weights in float32 that bring the parts, then the tasks, within budget."""
        parts = {one.part.name: one.part for one in measured}
        graphs = {one.part.name: one.graph for one in measured}
        searches: dict[str, PartSearch] = {}
        for one in measured:
            if not _over_alone(one.loss.record.measured, self.budget):
                continue
            with self.stages.stage(f"search {one.part.name}"):
                search = searches[one.part.name] = PartSearch(self._costs(one.part, base))
                if search.candidates:
                    search.count = fewest(
                        len(search.candidates), partial(self._is_enough, one.part, search.order, base)
                    )
                    graphs[one.part.name] = self._again(one.part, one.graph, search, base)
        if self._tasks_over(graphs, base):
            with self.stages.stage("search what the tasks need"):
                searches |= {
                    name: PartSearch(self._costs(part, base)) for name, part in parts.items() if name not in searches
                }
                every = [one for search in searches.values() for one in search.candidates]
                every.sort(key=lambda one: -one.cost)
                already = {name: search.count for name, search in searches.items()}

                def are_enough(count: int) -> bool:
                    more = Counter(one.part for one in every[:count])
                    for name, search in searches.items():
                        if search.count != already[name] + more[name]:
                            search.count = already[name] + more[name]
                            graphs[name] = self._again(parts[name], graphs[name], search, base)
                    return not self._tasks_over(graphs, base)

                if every:
                    are_enough(fewest(len(every), are_enough))
        return self._measure(list(parts.values()), graphs, base, searches)

    def _costs(self, part: PartRecord, base: _Baseline) -> list[WeightCost]:
        """The weights that the recipe changes, the costliest first: each is quantised alone and run on few inputs."""
        weights, feeds = part_weights(self.bundle, part, self.recipe), few(self._feeds(part, base.before))
        costs = []
        for name, nodes in weights.items():
            graph = self._tried(part, {other: "" for other in weights if other != name}, base)
            costs.append(WeightCost(part.name, name, nodes, cost_of(self._outputs(part, feeds, graph.paths[0]))))
            _delete(graph)
        return sorted(costs, key=lambda one: -one.cost)

    def _tried(self, part: PartRecord, keep: Mapping[str, str], base: _Baseline) -> QuantisedGraph:
        return write_tried(
            self.bundle,
            part,
            self.recipe,
            self.scratch,
            calibration=base.calibrations[part.name],
            reduce_range=self.options.reduce_range,
            keep=keep,
        )

    def _again(self, part: PartRecord, old: QuantisedGraph, search: PartSearch, base: _Baseline) -> QuantisedGraph:
        _delete(old)
        return self._quantised(part, base.calibrations[part.name], self._target(part), search.keep)

    def _is_enough(self, part: PartRecord, order: Sequence[WeightCost], base: _Baseline, count: int) -> bool:
        graph = self._tried(part, PartSearch(order, count).keep, base)
        enough = not self._is_over(part, graph, base)
        _delete(graph)
        return enough

    def _is_over(self, part: PartRecord, graph: QuantisedGraph, base: _Baseline) -> bool:
        """Whether the cosines of a part are over budget, whatever the tasks are."""
        outputs, golden, _ = self._losses(part, self._feeds(part, base.before), graph.paths[0])
        return _over_alone(loss_of(outputs, golden, Agreement(), 0.0), self.budget)

    def _tasks_over(self, graphs: Mapping[str, QuantisedGraph], base: _Baseline) -> bool:
        return bool(over_budget(loss_of({}, {}, self._agreement(graphs, base), 0.0), self.budget))

    def _tasks(self, samples: SampleSet, paths: Mapping[str, Path]) -> Answers:
        start: dict[str, Callable[[], Engine]] = {name: partial(self._engine, path) for name, path in paths.items()}
        return run_tasks(self.bundle, samples, start, self.options.threads)

    def _naive_tasks(
        self, samples: SampleSet, before: Answers, naive: dict[str, Path], failed: dict[str, str]
    ) -> Agreement:
        """What is left of tasks with the naive graphs, those that ONNX Runtime runs."""
        for name, path in list(naive.items()):
            try:
                engine = self._engine(path)
                for feeds in before.feeds.get(name, [])[:1]:
                    engine.run(feeds)
            except InputError as error:
                failed[name] = f"ONNX Runtime does not run it: {error.got}"[:_MAX_CAUSE].partition("\n")[0]
                del naive[name]
        return agreement(before, self._tasks(samples, naive)) if naive else Agreement()

    def _record(
        self,
        part: PartRecord,
        graph: QuantisedGraph,
        tasks: Agreement,
        base: _Baseline,
    ) -> LossRecord:
        samples, calibration, naive = base.samples, base.calibration, base.naive.get(part.name)
        notes = [*calibration.notes("calibrated on"), *samples.notes("measured on"), *base.before.not_run]
        notes += samples.accuracy_notes(self._named(), self.bundle.manifest.source)
        feeds = self._feeds(part, base.before)
        if not base.before.feeds.get(part.name):
            notes.append(f"no task runs part {part.name!r} here: it was measured on the inputs of its golden records")
        size = float32_bytes(self.bundle, part)
        outputs, golden, count = self._losses(part, feeds, graph.paths[0])
        measured = loss_of(outputs, golden, tasks, graph.size_bytes / size)
        for key in stated_budget(self.options.budget):
            if measured.figure(key) is None:
                fix = f"{_MEASURED_ON.get(key, 'name images and texts of your own')}, or leave it out of the budget"
                raise UsageError(f"the budget states {key}, and nothing here measures it", where="--budget", fix=fix)
        naive_loss = None
        if naive is not None:
            naive_outputs, naive_golden, _ = self._losses(part, feeds, naive)
            naive_loss = loss_of(naive_outputs, naive_golden, base.naive_tasks, naive.stat().st_size / size)
        return LossRecord(
            recipe=f"{self.recipe.tells}{_fused_text(graph.fused)}",
            reduce_range=self.options.reduce_range,
            measured=measured,
            naive=naive_loss,
            naive_failed=base.failed[part.name],
            budget={str(key): least for key, least in self.budget.items()},
            samples=Samples(
                images=len(samples.images),
                texts=len(samples.texts),
                rows=sum(_rows(one) for one in feeds),
                golden=count,
                own_images=samples.own_images,
                own_texts=samples.own_texts,
                calibration_images=len(calibration.images),
                calibration_texts=len(calibration.texts),
                labelled=len(samples.labelled),
                labels=len(samples.labels),
                pairs=len(samples.pairs),
            ),
            kept=graph.kept,
            notes=tuple(dict.fromkeys(notes)),
        )

    def _feeds(self, part: PartRecord, before: Answers) -> list[Feeds]:
        """What tasks fed a part, or else the inputs of its golden records."""
        return before.feeds.get(part.name) or [record.inputs for record in iterate_golden(self.bundle, part.name)]

    def _outputs(self, part: PartRecord, feeds: Sequence[Feeds], path: Path) -> dict[str, OutputLoss]:
        engine, float32 = self._engine(path), self._float32(part)
        return output_losses((float32.run(one), engine.run(one)) for one in feeds)

    def _losses(
        self, part: PartRecord, feeds: Sequence[Feeds], path: Path
    ) -> tuple[dict[str, OutputLoss], dict[str, OutputLoss], int]:
        """Against the float32 graph on real inputs, against the original on the golden records, and how many."""
        outputs, engine = self._outputs(part, feeds, path), self._engine(path)
        records = list(iterate_golden(self.bundle, part.name))
        golden = output_losses((record.outputs, engine.run(record.inputs)) for record in records)
        return outputs, golden, len(records)


def _over_alone(loss: Loss, budget: Mapping[BudgetKey, float]) -> bool:
    """Whether a part's own figures are over budget, whatever the tasks' are."""
    return bool(over_budget(replace(loss, **vars(Agreement())), budget))


def _fused_text(count: int) -> str:
    if not count:
        return ""
    what = "attention is" if count == 1 else f"{count} attentions are"
    return f"; {what} com.microsoft.MultiHeadAttention, which ONNX Runtime and OpenVINO read"


def _delete(graph: QuantisedGraph) -> None:
    for path in graph.paths:
        path.unlink()


def _rows(feeds: Feeds) -> int:
    return max((len(array) for array in feeds.values() if array.ndim), default=1)
