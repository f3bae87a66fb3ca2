"""Kills overwriting exports at points of their whole run and prints what they left, as JSON; run by test_faults.py.

Takes the target, the sources of two bundles, a directory for their references, and the path of the kill harness.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch

from vlm_export.bundle.opened import open_bundle
from vlm_export.exporting import pipeline
from vlm_export.exporting.options import ExportOptions

# Of some 600 file operations. Each of publication's own is killed in the bundle's tests.
EVERY = 25


def load_harness(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_harness", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["kill_harness"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export(source: str, target: Path) -> None:
    options = ExportOptions(opset=17, with_tokenizer=False, threads=1, overwrite=True)
    pipeline.export_bundle(source, target, options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main(target: Path, sources: list[str], references: Path, harness: ModuleType) -> dict[str, object]:
    expected = []
    for number, source in enumerate(sources):
        # Under the same name, which the manifest tells.
        export(source, references / str(number) / target.name)
        expected.append(content(references / str(number) / target.name))
    export(sources[0], target)
    seen: list[int] = []

    def check() -> None:
        bundle = open_bundle(target)
        bundle.verify(bundle.manifest.files)
        seen.append(expected.index(content(target)))

    killed = harness.kill_at_each_step(lambda: export(sources[1], target), check, every=EVERY)
    return {"killed": killed, "seen": seen, "left": _names(target.parent)}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, first, second, references, harness = sys.argv[1:]
    print(json.dumps(main(Path(target), [first, second], Path(references), load_harness(harness))))
