"""The proof sees every planted fault: in bundles by the record alone and with the original, in float16 graphs by the
ledger or in float32."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from faults.half import HalfVerdict, part_graphs
from faults.half import verdicts as half_verdicts
from faults.plant import FAULTS, Fault
from planted_faults import PAGE, Proved, Verdict, check, half_row, proved, row, verdict

import vlm_export
from vlm_export.bundle.opened import open_bundle
from vlm_export.proof.contract_record import read_record


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proved]:
    with proved(tmp_path_factory.mktemp("planted")) as found:
        yield found


@pytest.fixture(scope="module")
def verdicts(at: Proved, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Fault, Verdict]]:
    folder = tmp_path_factory.mktemp("copies")
    return {fault.name: (fault, verdict(fault, at, folder)) for fault in FAULTS}


def test_the_right_bundle_passes(at: Proved) -> None:
    assert check(at.bundle, at) == Verdict(None, None)


def test_every_fault_fails_and_its_file_or_stage_is_named(verdicts: dict[str, tuple[Fault, Verdict]]) -> None:
    assert len(FAULTS) >= 20
    for name, (fault, found) in verdicts.items():
        for error in (found.record, found.original):
            assert error is not None, f"{name} is not seen"
            assert fault.named in f"{error.what}, {error.where}, {error.got}", f"{name}: {error}"
            assert error.exit_status in (1, 3)


def test_the_page_shows_these_faults(verdicts: dict[str, tuple[Fault, Verdict]]) -> None:
    rows = [row(fault, found) for fault, found in verdicts.values()]
    assert _shown(0) == [_without_numbers(line) for line in rows]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[HalfVerdict]:
    with part_graphs(tmp_path_factory.mktemp("half")) as parts:
        return list(half_verdicts(parts))


def test_faults_of_float16_graphs_fail_in_every_part_and_layer(halves: list[HalfVerdict]) -> None:
    right = [found for found in halves if found.fault is None]
    planted = [found for found in halves if found.fault is not None]
    assert len(right) == 2
    for found in right:
        assert found.found_by == ""
        assert found.rounded.passed
        assert found.unrounded.share < 0.5
    assert len({(found.part, found.layer) for found in planted}) == 8
    for found in planted:
        assert found.found_by, f"{found.fault} in the {found.layer} layer of {found.part} is not seen"
        if found.found_by == "float32":
            # Far outside what any right graph shows.
            assert found.unrounded.share > 50


def test_the_page_shows_the_float16_graphs(halves: list[HalfVerdict]) -> None:
    assert _shown(1) == [_without_numbers(half_row(found)) for found in halves]


def _shown(table: int) -> list[str]:
    """The rows of a table of the page, without numbers."""
    tables = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [_without_numbers(line) for line in tables[table].splitlines(keepends=True)[2:]]


def _without_numbers(line: str) -> str:
    """Without the message's numbers, which differ from machine to machine."""
    return re.sub(r"[-0-9.e]+", "0", line)


def test_the_record_is_small_and_is_what_load_gives(at: Proved) -> None:
    bundle = open_bundle(at.bundle)
    record = read_record(bundle)
    assert record is not None
    assert not record.not_run
    size = sum(f.size_bytes for name, f in bundle.manifest.files.items() if name.startswith("golden/contract/"))
    assert size < 300_000
    model = vlm_export.load(at.bundle)
    images = model.encode_image([at.bundle / image.file for image in record.images])
    texts = model.encode_text([text.text for text in record.texts], truncate=True)
    for got, expected in (
        (images, record.vectors["vision"]["image_embeds"]),
        (texts, record.vectors["text"]["text_embeds"]),
    ):
        unit = expected / (expected**2).sum(axis=1, keepdims=True) ** 0.5
        assert (got * unit).sum(axis=1).min() > 0.99999
        assert abs(got - unit).max() < 1e-5


def test_the_page_has_many_faults_of_modules_and_bisect_names_each() -> None:
    """The faults are planted by the script; `tests/lab/test_bisect.py` plants others in every run."""
    table = PAGE.read_text(encoding="utf-8").partition("## Modules that `bisect` names")[2]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert len({row[0] for row in rows}) >= 24
    assert {row[1] for row in rows} == {"CLIP", "SigLIP 2", "BLIP", "MiniCPM-V", "nanoVLM"}
    assert [row for row in rows if row[2] != row[3] or row[-1] != "yes"] == []
