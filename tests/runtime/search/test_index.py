"""An index answers as its embeddings do, exactly or with the recall that it states, and nothing damaged is followed."""

from __future__ import annotations

import json
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
def lists_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lists") / "e.index"
    build_index(folder, path, method="approximate", threads=1)
    return path


@pytest.fixture(scope="module")
def approximate(lists_path: Path) -> SearchIndex:
    return open_index(lists_path)


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
    assert (len(exact), exact.dimension, exact.lists, exact.columns) == (ROWS, WIDTH, None, ("colour", "size"))
    for query in queries():
        expected = sorted_matches(vectors, query, 7, range(ROWS))
        assert expected == pairs(exact.search(query, 7)) == pairs(in_memory.search(query, 7))
    assert exact.search(vectors[4], 1)[0].columns == {"colour": "green", "size": "4"}
    assert exact.search(vectors[0], 1)[0].item == NAMES[0]


def test_an_approximate_index_finds_what_it_says(approximate: SearchIndex, vectors: FloatArray) -> None:
    lists = approximate.lists
    assert lists is not None
    assert 1 <= lists.probes < lists.count
    assert lists.recall.value >= 0.97
    assert (lists.recall.k, lists.recall.queries, lists.recall.of) == (10, 256, "items")
    found, rows = 0, {name: row for row, name in enumerate(NAMES)}
    for query in vectors[:200:5]:
        expected = dict(sorted_matches(vectors, query, 10, range(ROWS)))
        matches = approximate.search(query, 10)
        assert [match.score for match in matches] == sorted((match.score for match in matches), reverse=True)
        found += sum(match.item in expected for match in matches)
        assert all(abs(match.score - vectors[rows[match.item]] @ query) < 1e-6 for match in matches)
    assert found >= 0.95 * 10 * 40


def test_recall_is_measured_with_given_queries(folder: Path, tmp_path: Path, vectors: FloatArray) -> None:
    """A search then compares as many lists as these need, all of them for a recall of 1 of what lies anywhere."""
    write_embeddings(tmp_path / "texts.npy", [f"text {row}" for row in range(40)], queries(), META)
    calls = list[tuple[int, int]]()
    built = build_index(
        folder,
        tmp_path / "e.index",
        method="approximate",
        recall=1.0,
        queries=tmp_path / "texts.npy",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert built.lists is not None
    assert (built.lists.recall.of, built.lists.recall.queries, built.lists.recall.value) == ("given", 40, 1.0)
    for query in queries():
        assert sorted_matches(vectors, query, 10, range(ROWS)) == pairs(built.search(query, 10))
    assert calls[-1] == (3 * ROWS, 3 * ROWS)
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
    exact: SearchIndex, approximate: SearchIndex, vectors: FloatArray, condition: str
) -> None:
    rows = [row for row in range(ROWS) if CONDITIONS[condition](row)]
    for query in queries()[:5]:
        assert sorted_matches(vectors, query, 5, rows) == pairs(exact.search(query, 5, where=[condition]))
        found = approximate.search(query, 5, where=[condition])
        assert {match.item for match in found} <= {NAMES[row] for row in rows}
        assert len(found) == min(5, len(rows))


def test_the_fewer_meet_the_conditions_the_more_lists_are_compared(
    exact: SearchIndex, approximate: SearchIndex, vectors: FloatArray
) -> None:
    """All of them where few do: also where what meets them lies far from the query."""
    where: list[str | Condition] = ["colour=red", Condition("size", "<", ("2",))]
    for query in queries():
        expected = pairs(exact.search(query, 7, where=where))
        assert [(match.item, match.score) for match in approximate.search(query, 7, where=where)] == expected
    # More than the nearest lists hold.
    assert len(approximate.search(vectors[0], ROWS - 5)) == ROWS - 5
    assert len(approximate.search(vectors[0], ROWS + 5)) == ROWS
    assert approximate.search(vectors[0], 3, where=["colour=none"]) == []


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
    with pytest.raises(UsageError, match="auto, exact or approximate"):
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


