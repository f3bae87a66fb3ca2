"""Text encoders of transformers in open_clip's models: BERT, RoBERTa and XLM-R, a pooler and a projection.

open_clip names them by Hub ids and reads their sizes there. Here the sizes of the ids that it trains with are data.

Sources: open_clip 3.3.0, `HFTextEncoder` in hf_model.py; transformers 5.23, models/{bert,roberta,xlm_roberta}; the
config.json of each id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm_export.errors import InputError, suggestion
from vlm_export.models.layers.bert import Bert, BertSizes, TextEncoder
from vlm_export.models.layers.bert_weights import bert_table
from vlm_export.models.openclip.config import FILE, OpenClipArchitecture
from vlm_export.models.reading.weights import Target, prefixed

Kind = Literal["bert", "roberta", "xlm-roberta"]


@dataclass(frozen=True)
class HfEncoder:
    """One text encoder of transformers.

    Attributes:
        kind: its `model_type`. RoBERTa's kinds count positions from the padding's id on.
        token_types: rows of the table of token types, of which the first is used.
        pad_id: what the encoder does not see.
    """

    kind: Kind
    sizes: BertSizes
    token_types: int
    pad_id: int

    @property
    def config_fields(self) -> dict[str, Any]:
        """What transformers' configuration class of this kind takes."""
        sizes = self.sizes
        return {
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "intermediate_size": sizes.hidden,
            "max_position_embeddings": sizes.positions,
            "type_vocab_size": self.token_types,
            "layer_norm_eps": sizes.eps,
            "pad_token_id": self.pad_id,
        }


def _base(kind: Kind, vocab_size: int, *, large: bool = False) -> HfEncoder:
    width, layers = (1024, 24) if large else (768, 12)
    roberta = kind != "bert"
    positions, eps = (514, 1e-5) if roberta else (512, 1e-12)
    sizes = BertSizes(width, layers, width // 64, 4 * width, vocab_size, positions, 0, eps)
    return HfEncoder(kind, sizes, token_types=1 if roberta else 2, pad_id=1 if roberta else 0)


HF_ENCODERS: dict[str, HfEncoder] = {
    "roberta-base": _base("roberta", 50265),
    "roberta-large": _base("roberta", 50265, large=True),
    "xlm-roberta-base": _base("xlm-roberta", 250002),
    "xlm-roberta-large": _base("xlm-roberta", 250002, large=True),
    "bert-base-uncased": _base("bert", 30522),
    "bert-large-uncased": _base("bert", 30522, large=True),
    "bert-base-cased": _base("bert", 28996),
    "bert-base-multilingual-cased": _base("bert", 119547),
    "bert-base-chinese": _base("bert", 21128),
}
_OWNERS = ("FacebookAI/", "google-bert/")


def hf_encoder(architecture: OpenClipArchitecture) -> HfEncoder | None:
    """The encoder of transformers that the config names; None where the text encoder is open_clip's own.

    Raises:
        InputError: it is none of these.
    """
    stated = architecture.text_cfg.hf_model_name
    if not stated:
        return None
    name = stated
    for owner in _OWNERS:
        name = name.removeprefix(owner)
    if name not in HF_ENCODERS:
        raise InputError(
            "open_clip's config names a text encoder of transformers that is not computed here",
            where=f"{FILE}: model_cfg.text_cfg.hf_model_name",
            expected=", ".join(HF_ENCODERS),
            got=f"{stated!r:.200}",
            fix=suggestion(name, tuple(HF_ENCODERS)) or "this checkpoint cannot be exported",
        )
    return HF_ENCODERS[name]


def text_pad_id(architecture: OpenClipArchitecture) -> int:
    """What texts are filled up with."""
    encoder = hf_encoder(architecture)
    return architecture.text_cfg.pad_id if encoder is None else encoder.pad_id


def text_vocab_size(architecture: OpenClipArchitecture) -> int:
    """Rows of the token embedding."""
    encoder = hf_encoder(architecture)
    return architecture.text_cfg.vocab_size if encoder is None else encoder.sizes.vocab_size


class HfText(nn.Module):
    """input_ids int64 (B, T) → text_embeds float32 (B, D), not normalised; the padding's id is not seen."""

    def __init__(self, encoder: HfEncoder, architecture: OpenClipArchitecture) -> None:
        super().__init__()
        config, width = architecture.text_cfg, encoder.sizes.width
        self.pad_id, self.pool = encoder.pad_id, pooler_of(encoder, architecture)
        bert = Bert(encoder.sizes, encoder.token_types, None if encoder.kind == "bert" else encoder.pad_id)
        self.encoder = TextEncoder(bert)
        if self.pool == "cls_pooler":
            self.pooler = nn.Linear(width, width)
        self.projection = nn.Sequential(*_projection(config.hf_proj_type, width, architecture.embed_dim))

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = (input_ids != self.pad_id).to(torch.int64)
        states: Tensor = self.encoder(input_ids, mask)
        embeds: Tensor = self.projection(self._pooled(states, mask))
        return embeds

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.pool == "mean_pooler":
            weights = mask.to(states.dtype).unsqueeze(-1)
            return (states * weights).sum(dim=1) / weights.sum(dim=1)
        first = states[:, 0]
        return torch.tanh(self.pooler(first)) if self.pool == "cls_pooler" else first


def pooler_of(encoder: HfEncoder, architecture: OpenClipArchitecture) -> str:
    """The pooler that the config names, or open_clip's own choice for the kind, which has no layer of its own."""
    own = "cls_last_hidden_state_pooler" if encoder.kind == "bert" else "mean_pooler"
    return architecture.text_cfg.hf_pooler_type or own


def _projection(kind: str | None, width: int, output: int) -> list[nn.Module]:
    if kind == "linear":
        return [nn.Linear(width, output, bias=False)]
    if kind == "mlp":
        hidden = (width + output) // 2
        return [nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, output, bias=False)]
    if width != output:
        raise InputError(
            "a text encoder without a projection has another width than the embedding",
            where=f"{FILE}: model_cfg.text_cfg.hf_proj_type",
            expected=f"linear or mlp, or an embed_dim of {width}",
            got=f"null, with an embed_dim of {output}",
        )
    return []


