"""A folder of JPEGs to vectors, by `embed` and by others; how busy `embed` keeps the cores, and its memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

import vlm_export
from benchmarks.measuring import export_random, save_original
from benchmarks.report import MIB, Bars, Report, Table, table
from vlm_export.bundle.layout import PREPROCESSOR_NAME
from vlm_export.bundle.memory import anonymous_bytes
from vlm_export.bundle.opened import open_bundle
from vlm_export.exporting.tokenizers.files import find_open_clip_merges
from vlm_export.lab import timing
from vlm_export.lab.timing import median_ratio
from vlm_export.quantizing.pipeline import quantize

FP32 = "onnxruntime fp32"
VARIANTS = ("onnxruntime int8", "openvino int8-static")
TRANSFORMERS = ("transformers", "transformers-loader")
# Times as fast as the faster form of transformers, and as each other consumer: of float32, and of the fastest variant.
FASTEST = "fastest"
GOALS = {FP32: (2.0, 1.3), FASTEST: (4.0, 3.0)}
LEAST_COSINE, LEAST_BUSY, MOST_GROWTH = 0.999, 0.9, 1.1
# (width, height) and how many of ten images have it: what cameras, phones and the web write.
SIZES = (((500, 375), 3), ((640, 480), 2), ((375, 500), 1), ((1024, 768), 2), ((1280, 960), 1), ((1080, 1920), 1))
_SHARD_ITEMS, _WARM, _LINKED = 1000, 32, 50
_SIDE = Path(__file__).with_name("embed_side.py")
Array = npt.NDArray[Any]


def measure(
    name: str,
    bundle: Path | None,
    rounds: int,
    threads: int,
    images: int,
    round_images: int,
    many: int,
    fastembed: Path | None,
    modern_onnx_clip: Path | None,
) -> Report:
    """All sides in turn on the same images of the folder, other ones in each round; then the folder by the command."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        exported = bundle or root / "exported"
        if bundle is None:
            export_random(name, exported, "--part", "vision")
        made, files = _quantised(exported, root / "bundle"), write_images(root / "images", images)
        pythons = {"fastembed": fastembed, "modern-onnx-clip": modern_onnx_clip}
        consumers = {consumer: python for consumer, python in pythons.items() if python is not None}
        commands = _commands(
            made, save_original(name, root / "checkpoint"), bare_encoder(made, root / "bare"), consumers, threads
        )
        sides = {side: stack.enter_context(_started(command, root)) for side, command in commands.items()}
        times, cosines = _in_turn(sides, files, rounds, round_images, root)
        stack.close()
        runs = [_run(name, made, root / "images", root / "vectors", threads)]
        if many:
            runs += _memory_runs(root, files, (images, many), threads)
    return report_from_results(name, times, cosines, runs, threads, round_images)


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEGs of mixed sizes, of shapes and noise, seeded."""
    folder.mkdir()
    sizes = [size for size, share in SIZES for _ in range(share)]

    def write(number: int) -> Path:
        draw = np.random.default_rng(number)
        width, height = sizes[draw.integers(len(sizes))]
        coarse = draw.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        grain = draw.normal(0, 8, (height, width, 1))
        path = folder / f"{number:06d}.jpg"
        Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=85)
        return path

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(write, range(count)))


def _quantised(bundle: Path, target: Path) -> Path:
    for number, side in enumerate(VARIANTS):
        quantize(target if number else bundle, side.split()[1], parts=["vision"], output=None if number else target)
    return target


def bare_encoder(bundle: Path, folder: Path) -> Path:
    """The float32 image encoder in both consumers' names."""
    folder.mkdir()
    opened = open_bundle(bundle)
    variant = opened.manifest.part("vision").variant("fp32")
    graph = opened.model_files(variant)
    for own in ("model.onnx", "visual.onnx"):
        shutil.copyfile(graph, folder / own)
    for other in (*variant.external_data, PREPROCESSOR_NAME):
        shutil.copyfile(opened.root / other, folder / Path(other).name)
    # modern-onnx-clip makes a tokenizer, for images too, and would fetch its vocabulary.
    merges = find_open_clip_merges()
    assert merges is not None
    shutil.copyfile(merges, folder / "bpe_simple_vocab_16e6.txt.gz")
    assert opened.manifest.image is not None
    size = getattr(opened.manifest.image, "size_pixels", 224)
    (folder / "config.json").write_text(json.dumps({"image_size": size}), encoding="utf-8")
    return folder


