"""Regression tests: exports compared with their recorded state, and bundles verified again on another runtime.

Each case runs in a process of its own, one after the other. A case that fails, crashes or takes too much memory is
told, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml

from vlm_export.bundle.environment import environment_errors
from vlm_export.bundle.safe_files import check_path
from vlm_export.bundle.staging import staged_file
from vlm_export.errors import UsageError, VerificationError, VlmExportError, suggestion
from vlm_export.graph.core.plain_yaml import read_yaml
from vlm_export.lab.differences import SECTIONS
from vlm_export.lab.figures import Figure, compare_figures
from vlm_export.lab.regress_process import Progress, run_job
from vlm_export.lab.regress_spec import Case, read_cases
from vlm_export.lab.regress_state import State, compare_states, read_state, tool_changes
from vlm_export.specs.codec import Spec

_RUN, _STATE, _FIGURES = "export and verification", "recorded state", "figures"
_BUNDLE_RUN = "verification"
_RECORD = "look at what differs; if it is meant, record it with --update and commit what that writes"


@dataclass(frozen=True)
class RegressOptions:
    """What the user may choose.

    Attributes:
        update: record what is found.
        strict: an error that grew tenfold and is above its floor fails, also where no tolerance says so.
        max_memory_bytes: anonymous memory of one case; None for no bound.
        threads: of the engine that verifies bundles; None for its default.
    """

    update: bool = False
    strict: bool = False
    max_memory_bytes: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Check:
    """One thing that was checked; `failures` has a sentence for each that does not hold."""

    name: str
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaseResult:
    """One case.

    Attributes:
        checks: "export and verification", then one for each kind of difference, and "figures".
        figures: each then and now.
        tools: versions that are others than the recorded ones, "" where none is.
        peak_bytes: of anonymous memory; None outside Linux.
        changes: what `update` recorded anew, one sentence each.
    """

    name: str
    checks: tuple[Check, ...]
    seconds: float
    peak_bytes: int | None
    figures: tuple[Figure, ...] = ()
    tools: str = ""
    changes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not any(check.failures for check in self.checks)

    @property
    def failures(self) -> tuple[str, ...]:
        """Every failure, with its kind in front."""
        return tuple(f"{check.name}: {failure}" for check in self.checks for failure in check.failures)

    def to_json(self) -> dict[str, Any]:
        """What `regress --json` prints of a case."""
        return {
            "name": self.name,
            "passed": self.passed,
            "checks": [{"name": check.name, "failures": list(check.failures)} for check in self.checks],
            "figures": [figure.to_json() for figure in self.figures],
            "tools": self.tools,
            "changes": list(self.changes),
            "seconds": round(self.seconds, 3),
            "peak_anonymous_bytes": self.peak_bytes,
        }


Told = Callable[[CaseResult], None]
"""Called with each case that has ended."""


def regress(
    spec: str | Path,
    options: RegressOptions = RegressOptions(),
    *,
    names: Sequence[str] = (),
    progress: Progress | None = None,
    told: Told = lambda result: None,
) -> tuple[CaseResult, ...]:
    """Exports every case of a specification, verifies it, and compares it with its recorded state.

    Args:
        spec: the YAML file; states lie beside it, `states/NAME.yaml`.
        names: only these cases; none for all.

    Raises:
        UsageError: a bad specification, an unknown option, or no case of that name.
        InputError: a field of the specification is unknown, missing or of another type.
        EnvironmentFailure: a missing package.
    """
    check_path(spec, "a specification")
    cases = read_cases(Path(spec))
    known = [case.name for case in cases]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no case {name!r}", where=str(spec), fix=suggestion(name, known))
    chosen = [case for case in cases if not names or case.name in names]
    error = run_job({"kind": "check", "options": [case.options for case in chosen]}).error
    if error is not None:
        error.where = error.where or str(spec)
        raise error
    return _each(chosen, lambda case: run_case(case, options, progress), told)


def run_case(case: Case, options: RegressOptions, progress: Progress | None = None) -> CaseResult:
    """Exports one case into a directory that is removed again."""
    start = time.perf_counter()
    with TemporaryDirectory(prefix="vlm-export-") as folder:
        job = {"kind": "export", "name": case.name, "source": case.source, "options": dict(case.options)}
        job |= {"folder": folder, "tolerances": dict(case.tolerances)}
        answer = run_job(job, max_memory_bytes=options.max_memory_bytes, progress=progress)
    took = time.perf_counter() - start
    if answer.error is not None:
        return CaseResult(case.name, (Check(_RUN, (str(answer.error),)),), took, answer.peak_bytes)
    now = State.from_json(answer.result, case.name)
    checks, figures, tools = _compared(case, now, options)
    changes = list[str]()
    if options.update:
        changes = [f"{check.name}: {failure}" for check in checks for failure in check.failures]
        changes = changes if case.state.exists() else [f"{_STATE}: {case.state} is new"]
        with environment_errors("recording the state", case.state.parent):
            case.state.parent.mkdir(exist_ok=True)
        _record(case.state, now.to_text())
        checks = [Check(check.name) for check in checks]
    found = (Check(_RUN), *checks)
    return CaseResult(case.name, found, took, answer.peak_bytes, figures, tools, tuple(changes))


def _compared(case: Case, now: State, options: RegressOptions) -> tuple[list[Check], tuple[Figure, ...], str]:
    if not case.state.exists():
        missing = f"{case.state}: nothing is recorded; look at what --update writes there, and commit it"
        return [Check(_STATE, (missing,))], (), ""
    try:
        then = read_state(case.state)
    except VlmExportError as error:
        return [Check(_STATE, (str(error),))], (), ""
    differences = compare_states(then, now)
    figures = compare_figures(then.figures, now.figures, case.tolerances, strict=options.strict, complete=True)
    kinds = [kind for kind in SECTIONS if kind in then.sections or kind in now.sections]
    checks = [Check(kind, tuple(str(one) for one in differences if one.section == kind)) for kind in kinds]
    failures = tuple(figure.failure for figure in figures if figure.failure)
    return [*checks, Check(_FIGURES, failures)], figures, tool_changes(then, now)


@dataclass(frozen=True)
class Baseline(Spec):
    """Figures of bundles as a runtime gave them: directory as it was named → figure → number."""

    schema: Literal[1] = 1
    bundles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def regress_bundles(
    bundles: Sequence[str],
    options: RegressOptions = RegressOptions(),
    *,
    baseline: Path | None = None,
    told: Told = lambda result: None,
) -> tuple[CaseResult, ...]:
    """Verifies bundles by their own records, without torch, and compares the figures.

    Args:
        baseline: a file with the figures of another run; None for those that each export recorded, of more inputs. With
            `options.update` it is written.

    Raises:
        UsageError: an update without a baseline, or a baseline that is none, or has no figures of a bundle.
    """
    if options.update and baseline is None:
        raise UsageError(
            "an update of bundles writes a baseline", got="no baseline", fix="name its file: --baseline FILE"
        )
    known = Baseline()
    if baseline is not None and not options.update:
        if not baseline.exists():
            fix = f"record it with the old runtime: --baseline {baseline} --update"
            raise UsageError("there is no baseline", where=str(baseline), fix=fix)
        known = Baseline.from_config(read_yaml(baseline, "the baseline"), str(baseline))
        for bundle in bundles:
            if bundle not in known.bundles:
                raise UsageError(
                    "the baseline has no figures of a bundle",
                    where=str(baseline),
                    expected=", ".join(known.bundles) or "figures",
                    got=bundle,
                    fix="name the bundle as it was named then, or record it: --update",
                )
    found = dict[str, Mapping[str, float]]()

    def run(bundle: str) -> CaseResult:
        result, found[bundle] = _run_bundle(bundle, known.bundles.get(bundle), options)
        return result

    results = _each(bundles, run, told)
    # Of a bundle that does not hold there are no figures to compare others with.
    if options.update and baseline is not None and all(result.passed for result in results):
        data = Baseline(1, found).to_json()
        _record(baseline, yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000))
    return results


def _record(path: Path, text: str) -> None:
    """Writes all of a file, or leaves what is there."""
    with staged_file(path, "recording", overwrite=True, wait=True) as staged:
        staged.write_text(text, encoding="utf-8")


def _run_bundle(
    bundle: str, then: Mapping[str, float] | None, options: RegressOptions
) -> tuple[CaseResult, Mapping[str, float]]:
    start = time.perf_counter()
    job = {"kind": "verify", "bundle": bundle, "threads": options.threads}
    answer = run_job(job, max_memory_bytes=options.max_memory_bytes)
    took = time.perf_counter() - start
    if answer.error is not None:
        return CaseResult(bundle, (Check(_BUNDLE_RUN, (str(answer.error),)),), took, answer.peak_bytes), {}
    result = answer.result
    recorded = result["then"] if then is None else then
    figures = compare_figures(recorded, result["now"], {}, strict=options.strict, complete=then is not None)
    failures = tuple(figure.failure for figure in figures if figure.failure)
    checks = (Check(_BUNDLE_RUN, (result["failure"],) if result["failure"] else ()), Check(_FIGURES, failures))
    return CaseResult(bundle, checks, took, answer.peak_bytes, figures, result["tools"]), result["now"]


def _each(cases: Sequence[Any], run: Callable[[Any], CaseResult], told: Told) -> tuple[CaseResult, ...]:
    results = []
    for case in cases:
        results.append(run(case))
        told(results[-1])
    return tuple(results)


def raise_if_failed(results: Sequence[CaseResult]) -> None:
    """VerificationError that names the first failure."""
    failed = [result for result in results if not result.passed]
    if failed:
        first = next(check for check in failed[0].checks if check.failures)
        raise VerificationError(
            f"{len(failed)} of {len(results)} cases failed",
            where=", ".join(result.name for result in failed),
            got=f"{first.name}: {first.failures[0]}".splitlines()[0],
            fix="" if first.name in (_RUN, _BUNDLE_RUN) else _RECORD,
        )
