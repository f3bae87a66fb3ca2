"""An index of a million embeddings: how long it takes to build and to open, and how fast and how well it answers.

The vectors are drawn, not embedded. Real embeddings lie in clusters of very different sizes, and vary in few directions
much and in many a little; uniform vectors would have no neighbours worth the name. So each is a coarse centre, a fine
one near it (of sizes as 1/rank) and noise whose variance falls as 1/rank over the directions, in a random rotation, at
unit length. Queries are drawn likewise and are not in the index; a second set lies aside by one offset, as texts lie
beside images in the space of CLIP.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report import MIB, Bars, Report, table
from vlm_export.runtime.bulk.folder import EmbeddingsFolder, FolderState, embeddings_folder, folder_shards, read_folder
from vlm_export.runtime.bulk.indexing import build_index
from vlm_export.runtime.bulk.items import Item
from vlm_export.runtime.search.store import EmbeddingsMeta
from vlm_export.runtime.tasks.embed import unit_rows

GOAL_OPEN_SECONDS, GOAL_QUERY_SECONDS = 0.2, 0.01
K = 10
_SHARD, _COARSE, _FINE_ROWS = 50_000, 64, 250
_NOISE, _FINE_DISTANCE, _OFFSET = 0.7, 0.8, 0.6
_META = EmbeddingsMeta("image", "drawn", "0" * 64)
# Runs in a process of its own that imports only what a search needs.
_CHILD = """
import json, sys, time
import numpy as np
queries = np.load(sys.argv[2])
start = time.perf_counter()
import faiss
from vlm_export.runtime.bulk.indexing import open_index
imported = time.perf_counter()
index = open_index(sys.argv[1])
opened = time.perf_counter()
def answered(where, rounds):
    seconds, scores = [], []
    for query in queries[:rounds]:
        begun = time.perf_counter()
        found = index.search(query, int(sys.argv[3]), where=where)
        seconds.append(time.perf_counter() - begun)
        scores.append([each.score for each in found])
    return {"seconds": seconds, "scores": scores}
result = {"import": imported - start, "open": opened - imported}
for name, where, rounds in json.loads(sys.argv[4]):
    result[name] = answered(where, rounds)
print(json.dumps(result))
"""
_FLAT = """
import json, sys, time
import faiss
import numpy as np
from pathlib import Path
from vlm_export.runtime.bulk.folder import read_folder
faiss.omp_set_num_threads(1)
vectors = read_folder(Path(sys.argv[1]).with_name("embeddings")).vectors
flat = faiss.IndexFlatIP(vectors.shape[1])
flat.add(vectors)
seconds = []
for query in np.load(sys.argv[2])[: int(sys.argv[4])]:
    begun = time.perf_counter()
    flat.search(query[None], int(sys.argv[3]))
    seconds.append(time.perf_counter() - begun)
