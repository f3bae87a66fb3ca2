"""What the user may choose about an export."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_export.errors import UsageError
from vlm_export.exporting.backends import DEFAULT_OPSET, Exporter, Target
from vlm_export.exporting.finishing import DEFAULT_THRESHOLD_BYTES
from vlm_export.family import DEFAULT_BUILD, BuildOptions
from vlm_export.specs.codec import MAX_INTEGER

Precision = Literal["fp32", "fp16"]
FP32: Precision = "fp32"
FP16: Precision = "fp16"


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export_bundle`.

    Attributes:
        opset: ONNX opset of the graphs, 11 to 23.
        exporter: back end, None: the default for the opset.
        target: runtime that the graphs are meant for, None: any; see `choose_lowerings`.
        simplify: run onnxsim and fold weights; verified, and taken back when the result differs.
        external_data_threshold_bytes: graphs with more weights than this keep them in a second file.
        overwrite: replace an existing bundle.
        tokenizer: path of tokenizer files, None: those of the checkpoint.
        with_tokenizer: False for a bundle that takes token ids only.
        sha256: expected sha256 of the weights file.
        revision: of a hub id.
        base: what a LoRA adapter is put on, None: what its settings name.
        random_weights_seed: build the named architecture with seeded random weights instead of reading a checkpoint;
            0 to 2**63 - 1.
        build: choices about the modules: image size (at most 8192), dynamic or not.
        with_preprocessing: add a part that takes uint8 images of any size.
        parts: names of the parts to export, none for all.
        precisions: the variants of each part, each written and verified.
        images: images for the verification in addition to the synthetic ones.
        threads: of the engine while verifying, None: its default.
    """

    opset: int = DEFAULT_OPSET
    exporter: Exporter | None = None
    target: Target | None = None
    simplify: bool = True
    external_data_threshold_bytes: int = DEFAULT_THRESHOLD_BYTES
    overwrite: bool = False
    tokenizer: str | None = None
    with_tokenizer: bool = True
    sha256: str | None = None
    revision: str | None = None
    base: str | None = None
    random_weights_seed: int | None = None
    build: BuildOptions = DEFAULT_BUILD
    with_preprocessing: bool = False
    parts: Sequence[str] = ()
    precisions: Sequence[Precision] = (FP32,)
    images: Sequence[Path] = ()
    threads: int | None = None

    def __post_init__(self) -> None:
        """UsageError for a seed that no bundle could state, and for a sha256 that no file has."""
        seed = self.random_weights_seed
        if seed is not None and not 0 <= seed <= MAX_INTEGER:
            raise UsageError(
                "the seed of the random weights is out of range", expected=f"from 0 to {MAX_INTEGER}", got=str(seed)
            )
        if self.sha256 is not None and re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256) is None:
            raise UsageError("this is no sha256", expected="64 hexadecimal digits", got=f"{self.sha256!r:.100}")
