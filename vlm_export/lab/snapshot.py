"""The state of an export, read from the bundle that was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx_ir as ir

from vlm_export.bundle import layout
from vlm_export.bundle.ledger import LedgerEntry, read_ledger
from vlm_export.bundle.manifest import VariantRecord
from vlm_export.bundle.opened import OpenBundle
from vlm_export.graph.core.files import open_model
from vlm_export.lab.bundle_diff import (
    DIGEST_CHARACTERS,
    LONGEST_TEXT,
    axis_of,
    contract_of,
    side_files,
    spec_json,
    text_digest,
)
from vlm_export.lab.figures import recorded_figures
from vlm_export.lab.graph_diff import opset_text
from vlm_export.lab.regress_state import State
from vlm_export.lab.structure import structure_lines
from vlm_export.proof.contract_record import read_record
from vlm_export.proof.floor import RULES

_TOKENIZER_FILES = (layout.TOKENIZER_NAME, layout.TOKENIZER_CONFIG_NAME, "special_tokens_map.json")


def state_of(bundle: OpenBundle, case: str, tolerances: Mapping[str, float]) -> State:
    """The state of a bundle that was just exported.

    Args:
        tolerances: of the specification; a change of them is a difference too.
    """
    manifest = bundle.manifest
    variants = {f"{part.name}.{v.precision}": v for part in manifest.parts for v in part.variants}
    opsets, structure = dict[str, str](), dict[str, str]()
    for name, variant in variants.items():
        model = open_model(bundle.model_files(variant))
        opsets[name] = f"{opset_text(model)}, IR {model.ir_version}"
        structure |= {f"{name}.{module}": line for module, line in structure_lines(model).items()}
    sections: dict[str, Mapping[str, Any]] = {
        "interface": dict(_interface(bundle)),
        "model": {"family": manifest.family, "architecture": dict(manifest.architecture)},
        "preparation": {"image": spec_json(manifest.image), "text": spec_json(manifest.text)},
        "tokenizer": _digests(bundle, [name for name in side_files(bundle) if name in _TOKENIZER_FILES]),
        "tasks": {task.kind: task.to_json() for task in manifest.tasks},
        "files": _digests(bundle, [name for name in side_files(bundle) if name not in _TOKENIZER_FILES]),
        "contract": {**contract_of(bundle), **_words(bundle)},
        "opset": opsets,
        "structure": structure,
        "weights": _weights(bundle, variants),
        "tolerances": {
            "gates": {name: _gate(variant) for name, variant in variants.items()},
            "specification": dict(tolerances),
        },
    }
    return State(1, case, dict(manifest.tools), sections, recorded_figures(manifest))


def _interface(bundle: OpenBundle) -> Iterator[tuple[str, Any]]:
    for part in bundle.manifest.parts:
        for kind, tensors in (("input", part.signature.inputs), ("output", part.signature.outputs)):
            for tensor in tensors:
                axes = ", ".join(map(str, tensor.shape))
                yield f"{part.name} {kind} {tensor.name}", f"{tensor.dtype} ({axes})"
        for axis in part.signature.axes:
            yield f"{part.name} axis {axis.name}", axis_of(axis)


def _digests(bundle: OpenBundle, names: Iterable[str]) -> dict[str, str]:
    files = bundle.manifest.files
    return {name: files[name].sha256[:DIGEST_CHARACTERS] for name in names}


def _weights(bundle: OpenBundle, variants: Mapping[str, VariantRecord]) -> dict[str, str]:
    """Parameter → dtype, shape and digest. Large constants of the code, whose names are not stable, are one line."""
    ledger = read_ledger(bundle) or {}
    found = dict[str, str]()
    for graph, variant in variants.items():
        constants = list[str]()
        for entry in ledger[variant.file].initializers if variant.file in ledger else ():
            line = f"{ir.DataType(entry.data_type).name.lower()} {list(entry.shape)} {entry.sha256[:DIGEST_CHARACTERS]}"
            if not entry.parameters:
                constants.append(line)
                continue
            name, number = f"{graph} {_weight_name(entry)}", 2
            while name in found:
                name, number = f"{graph} {_weight_name(entry)} #{number}", number + 1
            found[name] = line
        found[f"{graph} constants"] = f"{len(constants)} {text_digest('|'.join(sorted(constants)))}"
    return found


def _weight_name(entry: LedgerEntry) -> str:
    how = "" if entry.transformation in ("", "as it is") else f" ({entry.transformation})"
    return "+".join(entry.parameters) + how


def _words(bundle: OpenBundle) -> dict[str, str]:
    """What the original answers."""
    record, found = read_record(bundle), dict[str, str]()
    for number, words in enumerate(() if record is None else record.words):
        what = repr(words.words) if words.probability is None else f"{words.probability:.3g}"
        found[f"{words.task} {number} {words.text[:LONGEST_TEXT]!a}"] = what
    return found


def _gate(variant: VariantRecord) -> Mapping[str, Any]:
    """The limits that judged a graph."""
    stated = variant.verification or {}
    floor = stated.get("floor")
    return {**stated.get("gate", {}), "times_the_floor": None if floor is None else RULES[floor["rule"]].factor}
