"""The arrows of docs/architecture.md: which package may import which, read from the syntax trees."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "vlm_export"
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
# What every machine has that only uses bundles; the last three are optional there.
BASE = {
    "PIL",
    "filelock",
    "ftfy",
    "numpy",
    "onnxruntime",
    "tokenizers",
    "tqdm",
    "yaml",
    "openvino",
    "pyarrow",
    "faiss",
}
TORCH = {"torch", "torchvision", "transformers", "timm"}
# Foreign text shown, errors, faults of the machine told, and interrupts: for every room.
EVERYWHERE = {"text_display", "errors", "machine_faults", "interrupts"}
# Room → the rooms that it may import. A room is a folder or a module of `vlm_export`; the longest name that fits is
# a file's. `runtime` itself is what the loader is made of, from the bottom: session, tasks, model, load.
ROOMS: dict[str, set[str]] = {
    "text_display": set(),
    "errors": {"text_display"},
    "interrupts": set(),
    "machine_faults": {"errors"},
    "specs": set(),
    "original": {"specs"},
    "family": {"specs", "original"},
    "bundle": {"specs"},
    "runtime": set(),
    "runtime.engines": {"specs", "bundle"},
    "runtime.inputs": {"specs"},
    "runtime.generation": {"specs", "runtime.engines", "runtime.inputs"},
    "runtime.session": {"specs", "bundle", "runtime.engines", "runtime.inputs"},
    "runtime.tasks": {"specs", "bundle", "runtime.engines", "runtime.inputs", "runtime.generation", "runtime.session"},
    "runtime.model": {"specs", "bundle", "runtime.inputs", "runtime.session", "runtime.tasks"},
    "runtime.load": {"bundle", "runtime.engines", "runtime.inputs", "runtime.session", "runtime.model"},
    "runtime.search": {"specs", "bundle", "runtime.inputs", "runtime.tasks", "runtime.model"},
    "runtime.bulk": {"specs", "bundle", "runtime.inputs", "runtime.session", "runtime.model", "runtime.search"},
    "ray": {"runtime.engines", "runtime.inputs", "runtime.load", "runtime.bulk"},
    "graph.core": {"specs", "bundle"},
    "graph.look": {"graph.core"},
    "graph.prove": {"graph.core"},
    "graph.passes": {"graph.core", "graph.prove"},
    "graph.edits": {"graph.core", "graph.prove"},
    "graph": {"graph.core", "graph.look", "graph.prove", "graph.passes", "graph.edits"},
    "precision": {"bundle"},
    "checkpoint": {"specs", "bundle", "family"},
    "models": {"specs", "bundle.strict_json", "family", "original"},
    "proof": {
        *("specs", "bundle", "family", "original", "runtime.engines", "runtime.inputs", "runtime.session"),
        "runtime.model",
    },
    "exporting.stages": {"bundle", "proof"},
    "quantizing": {
        *("bundle", "runtime.engines", "runtime.inputs", "runtime.session", "runtime.tasks", "runtime.model"),
        *("graph.core", "precision", "proof", "exporting.stages"),
    },
    "exporting": {
        *("specs", "bundle", "family", "original", "runtime.engines", "runtime.inputs", "graph", "graph.core"),
        *("graph.passes", "precision", "checkpoint", "models", "proof", "exporting.stages"),
    },
    "layouts": {"specs", "bundle", "runtime.engines", "runtime.inputs", "graph.core", "graph.edits", "proof"},
    "api": {"specs", "bundle", "checkpoint", "family", "proof", "exporting", "exporting.stages", "layouts"},
    "lab": {
        *("specs", "bundle", "runtime.engines", "runtime.inputs", "runtime.session", "runtime.model"),
        *("runtime.tasks", "runtime.generation"),
        *("graph.core", "graph.look", "graph.passes", "graph.prove", "precision", "proof", "api"),
    },
}
# These see everything below them; nothing sees them but the package's own door.
TOP = {"cli", "__main__", "__init__"}
# Folder → the packages from outside that it may import.
OUTSIDE = {
    "bundle": {"filelock"},
    "specs": set[str](),
    "runtime": BASE,
    "graph": {"numpy", "onnx_ir", "onnx", "google", "onnxruntime", "yaml"},  # google: protobuf
    "precision": {"numpy", "onnx_ir", "onnx", "onnxruntime", "onnxscript"},
    "quantizing": {"numpy", "PIL", "onnx", "onnx_ir", "onnxruntime"},
    "proof": BASE - {"onnxruntime", "openvino", "pyarrow", "tqdm", "faiss"},
    "layouts": {"numpy", "onnx_ir", "ftfy", "PIL"},
    # fastembed: a side of `bench`, where it is installed.
    "lab": {"numpy", "PIL", "onnx_ir", "onnx", "onnxruntime", "yaml", "pytest", "fastembed"},
    "cli": set[str](),
    "ray.py": {"numpy"},
    "api.py": set[str](),
    "__main__.py": set[str](),
}
WITH_TORCH = {"checkpoint", "exporting", "models", "family.py"}


def area_of(path: Path) -> str:
    """The folder below `vlm_export`, or the module that lies in it directly."""
    return path.relative_to(PACKAGE).parts[0]


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(PACKAGE / "models").rglob("*.py")])


def imports_of(path: Path, at_once: bool = False) -> set[str]:
    """Dotted names of all modules that the file imports when it runs, also inside functions unless `at_once`."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_once else _running(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            submodules = [f"{module}.{alias.name}" for alias in node.names if _is_module(f"{module}.{alias.name}")]
            names |= set(submodules or [module])
    return names


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers read."""
    if isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING":
        return
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from _running(child)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _inside(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "vlm_export"}


def _outside(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names - _inside(names)} - set(sys.stdlib_module_names)


def room_of(module: str) -> str:
    """The room of a dotted name: the longest that it begins with, or its first part."""
    name = module.removeprefix("vlm_export.").removesuffix(".__init__")
    rooms = [room for room in (*ROOMS, *TOP, "bundle.strict_json") if name == room or name.startswith(f"{room}.")]
    return max(rooms, key=len, default=name)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_arrows(path: Path) -> None:
    room, names = room_of(module_of(path)), imports_of(path)
    if room not in TOP:
        allowed = ROOMS[room.removesuffix(".strict_json")] | EVERYWHERE | {room, "__init__"}
        if "bundle" in allowed or room.startswith("bundle"):
            allowed |= {"bundle", "bundle.strict_json"}
        wrong = {name for name in _inside(names) if name != "vlm_export" and room_of(name) not in allowed}
        assert not wrong, f"{room} may not import {sorted(wrong)}"
    area = area_of(path)
    if area in OUTSIDE:
        assert _outside(names) <= OUTSIDE[area]
    if area not in WITH_TORCH:
        assert not _outside(names) & TORCH


def test_arrows_point_one_way() -> None:
    """The table itself has no circle: each room imports only rooms that stand before it."""
    seen = {"bundle.strict_json", *EVERYWHERE}
    for room, allowed in ROOMS.items():
        assert allowed <= seen, f"{room} would import {sorted(allowed - seen)}, which stands after it"
        seen.add(room)


def test_no_module_imports_in_a_circle() -> None:
    """Also within a room, with imports inside functions."""
    modules = {module_of(path): path for path in sources()}
    imported = {name: {n for n in imports_of(path) if n in modules and n != name} for name, path in modules.items()}
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' → '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(imported[name]):
                follow(other, (*way, name))
            done.add(name)

    for name in sorted(modules):
        follow(name, ())


def test_every_area_is_judged() -> None:
    assert {room_of(module_of(path)) for path in sources()} <= {*ROOMS, *TOP, "bundle.strict_json"}
    assert {area_of(path) for path in sources()} >= {*OUTSIDE, *WITH_TORCH}


def test_the_reader_of_imports_sees_lazy_ones() -> None:
    assert "pyarrow" in _outside(imports_of(PACKAGE / "runtime" / "search" / "store.py"))
    assert "torch" in _outside(imports_of(PACKAGE / "family.py"))
    assert "vlm_export.bundle.layout" in imports_of(PACKAGE / "exporting" / "pipeline.py")


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: path.name)
def test_verbs_import_lazily(path: Path) -> None:
    names = imports_of(path, at_once=True)
    assert not _outside(names)
    light = {"vlm_export", "vlm_export.errors", "vlm_export.interrupts", "vlm_export.cli"}
    light |= {"vlm_export.text_display", "vlm_export.machine_faults", "vlm_export.runtime.inputs.panic_text"}
    assert not {name for name in _inside(names) if name not in light and not name.startswith("vlm_export.cli.")}


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("folder", ["vlm_export", "models", "scripts", "tests"])
def test_files_and_functions_are_short(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_FILE_LINES, f"{path.relative_to(ROOT)} has {lines} lines: split it"
        for name, length in _functions(path):
            assert length <= MAX_FUNCTION_LINES, f"{path.relative_to(ROOT)}: {name} has {length} lines"


def test_verbs_print_through_the_functions_that_show_foreign_text() -> None:
    """`print` is for what `cli/output.py` has made safe, and for stderr's messages, whose errors show themselves."""
    allowed = {"output.py", "main.py", "streams.py", "progress.py", "ask.py", "verify.py"}
    for path in sorted((PACKAGE / "cli").glob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        printed = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not printed or path.name in allowed, f"{path.name} prints foreign text as it is: use print_line"
