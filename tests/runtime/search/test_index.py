"""An index answers as its embeddings do, exactly or with the recall that it states, and nothing damaged is followed."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_export import Match, SearchIndex, build_index, combined_vector, open_index
from vlm_export.errors import EnvironmentFailure, InputError, UsageError
from vlm_export.runtime.bulk.folder import FolderState, embeddings_folder
from vlm_export.runtime.bulk.items import Item
from vlm_export.runtime.inputs.images import FloatArray
from vlm_export.runtime.search import index as searching
from vlm_export.runtime.search.filters import Condition, parsed_condition
from vlm_export.runtime.search.store import EmbeddingsMeta, MoreColumns, write_embeddings
from vlm_export.runtime.tasks.embed import unit_rows

META = EmbeddingsMeta(kind="image", model="tiny", identity="0" * 64)
COLOURS = ("red", "green", "blue")
ROWS, WIDTH = 3000, 17
COLUMNS = {"colour": [COLOURS[row % 3] for row in range(ROWS)], "size": [str(row % 100) for row in range(ROWS)]}
NAMES = ["caf\udce9.png", *(f"{row}.png" for row in range(1, ROWS))]


@pytest.fixture(scope="module")
def vectors() -> FloatArray:
    random = np.random.default_rng(0)
    centres = random.standard_normal((60, WIDTH))
    return unit_rows((centres[np.arange(ROWS) % 60] + random.standard_normal((ROWS, WIDTH))).astype(np.float32))


@pytest.fixture(scope="module")
def file(vectors: FloatArray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings") / "e.npy"
    write_embeddings(path, NAMES, vectors, META, more=MoreColumns(COLUMNS))
    return path


@pytest.fixture(scope="module")
def folder(vectors: FloatArray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings") / "shards"
    state = FolderState(1, META, "npy", 700, tuple(COLUMNS), truncate=False)
    with embeddings_folder(path, state, resume=False, overwrite=False) as opened:
        records = []
        for number, first in enumerate(range(0, ROWS, 700)):
            rows = range(first, min(first + 700, ROWS))
            items = [Item(NAMES[row], columns=(COLUMNS["colour"][row], COLUMNS["size"][row])) for row in rows]
            records.append(opened.write_shard(number, items, vectors[rows.start : rows.stop], {}))
        opened.finish(records)
    return path


@pytest.fixture(scope="module")
def exact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    return build_index(folder, tmp_path_factory.mktemp("exact") / "e.index")


@pytest.fixture(scope="module")
def graph_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "e.index"
    build_index(folder, path, method="graph", threads=1)
    return path


@pytest.fixture(scope="module")
def graph(graph_path: Path) -> SearchIndex:
    return open_index(graph_path)


def queries() -> FloatArray:
    return unit_rows(np.random.default_rng(1).standard_normal((40, WIDTH)).astype(np.float32))


def sorted_matches(vectors: FloatArray, query: FloatArray, k: int, rows: Sequence[int]) -> list[tuple[str, float]]:
    scores = vectors @ query
    best = sorted(rows, key=lambda row: (-scores[row], row))[:k]
    return [(NAMES[row], float(scores[row])) for row in best]


def pairs(matches: Sequence[Match]) -> list[tuple[str, Any]]:
    return [(match.item, pytest.approx(match.score, abs=1e-6)) for match in matches]


def test_an_exact_index_answers_as_a_full_sort(exact: SearchIndex, file: Path, vectors: FloatArray) -> None:
    in_memory = open_index(file)
    assert (len(exact), exact.dimension, exact.graph, exact.columns) == (ROWS, WIDTH, None, ("colour", "size"))
    assert np.array_equal(exact.vectors, vectors)
    for query in queries():
        expected = sorted_matches(vectors, query, 7, range(ROWS))
        assert expected == pairs(exact.search(query, 7)) == pairs(in_memory.search(query, 7))
    assert exact.search(vectors[4], 1)[0].columns == {"colour": "green", "size": "4"}
    assert exact.search(vectors[0], 1)[0].item == NAMES[0]


def test_a_graph_finds_what_it_says(graph: SearchIndex, vectors: FloatArray) -> None:
    assert graph.graph is not None
    assert graph.graph.recall.value >= 0.97
    assert (graph.graph.recall.k, graph.graph.recall.queries, graph.graph.recall.of) == (10, 256, "items")
    found = 0
    for query in queries():
        expected = dict(sorted_matches(vectors, query, 10, range(ROWS)))
        matches = graph.search(query, 10)
        assert [match.score for match in matches] == sorted((match.score for match in matches), reverse=True)
        found += sum(match.item in expected for match in matches)
        # Candidates come from numbers of 8 bits, scores from the vectors themselves.
        assert all(abs(match.score - vectors[NAMES.index(match.item)] @ query) < 1e-6 for match in matches)
    assert found >= 0.95 * 10 * len(queries())


def test_recall_is_measured_with_given_queries(folder: Path, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "texts.npy", [f"text {row}" for row in range(40)], queries(), META)
    built = build_index(folder, tmp_path / "e.index", method="graph", recall=1.0, queries=tmp_path / "texts.npy")
    assert built.graph is not None
    assert (built.graph.recall.of, built.graph.recall.queries) == ("given", 40)
    other = EmbeddingsMeta("text", "other", "1" * 64)
    write_embeddings(tmp_path / "others.npy", ["text"], queries()[:1], other)
    with pytest.raises(InputError, match="another model"):
        build_index(folder, tmp_path / "x.index", queries=tmp_path / "others.npy")


CONDITIONS: dict[str, Callable[[int], bool]] = {
    "colour=red": lambda row: row % 3 == 0,
    "colour=red|blue": lambda row: row % 3 != 1,
    "colour!=red": lambda row: row % 3 != 0,
    "size<7": lambda row: row % 100 < 7,
    "size>=97.5": lambda row: row % 100 >= 97.5,
    "size=5": lambda row: row % 100 == 5,
    "colour = red": lambda row: False,
    "colour>1": lambda row: False,
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_result_meets_the_conditions(
    exact: SearchIndex, graph: SearchIndex, vectors: FloatArray, condition: str
) -> None:
    rows = [row for row in range(ROWS) if CONDITIONS[condition](row)]
    for query in queries()[:5]:
        expected = sorted_matches(vectors, query, 5, rows)
        assert expected == pairs(exact.search(query, 5, where=[condition]))
        assert expected == pairs(graph.search(query, 5, where=[condition]))


def test_conditions_add_up(graph: SearchIndex, vectors: FloatArray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the graph is asked, and where so few of its candidates meet them that all rows are."""
    rows = [row for row in range(ROWS) if row % 3 == 0 and row % 100 < 50]
    where: list[str | Condition] = ["colour=red", Condition("size", "<", ("50",))]
    for limit in (10_000, 10):
        monkeypatch.setattr(searching, "FILTERED_ROWS", limit)
        for k in (3, len(rows) + 5):
            expected = sorted_matches(vectors, vectors[1], k, rows)
            found = graph.search(vectors[1], k, where=where)
            assert len(found) == len(expected)
            assert all(match.item in dict(sorted_matches(vectors, vectors[1], ROWS, rows)) for match in found)
            assert found[0].item == expected[0][0]


