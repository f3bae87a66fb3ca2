"""Names that every tool behind this one can open."""

from __future__ import annotations

import os
from pathlib import Path

from vlm_export.errors import VlmExportError


def check_utf8(path: Path, error: type[VlmExportError], what: str, fix: str) -> None:
    """Raises `error` unless the path is valid UTF-8: engines and torch open no other, ONNX files hold no other."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as cause:
        raise error(what, where=repr(os.fsencode(path)), fix=fix) from cause
