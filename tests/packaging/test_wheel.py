"""The wheel holds the package whole and nothing else, and runs where only the base dependencies are installed."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.packaging.conftest import Built, Environment

ROOT = Path(__file__).parent.parent.parent
TINY_BUNDLE = ROOT / "tests" / "data" / "runtime" / "tiny_bundle"
IMAGE = ROOT / "tests" / "data" / "runtime" / "images" / "landscape.png"


@pytest.fixture(scope="module")
def installed(built: Built, install: Callable[..., Environment]) -> Environment:
    return install(built.wheel, metadata=built.wheel)


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def expected_names() -> set[str]:
    """Every source file of the package, as the wheel has to name it."""
    names = {"vlm_export/py.typed", "vlm_export/lab/consumer/collectors/collect.mjs"}
    sources = ("vlm_export/**/*.py", "vlm_export/models/**/*.py", "vlm_export/layouts/browser/*")
    for path in (path for pattern in sources for path in ROOT.glob(pattern)):
        names.add(path.relative_to(ROOT).as_posix())
    configs = [*ROOT.glob("configs/*.yaml"), ROOT / "configs" / "__init__.py", *ROOT.glob("configs/demo/**/*")]
    return names | {f"vlm_export/{path.relative_to(ROOT).as_posix()}" for path in configs if path.is_file()}


def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    package = {name for name in names_in(built.wheel) if ".dist-info/" not in name}
    assert package == expected_names()
    assert "vlm_export/models/clip/family.py" in package
    assert "vlm_export/configs/clip-vit-b-32.yaml" in package
    assert "vlm_export/configs/demo/clip-demo.pt" in package


def test_wheel_from_the_source_distribution_is_the_same(built: Built) -> None:
    direct, indirect = zipfile.ZipFile(built.wheel), zipfile.ZipFile(built.wheel_from_sdist)
    assert names_in(built.wheel) == names_in(built.wheel_from_sdist)
    for name in names_in(built.wheel):
        if not name.endswith("/RECORD"):
            assert direct.read(name) == indirect.read(name), name


def test_source_distribution_brings_its_papers(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "docs/architecture.md"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_runs_without_torch(installed: Environment) -> None:
    probe = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'transformers') if u.find_spec(n)])"
    assert installed.run("python", "-c", probe).stdout.strip() == "[]"
    assert installed.run("python", "-c", "import vlm_export; print(vlm_export.load.__name__)").stdout == "load\n"
    done = installed.run("vlm-export", "--help")
    assert done.returncode == 0
    assert "classify" in done.stdout
    done = installed.run("vlm-export", "classify", TINY_BUNDLE, IMAGE, "a dog", "a cat", "--json")
    assert done.returncode == 0, done.stderr
    assert '"probability"' in done.stdout


def test_verbs_that_need_torch_say_what_to_install(installed: Environment) -> None:
    done = installed.run("vlm-export", "export", "clip-vit-b-32", "-o", "out")
    assert done.returncode == 4
    assert "pip install '.[export]' -c constraints.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_configs_are_package_data(installed: Environment) -> None:
    code = (
        "from importlib.resources import files; f = files('vlm_export.configs');"
        "print((f / 'clip-vit-b-32.yaml').read_text().splitlines()[0], len((f / 'demo/clip-demo.pt').read_bytes()) > 1)"
    )
    assert installed.run("python", "-c", code).stdout.strip() == "family: clip True"


@pytest.mark.parametrize("name", ["models", "configs", "tests", "scripts"])
def test_installs_no_other_top_level_name(installed: Environment, name: str) -> None:
    done = installed.run("python", "-c", f"import {name}")
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


def test_dependencies_are_consistent(installed: Environment) -> None:
    done = installed.check_dependencies()
    assert done.returncode == 0, done.stdout + done.stderr


def test_editable_install_finds_the_models(tree: Path, built: Built, install: Callable[..., Environment]) -> None:
    environment = install("--editable", tree, metadata=built.wheel, also=["setuptools"])
    probe = (
        "import importlib.util as u, vlm_export.models as m, vlm_export.configs as c;"
        "print(m.__file__, u.find_spec('vlm_export.models.clip.family').origin, c.__file__, u.find_spec('models'))"
    )
    done = environment.run("python", "-c", probe)
    package = tree / "vlm_export"
    expected = [
        package / "models/__init__.py",
        package / "models/clip/family.py",
        package / "configs/__init__.py",
        None,
    ]
    assert done.stdout.split() == [str(entry) for entry in expected], done.stderr
    assert environment.run("vlm-export", "--version").stdout.startswith("vlm-export ")
