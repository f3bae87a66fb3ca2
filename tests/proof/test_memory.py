"""What the system says about its memory, and which weights stay in their file."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_export.proof import engine

GIB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /proc/meminfo and the control group: 8 GiB available, no group."""
    (tmp_path / "meminfo").write_text(f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable:    {8 * GIB // 1024} kB\n")
    monkeypatch.setattr(engine, "_SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(engine, "_GROUP", tmp_path)
    return tmp_path


def limit_group(folder: Path, limit: str, used: int, cached: int) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\n")


def test_the_system_tells(system: Path) -> None:
    assert engine.available_bytes() == 8 * GIB


def test_a_control_group_allows_less(system: Path) -> None:
    limit_group(system, str(4 * GIB), used=3 * GIB, cached=2 * GIB)
    assert engine.available_bytes() == 3 * GIB
    limit_group(system, str(100 * GIB), used=3 * GIB, cached=2 * GIB)
    assert engine.available_bytes() == 8 * GIB
    limit_group(system, "max", used=3 * GIB, cached=2 * GIB)
    assert engine.available_bytes() == 8 * GIB


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable: much\n", "no colon"])
def test_a_system_that_does_not_tell(system: Path, text: str) -> None:
    (system / "meminfo").write_text(text)
    assert engine.available_bytes() is None
    (system / "meminfo").unlink()
    assert engine.available_bytes() is None
    assert not engine.keeps_weights_mapped(GIB)
    assert engine.keeps_weights_mapped(5 * GIB)


def test_weights_stay_mapped_when_large_or_when_memory_is_short(system: Path) -> None:
    assert not engine.keeps_weights_mapped(3 * GIB)
    assert engine.keeps_weights_mapped(7 * GIB // 2)
    (system / "meminfo").write_text(f"MemAvailable: {100 * GIB // 1024} kB\n")
    assert not engine.keeps_weights_mapped(4 * GIB)
    assert engine.keeps_weights_mapped(4 * GIB + 1)
