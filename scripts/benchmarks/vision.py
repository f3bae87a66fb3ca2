"""What makes a vision transformer fast on this machine: variants, engines and forms of the graph against PyTorch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measuring import bundle_or_random
from benchmarks.report import MIB, Bars, Report, Table, table
from benchmarks.vision_graphs import write_forms
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.lab.bench import bench
from vlm_export.lab.bench_plan import TORCH, TORCH_FORMS, BenchOptions, Side
from vlm_export.lab.bench_result import BenchResult
from vlm_export.proof.samples import synthetic_photographs
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.specs import ImageSpec

GOAL_RATIO, GOAL_ORT_RATIO, LEAST_COSINE = 6.0, 3.5, 0.999
BATCHES = (4, 16)
# What each form runs in; the others are slower there than float32.
FORMS = (
    ("onnxruntime", "fused", ""),
    ("onnxruntime", "int8-dynamic", ""),
    ("onnxruntime", "int8-dynamic-fused", ""),
    ("onnxruntime", "int8-static-fused", ""),
    ("openvino", "fused", "+bf16"),
    ("openvino", "int8-static-fused", "+bf16"),
)
_CALIBRATED, _TOGETHER = 32, 4
_MOST_OPERATORS = 6


def measure(name: str, bundle: Path | None, rounds: int, threads: int, graphs: Sequence[Path]) -> Report:
    """Every side in turn; graphs: further ones for OpenVINO in bfloat16, such as NNCF writes."""
    with bundle_or_random(name, bundle) as directory, TemporaryDirectory() as folder:
        opened = open_bundle(directory)
        exported = opened.model_files(opened.manifest.part("vision").variant("fp32"))
        forms = write_forms(exported, Path(folder), _calibration(opened))
        sides = [Side(TORCH, form, threads) for form in TORCH_FORMS]
        sides += [Side("onnxruntime", "fp32", threads)]
        sides += [Side(engine, form + more, threads, str(forms[form])) for engine, form, more in FORMS]
        sides += [Side("openvino", precision, threads) for precision in ("fp32", "bf16")]
        sides += [Side("openvino", f"{path.stem}+bf16", threads, str(path)) for path in graphs]
        options = BenchOptions(parts=["vision"], batches=BATCHES, rounds=rounds, against=name)
        found = bench(directory, options, sides=sides, progress=lambda what, *_: print(what))
        profiles = [_profile(form, path, threads) for form, path in {"fp32": exported, **forms}.items()]
    return report_from_result(name, found, profiles, threads)


def _calibration(bundle: OpenBundle) -> list[Any]:
    spec = bundle.manifest.image
    assert isinstance(spec, ImageSpec)
    crops = [_crop(number) for number in range(_CALIBRATED)]
    pixels = np.stack([preprocess_image(image, spec) for image in crops])
    return np.split(pixels, _CALIBRATED // _TOGETHER)


def _crop(number: int) -> Image.Image:
    """A piece of a synthetic photograph; what is measured is run on the whole ones."""
    photographs = synthetic_photographs()
    image, random = photographs[number % len(photographs)], np.random.default_rng(number)
    width, height = (int(side * random.uniform(0.4, 0.8)) for side in image.size)
    left, top = int(random.integers(image.width - width)), int(random.integers(image.height - height))
    return image.crop((left, top, left + width, top + height))


def _profile(form: str, graph: Path, threads: int) -> dict[str, Any]:
    """Milliseconds of each operator of one run of ONNX Runtime: of each node the least of several runs."""
    import onnxruntime

    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = threads, True
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        port = session.get_inputs()[0]
        pixels = np.random.default_rng(0).standard_normal((BATCHES[0], *port.shape[1:])).astype(np.float32)
        for _ in range(5):
            session.run(None, {port.name: pixels})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    least: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = (event["args"]["op_name"], event["name"])
            least[node] = min(event["dur"] / 1000, least.get(node, np.inf))
    taken: Counter[str] = Counter()
    for (operator, _), milliseconds in least.items():
        taken[operator] += milliseconds  # type: ignore[assignment]
    return {"form": form, "ms": dict(taken.most_common())}


def report_from_result(name: str, found: BenchResult, profiles: Sequence[Mapping[str, Any]], threads: int) -> Report:
    """The page."""
    lost = {cost.side: 1 - (cost.cosine or np.nan) for cost in found.costs}
    sizes = {cost.side: cost.peak_bytes for cost in found.costs}
    rows = []
    for one in found.measured:
        speed = found.speed(one)
        rows.append(
            {
                "label": f"{one.load.label}: {one.side.name}",
                "side": one.side,
                "ms": 1e3 * one.spread.median,
                "rate": one.rows_per_second,
                "speed": speed.median,
                "half": f"{speed.low:.2f} to {speed.high:.2f}",
                "lost": lost[one.side],
                "peak": (sizes[one.side] or 0) / MIB,
            }
        )
    columns = {
        "": "{label}",
        "ms": "{ms:.0f}",
        "images/s": "{rate:.1f}",
        "times PyTorch eager": "{speed:.2f}",
        "middle half": "{half}",
        "1 - cosine": "{lost:.1e}",
        "peak memory, MiB": "{peak:,.0f}",
    }
    best, best_ort = (_least_speed(rows, engines) for engines in (("openvino", "onnxruntime"), ("onnxruntime",)))
    return Report(
        title="What makes a vision transformer fast",
        goal=f"at least {GOAL_RATIO:g} times PyTorch eager with a cosine of at least {LEAST_COSINE:g} to float32, and "
        f"{GOAL_ORT_RATIO:g} times in ONNX Runtime, at every batch.",
        reached=best[0] >= GOAL_RATIO and best_ort[0] >= GOAL_ORT_RATIO,
        conclusion=f"{best[0]:.2f} times ({best[1]}), in ONNX Runtime {best_ort[0]:.2f} times ({best_ort[1]}).",
        tables=(
            table(
                f"{name}, random weights, vision part, {threads} threads; {found.options.rounds} rounds in turn, each "
                "side in a process of its own; medians; ratios taken round by round",
                columns,
                rows,
            ),
            *(_profile_table(profile) for profile in profiles),
        ),
        bars=Bars(
            "Times PyTorch eager",
            "",
            [(f"{one.load.label}: {one.side.name}", found.speed(one).median) for one in found.measured],
        ),
        data={"model": name, "threads": threads, **found.to_json(), "profiles": list(profiles)},
    )


def _least_speed(rows: Sequence[Mapping[str, Any]], engines: Sequence[str]) -> tuple[float, str]:
    """The side within the bound whose slowest batch is fastest."""
    speeds: dict[str, list[float]] = {}
    for row in rows:
        if row["side"].engine in engines and row["lost"] <= 1 - LEAST_COSINE:
            speeds.setdefault(row["side"].name, []).append(row["speed"])
    return max((min(found), name) for name, found in speeds.items())


def _profile_table(profile: Mapping[str, Any]) -> Table:
    total = sum(profile["ms"].values())
    rows = [
        {"operator": operator, "ms": taken, "share": taken / total}
        for operator, taken in list(profile["ms"].items())[:_MOST_OPERATORS]
    ]
    columns = {"operator": "{operator}", "ms": "{ms:.1f}", "share": "{share:.0%}"}
    title = f"Where the time goes in ONNX Runtime: {profile['form']}, batch {BATCHES[0]}, {total:.0f} ms"
    return table(title, columns, rows)
