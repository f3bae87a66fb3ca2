"""Vision-language checkpoints to verified static-graph ONNX models that run without PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlm_export.runtime.load import load
    from vlm_export.runtime.model import Model

_HOMES = {"Model": "vlm_export.runtime.model", "load": "vlm_export.runtime.load"}
__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `import vlm_export` costs milliseconds and `--help` stays fast.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlm_export' has no attribute {name!r}")
