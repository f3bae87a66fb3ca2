"""transformers' own classes of BLIP on a checkpoint, for the proof of the contract: a match, a caption, an answer.

Source of what is called: transformers 5.23, models/blip/modeling_blip.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_export.family import Checkpoint
from vlm_export.models.blip.architecture import BlipArchitecture
from vlm_export.original import Asked, OriginalTask, Written

_PIXELS, _IDS, _MASK = "pixel_values", "input_ids", "attention_mask"


def original_task(architecture: BlipArchitecture, checkpoint: Checkpoint, config: Mapping[str, Any]) -> OriginalTask:
    """What transformers' class does with an image and a text.

    Args:
        config: of checked sizes alone, with the class's name.
    """
    (name,) = config["architectures"]
    load = partial(_load, name, config, checkpoint)
    if architecture.has_matching_head:
        return OriginalTask("match", f"transformers {name}", lambda: partial(_match, load()))
    if architecture.answers_questions:
        return OriginalTask("answer", f"transformers {name}", lambda: partial(_decoded, load()))
    return OriginalTask("caption", f"transformers {name}", lambda: partial(_caption, load()))


def _load(name: str, config: Mapping[str, Any], checkpoint: Checkpoint) -> Any:
    """The model with the checkpoint's tensors, which stay mapped where they are float32."""
    import transformers

    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(dict(config))).eval()
    wanted = model.state_dict()
    weights = {key: checkpoint.read(key).float() for key in checkpoint.tensors if key in wanted}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    for owner in model.modules():
        for buffer, tensor in owner.named_buffers(recurse=False):
            if tensor.is_meta and buffer == "position_ids":
                setattr(owner, buffer, torch.arange(tensor.shape[-1])[None])
    missing = [key for key, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if missing:
        raise ValueError(f"{name} has tensors that the checkpoint lacks: {', '.join(missing[:5])}")
    return model


def _inputs(asked: Asked) -> dict[str, Tensor]:
    ids = torch.tensor([list(asked.ids)])
    return {_PIXELS: torch.from_numpy(np.ascontiguousarray(asked.pixels)), _IDS: ids, _MASK: torch.ones_like(ids)}


def _match(model: Any, asked: Asked) -> Written:
    with torch.inference_mode():
        logits = model(**_inputs(asked)).itm_score
    return Written(probability=float(logits.softmax(-1)[0, 1]))


def _caption(model: Any, asked: Asked) -> Written:
    written = _decoded(model, asked)
    # The prompt without its end token, whose first token `generate` replaces.
    return Written(written.ids, len(asked.ids) - 1, margin=written.margin)


def _decoded(model: Any, asked: Asked) -> Written:
    """Greedy search, and the smallest distance between the logit of a chosen token and the next one's."""
    with torch.inference_mode():
        made = model.generate(
            **_inputs(asked),
            num_beams=1,
            do_sample=False,
            max_length=asked.max_length,
            min_length=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best: Sequence[Tensor] = [logits[0].topk(2).values for logits in made.logits]
    margin = min((float(pair[0] - pair[1]) for pair in best), default=float("inf"))
    return Written(tuple(map(int, made.sequences[0])), 0, margin=margin)
