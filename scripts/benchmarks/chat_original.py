"""nanoVLM in eager PyTorch: transformers' SigLIP and Llama around nanoVLM's projector, with the published weights.

nanoVLM has no class in transformers, but its two backbones are transformers' own, with a table of key names between
them (huggingface/nanoVLM, models/vision_transformer.py and language_model.py, `from_pretrained`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from vlm_export.family import Checkpoint

_VISION, _DECODER = "vision_encoder.", "decoder."
_VISION_NAMES = {
    "patch_embedding.conv": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    ".ln1.": ".layer_norm1.",
    ".ln2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    "layer_norm.": "post_layernorm.",
}
_DECODER_NAMES = {
    "blocks.": "layers.",
    ".attn.out_proj.": ".self_attn.o_proj.",
    ".attn.": ".self_attn.",
    ".norm1.": ".input_layernorm.",
    ".norm2.": ".post_attention_layernorm.",
}


class OriginalNanoVlm(nn.Module):
    """Image and prompt to token ids, as nanoVLM's `generate`: greedy, an image's tokens before the prompt's.

    Args:
        checkpoint: in nanoVLM's published format, with its `config.json`.
        cached: keep keys and values between tokens; nanoVLM-222M's own code computes the whole text for each.
    """

    def __init__(self, checkpoint: Checkpoint, *, cached: bool) -> None:
        super().__init__()
        config = dict(checkpoint.config or {})
        self.cached, self.factor = cached, int(config["mp_pixel_shuffle_factor"])
        self.vision = SiglipVisionModel(_vision_config(config)).eval()
        self.language = LlamaForCausalLM(_language_config(config)).eval()
        width = int(config["vit_hidden_dim"]) * self.factor**2
        self.projector = nn.Linear(width, int(config["lm_hidden_dim"]), bias=False)
        _load(self.vision, _vision_weights(checkpoint))
        _load(self.language, _language_weights(checkpoint))
        self.projector.load_state_dict({"weight": checkpoint.read("MP.proj.weight")})

    def features(self, pixel_values: Tensor) -> Tensor:
        """float32 (B, 3, S, S) → (B, L, D)."""
        hidden = self.vision(pixel_values=pixel_values).last_hidden_state
        batch, tokens, width = hidden.shape
        side, factor = int(tokens**0.5), self.factor
        tiles = hidden.reshape(batch, side // factor, factor, side // factor, factor, width).transpose(2, 3)
        projected: Tensor = self.projector(tiles.reshape(batch, tokens // factor**2, width * factor**2))
        return projected

    def first_logits(self, pixel_values: Tensor, ids: Tensor) -> tuple[Tensor, Any, Tensor]:
        """The logits after the prompt, the cache, and what was fed: an image's tokens, then the prompt's."""
        embeds = torch.cat([self.features(pixel_values), self.language.get_input_embeddings()(ids)], dim=1)
        out = self.language(inputs_embeds=embeds, use_cache=self.cached, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values, embeds

    def next_logits(self, token: Tensor, cache: Any, fed: Tensor) -> tuple[Tensor, Any, Tensor]:
        """The logits after one more token of each row, with or without a cache."""
        new = self.language.get_input_embeddings()(token)
        fed = torch.cat([fed, new], dim=1)
        given = new if self.cached else fed
        out = self.language(inputs_embeds=given, past_key_values=cache, use_cache=self.cached, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values, fed


def _vision_config(config: Mapping[str, Any]) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=config["vit_hidden_dim"],
        intermediate_size=config["vit_inter_dim"],
        num_hidden_layers=config["vit_n_blocks"],
        num_attention_heads=config["vit_n_heads"],
        image_size=config["vit_img_size"],
        patch_size=config["vit_patch_size"],
        layer_norm_eps=config["vit_ln_eps"],
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )


def _language_config(config: Mapping[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=config["lm_hidden_dim"],
        intermediate_size=config["lm_inter_dim"],
        num_hidden_layers=config["lm_n_blocks"],
        num_attention_heads=config["lm_n_heads"],
        num_key_value_heads=config["lm_n_kv_heads"],
        vocab_size=config["lm_vocab_size"],
        rms_norm_eps=config["lm_rms_eps"],
        max_position_embeddings=config["lm_max_position_embeddings"],
        rope_parameters={"rope_type": "default", "rope_theta": float(config["lm_re_base"])},
        tie_word_embeddings=config["lm_tie_weights"],
    )


def _vision_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for key in checkpoint.tensors:
        if not key.startswith(_VISION):
            continue
        name = _renamed(key.removeprefix(_VISION), _VISION_NAMES)
        if ".qkv_proj." in name:
            stem, kind = name.split(".attn.qkv_proj.")
            for letter, rows in zip("qkv", checkpoint.read(key).chunk(3), strict=True):
                weights[f"{stem}.self_attn.{letter}_proj.{kind}"] = rows
        elif name.endswith("position_embedding"):
            weights["embeddings.position_embedding.weight"] = checkpoint.read(key)[0]
        else:
            weights[name] = checkpoint.read(key)
    return weights


def _language_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for key in checkpoint.tensors:
        name = key.removeprefix(_DECODER)
        if not key.startswith(_DECODER) or name == "rotary_embd.inv_freq":
            continue
        if name == "head.weight":
            weights["lm_head.weight"] = checkpoint.read(key)
        elif name == "token_embedding.weight":
            weights["model.embed_tokens.weight"] = checkpoint.read(key)
        else:
            weights["model." + _renamed(name, _DECODER_NAMES)] = checkpoint.read(key)
    weights.setdefault("model.embed_tokens.weight", weights["lm_head.weight"])
    return weights


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into a model that was built with its own, as nanoVLM's `from_pretrained` does."""
    known = module.state_dict().keys()
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in known) else ""
    module.load_state_dict({prefix + key: value for key, value in weights.items()})
