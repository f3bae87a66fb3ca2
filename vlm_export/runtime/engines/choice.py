"""Which engine runs a bundle's graphs, and which variant of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from vlm_export.bundle.manifest import Manifest, PartRecord, is_ir
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError, UsageError, suggestion
from vlm_export.runtime.engines.onnxruntime import CPU, Engine, OrtEngine, checked_threads, shape_text
from vlm_export.runtime.engines.openvino import OpenVinoEngine
from vlm_export.runtime.engines.prepacked import prepacked_graph

EngineName: TypeAlias = Literal["onnxruntime", "openvino"]
Weights: TypeAlias = Literal["packed", "shared", "mapped"]
ONNXRUNTIME: EngineName = "onnxruntime"
OPENVINO: EngineName = "openvino"
BF16 = "bf16"
"""The name of bfloat16 in a precision."""
_SHORT_CPU = "cpu"


@dataclass(frozen=True)
class Precision:
    """Which graphs are run, and in which arithmetic. As a text it is what `chosen_precision` makes it of.

    Attributes:
        variant: of the bundle.
        in_bf16: the engine multiplies and adds in bfloat16 what the graph has in float32.
    """

    variant: str
    in_bf16: bool = False

    def __str__(self) -> str:
        if not self.in_bf16:
            return self.variant
        return BF16 if self.variant == "fp32" else f"{self.variant}+{BF16}"


@dataclass(frozen=True)
class EngineChoice:
    """What `engine_choice` made of a caller's options.

    Attributes:
        engine: its name.
        providers: of ONNX Runtime, in order of preference.
        threads: of one operator; None for as many as there are cores.
        in_bf16: as in `Precision`; of OpenVINO.
        weights: "packed": each process packs its own for the kernels. "shared": processes of this machine map packed
            ones from one file in the user's cache. "mapped": they are read as they lie in the bundle. Of ONNX Runtime
            on the CPU alone; others hold their own.
    """

    engine: EngineName
    providers: tuple[str, ...]
    threads: int | None
    in_bf16: bool = False
    weights: Weights = "packed"

    @property
    def is_on_cpu(self) -> bool:
        """Whether nothing but the CPU is asked for."""
        return {name.lower() for name in self.providers} <= {CPU.lower(), _SHORT_CPU}

    def open_part(self, bundle: OpenBundle, part: str, precision: str) -> Engine:
        """The engine of a part's variant, once its files and the graph's sizes are found to be what the manifest says.

        A part that was not quantised runs in float32.

        Raises:
            InputError: there is no such part, or its graph is damaged or another one.
        """
        record = bundle.manifest.part(part)
        variant = record.served_by(precision)
        engine: Engine
        if self.weights == "shared" and self.engine == ONNXRUNTIME and self.is_on_cpu and not is_ir(Path(variant.file)):
            path = prepacked_graph(bundle, variant)
            engine = OrtEngine(path, threads=self.threads, prepacked=True)
        else:
            path = bundle.graph_file(variant) if self.engine == ONNXRUNTIME else bundle.model_files(variant)
            engine = self.open(path)
        _check_graph_sizes(engine, record, path)
        return engine

    def open(self, path: Path) -> Engine:
        """The engine of a graph; errors as in `OrtEngine` and `OpenVinoEngine`.

        Raises:
            UsageError: the graph is OpenVINO's own form, and the engine another.
        """
        if self.engine == ONNXRUNTIME and is_ir(path):
            raise UsageError(
                "ONNX Runtime does not run a graph in OpenVINO's own form",
                where=str(path),
                expected="the engine openvino",
                got=self.engine,
                fix="take OpenVINO (engine='openvino', --engine openvino), or the bundle that this was packaged from",
            )
        if self.engine == ONNXRUNTIME:
            return OrtEngine(path, providers=self.providers, threads=self.threads, packs=self.weights != "mapped")
        return OpenVinoEngine(path, threads=self.threads, in_bf16=self.in_bf16)


def own_engine(manifest: Manifest) -> EngineName:
    """The engine for a caller who names none: ONNX Runtime, unless a graph is OpenVINO's own form."""
    graphs = (variant.file for part in manifest.parts for variant in part.variants)
    return OPENVINO if any(map(is_ir, graphs)) else ONNXRUNTIME


