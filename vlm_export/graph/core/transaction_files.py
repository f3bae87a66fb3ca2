"""Files written beside their targets, and put in place together when all of them are complete."""

from __future__ import annotations

import filecmp
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from vlm_export.bundle.staging import REMOVE, STEPS, Staged, check_not_there, commit_files, put_file
from vlm_export.errors import UsageError
from vlm_export.graph.core.file_checks import tensor_protos
from vlm_export.graph.core.tensors import tensor_slots


def check_output(path: Path | str, *, overwrite: bool) -> None:
    """Refuses a target before any work is done for it; UsageError says why."""
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise UsageError("the output's directory does not exist", where=str(path.parent), fix="create it")
    if path.is_dir():
        raise UsageError("the output is a directory", where=str(path), fix="name a file")
    check_not_there(path, overwrite=overwrite)


# Where a model says which file it was read from.
GRAPH_FILE_KEY = "vlm_export.graph_file"
# The steps in which files are put in place.
DATA, GRAPHS, _DATA_AGAIN, _GRAPHS_AGAIN = STEPS


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


def step_folder(staged: Staged, step: str) -> Path:
    """Returns a directory of what is staged, made where it is missing."""
    folder = staged.path / step
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def place_models(staged: Staged, models: Sequence[Sequence[Path]]) -> None:
    """Puts all files in place, so that at every instant each graph has the weights that it was written with.

    No file that a graph reads is replaced under it. Weights that would replace others are put beside them under a name
    of their own first, and the graph that reads them there replaces the old one. Only then they replace the old
    weights, and a graph that reads them there follows. They are copied for that: engines refuse hard links.

    Args:
        staged: holds the data files in its directory DATA and the graphs in GRAPHS, under the names of their targets.
        models: the targets of each model, the graph first.
    """
    if len(staged.targets) == 1:
        file = staged.path / GRAPHS / staged.targets[0].name
        staged.check_targets()
        put_file(file, staged.targets[0])
        return
    for graph, *data in models:
        names = {target.name: name for target in data if (name := evasive_name(staged, target)) is not None}
        if names:
            file = staged.path / GRAPHS / graph.name
            proto = onnx.load(file, format="protobuf", load_external_data=False)
            file.rename(step_folder(staged, _GRAPHS_AGAIN) / graph.name)
            for entry in (entry for tensor in tensor_protos(proto) for entry in tensor.external_data):
                if entry.key == "location":
                    entry.value = names.get(entry.value, entry.value)
            onnx.save(proto, file, format="protobuf")
    commit_files(staged)


def evasive_name(staged: Staged, target: Path) -> str | None:
    """Returns what a data file is called until no graph reads the one that it replaces; None: it replaces none."""
    file = staged.path / DATA / target.name
    if not os.path.lexists(target):
        return None
    if not target.is_symlink() and target.is_file() and filecmp.cmp(file, target, shallow=False):
        file.unlink()
        return None
    name = f"{target.name}-{secrets.token_hex(6)}"
    shutil.copyfile(file, file.with_name(name))
    file.rename(step_folder(staged, _DATA_AGAIN) / target.name)
    (step_folder(staged, REMOVE) / name).touch()
    return name
