"""Vision-language checkpoints to verified static-graph ONNX models that run without PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlm_export.api import VerificationResult, export, verify
    from vlm_export.exporting.pipeline import ExportResult
    from vlm_export.lab.consumer.report import Diagnosis
    from vlm_export.lab.doctor import doctor
    from vlm_export.runtime.load import load
    from vlm_export.runtime.model import Model

_HOMES = {
    "Diagnosis": "vlm_export.lab.consumer.report",
    "ExportResult": "vlm_export.exporting.pipeline",
    "Model": "vlm_export.runtime.model",
    "VerificationResult": "vlm_export.api",
    "doctor": "vlm_export.lab.doctor",
    "export": "vlm_export.api",
    "load": "vlm_export.runtime.load",
    "verify": "vlm_export.api",
}
__all__ = [
    "Diagnosis",
    "ExportResult",
    "Model",
    "VerificationResult",
    "__version__",
    "doctor",
    "export",
    "load",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `import vlm_export` costs milliseconds and `--help` stays fast.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlm_export' has no attribute {name!r}")
