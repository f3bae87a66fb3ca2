"""The BLIP demo's weights in the form in which Salesforce publishes checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from demo.blip_accuracy import Array, Parts, Run
from demo.checkpoint import stored
from vlm_export.family import Model
from vlm_export.models.blip.architecture import BlipArchitecture
from vlm_export.models.blip.parts import BlipModules
from vlm_export.models.blip.weights import decoder_table, encoder_table, vision_table
from vlm_export.models.reading.weights import WeightTable
from vlm_export.specs import ImageSpec

# salesforce/BLIP models/med.py (3a29b74) ties these, and its files hold both copies: stored key → its twin.
_TWINS = {
    "text_decoder.bert.embeddings.word_embeddings.weight": "text_decoder.cls.predictions.decoder.weight",
    "text_decoder.cls.predictions.bias": "text_decoder.cls.predictions.decoder.bias",
}


def published_checkpoint(modules: BlipModules, architecture: BlipArchitecture) -> dict[str, Any]:
    """What `torch.save` takes: `{"model": state dict}`. Matrices are float16 where the original has float32."""
    ours = modules.state_dict()
    kept = {key: target for key, target in _table(architecture).items() if target is not None}
    state = {key: stored(ours, target) for key, target in kept.items()}
    state |= {key: state[twin] for key, twin in _TWINS.items()}
    for prefix, sizes in (("text_encoder.", architecture.encoder), ("text_decoder.bert.", architecture.decoder)):
        if sizes is not None:
            state[f"{prefix}embeddings.position_ids"] = torch.arange(sizes.positions)[None]
    return {"model": dict(sorted(state.items()))}


def _table(architecture: BlipArchitecture) -> WeightTable:
    vision, encoder, decoder = architecture.vision, architecture.encoder, architecture.decoder
    assert decoder is not None
    table = vision_table(vision.layers, huggingface=False) | decoder_table(decoder.layers, ())
    return table if encoder is None else table | encoder_table(encoder.layers, has_cross_attention=True)


def torch_parts(model: Model, tokenizer: Tokenizer) -> Parts:
    """The model's Parts in PyTorch, as the metric takes them."""
    assert isinstance(model.image, ImageSpec)
    runs = {part.name: _torch_run(part.module) for part in model.parts}
    return Parts(runs, tokenizer, model.image, model.architecture["tokens"])


def _torch_run(module: nn.Module) -> Run:
    def run(inputs: Sequence[Array]) -> list[Array]:
        with torch.inference_mode():
            outputs = module(*map(torch.from_numpy, inputs))
        return [tensor.numpy() for tensor in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run