def _commands(
    bundle: Path, checkpoint: Path, bare: Path, consumers: Mapping[str, Path], threads: int
) -> dict[str, list[str]]:
    """Side → what starts its process."""

    def command(python: str | Path, *words: str | Path) -> list[str]:
        side, folder, *options = map(str, words)
        return [str(python), str(_SIDE), side, folder, str(threads), *options]

    ours = {side: side.split() for side in (FP32, *VARIANTS)}
    commands = {
        side: command(sys.executable, "bundle", bundle, precision, engine) for side, (engine, precision) in ours.items()
    }
    commands |= {side: command(sys.executable, side, checkpoint) for side in TRANSFORMERS}
    return commands | {side: command(python, side, bare) for side, python in consumers.items()}


Ask = Callable[[Sequence[Path], Path], float]
"""Lets a side embed files into a `.npy` file; returns its seconds."""


@contextmanager
def _started(command: Sequence[str], folder: Path) -> Iterator[Ask]:
    """A side's process, which ends with the block."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if command[0] != sys.executable:
        # What is importable here is of another environment.
        environment.pop("PYTHONPATH", None)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, told = process.stdin, process.stdout

        def ask(files: Sequence[Path], target: Path) -> float:
            # A process that has ended says so by its status.
            with suppress(BrokenPipeError):
                print(json.dumps([list(map(str, files)), str(target)]), file=asked, flush=True)
            if not (line := told.readline()):
                raise SystemExit(f"a side ended with status {process.wait()}: {' '.join(command)}")
            return float(json.loads(line)["seconds"])

        try:
            yield ask
        finally:
            process.kill()
            with suppress(BrokenPipeError):
                asked.close()


def _in_turn(
    sides: Mapping[str, Ask], files: Sequence[Path], rounds: int, count: int, folder: Path
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each side in each round, whose images are others than those of the round before; and the least cosine
    of each side's vectors to float32's, over the last round."""
    targets = {side: folder / f"{number}.npy" for number, side in enumerate(sides)}
    chunks = {side: cycle(zip(*[iter(files)] * count, strict=False)) for side in sides}

    def measured(side: str) -> timing.Measure:
        return lambda: sides[side](next(chunks[side]), targets[side])

    for side, ask in sides.items():
        print(f"{side}: warms up", file=sys.stderr)
        ask(files[:_WARM], targets[side])
    told = partial(print, "round", file=sys.stderr)
    times = timing.interleaved({side: measured(side) for side in sides}, rounds, told)
    vectors = {side: np.load(target) for side, target in targets.items()}
    return times, {side: float((found * vectors[FP32]).sum(axis=1).min()) for side, found in vectors.items()}


def _run(label: str, bundle: Path, images: Path, output: Path, threads: int) -> dict[str, Any]:
    """The command on a folder: seconds, the share of the cores that was busy, and the peak of its anonymous memory."""
    print(f"{label}: runs", file=sys.stderr)
    options = ("--threads", str(threads), "--shard-items", str(_SHARD_ITEMS), "--quiet")
    command = [sys.executable, "-m", "vlm_export", "embed", str(bundle), str(images), "-o", str(output), *options]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, anonymous_bytes(process.pid) or 0)
        time.sleep(0.1)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"embed ended with status {process.returncode}")
    seconds = time.perf_counter() - start
    busy = (usage.ru_utime + usage.ru_stime) / (seconds * min(threads, os.cpu_count() or 1))
    return {
        "run": label,
        "images": sum(1 for _ in images.iterdir()),
        "seconds": seconds,
        "busy": busy,
        "peak_bytes": peak,
    }


def _memory_runs(folder: Path, files: Sequence[Path], counts: Sequence[int], threads: int) -> list[dict[str, Any]]:
    """The demo bundle on so many links to the smallest images: what the loop around a model keeps."""
    vlm_export.export("clip-demo", folder / "demo", precisions=("fp32",))
    smallest = sorted(files, key=lambda path: path.stat().st_size)[:_LINKED]
    runs = []
    for count in counts:
        images = folder / f"links-{count}"
        images.mkdir()
        for number in range(count):
            os.link(smallest[number % _LINKED], images / f"{number:06d}.jpg")
        runs.append(_run("demo", folder / "demo", images, folder / f"demo-{count}", threads))
    return runs


