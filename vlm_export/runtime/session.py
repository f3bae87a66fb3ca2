"""An opened bundle with its engines: what every task runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from vlm_export.bundle.layout import TOKENIZER_NAME
from vlm_export.bundle.manifest import Manifest
from vlm_export.bundle.opened import OpenBundle
from vlm_export.errors import InputError
from vlm_export.runtime.engines.choice import (
    OPENVINO,
    EngineName,
    Weights,
    chosen_precision,
    engine_choice,
    own_engine,
)
from vlm_export.runtime.engines.fastest import FASTEST, fastest_variant
from vlm_export.runtime.engines.onnxruntime import Array, Engine, run_in_float32
from vlm_export.runtime.inputs.images import MAX_PIXELS
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.specs import AnyImageSpec, TextSpec


class Session:
    """A bundle, its variant and its engines by part, each opened on first use; arguments as in `vlm_export.load`.

    Threads may share it. It can be pickled, also after use: engines and mapped files belong to their process, so a
    worker gets the bundle's path and the options, checks that the bundle is the same, and opens its own engines.

    Attributes:
        precision: the variant that is run.
        precision_text: the same with the arithmetic where that is another: "bf16" is float32's graphs in bfloat16.

    Raises:
        UsageError: the bundle has no variant of that precision, or an option is out of its range.
    """

    def __init__(
        self,
        bundle: OpenBundle,
        *,
        precision: str | None = None,
        engine: EngineName | None = None,
        providers: str | Sequence[str] | None = None,
        threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
        weights: Weights = "packed",
    ) -> None:
        self.bundle = bundle
        engine = engine or own_engine(bundle.manifest)
        if precision == FASTEST:
            precision = fastest_variant(bundle.manifest, engine_choice(engine, providers, threads))
        chosen = chosen_precision(bundle.manifest, precision)
        self.precision, self.precision_text = chosen.variant, str(chosen)
        self.max_pixels = max_pixels
        self._choice = engine_choice(engine, providers, threads, in_bf16=chosen.in_bf16, weights=weights)
        self._engines: dict[str, Engine] = {}
        self._tokenizers: dict[int, Tokenizer] = {}
        self._for_workers: dict[int, Session] = {}
        self._opening = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.bundle, self._options())

    def for_workers(self, workers: int) -> Session:
        """The same for so many threads that use it at once: operators of one thread, where runs take no turns.

        It is kept, so that its engines are opened once for all runs.
        """
        threads = workers if self._choice.engine == OPENVINO else 1
        if threads == self.threads:
            return self
        with self._opening:
            if threads not in self._for_workers:
                self._for_workers[threads] = Session(self.bundle, **{**self._options(), "threads": threads})
            return self._for_workers[threads]

    def _options(self) -> dict[str, Any]:
        return {
            "precision": self.precision_text,
            "engine": self._choice.engine,
            "providers": self._choice.providers,
            "threads": self._choice.threads,
            "max_pixels": self.max_pixels,
            "weights": self._choice.weights,
        }

    @property
    def manifest(self) -> Manifest:
        """All that the bundle says about itself."""
        return self.bundle.manifest

    @property
    def providers(self) -> tuple[str, ...]:
        """ONNX Runtime's execution providers in order of preference."""
        return self._choice.providers

    @property
    def threads(self) -> int | None:
        """Threads of one operator and of image decoding; None for the default."""
        return self._choice.threads

    @property
    def image_spec(self) -> AnyImageSpec:
        """How images become inputs of the vision part; InputError when the bundle takes none."""
        if self.manifest.image is None:
            raise InputError("this bundle takes no images", where=self.manifest.name)
        return self.manifest.image

    @property
    def text_spec(self) -> TextSpec:
        """How texts become token ids; InputError when the bundle takes none."""
        if self.manifest.text is None:
            raise InputError("this bundle takes no texts", where=self.manifest.name)
        return self.manifest.text

    @cached_property
    def identity(self) -> str:
        """sha256 that names the model: equal for bundles of one checkpoint, whatever their opset or precision."""
        return self.manifest.identity()

    def engine(self, part: str) -> Engine:
        """The graph of a part, opened and checked on first use; InputError when the bundle has no such part."""
        with self._opening:
            if part not in self._engines:
                self._engines[part] = self._choice.open_part(self.bundle, part, self.precision)
            return self._engines[part]

    def run(self, part: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """A part's outputs by name, floats as float32."""
        return run_in_float32(self.engine(part), feeds)

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer; InputError when it was exported without one."""
        return self.tokenizer_up_to(self.text_spec.context_length)

    def tokenizer_up_to(self, max_tokens: int) -> Tokenizer:
        """The tokenizer for rows of at most that many tokens; the context's length where that is smaller."""
        length = min(max_tokens, self.text_spec.context_length)
        with self._opening:
            if length not in self._tokenizers:
                spec = replace(self.text_spec, context_length=length)
                self._tokenizers[length] = Tokenizer(self._tokenizer_file(), spec)
            return self._tokenizers[length]

    def _tokenizer_file(self) -> Path:
        if TOKENIZER_NAME not in self.manifest.files:
            raise InputError(
                "this bundle has no tokenizer",
                where=self.manifest.name,
                expected=TOKENIZER_NAME,
                fix="export again with --tokenizer PATH, or work with token ids (encode_ids; of chat, generate_ids)",
            )
        return self.bundle.file(TOKENIZER_NAME)


def _opened_again(bundle: OpenBundle, options: dict[str, Any]) -> Session:
    return Session(bundle, **options)
