"""What several areas share: the oracle as models and records, tiny Hugging Face checkpoints, linked distributions.

Imports torch only where it is used: the runtime's tests run without it.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from importlib.metadata import Distribution, distribution
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from filelock import FileLock
from hypothesis import settings
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from vlm_export.family import Model

# The same examples in every run, on every machine and under any load; `HYPOTHESIS_PROFILE=explore` draws new ones.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=50)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
# Imports and exports make millions of objects that live long; Python's collector would walk over them again and again,
# which is a tenth of the time of a test run, and a third of what the collection of tests takes.
gc.set_threshold(50_000, 20, 100)

CLIP_DATA = Path(__file__).parent / "data" / "clip"
BLIP_DATA = Path(__file__).parent / "data" / "blip"
MINICPMV_DATA = Path(__file__).parent / "data" / "minicpmv"
NANOVLM_DATA = Path(__file__).parent / "data" / "nanovlm"


def pytest_collection_finish() -> None:
    """What is loaded now stays until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def default_interrupts() -> Iterator[None]:
    """Ctrl-C as at a terminal: what a script runs in its background inherits an ignored one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    """`bundle/kill_harness.py`; loaded by path because test directories are no packages."""
    name = "vlm_export_kill_harness"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "bundle" / "kill_harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def build_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Model]]:
    """Opens a path and builds its model, with BuildOptions if given; converted weights live until the session's end."""
    import torch

    from vlm_export.checkpoint.open import open_checkpoint
    from vlm_export.checkpoint.store import ScratchStore
    from vlm_export.family import DEFAULT_BUILD, BuildOptions
    from vlm_export.models.registry import identify

    torch.set_num_threads(1)
    with ExitStack() as stack:

        def build(source: Path, options: BuildOptions = DEFAULT_BUILD) -> Model:
            checkpoint = open_checkpoint(str(source))
            store = stack.enter_context(ScratchStore(tmp_path_factory.mktemp("store") / "weights.bin"))
            family, checkpoint = identify(checkpoint)
            return family.build(checkpoint, store, options)

        yield build


@pytest.fixture(scope="module")
def models_under(build_model: Callable[..., Model]) -> Callable[[Path], Callable[[str], Model]]:
    """A directory → a function that builds the model of the checkpoint of a name there, once for a test module."""

    def under(directory: Path) -> Callable[[str], Model]:
        return cache(lambda name: build_model(directory / name))

    return under


@pytest.fixture(scope="session")
def oracle_model(build_model: Callable[..., Model]) -> Callable[[str], Model]:
    """Opens `<variant>/<file>` of CLIP's oracle and builds its model, once."""
    models: dict[str, Model] = {}

    def build(name: str) -> Model:
        if name not in models:
            models[name] = build_model(CLIP_DATA / name)
        return models[name]

    return build


@pytest.fixture(scope="session")
def oracle_record() -> Callable[[str], dict[str, npt.NDArray[Any]]]:
    """The recorded inputs and outputs of `<variant>/<file>`; token ids as int64."""

    def load(name: str) -> dict[str, npt.NDArray[Any]]:
        from safetensors.numpy import load_file

        record: dict[str, npt.NDArray[Any]] = load_file(CLIP_DATA / name.partition("/")[0] / "golden.safetensors")
        return record | {"input.text": record["input.text"].astype(np.int64)}

    return load


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Equal within the gate of float32: shape, every value, and every row's cosine."""

    def check(got: npt.ArrayLike, expected: npt.ArrayLike, max_abs: float = 1e-4, cosine: float = 0.99999) -> None:
        left, right = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        assert left.shape == right.shape
        difference = np.abs(left - right).max()
        assert difference <= max_abs, f"max-abs {difference:.2e}"
        rows = left.reshape(len(left), -1), right.reshape(len(right), -1)
        norms = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
        lowest = ((rows[0] * rows[1]).sum(axis=1) / norms).min()
        assert lowest >= cosine, f"cosine {lowest:.7f}"

    return check


@pytest.fixture(scope="session")
def wordpiece_json() -> Callable[[str], str]:
    """The content of a tokenizer.json from lines of an uncased BERT vocabulary; tokens in brackets are special.

    As transformers 4 read it, so that words close up before marks."""

    def build(lines: str) -> str:
        from tokenizers import AddedToken
        from tokenizers.implementations import BertWordPieceTokenizer

        from vlm_export.exporting.tokenizers.fit import closed_up

        words = lines.removesuffix("\n").split("\n")
        tokenizer = BertWordPieceTokenizer(vocab={word: i for i, word in enumerate(words)})
        special = [word for word in words if re.fullmatch(r"\[[A-Z]+\]", word)]
        tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
        return closed_up(str(tokenizer.to_str()))

    return build


