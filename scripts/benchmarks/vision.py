"""What makes a vision transformer fast on this machine: a bundle's variants in each engine against PyTorch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.measuring import bundle_or_random
from benchmarks.report import MIB, Bars, Report, Table, table
from vlm_export.bundle.opened import open_bundle
from vlm_export.lab.bench import bench
from vlm_export.lab.bench_plan import TORCH, TORCH_FORMS, BenchOptions, Side
from vlm_export.lab.bench_result import BenchResult
from vlm_export.quantizing.pipeline import quantize

GOAL_RATIO, GOAL_ORT_RATIO, LEAST_COSINE = 6.0, 3.5, 0.999
BATCHES = (4, 16)
# Each with the bundle's variants, which `quantize` makes; bfloat16 only on processors that have it.
VARIANTS = ("int8", "int8-static", "w8a16")
SIDES = (
    ("onnxruntime", ("fp32", *VARIANTS)),
    ("openvino", ("fp32", "int8-static", "bf16", "int8-static+bf16")),
)
_MOST_OPERATORS = 8


def measure(name: str, bundle: Path | None, rounds: int, threads: int, graphs: Sequence[Path]) -> Report:
    """Every side in turn; graphs: further ones for OpenVINO in bfloat16, such as NNCF writes."""
    with bundle_or_random(name, bundle) as exported, TemporaryDirectory() as folder:
        directory = _quantised(exported, Path(folder) / "bundle")
        sides = [Side(TORCH, form, threads) for form in TORCH_FORMS]
        sides += [Side(engine, precision, threads) for engine, precisions in SIDES for precision in precisions]
        sides += [Side("openvino", f"{path.stem}+bf16", threads, str(path)) for path in graphs]
        options = BenchOptions(parts=["vision"], batches=BATCHES, rounds=rounds, against=name)
        found = bench(directory, options, sides=sides, progress=lambda what, *_: print(what))
        opened = open_bundle(directory)
        variants = opened.manifest.part("vision").variants
        profiles = [_profile(one.precision, opened.model_files(one), threads) for one in variants]
    return report_from_result(name, found, profiles, threads)


def _quantised(bundle: Path, target: Path) -> Path:
    """A copy with the variants; the bundle's own of the same names are made again."""
    for number, precision in enumerate(VARIANTS):
        print(f"quantize to {precision}")
        quantize(target if number else bundle, precision, parts=["vision"], output=None if number else target)
    return target


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
            *([table("Left out", {"side": "{why}"}, [{"why": why} for why in found.not_run])] if found.not_run else []),
        ),
        bars=Bars(
            "Times PyTorch eager",
            "",
            [(f"{one.load.label}: {one.side.name}", found.speed(one).median) for one in found.measured],
        ),
        data={"model": name, "threads": threads, **_without_paths(found.to_json()), "profiles": list(profiles)},
    )


def _without_paths(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a bench found, without what says where its bundle lay."""
    kept = {key: value for key, value in data.items() if key != "bundle"}
    if isinstance(kept.get("recommended"), Mapping):
        kept["recommended"] = {k: v for k, v in kept["recommended"].items() if k not in ("call", "command")}
    return kept


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
