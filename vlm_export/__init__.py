"""Vision-language checkpoints to verified static-graph ONNX models that run without PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlm_export.api import ExportedPackage, VerificationResult, export, export_package, verify
    from vlm_export.exporting.pipeline import ExportResult
    from vlm_export.lab.bench import bench
    from vlm_export.lab.bisect import bisect
    from vlm_export.lab.check import check
    from vlm_export.lab.diff import diff
    from vlm_export.lab.doctor import doctor
    from vlm_export.lab.ranges import ranges
    from vlm_export.lab.regress import regress
    from vlm_export.lab.report.collect import report
    from vlm_export.layouts.package import package
    from vlm_export.layouts.page import page
    from vlm_export.quantizing.pipeline import quantize
    from vlm_export.quantizing.result import QuantizeResult
    from vlm_export.runtime.bulk.embed import EmbedOptions, EmbedResult, embed
    from vlm_export.runtime.bulk.indexing import build_index, open_index
    from vlm_export.runtime.load import load
    from vlm_export.runtime.model import Model
    from vlm_export.runtime.search.index import Match, SearchIndex, combined_vector

_HOMES = {
    "EmbedOptions": "vlm_export.runtime.bulk.embed",
    "EmbedResult": "vlm_export.runtime.bulk.embed",
    "ExportedPackage": "vlm_export.api",
    "ExportResult": "vlm_export.exporting.pipeline",
    "Match": "vlm_export.runtime.search.index",
    "Model": "vlm_export.runtime.model",
    "QuantizeResult": "vlm_export.quantizing.result",
    "SearchIndex": "vlm_export.runtime.search.index",
    "VerificationResult": "vlm_export.api",
    "bench": "vlm_export.lab.bench",
    "bisect": "vlm_export.lab.bisect",
    "build_index": "vlm_export.runtime.bulk.indexing",
    "check": "vlm_export.lab.check",
    "combined_vector": "vlm_export.runtime.search.index",
    "diff": "vlm_export.lab.diff",
    "doctor": "vlm_export.lab.doctor",
    "embed": "vlm_export.runtime.bulk.embed",
    "export": "vlm_export.api",
    "export_package": "vlm_export.api",
    "load": "vlm_export.runtime.load",
    "open_index": "vlm_export.runtime.bulk.indexing",
    "package": "vlm_export.layouts.package",
    "page": "vlm_export.layouts.page",
    "quantize": "vlm_export.quantizing.pipeline",
    "ranges": "vlm_export.lab.ranges",
    "regress": "vlm_export.lab.regress",
    "report": "vlm_export.lab.report.collect",
    "verify": "vlm_export.api",
}
__all__ = [
    "EmbedOptions",
    "EmbedResult",
    "ExportResult",
    "ExportedPackage",
    "Match",
    "Model",
    "QuantizeResult",
    "SearchIndex",
    "VerificationResult",
    "__version__",
    "bench",
    "bisect",
    "build_index",
    "check",
    "combined_vector",
    "diff",
    "doctor",
    "embed",
    "export",
    "export_package",
    "load",
    "open_index",
    "package",
    "page",
    "quantize",
    "ranges",
    "regress",
    "report",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `import vlm_export` costs milliseconds and `--help` stays fast.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlm_export' has no attribute {name!r}")