@pytest.mark.parametrize("text", ["colour", "=red", "size<red", "size>nan", ""])
def test_what_is_no_condition(exact: SearchIndex, text: str) -> None:
    with pytest.raises(UsageError):
        exact.search(queries()[0], where=[text])


def test_conditions_are_read_from_the_left() -> None:
    assert parsed_condition("a=b<=c|d") == Condition("a", "=", ("b<=c", "d"))
    assert parsed_condition("year>=2020") == Condition("year", ">=", ("2020",))
    with pytest.raises(UsageError, match="operator"):
        Condition("a", "~", ("b",))  # type: ignore[arg-type]


def test_wrong_calls(exact: SearchIndex, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'colour'"):
        exact.search(queries()[0], where=["color=red"])
    with pytest.raises(UsageError, match="k must be"):
        exact.search(queries()[0], 0)
    with pytest.raises(InputError, match="another size"):
        exact.search(queries()[0][:5])
    with pytest.raises(UsageError, match="auto, exact or graph"):
        build_index(folder, tmp_path / "x.index", method="fast")  # type: ignore[arg-type]
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UsageError, match="output exists"):
        build_index(folder, tmp_path / "there")
    write_embeddings(tmp_path / "long.npy", ["a"], 3 * queries()[:1], META)
    with pytest.raises(InputError, match="no unit length"):
        build_index(tmp_path / "long.npy", tmp_path / "x.index")
    write_embeddings(tmp_path / "none.npy", [], queries()[:0], META)
    with pytest.raises(InputError, match="nothing to index"):
        build_index(tmp_path / "none.npy", tmp_path / "x.index")
    with pytest.raises(InputError, match="another model"):
        exact.require_model("1" * 64, "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.npy", "none.npy", "there"]


def test_a_graph_needs_usearch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(EnvironmentFailure, match="usearch") as caught:
        build_index(folder, tmp_path / "x.index", method="graph")
    assert ".[search]" in caught.value.fix
    assert len(build_index(folder, tmp_path / "x.index")) == ROWS


def test_text_and_image_together() -> None:
    text, image = queries()[:2]
    found = combined_vector(text, image)
    assert np.linalg.norm(found) == pytest.approx(1)
    assert found @ text == pytest.approx(found @ image, abs=1e-6)
    assert combined_vector(text, image, 0) @ text == pytest.approx(1)
    assert combined_vector(text, image, 1) @ image == pytest.approx(1)
    with pytest.raises(UsageError, match="cancel out"):
        combined_vector(text, -text)
    with pytest.raises(UsageError, match="share"):
        combined_vector(text, image, 1.5)


@pytest.mark.parametrize("kept", [0, 7, 16, 1000, -1])
def test_a_file_that_is_cut_is_no_index(graph_path: Path, tmp_path: Path, kept: int) -> None:
    (tmp_path / "cut.index").write_bytes(graph_path.read_bytes()[:kept])
    with pytest.raises((InputError, UsageError)):
        open_index(tmp_path / "cut.index")
    with pytest.raises(InputError):
        SearchIndex.mapped(tmp_path / "cut.index")