@pytest.fixture(scope="session")
def make_huggingface_clip() -> Callable[..., Any]:
    """Saves a tiny `CLIPModel` with random weights, none of them at its default, and returns it in eval mode."""

    def make(
        folder: Path, *, eos: int = 524, heads: tuple[int, int] = (2, 4), act: str = "quick_gelu", **save: Any
    ) -> Any:
        import torch
        from transformers import CLIPConfig, CLIPModel

        shared = {"hidden_act": act, "num_hidden_layers": 2, "intermediate_size": 48, "layer_norm_eps": 2e-5}
        text = {"hidden_size": 32, "num_attention_heads": heads[0], "vocab_size": 525, "max_position_embeddings": 20}
        vision = {"hidden_size": 64, "num_attention_heads": heads[1], "image_size": 24, "patch_size": 8}
        config = CLIPConfig(
            text_config={**text, **shared, "bos_token_id": 523, "eos_token_id": eos, "pad_token_id": 0},
            vision_config={**vision, **shared},
            projection_dim=24,
        )
        generator = torch.Generator().manual_seed(0)
        model = CLIPModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                # A tenth around the default of each kind: zero for matrices and biases, one for norms.
                parameter.copy_((parameter.mean() if parameter.ndim < 2 else 0.0) + 0.2 * noise)
        model.to(save.pop("dtype", torch.float32)).save_pretrained(folder, **save)
        return model.float()

    return make


@pytest.fixture(scope="session")
def link_distributions() -> Callable[..., None]:
    """Fills an environment from this one: `link(requirements, site_packages, alone=names without dependencies)`."""

    def link(requirements: Sequence[str], site: Path, alone: Sequence[str] = ()) -> None:
        for dist in (*_needed_distributions(requirements).values(), *map(distribution, alone)):
            _link_distribution(dist, site)

    return link


