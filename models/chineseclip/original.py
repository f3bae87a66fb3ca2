"""Whose code prepares inputs for a Chinese-CLIP checkpoint and computes its embeddings.

transformers has classes for checkpoints in its form. The authors' own package is a copy of OpenAI's image encoders and
of transformers' BERT, and their classes stand in for it: open_clip's `CLIP` and transformers' `BertModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from vlm_export.family import Array, Arrays, BuildOptions, Checkpoint, Part, Reference, WeightStore
from vlm_export.models.chineseclip.architecture import ChineseClipArchitecture, LibraryNames, stated_text
from vlm_export.models.clip.original import encoder, vision_config
from vlm_export.models.reading.image_processor import processor_files
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD
from vlm_export.models.reading.weights import float32, published_score
from vlm_export.original import Original, TorchvisionPipeline, TransformersOriginal

_TRANSFORM = TorchvisionPipeline(
    "image_transform of OFA-Sys/Chinese-CLIP cn_clip/clip/utils.py, by torchvision",
    "bicubic",
    crop=False,
    rgb_first=False,
    mean=IMAGE_MEAN,
    std=IMAGE_STD,
)
# open_clip builds no image encoder alone; this text encoder gets no weights.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 64, "heads": 1, "layers": 1}
_BERT = "bert."


def original(
    checkpoint: Checkpoint,
    architecture: ChineseClipArchitecture,
    parts: Sequence[Part],
    store: WeightStore,
    options: BuildOptions,
    library: LibraryNames,
) -> Original:
    """What the proof of the contract runs; `architecture` is as the checkpoint has it, before any option."""
    scale = published_score(checkpoint)
    classes = TransformersOriginal(library.model_type, library.image_class)
    if architecture.key_names == "huggingface":
        return Original(classes, classes, score=scale)
    vision, text = parts
    encoders = {text.name: partial(_bert, checkpoint, architecture, text, store)}
    # Other sizes are computed by this project alone: open_clip resamples positions only while it loads a file.
    if options.image_size is None and not options.dynamic_image_size:
        config = {
            "embed_dim": architecture.embed_dim,
            "quick_gelu": True,
            "vision_cfg": vision_config(architecture.vision),
            "text_cfg": _NO_TEXT,
        }
        encoders[vision.name] = partial(encoder, checkpoint, config, vision, store)
    images = classes if processor_files(checkpoint) else _TRANSFORM
    return Original(images, classes, encoders, "open_clip CLIP and transformers BertModel", scale)


def _bert(checkpoint: Checkpoint, architecture: ChineseClipArchitecture, part: Part, store: WeightStore) -> Reference:
    """`encode_text` of the authors' CLIP: the state of the first token through the projection."""
    from transformers import BertConfig, BertModel

    sizes = stated_text(architecture)
    config = BertConfig(
        **sizes,
        num_attention_heads=architecture.text.heads,
        layer_norm_eps=architecture.text.eps,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False).eval()
    weights = {key: float32(checkpoint.read(_BERT + key), store) for key in model.state_dict()}
    model.load_state_dict(weights, strict=True, assign=True)
    embeddings = model.embeddings
    embeddings.position_ids = torch.arange(architecture.text.positions)[None]
    embeddings.token_type_ids = torch.zeros((1, architecture.text.positions), dtype=torch.int64)
    projection = float32(checkpoint.read("text_projection"), store)

    def run(inputs: Arrays) -> dict[str, Array]:
        given = {name: torch.from_numpy(inputs[name]) for name in part.signature.input_names}
        with torch.inference_mode():
            embeds: Tensor = model(**given).last_hidden_state[:, 0] @ projection
        return {part.signature.output_names[0]: embeds.numpy()}

    return run