def test_an_approximate_index_needs_faiss(
    folder: Path, lists_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    calls: list[Callable[[], SearchIndex]] = [
        lambda: build_index(folder, tmp_path / "x.index", method="approximate"),
        lambda: open_index(lists_path),
    ]
    for call in calls:
        with pytest.raises(EnvironmentFailure, match="faiss") as caught:
            call()
        assert ".[search]" in caught.value.fix
    assert not list(tmp_path.iterdir())
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
def test_a_file_that_is_cut_is_no_index(lists_path: Path, tmp_path: Path, kept: int) -> None:
    (tmp_path / "cut.index").write_bytes(lists_path.read_bytes()[:kept])
    with pytest.raises((InputError, UsageError)):
        open_index(tmp_path / "cut.index")
    with pytest.raises(InputError):
        SearchIndex.mapped(tmp_path / "cut.index")


def test_every_section_is_verified(lists_path: Path, tmp_path: Path) -> None:
    from vlm_export.runtime.search.index_file import IndexFile

    open_index(lists_path).verify()
    for section in IndexFile(lists_path).state.sections.values():
        content = bytearray(lists_path.read_bytes())
        content[section.offset + section.size_bytes // 2] ^= 1
        (tmp_path / "x.index").write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            SearchIndex.mapped(tmp_path / "x.index").verify()


def altered(content: bytes, offset: int, form: str, value: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(form, changed, offset, value)
    return bytes(changed)


def test_lists_that_lead_outside_are_not_followed(lists_path: Path, tmp_path: Path) -> None:
    """Each number around the vectors, changed: as faiss writes them, in the order in which it reads them."""
    from vlm_export.runtime.search.index_file import IndexFile

    content, state = lists_path.read_bytes(), IndexFile(lists_path).state
    assert state.lists is not None
    count, centres = state.lists.count, 37 + 16
    after = centres + 37 + 8 + 4 * count * WIDTH
    sizes = after + 9 + 32
    places = {
        **{
            "kind": (0, "<I"),
            "dimension": (4, "<i"),
            "rows": (8, "<q"),
            "is trained": (32, "<B"),
            "metric": (33, "<i"),
        },
        **{"lists": (37, "<Q"), "kind of centres": (centres, "<I"), "dimension of centres": (centres + 4, "<i")},
        **{"number of centres": (centres + 8, "<q"), "size of centres": (centres + 37, "<Q")},
        **{"map": (after, "<B"), "size of map": (after + 1, "<Q"), "kind of lists": (after + 9, "<I")},
        **{"number of lists": (after + 13, "<Q"), "bytes of a vector": (after + 21, "<Q"), "form": (after + 29, "<I")},
        **{
            "number of sizes": (after + 33, "<Q"),
            "size of a list": (sizes, "<Q"),
            "of the last": (sizes + 8 * count - 8, "<Q"),
        },
    }
    for name, (offset, form) in places.items():
        (value,) = struct.unpack_from(form, content, offset)
        for other in {value + 1, max(value - 1, 0), 2 ** (8 * struct.calcsize(form) - 1) - 1} - {value}:
            (tmp_path / "x.index").write_bytes(altered(content, offset, form, other))
            with pytest.raises(InputError, match="lists of an index are damaged"):
                open_index(tmp_path / "x.index")
        assert content[offset] is not None, name
    # Sizes that make the right sum in 64 bits.
    sum_kept = altered(altered(content, sizes, "<Q", 2**63), sizes + 8, "<Q", 2**63)
    (tmp_path / "x.index").write_bytes(sum_kept)
    with pytest.raises(InputError, match="lists of an index are damaged"):
        open_index(tmp_path / "x.index")


def test_lists_begin_the_file(lists_path: Path, tmp_path: Path) -> None:
    """Where faiss reads them: what is checked elsewhere in the file would be something else."""
    content = lists_path.read_bytes()
    (length,) = struct.unpack_from("<Q", content, len(content) - 16)
    state = json.loads(content[-16 - length : -16])
    for section in state["sections"].values():
        section["offset"] += 64
    moved = json.dumps(state).encode()
    tail = struct.pack("<Q", len(moved)) + content[-8:]
    (tmp_path / "x.index").write_bytes(bytes(64) + content[: -16 - length] + moved + tail)
    with pytest.raises(InputError, match="index is damaged") as caught:
        open_index(tmp_path / "x.index")
    assert "begin the file" in caught.value.got


def test_row_numbers_that_are_none_are_told(lists_path: Path, tmp_path: Path, vectors: FloatArray) -> None:
    from vlm_export.runtime.search.index_file import LISTS, IndexFile

    section, content = IndexFile(lists_path).state.sections[LISTS], lists_path.read_bytes()
    for value in (ROWS, -2, 2**62):
        # The last row number of the last list.
        (tmp_path / "x.index").write_bytes(altered(content, section.size_bytes - 8, "<q", value))
        with pytest.raises(InputError, match="row number"):
            open_index(tmp_path / "x.index").search(vectors[0], ROWS)


_ANSWERS = """
import sys
from pathlib import Path
import numpy as np
from vlm_export.errors import InputError
from vlm_export.runtime.search.index import SearchIndex
content = open(sys.argv[1], "rb").read()
random = np.random.default_rng(0)
refused, width = 0, int(sys.argv[3])
query = np.ones(width, np.float32) / np.sqrt(np.float32(width))
for number in range(300):
    changed = bytearray(content)
    # Every second time around the vectors, where what is followed stands.
    for place in random.integers(0, 40_000 if number % 2 else len(content), 3):
        changed[place] = random.integers(256)
    open(sys.argv[2], "wb").write(changed)
    try:
        SearchIndex.mapped(Path(sys.argv[2])).search(query, 10)
    except InputError:
        refused += 1
print(refused)
"""


def test_random_damage_ends_no_process(lists_path: Path, tmp_path: Path) -> None:
    """Either it is told, or the search goes its way; in a process of its own, which a fault would end."""
    arguments = [lists_path, tmp_path / "x.index", WIDTH]
    done = subprocess.run([sys.executable, "-c", _ANSWERS, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 300


def test_columns_and_vectors_that_are_damaged(exact: SearchIndex, vectors: FloatArray, tmp_path: Path) -> None:
    from vlm_export.runtime.search.index_file import VECTORS, column_codes

    assert exact._file is not None
    content, sections = exact._file.path.read_bytes(), exact._file.state.sections
    (tmp_path / "x.index").write_bytes(altered(content, sections[column_codes(0)].offset, "<I", 3))
    with pytest.raises(InputError, match="column"):
        open_index(tmp_path / "x.index").search(queries()[0], where=["colour=red"])
    with pytest.raises(InputError, match="column"):
        open_index(tmp_path / "x.index").search(vectors[0])
    (tmp_path / "x.index").write_bytes(altered(content, sections[VECTORS].offset, "<I", 0x7FC00000))
    with pytest.raises(InputError, match="NaN"):
        open_index(tmp_path / "x.index").search(queries()[0], ROWS)


def test_it_says_what_it_is(exact: SearchIndex, approximate: SearchIndex, file: Path) -> None:
    assert "3000 images by 'tiny', exact" in repr(exact)
    assert "approximate" in repr(approximate)
    assert open_index(file).lists is None