def hf_text_table(encoder: HfEncoder, architecture: OpenClipArchitecture) -> Mapping[str, Target]:
    """The text encoder's keys, without "text."."""
    table = prefixed(bert_table(encoder.sizes.layers), "transformer.", "encoder.")
    # Earlier versions of transformers saved it.
    table["transformer.embeddings.token_type_ids"] = None
    if pooler_of(encoder, architecture) == "cls_pooler":
        table |= {f"transformer.pooler.dense.{name}": f"pooler.{name}" for name in ("weight", "bias")}
    kind = architecture.text_cfg.hf_proj_type
    if kind == "linear":
        table["proj.weight"] = "projection.0.weight"
    elif kind == "mlp":
        table |= {f"proj.{i}.weight": f"projection.{i}.weight" for i in (0, 2)}
    return table


def original_hf_text(encoder: HfEncoder, architecture: OpenClipArchitecture) -> nn.Module:
    """open_clip's own module on the meta device, with the tables that transformers' code computes."""
    import transformers
    from open_clip.hf_model import HFTextEncoder

    classes = {"bert": "BertConfig", "roberta": "RobertaConfig", "xlm-roberta": "XLMRobertaConfig"}
    config = getattr(transformers, classes[encoder.kind])(**encoder.config_fields)
    text, pooler = architecture.text_cfg, pooler_of(encoder, architecture)
    with torch.device("meta"):
        tower: nn.Module = HFTextEncoder(
            encoder.kind, architecture.embed_dim, config=config, pooler_type=pooler, proj_type=text.hf_proj_type
        )
    model: Any = tower.transformer
    if pooler != "cls_pooler":
        # Without a config it asks transformers for none: `add_pooling_layer=False`.
        model.pooler = None
    shape = (1, encoder.sizes.positions)
    model.embeddings.position_ids = torch.arange(shape[1]).expand(shape)
    model.embeddings.token_type_ids = torch.zeros(shape, dtype=torch.long)
    return tower
