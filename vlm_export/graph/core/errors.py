"""What graph surgery refuses."""

from __future__ import annotations

from vlm_export.errors import InputError


class GraphError(InputError):
    """A model, or a change of it, that cannot be: an unknown name, a cycle, a clash of dtypes or shapes."""

    kind = "graph"
