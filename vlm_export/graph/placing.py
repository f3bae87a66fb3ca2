"""Files written beside their targets, and put in place together when all of them are complete."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from vlm_export.bundle.replacement import sync_directory, sync_file
from vlm_export.errors import UsageError
from vlm_export.graph.outputs import check_output
from vlm_export.graph.tensor_slots import tensor_slots

# Where a model says which file it was read from.
GRAPH_FILE_KEY = "vlm_export.graph_file"


@dataclass(frozen=True)
class Staged:
    """The files of one model.

    Attributes:
        folder: where they lie now, under the names of their targets, in the file system of these.
        targets: where they belong, all in one directory; the graph first, then its weights.
    """

    folder: Path
    targets: tuple[Path, ...]


def check_targets(targets: Sequence[Path], overwrite: bool) -> None:
    """Refuses targets that stand in the way, or are one file; UsageError says why."""
    for target in targets:
        check_output(target, overwrite=overwrite)
    if len(set(map(_place, targets))) < len(targets):
        raise UsageError(
            "two files would have the same name", got=", ".join(map(str, targets)), fix="choose another name for one"
        )


def check_readers(targets: Sequence[Path], models: Sequence[ir.Model]) -> None:
    """UsageError where a target is a data file of a model that was read from a file, and its graph stays."""
    places = {_place(target): target for target in targets}
    for model in models:
        graph = model.meta.get(GRAPH_FILE_KEY)
        if graph is None or Path(graph).resolve() in places:
            continue
        for slot in tensor_slots(model):
            if not isinstance(slot.tensor, ir.ExternalTensor):
                continue
            data = Path(slot.tensor.path)
            for place in (_place(data), data.resolve()):
                if place in places:
                    raise UsageError(
                        "the output would replace weights that an input reads",
                        where=str(places[place]),
                        got=f"{graph} reads tensor {slot.tensor.name!r} there",
                        fix="choose another name for the output",
                    )


def _place(path: Path) -> Path:
    """What a rename onto the path replaces: a link itself, in the directory that is meant."""
    return path.parent.resolve() / path.name


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A directory beside the target, which is gone afterwards."""
    folder = path.with_name(f".{path.name}.vlm-export-{os.getpid()}-{secrets.token_hex(6)}.tmp")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(models: Sequence[Staged]) -> None:
    """Moves all files to their targets; on an error all targets are as they were."""
    files = [(staged.folder, target) for staged in models for target in staged.targets]
    for folder, target in files:
        sync_file(folder / target.name)
    if len(files) == 1:
        ((folder, target),) = files
        os.replace(folder / target.name, target)
    else:
        _replace_together(models)
    # The models are complete and in place by now; what may be lost is only that this survives a power cut.
    for parent in {target.parent for _, target in files}:
        with suppress(OSError):
            sync_directory(parent)


def _replace_together(models: Sequence[Staged]) -> None:
    """The old graphs leave first and the new ones come last: at no time does a graph stand beside other weights."""
    graphs = [(staged.folder, staged.targets[0]) for staged in models]
    files = graphs + [(staged.folder, target) for staged in models for target in staged.targets[1:]]
    for staged in models:
        (staged.folder / "old").mkdir()
    old = [(folder / "old" / target.name, target) for folder, target in files if os.path.lexists(target)]
    done: list[Path] = []
    try:
        for aside, target in old:
            os.replace(target, aside)
        for folder, target in reversed(files):
            os.replace(folder / target.name, target)
            done.append(target)
    except BaseException:
        for target in done:
            target.unlink(missing_ok=True)
        for aside, target in reversed(old):
            if aside.exists():
                os.replace(aside, target)
        raise
