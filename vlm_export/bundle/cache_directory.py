"""Where what was downloaded is kept."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "VLM_EXPORT_CACHE"


def cache_directory() -> Path:
    """Where downloads are kept: $VLM_EXPORT_CACHE, else vlm-export in $XDG_CACHE_HOME, else in ~/.cache.

    On every system, as the Hub's cache is; `platformdirs` would put it elsewhere on macOS and Windows.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vlm-export"
