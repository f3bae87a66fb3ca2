"""What a notebook calls: `vlm_export.export` and `vlm_export.verify`; the command line is their first user.

result = vlm_export.export("clip-demo", "out", precisions=("fp32", "fp16"), progress=print)
vlm_export.verify("out", source="clip-demo").raise_if_failed()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_type_hints

from vlm_export.bundle.environment import environment_errors
from vlm_export.bundle.opened import OpenBundle, open_bundle
from vlm_export.bundle.publish import check_target
from vlm_export.bundle.safe_files import check_path
from vlm_export.checkpoint.names import source_kind
from vlm_export.errors import UsageError, VerificationError, missing_package, suggestion
from vlm_export.exporting.stages import SilentListener, StageListener, StageRecord, Stages
from vlm_export.proof.contract import ContractReport, replay
from vlm_export.proof.engine import verifying_start
from vlm_export.proof.recheck import verify_bundle
from vlm_export.proof.report import PartReport
from vlm_export.specs.codec import misfit

if TYPE_CHECKING:
    # It imports torch, which verifying a bundle by itself does not need.
    from vlm_export.exporting.options import ExportOptions
    from vlm_export.exporting.pipeline import ExportResult
    from vlm_export.layouts.package import Package

Progress = Callable[[StageRecord], None] | StageListener
"""Called with each stage that has ended, or told of each stage as it happens."""


@dataclass(frozen=True)
class VerificationResult:
    """What was compared.

    Attributes:
        reports: one for each variant of each part.
        contract: the proof from images and texts to vectors.
    """

    reports: tuple[PartReport, ...]
    contract: ContractReport

    @property
    def passed(self) -> bool:
        """Whether everything that was compared agrees."""
        return self.contract.passed and all(report.passed for report in self.reports)

    def raise_if_failed(self) -> None:
        """VerificationError for the first failure; the contract's names the file, so it comes first."""
        self.contract.raise_if_failed()
        for report in self.reports:
            report.raise_if_failed()

    def to_json(self) -> dict[str, Any]:
        """What `verify --json` prints."""
        return {
            "passed": self.passed,
            "verification": [report.to_json() for report in self.reports],
            "contract": self.contract.to_json(),
        }


def export(source: str | Path, bundle: str | Path, *, progress: Progress | None = None, **options: Any) -> ExportResult:
    """Exports a checkpoint and publishes the bundle, if every part passes its verification.

    Args:
        source: a file, a directory, a known name, or a Hugging Face Hub id.
        bundle: the directory that the bundle becomes.
        progress: told of the stages; None for silence.
        options: the fields of `ExportOptions` and of `BuildOptions`, by name.

    Returns:
        The manifest, the reports of all variants, the contract's report, and what each stage took.

    Raises:
        VerificationError: a graph does not compute what the original computes; nothing is published.
        UsageError: an option is unknown or out of its range, or the directory exists and `overwrite` is not set.
        InputError: the source is bad or unsafe, or no family computes it.
        EnvironmentFailure: disk, memory, a missing package or the network.
    """
    check_path(source, "a source")
    check_path(bundle, "a bundle")
    source_kind(str(source))  # What is not there is told before what is not installed.
    with _told_if_missing():
        from vlm_export.exporting.pipeline import export_bundle

    chosen = export_options(options)
    return export_bundle(str(source), Path(bundle), chosen, Stages(_listener(progress)))


@dataclass(frozen=True)
class ExportedPackage:
    """What `export_package` did: the export with its proof, and the package that was made of it."""

    export: ExportResult
    package: Package

    def to_json(self) -> dict[str, Any]:
        """What `export --for --json` prints, but for the package's path."""
        return {"export": self.export.to_json(), **self.package.to_json()}


