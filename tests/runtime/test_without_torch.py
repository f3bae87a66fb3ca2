"""The runtime's tests pass where torch cannot be imported: an environment of the base dependencies alone."""

from __future__ import annotations

import os
import re
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# What the tests themselves need. Of open_clip_torch only its vocabulary file is read: it comes without its own
# dependencies, so importing it would fail.
TEST_TOOLS = ("hypothesis", "pytest", "pyarrow", "faiss-cpu", "regex")
FORBIDDEN = ("torch", "torchvision", "transformers", "onnx", "onnxscript", "safetensors", "timm")
# Comes with `tokenizers`, but nothing of the runtime may reach for the network.
NOT_IMPORTED = (*FORBIDDEN, "huggingface_hub")


def base_requirements() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return re.findall(r'"([^"]+)"', block[1])


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory, link_distributions: Callable[..., None]) -> Path:
    """The interpreter of an environment with the base dependencies, linked from this one: no download, no install."""
    home = tmp_path_factory.mktemp("bare") / "env"
    venv.create(home, with_pip=False, symlinks=True)
    site = next(home.glob("lib/python3*/site-packages"))
    link_distributions([*base_requirements(), *TEST_TOOLS], site, alone=["open_clip_torch"])
    (site / "vlm_export").symlink_to(ROOT / "vlm_export")
    return home / "bin" / "python"


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "COV"))}
    return subprocess.run(
        [str(python), *arguments],
        cwd=ROOT,
        env={**keep, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.needs_torch
def test_runtime_tests_pass_without_torch(bare_python: Path) -> None:
    probe = f"import importlib.util as u; print([n for n in {FORBIDDEN!r} if u.find_spec(n)])"
    assert run(bare_python, "-c", probe).stdout.strip() == "[]"
    # The tests outside this folder may have fixtures that import torch.
    options = ("-m", "not needs_torch", "-q", "-p", "no:cacheprovider", "--confcutdir", "tests/runtime")
    done = run(bare_python, "-m", "pytest", "tests/runtime", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 150
    assert "skipped" not in done.stdout


@pytest.mark.needs_torch
def test_the_whole_runtime_imports_without_torch(bare_python: Path) -> None:
    code = (
        "import pkgutil, importlib, sys, vlm_export.runtime as r, vlm_export.bundle as b\n"
        "for p in (r, b):\n"
        "    for m in pkgutil.iter_modules(p.__path__): importlib.import_module(f'{p.__name__}.{m.name}')\n"
        f"print([n for n in {NOT_IMPORTED!r} if n in sys.modules])"
    )
    done = run(bare_python, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr
