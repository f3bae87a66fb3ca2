"""Graphs in the form in which ONNX Runtime computes them, in files whose weights several processes share.

ONNX Runtime maps a graph's weights from their file, but then each process folds constants and packs every matrix for
its kernels, into memory of its own. Here both are done once for each machine and release, and written to files that
every process maps, so that the system holds their pages once. ONNX Runtime writes and maps packed weights since its
pull request 23069. It still packs each matrix when it opens such a graph, for a moment, and takes the mapped one where
both have the same hash: a file of another processor would cost memory and change no result. The mapped bytes
themselves it takes as they are, which is why they are hashed here.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

from vlm_export.bundle.cache_directory import CACHE_VARIABLE, cache_directory
from vlm_export.bundle.environment import check_free_space, environment_errors
from vlm_export.bundle.manifest import VariantRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.bundle.safe_files import record_of_file, relative_files
from vlm_export.bundle.staging import delete, staging, sync_directory, sync_file
from vlm_export.bundle.strict_json import json_object_from_bytes
from vlm_export.errors import InputError
from vlm_export.runtime.engines.onnxruntime import WRONG_OPTIMIZERS, OrtEngine

_GRAPH_NAME, _RECORD_NAME = "graph.onnx", "files.json"
_CPUINFO = Path("/proc/cpuinfo")
# Written weights lie there as they were and packed.
_TIMES_WRITTEN = 2


def prepacked_graph(bundle: OpenBundle, variant: VariantRecord) -> Path:
    """The path of a variant's prepacked graph in the user's cache, verified; made first where it is not there.

    One process makes it, and others that ask meanwhile wait for it.

    Raises:
        InputError: the bundle's graph is damaged.
        EnvironmentFailure: the cache cannot be written.
    """
    source = bundle.graph_file(variant)
    target = cache_directory() / "prepacked" / _key(bundle, variant)
    if _is_whole(target):
        return target / _GRAPH_NAME
    fix = f"free some space, or set {CACHE_VARIABLE} to a directory on a larger disk"
    with environment_errors("writing packed weights", target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging(target, wait=True) as staged:
            if not _is_whole(target):
                files = (variant.file, *variant.external_data)
                size = sum(bundle.manifest.files[name].size_bytes for name in files)
                check_free_space(target.parent, _TIMES_WRITTEN * size, fix)
                _make(source, staged.path)
                # What others still map stays theirs.
                delete(target)
                os.rename(staged.path, target)
                sync_directory(target.parent)
    return target / _GRAPH_NAME


def _make(source: Path, folder: Path) -> None:
    folder.mkdir()
    OrtEngine(source, threads=1, prepacked_to=folder / _GRAPH_NAME)
    records = {name: record_of_file(folder, name).to_json() for name in relative_files(folder)}
    (folder / _RECORD_NAME).write_text(json.dumps(records), encoding="utf-8")
    for name in (*records, _RECORD_NAME):
        sync_file(folder / name)
    sync_directory(folder)


def _is_whole(folder: Path) -> bool:
    """Whether a prepacked graph is there, as it was written."""
    record = folder / _RECORD_NAME
    try:
        stated = json_object_from_bytes(record.read_bytes(), str(record))
        return bool(stated) and stated == {name: record_of_file(folder, name).to_json() for name in stated}
    except (InputError, OSError):
        return False


def _key(bundle: OpenBundle, variant: VariantRecord) -> str:
    """Names what a prepacked graph depends on: the graph, its optimiser, and the processor that it is packed for."""
    import onnxruntime

    files = (variant.file, *variant.external_data)
    facts: list[Any] = [[bundle.manifest.files[name].sha256 for name in files]]
    facts += [onnxruntime.__version__, WRONG_OPTIMIZERS, platform.machine(), _processor()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _processor() -> list[str]:
    """The processor's name and instructions, as Linux tells them; elsewhere its name."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [platform.processor()]
    return sorted({line for line in lines if line.lower().startswith(("model name", "flags", "features"))})