def export_package(
    source: str | Path,
    output: str | Path,
    consumer: str,
    *,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> ExportedPackage:
    """Exports a checkpoint and packages the bundle for a consumer; the bundle itself is not kept.

    Args:
        source, progress, options: as in `export`.
        output: the directory that the package becomes.
        consumer, tell: as in `vlm_export.package`.

    Raises:
        VlmExportError: as `export` and `vlm_export.package`; nothing is left behind.
    """
    check_path(output, "a package")
    with _told_if_missing("graph"):
        from vlm_export.layouts.package import known_consumer, package

    known_consumer(consumer)
    overwrite = bool(options.pop("overwrite", False))
    # An export takes minutes: a target that cannot be written is told before.
    with environment_errors("checking the output directory"):
        check_target(Path(output).absolute(), overwrite)
    with TemporaryDirectory(prefix="vlm-export-") as folder:
        bundle = Path(folder) / Path(output).absolute().name
        exported = export(source, bundle, progress=progress, **options)
        threads = options.get("threads")
        made = package(bundle, output, consumer, overwrite=overwrite, threads=threads, tell=tell)
    return ExportedPackage(exported, made)


def export_options(options: Mapping[str, Any]) -> ExportOptions:
    """The options of an export from keyword arguments of `export`.

    Raises:
        UsageError: an option is unknown (with the nearest known one), or out of its range.
        EnvironmentFailure: a missing package.
    """
    with _told_if_missing():
        from vlm_export.exporting.options import ExportOptions
        from vlm_export.family import BuildOptions

    built = {field.name for field in fields(BuildOptions)}
    known = {field.name for field in fields(ExportOptions)} - {"build"} | built
    for name in options:
        if name not in known:
            raise UsageError(f"export has no option {name!r}", fix=suggestion(name, sorted(known)))
    build = BuildOptions(**{name: value for name, value in options.items() if name in built})
    return ExportOptions(**{name: value for name, value in options.items() if name not in built}, build=build)


def options_from_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `export` from what a YAML or JSON file holds.

    Raises:
        UsageError: as `export_options`, and for a value of another type.
        EnvironmentFailure: a missing package.
    """
    with _told_if_missing():
        from vlm_export.exporting.options import ExportOptions

    hints = {**get_type_hints(ExportOptions), "images": Sequence[str]}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    for name, value in options.items():
        expected = misfit(hints[name], value) if name in hints and name != "build" else None
        if expected is not None:
            raise UsageError(f"option {name!r} has another type or value", expected=expected, got=repr(value)[:200])
    options["images"] = tuple(map(Path, options.get("images", ())))
    export_options(options)
    return options


def verify(
    bundle: str | Path,
    source: str | Path | None = None,
    *,
    base: str | None = None,
    precision: str | None = None,
    providers: Sequence[str] = ("cpu",),
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerificationResult:
    """Proves a bundle again on this machine: from its own records, without torch, or against its source.

    Args:
        bundle: the bundle's directory.
        source: the checkpoint that it was made from; None for the recorded inputs and outputs.
        base: what a LoRA adapter is put on, where its settings do not name it.
        precision: only these variants; None for all.
        providers: ONNX Runtime's execution providers in order of preference.
        threads: threads of one operator; None for as many as there are cores.
        progress: told of the stages; None for silence.

    Returns:
        What was compared; `raise_if_failed` raises where something differs.

    Raises:
        VerificationError: nothing was compared, or the manifest states something else than the source.
        UsageError: `base` without a source, or no part has that variant.
        InputError: a file of the bundle is not the one that was exported, or the source is another one.
        EnvironmentFailure: a missing package.
    """
    if base is not None and source is None:
        raise UsageError("a base goes with a source", got="a base alone", fix="name the adapter as the source")
    opened = open_bundle(bundle)
    if source is None:
        opened.verify(opened.manifest.files)
        start = verifying_start(opened, providers, threads)
        contract = replay(opened, start, precision=precision)
        name = ", ".join(providers)
        reports = verify_bundle(opened, engine_factory=start, engine_name=name, precision=precision)
    else:
        source_kind(str(source))
        with _told_if_missing():
            from vlm_export.exporting.reverify import verify_against_source

        stages = Stages(_listener(progress))
        reports, contract = verify_against_source(opened, str(source), providers, threads, stages, precision, base)
    if not reports:
        raise VerificationError(
            "nothing was compared, so nothing is proved", where=str(bundle), fix="export the model again"
        )
    return VerificationResult(tuple(reports), contract)


def export_again(bundle: OpenBundle, source: str, folder: Path, progress: Progress | None = None) -> OpenBundle:
    """Exports a source with the options that a bundle declares, into a folder that is there.

    Raises:
        InputError: the source is bad or unsafe, or the bundle declares options that it does not take.
        EnvironmentFailure: a missing package.
    """
    source_kind(source)
    with _told_if_missing():
        from vlm_export.exporting.pipeline import export_bundle
        from vlm_export.exporting.reverify import declared_options

    target = folder / "exported-again"
    export_bundle(source, target, declared_options(bundle, source), Stages(_listener(progress)))
    return open_bundle(target)


@dataclass(frozen=True)
class SourceModule:
    """A part as the PyTorch module that a source fills.

    Attributes:
        names: of its submodules.
        values: what submodules give and are given; `vlm_export.exporting.module_outputs.module_values`.
    """

    names: tuple[str, ...]
    values: Callable[..., dict[str, list[Any]]]


@contextmanager
def source_modules(bundle: OpenBundle, source: str) -> Iterator[dict[str, SourceModule]]:
    """The parts of a bundle as PyTorch modules, by name; they last as long as the context.

    Raises:
        InputError: the source's files are not those that the manifest records.
        EnvironmentFailure: a missing package.
    """
    source_kind(source)
    with _told_if_missing():
        from vlm_export.exporting.module_outputs import module_values, source_model, submodules
    with source_model(bundle, source) as model:
        yield {part.name: SourceModule(submodules(part), partial(module_values, part)) for part in model.parts}


@contextmanager
def source_runs(bundle: OpenBundle, source: str, form: str, threads: int) -> Iterator[Callable[[str], Any]]:
    """What gives for a part of a source what runs it in PyTorch, arrays by name to arrays by name; it lasts as long as
    the context.

    Args:
        form: "eager", "compiled" or "bf16", as `vlm_export.exporting.source_runs` has them.
        threads: of torch, in this process.

    Raises:
        InputError: the source's files are not those that the manifest records.
        EnvironmentFailure: a missing package.
    """
    source_kind(source)
    with _told_if_missing():
        from vlm_export.exporting import source_runs
    with source_runs.source_runs(bundle, source, form, threads) as run_of:
        yield run_of


def transformers_images(source: str, threads: int) -> Callable[[Sequence[str], int], Any]:
    """transformers' own model on files of images: `vlm_export.exporting.source_runs.transformers_images`."""
    source_kind(source)
    with _told_if_missing():
        from vlm_export.exporting import source_runs
    return source_runs.transformers_images(source, threads)


@contextmanager
def _told_if_missing(extra: str = "export") -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise missing_package(error, extra) or error from error


class _Calls(SilentListener):
    """Calls a function with each stage that has ended."""

    def __init__(self, call: Callable[[StageRecord], None]) -> None:
        self._call = call

    def finished(self, record: StageRecord) -> None:
        self._call(record)


def _listener(progress: Progress | None) -> StageListener | None:
    return _Calls(progress) if callable(progress) else progress