def test_every_section_is_verified(graph_path: Path, tmp_path: Path) -> None:
    from vlm_export.runtime.search.index_file import IndexFile

    open_index(graph_path).verify()
    for section in IndexFile(graph_path).state.sections.values():
        content = bytearray(graph_path.read_bytes())
        content[section.offset + section.size_bytes // 2] ^= 1
        (tmp_path / "x.index").write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            SearchIndex.mapped(tmp_path / "x.index").verify()


def altered(content: bytes, offset: int, form: str, value: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(form, changed, offset, value)
    return bytes(changed)


def test_a_graph_that_leads_outside_is_not_followed(graph_path: Path, tmp_path: Path) -> None:
    """Every number of a graph that the library would follow, set to what lies outside."""
    content = graph_path.read_bytes()
    head = 8 + ROWS * WIDTH
    levels = head + 64 + 40
    nodes = levels + 2 * ROWS
    tall = int(np.frombuffer(content, "<i2", ROWS, levels).argmax())
    level = np.frombuffer(content, "<i2", ROWS, levels)
    tall_start = nodes + int((142 + 68 * level[:tall].astype(int)).sum())
    low = int(np.flatnonzero(level == 0)[0])
    places = {
        "rows of vectors": (0, "<I", ROWS + 1),
        "columns of vectors": (4, "<I", WIDTH + 1),
        "name": (head, "<B", 0),
        "version": (head + 7, "<H", 3),
        "numbers": (head + 14, "<B", 11),
        "dimensions": (head + 33, "<Q", 2 * WIDTH),
        "nodes": (head + 64, "<Q", ROWS + 1),
        "connectivity": (head + 72, "<Q", 64),
        "connectivity of the base": (head + 80, "<Q", 64),
        "top": (head + 88, "<Q", 9),
        "entry": (head + 96, "<Q", ROWS),
        "listed level": (levels, "<h", 5),
        "negative level": (levels, "<h", -1),
        "key": (nodes, "<Q", ROWS),
        "level of a node": (nodes + 8, "<h", 5),
        "number of neighbours": (nodes + 10, "<I", 33),
        "neighbour": (nodes + 14, "<I", ROWS),
        "number of neighbours above": (tall_start + 142, "<I", 17),
        "neighbour above": (tall_start + 146, "<I", ROWS),
        "neighbour that does not reach": (tall_start + 146, "<I", low),
    }
    for name, (offset, form, value) in places.items():
        (tmp_path / "x.index").write_bytes(altered(content, offset, form, value))
        with pytest.raises(InputError, match="graph of an index is damaged"):
            SearchIndex.mapped(tmp_path / "x.index")
        assert altered(content, offset, form, value) != content, name


_ANSWERS = """
import sys
import numpy as np
from vlm_export.errors import InputError
from vlm_export.runtime.search.index import SearchIndex
content = open(sys.argv[1], "rb").read()
random = np.random.default_rng(0)
start, refused = int(sys.argv[3]), 0
query = np.ones(int(sys.argv[4]), np.float32) / np.sqrt(np.float32(sys.argv[4]))
for _ in range(150):
    changed = bytearray(content)
    for place in random.integers(start, int(sys.argv[5]), 3):
        changed[place] = random.integers(256)
    open(sys.argv[2], "wb").write(changed)
    try:
        SearchIndex.mapped(__import__("pathlib").Path(sys.argv[2])).search(query, 10)
    except InputError:
        refused += 1
print(refused)
"""


def test_random_damage_ends_no_process(graph_path: Path, tmp_path: Path) -> None:
    """Either it is told, or the search goes its way; in a process of its own, which a fault would end."""
    start = 8 + ROWS * WIDTH
    size = graph_path.stat().st_size
    arguments = [graph_path, tmp_path / "x.index", start, WIDTH, size]
    done = subprocess.run([sys.executable, "-c", _ANSWERS, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 150


def test_columns_and_vectors_that_are_damaged(exact: SearchIndex, tmp_path: Path) -> None:
    from vlm_export.runtime.search.index_file import VECTORS, column_codes

    assert exact._file is not None
    content, sections = exact._file.path.read_bytes(), exact._file.state.sections
    (tmp_path / "x.index").write_bytes(altered(content, sections[column_codes(0)].offset, "<I", 3))
    with pytest.raises(InputError, match="column"):
        open_index(tmp_path / "x.index").search(queries()[0], where=["colour=red"])
    with pytest.raises(InputError, match="column"):
        open_index(tmp_path / "x.index").search(exact.vectors[0])
    (tmp_path / "x.index").write_bytes(altered(content, sections[VECTORS].offset, "<I", 0x7FC00000))
    with pytest.raises(InputError, match="NaN"):
        open_index(tmp_path / "x.index").search(queries()[0], ROWS)


def test_it_says_what_it_is(exact: SearchIndex, graph: SearchIndex, file: Path) -> None:
    assert "3000 images by 'tiny', exact" in repr(exact)
    assert "approximate" in repr(graph)
    found: Any = open_index(file)
    assert found.graph is None
