"""transformers' own class of a dual encoder on a checkpoint's weights, as the Reference of its parts.

Facts of transformers 5.23: `get_image_features` and `get_text_features` of its dual encoders give the projected
embedding as `pooler_output`; its classes of one tower name their output as the part does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_export.family import Array, Arrays, Checkpoint, Part, Reference
from vlm_export.models.reading.weights import unboxed


def transformers_model(
    checkpoint: Checkpoint, class_name: str, config: Mapping[str, Any], renamed: tuple[str, str] = ("", "")
) -> Any:
    """The class with the checkpoint's weights, loaded strictly.

    Args:
        config: of checked sizes alone: whatever else the checkpoint's own config states may be made to hurt.
        renamed: part of the keys in files, and what newer releases of the class have in its place.
    """
    import transformers

    kind = getattr(transformers, class_name)
    built = kind.config_class.from_dict(dict(config))
    built._attn_implementation = "eager"
    with torch.device("meta"):
        model = kind(built).eval()
    own = set(model.state_dict())
    weights = {
        key if key in own else key.replace(*renamed): checkpoint.read(key).float()
        for key in checkpoint.tensors
        if not key.endswith("position_ids")
    }
    model.load_state_dict(unboxed(weights, model), strict=True, assign=True)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name == "position_ids":
                setattr(module, name, torch.arange(buffer.shape[-1])[None])
            elif name == "token_type_ids":
                setattr(module, name, torch.zeros(buffer.shape, dtype=torch.int64))
    return model


def reference_from_encoder(model: Any, part: Part, image_size: int | None) -> Reference:
    """What the class computes for a part of two encoders, or of the one that it is.

    Args:
        image_size: edge of the square that the checkpoint's image encoder takes; at another one positions are
            resampled. None without an image encoder, and where images have any size.
    """
    is_pair = hasattr(model, "get_image_features")
    encode = model
    if is_pair:
        encode = model.get_image_features if part.name == "vision" else model.get_text_features
    has_size = part.name == "vision" and image_size is not None
    is_resized = has_size and part.signature.inputs[0].shape[2:] != (image_size, image_size)
    other_size = {"interpolate_pos_encoding": True} if is_resized else {}
    output = part.signature.output_names[0]

    def run(inputs: Arrays) -> dict[str, Array]:
        given = {name: torch.from_numpy(inputs[name]) for name in part.signature.input_names}
        with torch.inference_mode():
            features = encode(**given, **other_size)
        if not is_pair:
            features = features[output]
        # transformers 4 returned the tensor itself.
        tensor: Tensor = features if isinstance(features, Tensor) else features.pooler_output
        return {output: tensor.numpy()}

    return run
