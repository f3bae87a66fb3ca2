"""Opened bundles as pickles: the path and the options, opened again where the pickle is read.

Engines and mapped files belong to their process. So what `load` returns travels to workers (`multiprocessing`, a
DataLoader's) as what it was made from, also after use; each worker opens its own engines when it first needs them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from vlm_export.bundle.opened import OpenBundle
from vlm_export.runtime.engine_choice import EngineChoice

Reopening: TypeAlias = tuple[Any, tuple[type[Any], OpenBundle, dict[str, Any]]]


def reopening(model: Any, choice: EngineChoice) -> Reopening:
    """What `__reduce__` of an opened model returns; `bundle` checks where it is opened again that it is the same."""
    options = {
        "precision": model.precision,
        "engine": choice.engine,
        "providers": choice.providers,
        "threads": choice.threads,
        "max_pixels": model.max_pixels,
    }
    return _opened_again, (type(model), model.bundle, options)


def _opened_again(kind: type[Any], bundle: OpenBundle, options: dict[str, Any]) -> Any:
    return kind(bundle, **options)
