"""What a bench measures: a part on arrays, or a task from files of images on; and what the sides are asked to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_export.bundle.manifest import Manifest, PartRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError, UsageError, suggestion
from vlm_export.lab.bench_plan import (
    BenchOptions,
    Load,
    Side,
    chosen_parts,
    loads_of,
    save_arrays,
)
from vlm_export.lab.real_inputs import real_inputs
from vlm_export.proof.contract_record import image_content, read_record
from vlm_export.runtime.engines.choice import chosen_precision
from vlm_export.runtime.inputs.sources import image_files
from vlm_export.specs.tasks import EmbedSpec, TaskSpec

WRITING = ("caption", "answer", "chat")
MEASURED = ("embed", *WRITING)
"""Kinds of tasks that are measured."""


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        name: of the part, or the kind of the task.
        task: that kind; None of a part.
        job: what a side's process opens, beside the side itself.
        loads: what each run is about, as the process takes it.
        compared: what the sides' outputs are compared on.
        parts: that it runs.
    """

    name: str
    task: str | None
    job: Mapping[str, Any]
    loads: Mapping[Load, Any]
    compared: Sequence[Any]
    parts: Sequence[PartRecord]

    def has_variant(self, manifest: Manifest, side: Side) -> bool:
        """Whether the side has something of its own to run."""
        if not side.is_of_bundle:
            return True
        variant = chosen_precision(manifest, side.precision).variant
        return variant in {record.precision for part in self.parts for record in part.variants}

    def size_bytes(self, manifest: Manifest, side: Side) -> int | None:
        """Of the files that the side reads; None for what is not the bundle's."""
        if not side.is_of_bundle:
            return None
        precision = chosen_precision(manifest, side.precision).variant
        variants = [part.served_by(precision) for part in self.parts]
        return sum(manifest.files[name].size_bytes for one in variants for name in (one.file, *one.external_data))


def subjects_of(bundle: OpenBundle, options: BenchOptions, folder: Path) -> Iterator[Subject]:
    """Each part that is asked for, then each task; a part without recorded inputs has no loads.

    Args:
        folder: for files that the sides read.

    Raises:
        UsageError: a part or a task that there is not, or a size that it does not take.
        InputError: an image cannot be read, or there is none.
    """
    if options.parts or not (options.images or options.tasks):
        for part in chosen_parts(bundle.manifest, options.parts):
            yield _part_subject(bundle, part, options, folder / part.name)
    if options.images or options.tasks:
        images = _images(bundle, options.images, folder)
        for task in _chosen_tasks(bundle.manifest, options.tasks):
            yield _task_subject(bundle.manifest, task, options, images)


def _part_subject(bundle: OpenBundle, part: PartRecord, options: BenchOptions, folder: Path) -> Subject:
    folder.mkdir()
    loads, compared = {}, []
    for number, (load, inputs) in enumerate(loads_of(bundle, part, options).items()):
        loads[load] = str(folder / f"load-{number}.npz")
        save_arrays(loads[load], inputs)
    for number, inputs in enumerate(real_inputs(bundle, part)):
        compared.append(str(folder / f"real-{number}.npz"))
        save_arrays(compared[-1], inputs)
    return Subject(part.name, None, {"part": part.name}, loads, compared, [part])


def _chosen_tasks(manifest: Manifest, kinds: Sequence[str]) -> list[TaskSpec]:
    """The tasks of those kinds, "embed" or else all that write where there is none; UsageError for another one."""
    known = {task.kind: task for task in manifest.tasks if task.kind in MEASURED and _sees(task)}
    for kind in kinds:
        if kind not in known:
            raise UsageError(
                f"the bundle has no task {kind!r} that is measured from images on",
                where=manifest.name,
                got=", ".join(known) or "none",
                fix=suggestion(kind, MEASURED),
            )
    chosen = kinds or (["embed"] if "embed" in known else list(known))
    if not chosen:
        raise InputError("the bundle has no task that is measured from images on", where=manifest.name)
    return [task for kind, task in known.items() if kind in chosen]


def _sees(task: TaskSpec) -> bool:
    return not isinstance(task, EmbedSpec) or task.image is not None


def _images(bundle: OpenBundle, named: Sequence[str | Path], folder: Path) -> list[str]:
    """Files of images: the named ones, or else copies of the contract's."""
    if named:
        return [str(file) for entry in named for file in image_files(Path(entry))]
    record = read_record(bundle)
    found = []
    for number, image in enumerate(() if record is None else record.images):
        found.append(str(folder / f"{number}-{Path(image.file).name}"))
        Path(found[-1]).write_bytes(image_content(bundle, image))
    if not found:
        raise InputError("the bundle has no images on record", where=bundle.manifest.name, fix="name some")
    return found


def _task_subject(manifest: Manifest, task: TaskSpec, options: BenchOptions, images: Sequence[str]) -> Subject:
    is_embed = isinstance(task, EmbedSpec)
    names = [task.image.part] if isinstance(task, EmbedSpec) and task.image is not None else list(task.parts)
    loads: dict[Load, Any] = {}
    for batch in sorted(set(options.batches)):
        if is_embed:
            loads[Load(task.kind, batch, None, files=len(images))] = {"files": images, "batch": batch}
            continue
        about = {"files": [images[i % len(images)] for i in range(batch)], "text": options.prompt}
        loads[Load(task.kind, batch, None, "first token")] = {**about, "tokens": 1}
        loads[Load(task.kind, batch, options.new_tokens - 1, "next tokens")] = {**about, "tokens": options.new_tokens}
    compared = [about for load, about in loads.items() if load.step != "first token"][:1]
    job = {"task": task.kind, "parts": names}
    return Subject(task.kind, task.kind, job, loads, compared, [manifest.part(name) for name in names])
