"""Which model a checkpoint is: what config.json says, and names of tensors.

All of them decide together. A family takes only what it computes; anything else is refused under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint, Family
from vlm_export.models.recognition.foreign import class_described, distinct_model, other_model, title_of
from vlm_export.text_display import shown

# Copies of a model that training keeps beside it.
_COPIES = re.compile(r"(^|[._])(ema|swa|averaged?|shadow|momentum|teacher|target)([._]|$)")
_MOST_NAMES = 8


@dataclass(frozen=True)
class Claim:
    """A family, and the prefix that its keys have in a checkpoint ("" for none).

    Attributes:
        others: prefixes of copies that training keeps beside the model.
    """

    family: Family
    prefix: str
    others: tuple[str, ...] = ()


def refuse_other_models(checkpoint: Checkpoint, families: Sequence[Family]) -> None:
    """InputError for a model that a config or distinct key names call by the name of another one."""
    _refuse_by_config(checkpoint, families)
    if name := distinct_model(checkpoint.tensors):
        raise _error_from_name(checkpoint, families, name)


def claimed_by(families: Sequence[Family], checkpoint: Checkpoint) -> Claim | None:
    """The family whose keys these are, if need be behind one common prefix.

    Raises:
        InputError: several models stand side by side in the file, and none of them is only a copy of another one.
    """
    found = [claim for prefix in _prefixes(families, checkpoint) if (claim := _claim(families, checkpoint, prefix))]
    if not found or not found[0].prefix:
        return found[0] if found else None
    # A prefix within another one's model is part of it.
    models = [claim for claim in found if not any(_is_inside(claim, other) for other in found)]
    copies = [claim for claim in models if _COPIES.search(claim.prefix)]
    own = [claim for claim in models if claim not in copies] or copies
    if len(own) > 1:
        raise InputError(
            "the checkpoint holds several models side by side",
            where=checkpoint.source,
            expected="one model",
            got=", ".join(f"{shown(claim.prefix)}* ({claim.family.name})" for claim in own[:_MOST_NAMES]),
            fix="save the state dict of the one that is meant in a file of its own",
        )
    return replace(own[0], others=tuple(claim.prefix for claim in copies if claim is not own[0]))


def seen_by(claim: Claim, checkpoint: Checkpoint, families: Sequence[Family]) -> Checkpoint:
    """The checkpoint as the family reads it: its own keys without the prefix.

    Raises:
        InputError: config.json says that the model is of another family.
    """
    _check_config_family(claim.family, checkpoint, families)
    prefix, roots = claim.prefix, set(claim.family.roots)
    kept = {}
    for key in checkpoint.tensors:
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and (not roots or name.split(".", 1)[0] in roots):
            kept[name] = key
    own = set(kept.values())
    left_out = tuple(key for key in checkpoint.tensors if key not in own)
    if not prefix and not left_out:
        return checkpoint
    notes = [f"the prefix {shown(prefix)!r} was taken off the keys"] if prefix else []
    notes += [f"{shown(other)}* is a copy that training keeps, and was left out" for other in claim.others]
    read = checkpoint.read
    return replace(
        checkpoint,
        tensors={name: checkpoint.tensors[key] for name, key in kept.items()},
        read=lambda name: read(kept[name]),
        computed=frozenset(name for name, key in kept.items() if key in checkpoint.computed),
        notes=(*checkpoint.notes, *notes),
        left_out=left_out,
    )


def left_out_warnings(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A warning that names the modules beside the model whose tensors were left out; none where there are none."""
    modules = list(dict.fromkeys(_module(key) for key in checkpoint.left_out))
    if not modules:
        return ()
    names = ", ".join(map(shown, modules[:_MOST_NAMES])) + (", …" if len(modules) > _MOST_NAMES else "")
    return (
        f"{len(checkpoint.left_out)} tensors beside the model were left out: {names}. What is exported does not "
        "compute them",
    )


def error_from_unknown(checkpoint: Checkpoint, families: Sequence[Family]) -> InputError:
    """The error for keys that no family claims."""
    if name := other_model(checkpoint.tensors):
        return _error_from_name(checkpoint, families, name)
    keys = list(checkpoint.tensors)
    return InputError(
        "no family recognises this checkpoint",
        where=checkpoint.source,
        expected=f"the published key names of one of: {', '.join(family.name for family in families)}",
        got=f"{len(keys)} tensors, the first: {', '.join(map(shown, keys[:5]))}",
        fix="look at the names: a model of these families whose modules were renamed must be saved under the names "
        "that its publisher uses; a common prefix is no obstacle",
    )