def report_from_results(
    name: str,
    times: Mapping[str, Sequence[float]],
    cosines: Mapping[str, float],
    runs: Sequence[Mapping[str, Any]],
    threads: int,
    round_images: int,
) -> Report:
    """The page.

    Args:
        times: seconds of each side in each round.
        cosines: the least of each side's vectors to float32's.
        runs: of the command: the whole folder, then two of the demo bundle, of few and of many images.
    """
    reached, conclusion = _judged(times, cosines, runs)
    rates = {side: round_images / median(found) for side, found in times.items()}
    title = f"{name}, random weights, {threads} threads, JPEGs of mixed sizes to vectors; {len(times[FP32])} rounds in "
    (exact, exact_others), (fast, fast_others) = GOALS[FP32], GOALS[FASTEST]
    return Report(
        title="Embedding a folder of images",
        goal=f"float32 at least {exact:g} times transformers and {exact_others:g} times the others, the "
        f"fastest variant of a cosine of at least {LEAST_COSINE:g} {fast:g} and {fast_others:g} times; "
        f"{LEAST_BUSY:.0%} of the cores busy, and memory that does not grow with the folder.",
        reached=reached,
        conclusion=conclusion,
        tables=(
            _sides_table(
                f"{title}turn of {round_images} images; medians, ratios round by round", times, cosines, rates
            ),
            _runs_table(runs),
        ),
        bars=Bars("Images per second", "images/s", list(rates.items())),
        data={
            "model": name,
            "threads": threads,
            "round_images": round_images,
            "cosines": dict(cosines),
            "seconds": {side: list(found) for side, found in times.items()},
            "runs": list(runs),
        },
    )


def _sides_table(
    title: str, times: Mapping[str, Sequence[float]], cosines: Mapping[str, float], rates: Mapping[str, float]
) -> Table:
    rows = [
        {
            "side": side,
            "rate": rates[side],
            "speed": median_ratio(times[TRANSFORMERS[0]], found),
            "cosine": cosines[side],
        }
        for side, found in times.items()
    ]
    columns = {
        "": "{side}",
        "images/s": "{rate:.1f}",
        "times transformers": "{speed:.2f}",
        "least cosine to float32": "{cosine:.6f}",
    }
    return table(title, columns, rows)


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    rows = [{**run, "label": f"{run['run']}: {run['images']:,} images", "mib": run["peak_bytes"] / MIB} for run in runs]
    columns = {
        "": "{label}",
        "seconds": "{seconds:.1f}",
        "cores busy": "{busy:.0%}",
        "peak anonymous memory, MiB": "{mib:,.0f}",
    }
    return table("`vlm-export embed FOLDER -o VECTORS`, from the start of the process to its end", columns, rows)


def _judged(
    times: Mapping[str, Sequence[float]], cosines: Mapping[str, float], runs: Sequence[Mapping[str, Any]]
) -> tuple[bool, str]:
    """Whether the goal is reached, and all that it depends on in a sentence."""
    ours = [side for side in (FP32, *VARIANTS) if cosines[side] >= LEAST_COSINE]
    fastest = min(ours, key=lambda side: median(times[side]))
    others = [side for side in times if side not in (FP32, *VARIANTS)]
    missed, said = [], []
    for side, (least_transformers, least_others) in ((FP32, GOALS[FP32]), (fastest, GOALS[FASTEST])):
        speeds = {other: median_ratio(times[other], times[side]) for other in others}
        missed += [
            speed < (least_transformers if other in TRANSFORMERS else least_others) for other, speed in speeds.items()
        ]
        said.append(f"{side}: {', '.join(f'{speed:.2f} times {other}' for other, speed in speeds.items())}")
    missed.append(runs[0]["busy"] < LEAST_BUSY)
    said.append(f"{runs[0]['busy']:.0%} of the cores busy")
    if len(runs) > 1:
        few, many = runs[1:]
        growth = many["peak_bytes"] / few["peak_bytes"]
        missed.append(growth > MOST_GROWTH)
        said.append(f"{growth:.2f} times the memory for {many['images']:,} images as for {few['images']:,}")
    return not any(missed), "; ".join(said) + "."