print(json.dumps({"seconds": seconds}))
"""


class Drawn:
    """The vectors that are drawn: the same for the same seed.

    Args:
        rows: of the index, on which the number of clusters depends.
        dimension: of the vectors.
    """

    def __init__(self, rows: int, dimension: int) -> None:
        rng = np.random.default_rng(0)
        self.dimension = dimension
        coarse = rng.standard_normal((_COARSE, dimension))
        fine = max(rows // _FINE_ROWS, 1)
        near = coarse[rng.integers(0, _COARSE, fine)] + _FINE_DISTANCE * rng.standard_normal((fine, dimension))
        self.centres = unit_rows(near.astype(np.float32))
        shares = 1 / np.arange(1, fine + 1)
        self.shares = shares / shares.sum()
        spread = np.sqrt(1 / np.arange(1, dimension + 1))
        rotation = np.linalg.qr(rng.standard_normal((dimension, dimension)))[0]
        self.noise = (_NOISE * (spread / np.linalg.norm(spread))[:, None] * rotation).astype(np.float32)
        self.offset = unit_rows(rng.standard_normal((1, dimension)).astype(np.float32))

    def vectors(self, count: int, seed: int, *, aside: bool = False) -> npt.NDArray[np.float32]:
        """Float32 (count, D) of unit length."""
        rng = np.random.default_rng(seed)
        found = self.centres[rng.choice(len(self.centres), count, p=self.shares)]
        found = found + rng.standard_normal((count, self.dimension), dtype=np.float32) @ self.noise
        return unit_rows(unit_rows(found) + _OFFSET * self.offset * aside)


def measure(rows: int, dimension: int, queries: int, threads: int | None) -> Report:
    """Draws vectors, builds an index of them, and asks it in processes of their own."""
    drawn = Drawn(rows, dimension)
    with TemporaryDirectory() as name:
        folder = Path(name)
        print(f"drawing {rows} vectors", file=sys.stderr)
        _write(folder / "embeddings", drawn, rows)
        begun = time.perf_counter()
        index = build_index(
            folder / "embeddings", folder / "index", method="approximate", threads=threads, progress=_shown
        )
        build = time.perf_counter() - begun
        assert index.lists is not None
        sizes = {"index": (folder / "index").stat().st_size, "vectors": 4 * rows * dimension}
        kinds = {"drawn": drawn.vectors(queries, 1), "aside": drawn.vectors(queries, 2, aside=True)}
        sides: dict[str, Any] = {}
        for kind, asked in kinds.items():
            np.save(folder / "queries.npy", asked)
            found = _child(folder, _CHILD, json.dumps(_questions(queries)))
            exact = _kth_scores(folder / "embeddings", asked)
            scores = np.array(found["all"]["scores"])
            recall = float((scores >= exact[:, None] - 1e-6).mean())
            sides[kind] = {**found, "recall": recall}
            for answers in found.values():
                if isinstance(answers, dict):
                    del answers["scores"]
        few = min(queries, 20)
        flat = _child(folder, _FLAT, str(few))
        brute = _brute_force(folder / "embeddings", kinds["drawn"][:few])
        record = index.lists.to_json()
    return _report(rows, dimension, build, sizes, record, sides, {"numpy": brute, "faiss flat": flat})


def _questions(queries: int) -> list[tuple[str, list[str], int]]:
    """Name, conditions, and how many queries: of filters that leave 1 % and 50 % of the rows."""
    return [("all", [], queries), ("1 %", ["hundredth=7"], min(queries, 50)), ("50 %", ["half=0"], min(queries, 50))]


def _write(path: Path, drawn: Drawn, rows: int) -> None:
    columns = ("hundredth", "half")
    state = FolderState(1, _META, "npy", _SHARD, columns, truncate=False)
    with embeddings_folder(path, state, resume=False, overwrite=False) as folder:
        folder.finish(list(_shards(folder, drawn, rows)))


def _shards(folder: EmbeddingsFolder, drawn: Drawn, rows: int) -> Iterator[Any]:
    for number, first in enumerate(range(0, rows, _SHARD)):
        numbers = range(first, min(first + _SHARD, rows))
        items = [Item(f"{row:08d}.jpg", columns=(str(row * 7919 % 100), str(row % 2))) for row in numbers]
        yield folder.write_shard(number, items, drawn.vectors(len(items), 1000 + number), {})


def _shown(done: int, total: int) -> None:
    print(f"{done} of {total} vectors", file=sys.stderr)


def _child(folder: Path, program: str, argument: str) -> dict[str, Any]:
    command = [sys.executable, "-c", program, str(folder / "index"), str(folder / "queries.npy"), str(K), argument]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the measured process ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _kth_scores(embeddings: Path, queries: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    best = np.empty((len(queries), 0), np.float32)
    for shard in folder_shards(embeddings)[1]():
        best = np.concatenate([best, queries @ shard.vectors.T], axis=1)
        best = np.partition(best, best.shape[1] - K, axis=1)[:, -K:]
    worst: npt.NDArray[np.float32] = best.min(axis=1)
    return worst


def _brute_force(embeddings: Path, queries: npt.NDArray[np.float32]) -> dict[str, Any]:
    vectors, seconds = read_folder(embeddings).vectors, []
    for query in queries:
        begun = time.perf_counter()
        scores = vectors @ query
        np.argpartition(scores, len(scores) - K)[-K:]
        seconds.append(time.perf_counter() - begun)
    return {"seconds": seconds}


def _report(
    rows: int,
    dimension: int,
    build: float,
    sizes: dict[str, int],
    record: dict[str, Any],
    sides: dict[str, Any],
    others: dict[str, Any],
) -> Report:
    drawn = sides["drawn"]
    latencies = [
        ("index", drawn["all"]["seconds"]),
        ("index, queries aside", sides["aside"]["all"]["seconds"]),
        ("index, 1 % by --where", drawn["1 %"]["seconds"]),
        ("index, 50 % by --where", drawn["50 %"]["seconds"]),
        *((f"{name}, all vectors", found["seconds"]) for name, found in others.items()),
    ]
    timed: list[dict[str, Any]] = [
        {"side": side, "median": 1000 * float(np.median(found)), "p95": 1000 * float(np.percentile(found, 95))}
        for side, found in latencies
    ]
    median = 1000 * float(np.median(latencies[0][1]))
    opened = max(float(side["open"]) for side in sides.values())
    facts: list[dict[str, Any]] = [
        {"fact": "building, s", "value": build},
        {"fact": "index, MiB", "value": sizes["index"] / MIB},
        {"fact": "of which vectors, MiB", "value": sizes["vectors"] / MIB},
        {"fact": "opening in a fresh process, s", "value": opened},
        {"fact": "importing vlm_export and faiss, s", "value": max(side["import"] for side in sides.values())},
        {"fact": f"recall@{K}, queries drawn alike", "value": drawn["recall"]},
        {"fact": f"recall@{K}, queries aside", "value": sides["aside"]["recall"]},
        {"fact": f"recall@{K} that the index states", "value": record["recall"]["value"]},
        {"fact": "lists", "value": record["count"]},
        {"fact": "lists that a search compares", "value": record["probes"]},
    ]
    return Report(
        title=f"An index of {rows:,} x {dimension}",
        goal=f"opened in at most {GOAL_OPEN_SECONDS} s and answered in at most {1000 * GOAL_QUERY_SECONDS:.0f} ms.",
        reached=opened <= GOAL_OPEN_SECONDS and median <= 1000 * GOAL_QUERY_SECONDS,
        conclusion=f"{opened:.3f} s and {median:.2f} ms, with recall@{K} {drawn['recall']:.3f}.",
        tables=(
            table(
                "The index, of vectors drawn in clusters, in the page cache",
                {"": "{fact}", "value": "{value:.4g}"},
                facts,
            ),
            table(
                f"Milliseconds of one query, its {K} nearest, in one thread",
                {"": "{side}", "median": "{median:.2f}", "95th percentile": "{p95:.2f}"},
                timed,
            ),
        ),
        bars=Bars("A query, median", "ms", [(row["side"], row["median"]) for row in timed]),
        data={"rows": rows, "dimension": dimension, "build_s": build, "sizes": sizes, "lists": record}
        | {"sides": sides, "others": others},
    )