def _refuse_by_config(checkpoint: Checkpoint, families: Sequence[Family]) -> None:
    model_type, classes = stated_model(checkpoint)
    if model_type is None and not classes:
        return
    known = {name: names for family in families for name, names in family.config_types.items()}
    if model_type is None:
        accepted: tuple[str, ...] = tuple(name for names in known.values() for name in names)
    elif model_type not in known:
        stated = shown(model_type) + (f" ({', '.join(classes)})" if classes else "")
        what = f"config.json says {stated}: {title_of(model_type)} is not supported"
        raise _error_from_config(checkpoint, families, what)
    else:
        accepted = known[model_type]
    if accepted and classes and not set(classes) & set(accepted):
        stated = f"{model_type} ({', '.join(classes)})" if model_type else ", ".join(classes)
        kind, way_out = class_described(classes) or (
            "this class",
            "where the class only adds something to one of these, save the weights with that one's config.json",
        )
        raise _error_from_config(checkpoint, families, f"config.json says {stated}: {kind} is not supported", way_out)


def _check_config_family(family: Family, checkpoint: Checkpoint, families: Sequence[Family]) -> None:
    """InputError when config.json is of another family than the tensors are."""
    model_type, _ = stated_model(checkpoint)
    if model_type is not None and model_type not in family.config_types:
        raise InputError(
            "config.json and the names of the tensors say different models",
            where=f"{checkpoint.source}: config.json: model_type",
            expected=" or ".join(family.config_types) or f"no model_type, as the family {family.name} has none",
            got=f"{shown(model_type)}, with the tensors of {family.name}",
            fix="take the config.json that was saved with these weights",
        )


def stated_model(checkpoint: Checkpoint) -> tuple[str | None, tuple[str, ...]]:
    """`model_type` and `architectures` of config.json, None and () where it does not state them.

    Raises:
        InputError: they are not text.
    """
    config = checkpoint.config or {}
    model_type, classes = config.get("model_type"), config.get("architectures")
    if model_type is not None and not isinstance(model_type, str):
        raise _malformed(checkpoint, "model_type", "a text", model_type)
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise _malformed(checkpoint, "architectures", "a list of class names", classes)
    return model_type or None, tuple(map(shown, classes or ()))


def _malformed(checkpoint: Checkpoint, key: str, expected: str, got: object) -> InputError:
    where = f"{checkpoint.source}: config.json: {key}"
    return InputError("config.json is malformed", where=where, expected=expected, got=f"{got!r:.200}")


def _error_from_config(checkpoint: Checkpoint, families: Sequence[Family], what: str, more: str = "") -> InputError:
    model_type, classes = stated_model(checkpoint)
    return InputError(
        what,
        where=f"{checkpoint.source}: config.json",
        expected=_supported(families),
        got=f"model_type {shown(str(model_type))}, architectures {', '.join(classes) or 'not stated'}",
        fix=more or _supported_fix(),
    )


def _error_from_name(checkpoint: Checkpoint, families: Sequence[Family], name: str) -> InputError:
    keys = list(checkpoint.tensors)
    fix = "merge it into its model first: peft's merge_and_unload(), then save the model" if "LoRA" in name else ""
    return InputError(
        f"the names of the tensors are those of {name}, which is not supported",
        where=checkpoint.source,
        expected=_supported(families),
        got=f"{len(keys)} tensors, the first: {', '.join(map(shown, keys[:5]))}",
        fix=fix or _supported_fix(),
    )


def _supported(families: Sequence[Family]) -> str:
    """What is supported, by what config.json says, and the files that have none."""
    stated = [
        f"{name} ({', '.join(classes)})" if classes else name
        for family in families
        for name, classes in family.config_types.items()
    ]
    return f"{', '.join(stated)}; or CLIP of OpenAI, models of open_clip, BLIP of Salesforce, nanoVLM"


def _supported_fix() -> str:
    return "export a model that is supported: `vlm-export inspect` lists published ones"


def _prefixes(families: Sequence[Family], checkpoint: Checkpoint) -> Iterator[str]:
    """The empty prefix, and what stands before the keys by which families are known, the shortest first."""
    marks = tuple(mark for family in families for mark in family.marks)
    found = {""}
    for key in checkpoint.tensors:
        if key.endswith(marks):
            found |= {key.removesuffix(mark) for mark in marks if key.endswith(mark)}
    yield from sorted((prefix for prefix in found if not prefix or prefix.endswith(".")), key=lambda p: (len(p), p))


def _claim(families: Sequence[Family], checkpoint: Checkpoint, prefix: str) -> Claim | None:
    if prefix:
        tensors = {key[len(prefix) :]: info for key, info in checkpoint.tensors.items() if key.startswith(prefix)}
        checkpoint = replace(checkpoint, tensors=tensors)
    return next((Claim(family, prefix) for family in families if family.recognises(checkpoint)), None)


def _is_inside(claim: Claim, other: Claim) -> bool:
    return claim is not other and claim.prefix.startswith(other.prefix)


def _module(key: str) -> str:
    """The name of the module that a tensor belongs to, as far as its first two parts tell."""
    parts = key.split(".")
    return ".".join(parts[: min(2, max(len(parts) - 1, 1))])
