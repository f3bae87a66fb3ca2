"""What the proof of the contract runs for Jina CLIP, whose own code is remote and never run.

Its image processor's transform is a copy of open_clip's, which stands in for it. So do other libraries' own classes for
its encoders: timm's `Eva`, and transformers' `JinaEmbeddingsV3Model`, or its `BertModel` with timm's `GluMlp` and the
slopes of its BLOOM for JinaBERT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vlm_export.family import Array, Arrays, Checkpoint, Part, Reference, WeightStore
from vlm_export.models.jinaclip.architecture import (
    TEXT,
    VISION,
    XLM_TEXT,
    JinaClipArchitecture,
    JinaTextSizes,
    stated_sizes,
)
from vlm_export.models.openclip.towers import fill_computed_tables
from vlm_export.models.reading.weights import float32, published_score
from vlm_export.original import OpenClipOriginal, Original, TransformersOriginal

_Names: TypeAlias = Mapping[str, str | tuple[str, ...]]
# The original's names of a block's layers → timm's.
_EVA_NAMES: _Names = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    "attn.inner_attn_ln": "attn.norm",
    "mlp.ffn_ln": "mlp.norm",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w3": "mlp.fc2",
}
# The text encoders' names → transformers'; a packed projection becomes three.
_XLM_NAMES: _Names = {
    "emb_ln.": "embeddings.LayerNorm.",
    "encoder.layers.": "layers.",
    "mixer.Wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixer.out_proj": "self_attn.o_proj",
    "norm1": "post_attention_layernorm",
    "norm2": "post_mlp_layernorm",
}
_BERT_NAMES: _Names = {
    "emb_ln.": "embeddings.LayerNorm.",
    "encoder.layers.": "encoder.layer.",
    "mixer.Wqkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "mixer.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "norm2": "output.LayerNorm",
    "mlp.gated_layers": "intermediate.fc1",
    "mlp.wo": "intermediate.fc2",
}
_MODEL_TYPES = {"jina-bert": "bert", "jina-xlm-roberta": "xlm-roberta"}


def original(
    checkpoint: Checkpoint,
    architecture: JinaClipArchitecture,
    preprocess: Mapping[str, Any],
    parts: Sequence[Part],
    store: WeightStore,
) -> Original:
    """What the proof of the contract runs.

    Args:
        checkpoint: with its adapter merged.
        preprocess: the fields of preprocessor_config.json.
    """
    vision, text = parts
    known = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    stated = {key: preprocess[key] for key in known if preprocess.get(key) is not None}
    kind = architecture.text.kind
    return Original(
        OpenClipOriginal(stated, rgb_first=True),
        TransformersOriginal(_MODEL_TYPES[kind], ""),
        {
            vision.name: partial(_vision, checkpoint, architecture, vision, store),
            text.name: partial(_text, checkpoint, architecture, text, store),
        },
        f"timm Eva and transformers {'BertModel' if kind == 'jina-bert' else 'JinaEmbeddingsV3Model'}",
        published_score(checkpoint),
    )


def _vision(checkpoint: Checkpoint, architecture: JinaClipArchitecture, part: Part, store: WeightStore) -> Reference:
    """timm's `Eva` with the checkpoint's weights."""
    from timm.models.eva import Eva

    sizes = architecture.vision
    with torch.device("meta"):
        model = Eva(
            img_size=sizes.image_size,
            patch_size=sizes.patch_size,
            num_classes=0,
            global_pool="token",
            embed_dim=sizes.width,
            depth=sizes.layers,
            num_heads=sizes.heads,
            mlp_ratio=sizes.hidden / sizes.width,
            qkv_fused=False,
            swiglu_mlp=True,
            scale_mlp=True,
            scale_attn_inner=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(sizes.reference_grid, sizes.reference_grid),
        ).eval()
    fill_computed_tables(model)
    _load(model, checkpoint, VISION, _EVA_NAMES, store)

    def encode(pixel_values: Tensor) -> Tensor:
        embeds: Tensor = model(pixel_values)
        return embeds[:, : architecture.embed_dim]

    return _reference(part, encode)


def _text(checkpoint: Checkpoint, architecture: JinaClipArchitecture, part: Part, store: WeightStore) -> Reference:
    """transformers' class with the checkpoint's weights, and the mean of the tokens that are not padding."""
    sizes = architecture.text
    model: Any = _bert(sizes, architecture.max_length) if sizes.kind == "jina-bert" else _xlm_roberta(sizes)
    if sizes.kind == "jina-bert":
        _load(model, checkpoint, TEXT, _BERT_NAMES, store)
    else:
        _load(model, checkpoint, XLM_TEXT, _XLM_NAMES, store)

    def encode(input_ids: Tensor) -> Tensor:
        seen = input_ids != sizes.pad_id
        mask = _alibi(seen, sizes.heads) if sizes.kind == "jina-bert" else seen.long()
        types = torch.zeros_like(input_ids)
        states: Tensor = model(input_ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        weights = seen.unsqueeze(-1).float()
        return ((states * weights).sum(1) / weights.sum(1))[:, : architecture.embed_dim]

    return _reference(part, encode)


def _xlm_roberta(sizes: JinaTextSizes) -> Any:
    from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

    config = JinaEmbeddingsV3Config(
        **_common(sizes),
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rotary_base},
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = JinaEmbeddingsV3Model(config, add_pooling_layer=False).eval()
    model.rotary_emb = type(model.rotary_emb)(config)
    return model


def _bert(sizes: JinaTextSizes, positions: int) -> Any:
    """transformers' `BertModel` without positions, with timm's `GluMlp` between its norms."""
    from timm.layers import GluMlp
    from transformers import BertConfig, BertModel

    config = BertConfig(**_common(sizes), max_position_embeddings=positions, attn_implementation="eager")
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False).eval()
        for layer in model.encoder.layer:
            layer.intermediate = GluMlp(
                sizes.width, 2 * sizes.hidden, sizes.width, act_layer=nn.GELU, bias=(False, True), gate_last=False
            )
            layer.output.dense = nn.Identity()
    model.embeddings.position_embeddings.weight = nn.Parameter(torch.zeros(1, sizes.width).expand(positions, -1))
    model.embeddings.position_ids = torch.arange(positions)[None]
    return model.eval()


def _common(sizes: JinaTextSizes) -> dict[str, Any]:
    return {
        **stated_sizes(sizes),
        "num_attention_heads": sizes.heads,
        "layer_norm_eps": sizes.eps,
        "pad_token_id": sizes.pad_id,
    }


def _alibi(seen: Tensor, heads: int) -> Tensor:
    """What is added to the scores, float32 (B, H, T, T): ALiBi in both directions, and padding hidden."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    # At the second of two tokens it is the slope itself.
    slopes = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float32)[:, 0, 1]
    positions = torch.arange(seen.shape[1])
    distances = (positions[:, None] - positions).abs()
    hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    bias: Tensor = hidden[:, None, None] - slopes[:, None, None] * distances
    return bias