def _needed_distributions(requirements: Sequence[str]) -> dict[str, Distribution]:
    """The installed distributions that satisfy the requirements without extras, and what those require in turn."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = distribution(requirement.name)
        assert requirement.specifier.contains(found[name].version, prereleases=True), str(requirement)
        waiting += [Requirement(text) for text in found[name].requires or []]
    return found


def _link_distribution(dist: Distribution, site: Path) -> None:
    """Links each top-level entry of an installed distribution into `site`: no download, no copy but the metadata's."""
    for top in {file.parts[0] for file in dist.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        origin, target = Path(str(dist.locate_file(top))), site / top
        if target.exists():
            continue
        if top.endswith(".dist-info"):
            # uv overlooks metadata behind a link.
            shutil.copytree(origin, target)
        else:
            target.symlink_to(origin)


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`shared_bundle(name, export)`: the bundle of that name, which the first worker exports that needs it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "shared"

    def share(name: str, export: Callable[[Path], object]) -> Path:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # Publication is atomic: a bundle that is there is whole.
        with FileLock(f"{target}.lock"):
            if not target.exists():
                export(target)
        return target

    return share


@pytest.fixture(scope="session")
def demo(shared_bundle: Callable[..., Path]) -> Path:
    """The exported demo checkpoint, float32 and float16; tests must not change it."""

    import vlm_export

    def export(target: Path) -> None:
        options: dict[str, Any] = {"exporter": "torchscript", "opset": 18, "threads": 1}
        vlm_export.export("clip-demo", target, precisions=("fp32", "fp16"), **options)

    return shared_bundle("clip-demo", export)


@pytest.fixture(scope="session")
def relist() -> Callable[[Path], None]:
    """Makes a bundle's manifest state the files that are there now, as an exporter of such files would have."""

    def write(bundle: Path) -> None:
        manifest = bundle / "vlm_export.json"
        data = json.loads(manifest.read_text(encoding="utf-8"))
        for name in data["files"]:
            raw = (bundle / name).read_bytes()
            data["files"][name] = {"size_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        manifest.write_text(json.dumps(data), encoding="utf-8")

    return write


@pytest.fixture(scope="session")
def blip_bundle(shared_bundle: Callable[..., Path]) -> Callable[[str], Path]:
    """The bundle of a variant of BLIP's oracle ("caption", "vqa", …), exported once; tests must not change it."""

    def bundle(variant: str) -> Path:
        return shared_bundle(f"blip/{variant}", lambda target: export(variant, target))

    def export(variant: str, target: Path) -> None:
        from vlm_export.exporting.options import ExportOptions
        from vlm_export.exporting.pipeline import export_bundle

        (checkpoint,) = (BLIP_DATA / variant).glob("*.pth")
        options = ExportOptions(opset=17, threads=1, tokenizer=str(BLIP_DATA / "vocab.txt"))
        export_bundle(str(checkpoint), target, options)

    return bundle


@pytest.fixture(scope="session")
def blip_record() -> Callable[[str], dict[str, Any]]:
    """The recorded arrays of a variant of BLIP's oracle by name, and under "strings" its recorded texts."""

    def load(variant: str) -> dict[str, Any]:
        from safetensors.numpy import load_file

        meta = json.loads((BLIP_DATA / variant / "meta.json").read_text(encoding="utf-8"))
        return {**load_file(BLIP_DATA / variant / "golden.safetensors"), "strings": meta["strings"]}

    return load


@pytest.fixture(scope="session")
def slice_bundle(shared_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a variant of MiniCPM-V's oracle ("v1_0" … "v4_5", "omnilmm"), exported once; tests must not change
    it. Slices are as small as those of the recorded images, and it is verified at few sizes."""

    def bundle(variant: str) -> Path:
        return shared_bundle(f"minicpmv/{variant}", lambda target: export(variant, target))

    def export(variant: str, target: Path) -> None:
        from vlm_export.exporting import verification
        from vlm_export.exporting.options import ExportOptions
        from vlm_export.exporting.pipeline import export_bundle

        source = Path(shutil.copytree(MINICPMV_DATA / variant, tmp_path_factory.mktemp("minicpmv") / "source"))
        _shrink_slices(source / "config.json", variant)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verification, "_LARGE_PART_BYTES", 0)
            export_bundle(str(source), target, ExportOptions(opset=17, threads=1, with_tokenizer=False))

    return bundle


def _shrink_slices(path: Path, variant: str) -> None:
    recorded = json.loads((MINICPMV_DATA / "preprocess" / "meta.json").read_text(encoding="utf-8"))["pixel_config"]
    config = json.loads(path.read_text(encoding="utf-8"))
    most = recorded["max_slice_nums"].get(variant.removeprefix("v").replace("_", "."), 9)
    numbers = {"scale_resolution": recorded["scale_resolution"], "max_slice_nums": most}
    if "slice_config" in config:
        config["slice_config"] |= numbers
    elif variant == "v2_0":
        config |= numbers
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def nanovlm_bundle(shared_bundle: Callable[..., Path]) -> Callable[[str], Path]:
    """The bundle of a variant of nanoVLM's oracle ("222m", "450m", "split"), exported once; not to be changed."""

    def bundle(variant: str) -> Path:
        return shared_bundle(f"nanovlm/{variant}", lambda target: export(variant, target))

    def export(variant: str, target: Path) -> None:
        from vlm_export.exporting import verification
        from vlm_export.exporting.options import ExportOptions
        from vlm_export.exporting.pipeline import export_bundle

        source = NANOVLM_DATA / variant
        with pytest.MonkeyPatch.context() as patch:
            # Verified at few sizes, as large parts are: the export's own tests look at all of them.
            patch.setattr(verification, "_LARGE_PART_BYTES", 0)
            options = ExportOptions(opset=17, threads=1, tokenizer=str(source / "tokenizer"))
            export_bundle(str(source), target, options)

    return bundle


@pytest.fixture(scope="session")
def nanovlm_record() -> Callable[[str], dict[str, npt.NDArray[Any]]]:
    """The recorded arrays of a variant of nanoVLM's oracle by name."""

    def load(variant: str) -> dict[str, npt.NDArray[Any]]:
        from safetensors.numpy import load_file

        record: dict[str, npt.NDArray[Any]] = load_file(NANOVLM_DATA / variant / "golden.safetensors")
        return record

    return load


@pytest.fixture(scope="session")
def consumers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the environments of other software, which `VLM_EXPORT_CONSUMERS` may name to keep them."""
    stated = os.environ.get("VLM_EXPORT_CONSUMERS")
    folder = Path(stated) if stated else tmp_path_factory.mktemp("consumers")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def checked_install() -> Callable[..., None]:
    """`checked_install(command)`: skips, and says what failed, where the registry cannot be reached; else an error."""

    def install(command: Sequence[str | Path], **options: Any) -> None:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
        if done.returncode:
            said = (done.stdout + done.stderr).strip()
            if re.search(r"resol|connect|network|ENOTFOUND|EAI_AGAIN|timed out", said, re.IGNORECASE):
                pytest.skip(f"the package registry cannot be reached: {said.splitlines()[-1]}")
            raise AssertionError(said)

    return install


@pytest.fixture(scope="session")
def python_with(consumers: Path, checked_install: Callable[..., None]) -> Callable[..., Path]:
    """`python_with("name", "package==1.0", …)`: the interpreter of an environment of that name that has these."""

    def make(name: str, *requirements: str) -> Path:
        home = consumers / name
        python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not (home / "ready").exists():
            here = (shutil.which("uv"), Path(__file__).parents[1] / ".venv-uv" / "bin" / "uv")
            uv = next((path for path in here if path and Path(path).exists()), "")
            if uv:
                checked_install([uv, "venv", "--clear", "--python", sys.executable, home])
                checked_install([uv, "pip", "install", "--python", python, *requirements])
            else:
                checked_install([sys.executable, "-m", "venv", "--clear", home])
                checked_install([python, "-m", "pip", "install", *requirements])
            (home / "ready").touch()
        return python

    return make
