"""Published keys → this family's modules, and the adapters that lie beside the text encoder's weights.

Sources: jinaai/jina-clip-implementation eva_model.py and hf_model.py; jinaai/jina-bert-flash-implementation (b78d159)
convert_v2_weights.py and mlp.py; jinaai/xlm-roberta-flash-implementation modeling_lora.py (`LoRAParametrization`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from vlm_export.errors import InputError
from vlm_export.family import Checkpoint, StoredTensorInfo
from vlm_export.models.jinaclip.architecture import (
    LORA_A,
    LORA_B,
    ORIGINAL,
    TEXT,
    VISION,
    XLM_TEXT,
    JinaClipArchitecture,
    LoraForm,
)
from vlm_export.models.reading.weights import (
    Rows,
    Target,
    Unsqueezed,
    WeightTable,
    origins_of,
    prefixed,
    published_tensors,
    repeat,
    set_origins,
)
from vlm_export.text_display import Lines, shown

ROOTS = ("vision_model", "text_model", "logit_scale", "visual_projection", "text_projection")
_PAIR = ("weight", "bias")
_STEM: WeightTable = {
    "cls_token": Unsqueezed("class_embedding", 2),
    "pos_embed": Unsqueezed("position_embedding"),
    **{f"patch_embed.proj.{name}": f"patches.conv.{name}" for name in _PAIR},
    **{f"norm.{name}": f"norm.{name}" for name in _PAIR},
}
# Keys have no bias; the rows that no key fills stay zero.
_BLOCK: WeightTable = {
    **{f"attn.{name}_proj.weight": Rows("attn.qkv.weight", i, 3) for i, name in enumerate("qkv")},
    "attn.q_bias": Rows("attn.qkv.bias", 0, 3),
    "attn.v_bias": Rows("attn.qkv.bias", 2, 3),
    **{f"attn.inner_attn_ln.{name}": f"attn.norm.{name}" for name in _PAIR},
    **{f"attn.proj.{name}": f"attn.out.{name}" for name in _PAIR},
    **{f"norm{i}.{name}": f"norm{i}.{name}" for i in (1, 2) for name in _PAIR},
    **{f"mlp.w1.{name}": f"mlp.gate.{name}" for name in _PAIR},
    **{f"mlp.w2.{name}": f"mlp.up.{name}" for name in _PAIR},
    **{f"mlp.ffn_ln.{name}": f"mlp.norm.{name}" for name in _PAIR},
    **{f"mlp.w3.{name}": f"mlp.down.{name}" for name in _PAIR},
}
_EMBEDDINGS: WeightTable = {
    "embeddings.word_embeddings.weight": "word.weight",
    "embeddings.token_type_embeddings.weight": "token_type_embedding",
    **{f"emb_ln.{name}": f"norm.{name}" for name in _PAIR},
    # Texts are the mean of their tokens: this layer of some checkpoints is not asked.
    **{f"pooler.dense.{name}": None for name in _PAIR},
}
_LAYER: WeightTable = {
    **{f"mixer.Wqkv.{name}": f"attention.qkv.{name}" for name in _PAIR},
    **{f"mixer.out_proj.{name}": f"attention.out.{name}" for name in _PAIR},
    **{f"norm{i}.{name}": f"norm{i}.{name}" for i in (1, 2) for name in _PAIR},
}
_BERT_LAYER: WeightTable = {
    **_LAYER,
    "mlp.gated_layers.weight": "mlp.gate_up.weight",
    **{f"mlp.wo.{name}": f"mlp.down.{name}" for name in _PAIR},
    # Tables of ALiBi, where a release saved them; they are computed.
    "mixer.inner_attn.linear_biases": None,
    "mixer.inner_attn.alibi_slopes": None,
}
_XLM_LAYER: WeightTable = {**_LAYER, **{f"mlp.fc{i}.{name}": f"mlp.fc{i}.{name}" for i in (1, 2) for name in _PAIR}}
# Their adapters are stored the other way round: W + A B.
_TABLES = (".word_embeddings", ".token_type_embeddings")


def weight_table(architecture: JinaClipArchitecture) -> dict[str, Target]:
    """All keys of a checkpoint whose adapters are merged."""
    is_bert = architecture.text.kind == "jina-bert"
    layer = prefixed(_BERT_LAYER if is_bert else _XLM_LAYER, "encoder.layers.{i}.", "layers.{i}.")
    text = {**_EMBEDDINGS, **repeat(layer, architecture.text.layers)}
    blocks = repeat(prefixed(_BLOCK, "blocks.{i}.", "blocks.{i}."), architecture.vision.layers)
    return {
        **prefixed({**_STEM, **blocks}, VISION, "vision."),
        **prefixed(text, TEXT if is_bert else XLM_TEXT, "text."),
        "logit_scale": "logit_scale",
    }


def with_merged_adapter(checkpoint: Checkpoint, lora: LoraForm | None) -> Checkpoint:
    """The checkpoint with one tensor `X.weight` for each weight and its adapters, merged in float32 as it is read.

    Raises:
        InputError: matrices of an adapter are missing, or do not fit their weight and what config.json says of them.
    """
    if lora is None:
        return checkpoint
    stems = [key.removesuffix(ORIGINAL) for key in checkpoint.tensors if key.endswith(ORIGINAL)]
    if problems := [text for stem in stems for text in _problems(checkpoint.tensors, stem, lora)]:
        raise InputError(
            "the adapters of the text encoder do not fit their weights",
            where=checkpoint.source,
            expected=f"{len(lora.tasks)} adapters of rank {lora.rank} for each weight, as config.json says",
            got=Lines.of(problems[:10]),
            fix="save the model's whole state dict, and take the config.json that was saved with it",
        )
    read, whole = checkpoint.read, {f"{stem}.weight": stem for stem in stems}
    merged = {name for stem in stems for name in (stem + ORIGINAL, stem + LORA_A, stem + LORA_B)}
    tensors = {key: info for key, info in checkpoint.tensors.items() if key not in merged}
    for name, stem in whole.items():
        info = checkpoint.tensors[stem + ORIGINAL]
        tensors[name] = info if lora.task is None else StoredTensorInfo(info.shape, "float32")

    def read_merged(key: str) -> Tensor:
        if key not in whole:
            return read(key)
        stem = whole[key]
        return read(stem + ORIGINAL) if lora.task is None else _merged(checkpoint, stem, lora)

    computed = frozenset() if lora.task is None else frozenset(whole)
    return replace(checkpoint, tensors=tensors, read=read_merged, computed=checkpoint.computed | computed)


def _merged(checkpoint: Checkpoint, stem: str, lora: LoraForm) -> Tensor:
    assert lora.task is not None
    index = lora.tasks.index(lora.task)
    a, b = (checkpoint.read(stem + end)[index].float() for end in (LORA_A, LORA_B))
    # In place: a table of tokens is a gigabyte.
    added = (a @ b if stem.endswith(_TABLES) else b @ a).mul_(lora.alpha / lora.rank)
    return added.add_(checkpoint.read(stem + ORIGINAL))


def _problems(tensors: Mapping[str, StoredTensorInfo], stem: str, lora: LoraForm) -> list[str]:
    for end, expected in _adapter_shapes(tensors[stem + ORIGINAL].shape, stem, lora).items():
        info = tensors.get(stem + end)
        if info is None or info.shape != expected:
            got = "no such tensor" if info is None else str(info.shape)
            return [f"{shown(stem + end)}: expected {expected}, got {got}"]
    return []


def _adapter_shapes(shape: tuple[int, ...], stem: str, lora: LoraForm) -> dict[str, tuple[int, ...]]:
    tasks, (rows, columns) = len(lora.tasks), shape
    if stem.endswith(_TABLES):
        return {LORA_A: (tasks, rows, lora.rank), LORA_B: (tasks, lora.rank, columns)}
    return {LORA_A: (tasks, lora.rank, columns), LORA_B: (tasks, rows, lora.rank)}


def note_adapter(text: nn.Module, lora: LoraForm | None, checkpoint: Checkpoint) -> None:
    """Notes for the ledger of weights which stored tensors a merged weight is made of."""
    if lora is None:
        return
    how_merged = "without an adapter" if lora.task is None else f"with the adapter {lora.task}"
    for tensor in text.state_dict(keep_vars=True).values():
        origins = []
        for key, how in origins_of(tensor):
            stem = key.removesuffix(".weight")
            parts = [stem + end for end in (ORIGINAL, LORA_A, LORA_B)] if lora.task else [stem + ORIGINAL]
            is_merged = parts[0] in checkpoint.tensors
            origins += [(part, how_merged) for part in parts] if is_merged else [(key, how)]
        set_origins(tensor, tuple(origins))


def stored_tensors(encoders: nn.Module, architecture: JinaClipArchitecture) -> dict[str, StoredTensorInfo]:
    """Keys, shapes and dtype of a checkpoint as the publisher saves it."""
    lora = architecture.text.lora
    plain = published_tensors(encoders, weight_table(architecture), "float32" if lora is None else "bfloat16")
    if lora is None:
        return plain
    found: dict[str, StoredTensorInfo] = {}
    for key, info in plain.items():
        stem = key.removesuffix(".weight")
        if not key.startswith(XLM_TEXT) or key == stem or len(info.shape) != 2:
            found[key] = info
            continue
        found[stem + ORIGINAL] = info
        for end, shape in _adapter_shapes(info.shape, stem, lora).items():
            found[stem + end] = StoredTensorInfo(shape, info.dtype)
    return found
