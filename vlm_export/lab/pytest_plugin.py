"""A plugin of pytest: `pytest --vlm-export-spec FILE` runs each case of a specification as a test.

It is loaded wherever this project is installed beside pytest, so it imports nothing else before the option is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_GROUP, _SPEC, _UPDATE, _STRICT = "vlm-export", "--vlm-export-spec", "--vlm-export-update", "--vlm-export-strict"
_GIB, _MEMORY = 1 << 30, "--vlm-export-max-memory"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup(_GROUP, "regression tests of ONNX exports")
    group.addoption(_SPEC, action="append", default=[], metavar="FILE", help="run its cases too, repeatable")
    group.addoption(_UPDATE, action="store_true", help="record the states that are found")
    group.addoption(_STRICT, action="store_true", help="fail where an error grew tenfold above its floor")
    group.addoption(_MEMORY, type=float, metavar="GIB", help="most memory that a case may take")


def pytest_configure(config: pytest.Config) -> None:
    for spec in _specs(config):
        if str(spec) not in config.args:
            config.args.append(str(spec))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return _SpecFile.from_parent(parent, path=file_path) if file_path in _specs(parent.config) else None


def _specs(config: pytest.Config) -> list[Path]:
    return [Path(config.invocation_params.dir, name).resolve() for name in config.getoption(_SPEC)]


class _SpecFile(pytest.File):
    """A specification."""

    def collect(self) -> Iterator[pytest.Item]:
        from vlm_export.errors import VlmExportError
        from vlm_export.lab.regress_spec import read_cases

        try:
            cases = read_cases(self.path)
        except VlmExportError as error:
            raise self.CollectError(str(error)) from error
        for case in cases:
            yield _CaseItem.from_parent(self, name=case.name, case=case)


class _Failed(Exception):
    """The case does not pass; the text says why."""


class _CaseItem(pytest.Item):
    """One export."""

    def __init__(self, *, case: Any, **options: Any) -> None:
        super().__init__(**options)
        self._case = case

    def runtest(self) -> None:
        from vlm_export.lab.regress import RegressOptions, run_case

        memory = self.config.getoption(_MEMORY)
        result = run_case(
            self._case,
            RegressOptions(
                update=self.config.getoption(_UPDATE),
                strict=self.config.getoption(_STRICT),
                max_memory_bytes=None if memory is None else int(memory * _GIB),
            ),
        )
        if not result.passed:
            tools = [f"versions: {result.tools}"] if result.tools else []
            raise _Failed("\n".join([*result.failures, *tools]))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, _Failed) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name}: {self.name}"