def _load(
    model: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    names: _Names,
    store: WeightStore,
) -> None:
    """Gives a library's model the checkpoint's tensors, whose names begin with `prefix` and are renamed by `names`."""
    wanted, weights = set(model.state_dict()), dict[str, Tensor]()
    for key in checkpoint.tensors:
        renamed = _renamed(key.removeprefix(prefix), names) if key.startswith(prefix) else []
        # What remains is a pooler that no text is read at.
        if renamed and set(renamed) <= wanted:
            tensor = float32(checkpoint.read(key), store)
            weights |= dict(zip(renamed, tensor.chunk(len(renamed)), strict=True))
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in weights and not tensor.is_meta}
    model.load_state_dict({**kept, **weights}, strict=True, assign=True)


def _renamed(name: str, names: _Names) -> list[str]:
    """The library's names for a tensor: one, or those of its equal blocks of rows."""
    found = [name]
    for old, new in names.items():
        options = (new,) if isinstance(new, str) else new
        found = [each.replace(old, to) for each in found for to in (options if old in each else options[:1])]
    return found


def _reference(part: Part, encode: Any) -> Reference:
    (given,), (made,) = part.signature.input_names, part.signature.output_names

    def run(inputs: Arrays) -> dict[str, Array]:
        with torch.inference_mode():
            embeds: Tensor = encode(torch.from_numpy(inputs[given]))
        return {made: embeds.numpy()}

    return run
