"""Missing statements of which version of a domain's operators a graph uses."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from vlm_export.errors import GraphError
from vlm_export.graph.core.names import nested_graphs, opset_imports_of, root_graphs


def add_opset_imports(model: ir.Model, versions: Mapping[str, int] | None = None) -> dict[str, int]:
    """Imports, in place, every domain that a node uses and its graph or function does not import.

    A domain whose version is not given gets the one that another scope of the model imports, for domains that ONNX
    defines the newest, otherwise 1.

    Args:
        versions: domain → version, also for domains that are already imported.

    Returns:
        Domain → version of what was added or changed.

    Raises:
        GraphError: ONNX's own operators are not imported and no version is given: any choice would be a guess.
    """
    wanted = dict(versions or {})
    plan: list[tuple[dict[str, int], str, int]] = []
    for root in root_graphs(model):
        imports = opset_imports_of(model, root)
        used = {node.domain for graph in nested_graphs(root) for node in graph}
        for domain in sorted(used | (wanted.keys() if root is model.graph else set())):
            if domain not in imports or imports[domain] != wanted.get(domain, imports[domain]):
                plan.append((imports, domain, wanted.get(domain) or _version(model, domain)))
    for imports, domain, version in plan:
        imports[domain] = version
    return {domain: version for _, domain, version in plan}


def _version(model: ir.Model, domain: str) -> int:
    for root in root_graphs(model):
        if domain in (imports := opset_imports_of(model, root)):
            return imports[domain]
    if domain == "":
        raise GraphError(
            "the model does not import ONNX's own operators", expected="a version", fix="give one: --version ai.onnx=18"
        )
    return max((schema.since_version for schema in onnx.defs.get_all_schemas() if schema.domain == domain), default=1)