def engine_choice(
    engine: str,
    providers: str | Sequence[str] | None,
    threads: int | None,
    *,
    in_bf16: bool = False,
    weights: Weights = "packed",
) -> EngineChoice:
    """The options, checked before anything is opened.

    Args:
        providers: one or several; None for the CPU.
        in_bf16: as in `Precision`.
        weights: as in `EngineChoice`.

    Raises:
        UsageError: an unknown engine, providers that are no names or that OpenVINO would not use, or `threads` is out
            of its range.
    """
    names: tuple[str, ...] = (providers,) if isinstance(providers, str) else tuple(providers or (CPU,))
    if not all(isinstance(name, str) for name in names):
        raise UsageError("providers are names", expected=f"such as [{CPU!r}]", got=repr(names))
    known = get_args(EngineName)
    if engine not in known:
        raise UsageError(f"there is no engine {engine!r}", fix=suggestion(str(engine), known))
    if in_bf16 and engine == ONNXRUNTIME:
        raise UsageError(
            "ONNX Runtime does not compute float32 graphs in bfloat16",
            expected="a precision that the bundle has a variant of, or another engine",
            got=BF16,
            fix="take OpenVINO (engine='openvino', --engine openvino), or leave out the precision",
        )
    if weights not in get_args(Weights):
        raise UsageError(f"weights cannot be {weights!r}", fix=suggestion(str(weights), get_args(Weights)))
    name = OPENVINO if engine == OPENVINO else ONNXRUNTIME
    chosen = EngineChoice(name, names, checked_threads(threads), in_bf16, weights)
    if engine != ONNXRUNTIME and not chosen.is_on_cpu:
        raise UsageError(
            "OpenVINO has none of ONNX Runtime's execution providers",
            expected="no providers: it runs on the CPU",
            got=", ".join(names),
            fix="leave out providers, or engine='openvino'",
        )
    return chosen


def chosen_precision(manifest: Manifest, precision: str | None) -> Precision:
    """The variant to open, and the arithmetic to run it in.

    Args:
        precision: the name of a variant; "bf16" for the default one in bfloat16, unless the bundle has a variant of
            that name; "NAME+bf16" for another one in bfloat16; None for the default one as it is.

    Raises:
        UsageError: no part has a variant of that precision, or none is given and the bundle has no default.
    """
    if precision is None:
        return Precision(manifest.default_precision())
    known = list(dict.fromkeys(variant.precision for part in manifest.parts for variant in part.variants))
    if precision in known:
        return Precision(precision)
    variant, _, arithmetic = str(precision).rpartition("+")
    if arithmetic == BF16 and (variant in known or precision == BF16):
        return Precision(variant or manifest.default_precision(), in_bf16=True)
    raise UsageError(
        f"the bundle has no variant {precision!r}", where=manifest.name, fix=suggestion(str(precision), known)
    )


def _check_graph_sizes(engine: Engine, part: PartRecord, path: Path) -> None:
    """InputError where an input or output has another number of axes, or another size, than the part's signature.

    Axes without a fixed size in the graph, or in the signature, are left to the run.
    """
    stated = {tensor.name: tensor.shape for tensor in (*part.signature.inputs, *part.signature.outputs)}
    for info in (*engine.inputs, *engine.outputs):
        expected = stated.get(info.name, info.shape)
        pairs = zip(expected, info.shape, strict=False)
        differs = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
        if differs or len(expected) != len(info.shape):
            raise InputError(
                f"the graph of part {part.name!r} has other sizes than the manifest states",
                where=f"{path}: {info.name}",
                expected=shape_text(expected),
                got=shape_text(info.shape),
                fix="copy the bundle again, or export it again with --overwrite",
            )
