"""The encoders: open_clip's own vision transformer, models of timm, and the text encoders.

Source: open_clip 3.3.0, `VisionTransformer`, `AttentionalPooler` and `TextTransformer` in transformer.py, `TimmModel`
in timm_model.py.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from vlm_export.errors import InputError
from vlm_export.models.layers.blocks import CrossAttention, KeyValueProjection, ScaledBlock, meta_modules
from vlm_export.models.layers.modified_resnet import ModifiedResNet
from vlm_export.models.layers.text_transformer import TextForm, TextPool, TextTransformer
from vlm_export.models.layers.vit import VisionTransformer, VitForm
from vlm_export.models.openclip.config import FILE, OpenClipArchitecture, TextConfig
from vlm_export.models.openclip.hf_text import HfText, hf_encoder
from vlm_export.models.reading.weights import origins_of, set_origins

_POOLS: dict[str, TextPool] = {"argmax": "highest_id", "eos": "end_token", "first": "first", "last": "last"}


class AttentionalPooler(nn.Module):
    """Tokens float32 (B, T, width) → float32 (B, D): learned queries attend to all tokens.

    The original computes all its queries and takes the first, or the mean of the others.
    """

    def __init__(self, queries: int, width: int, output: int, heads: int, eps: float, *, averages: bool) -> None:
        super().__init__()
        self.averages = averages
        self.query = nn.Parameter(torch.empty(queries, output))
        self.norm_query = nn.LayerNorm(output)
        self.norm_states = nn.LayerNorm(width)
        self.attention = CrossAttention(output, heads)
        self.keys_values = KeyValueProjection(output, width, heads)
        self.norm = nn.LayerNorm(output, eps=eps)

    def forward(self, tokens: Tensor) -> Tensor:
        key, value = self.keys_values(self.norm_states(tokens))
        wanted = self.query[1:] if self.averages else self.query[:1]
        queries = self.norm_query(wanted).expand(tokens.shape[0], -1, -1)
        pooled: Tensor = self.norm(self.attention(queries, key, value)).mean(dim=1)
        return pooled


class VisionTower(VisionTransformer):
    """pixel_values float32 (B, 3, S, S), normalised → image_embeds float32 (B, D), not normalised."""

    def __init__(self, architecture: OpenClipArchitecture) -> None:
        config = architecture.vision_cfg
        assert isinstance(config.layers, int)
        form = VitForm(
            width=config.width,
            layers=config.layers,
            heads=config.width // config.head_width,
            hidden=int(config.width * config.mlp_ratio),
            patch_size=config.patch_edge,
            grid=config.image_edge // config.patch_edge,
            activation=config.activation(architecture.quick_gelu),
            eps=config.eps,
            patch_bias=False,
            norm_first=not config.no_ln_pre,
            antialias=True,
        )
        super().__init__(form)
        self.averages, self.norm_last = config.pool_type == "avg", config.final_ln_after_pool
        if config.ls_init_value is not None:
            sizes = form.width, form.heads, form.hidden, form.activation, form.eps
            self.blocks = nn.ModuleList(ScaledBlock(*sizes) for _ in range(form.layers))
        pooled = config.width
        if config.attentional_pool:
            pooled = architecture.embed_dim
            # It normalises the pooled states itself, with the weights of ln_post.
            del self.norm_post
            self.pooler = AttentionalPooler(
                config.attn_pooler_queries,
                config.width,
                pooled,
                config.attn_pooler_heads,
                form.eps,
                averages=self.averages,
            )
        self.projection = nn.Parameter(torch.empty(pooled, architecture.embed_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeds: Tensor = self._pooled(self.encode(pixel_values)) @ self.projection
        return embeds

    def _pooled(self, tokens: Tensor) -> Tensor:
        if hasattr(self, "pooler"):
            return cast(Tensor, self.pooler(tokens))
        if not self.averages:
            # The norm acts on each token alone.
            return cast(Tensor, self.norm_post(tokens[:, 0]))
        if self.norm_last:
            return cast(Tensor, self.norm_post(tokens[:, 1:].mean(dim=1)))
        return cast(Tensor, self.norm_post(tokens[:, 1:]).mean(dim=1))


class OpenClipEncoders(nn.Module):
    """Both encoders and the numbers of the score, as one module to load weights into."""

    def __init__(self, architecture: OpenClipArchitecture) -> None:
        super().__init__()
        self.vision = _vision(architecture)
        encoder = hf_encoder(architecture)
        self.text = TextTransformer(text_form(architecture)) if encoder is None else HfText(encoder, architecture)
        self.logit_scale = nn.Parameter(torch.empty(()))
        if architecture.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.empty(()))


def build_encoders(architecture: OpenClipArchitecture) -> OpenClipEncoders:
    """The modules on the meta device: shapes without weights; tables that code computes are filled.

    Raises:
        InputError: the installed timm does not have the model.
    """
    with meta_modules():
        encoders = OpenClipEncoders(architecture)
    fill_computed_tables(encoders)
    return encoders


def fill_computed_tables(module: nn.Module) -> None:
    """Computes timm's tables, such as those of rotary positions, of a module that was built on the meta device.

    Raises:
        InputError: timm does not say how a module computes its tables.
    """
    for owner in module.modules():
        tables = {name: owner._buffers[name] for name in owner._non_persistent_buffers_set}
        missing = {name: table for name, table in tables.items() if table is not None and table.is_meta}
        if not missing:
            continue
        compute = getattr(owner, "init_non_persistent_buffers", None)
        if compute is None:
            raise InputError(
                "this image encoder has tables that its code computes, and timm has no function for that",
                where=f"{FILE}: model_cfg.vision_cfg.timm_model_name",
                expected="init_non_persistent_buffers, as timm's other modules have it",
                got=f"{type(owner).__name__}: {', '.join(missing)}",
                fix="this checkpoint cannot be exported",
            )
        for name, table in missing.items():
            owner._buffers[name] = torch.empty_like(table, device="cpu")
        compute()


def reparameterise(tower: nn.Module) -> None:
    """Merges the branches that some of timm's encoders were trained with (FastViT of MobileCLIP), in place.

    Where each merged weight comes from is noted for the ledger: from every tensor of the block that it stands for.
    """
    from timm.models import reparameterize_model

    before = {name: origins_of(tensor) for name, tensor in tower.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        reparameterize_model(tower, inplace=True)
    merged = tower.state_dict(keep_vars=True)
    gone = [name for name in before if name not in merged]
    for name, tensor in merged.items():
        if name in before:
            continue
        block = name.rpartition(".")[0]
        while block and not any(old.startswith(f"{block}.") for old in gone):
            block = block.rpartition(".")[0]
        tensor.requires_grad_(False)
        origins = (origin for old in gone if old.startswith(f"{block}.") for origin in before[old])
        set_origins(tensor, tuple((key, f"{how}, merged with its block's") for key, how in origins))


def text_form(architecture: OpenClipArchitecture) -> TextForm:
    """Of a text encoder of open_clip's own."""
    config = architecture.text_cfg
    return TextForm(
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        hidden=int(config.width * config.mlp_ratio),
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        output=architecture.embed_dim,
        pool=_POOLS[config.pool_type],
        end_token_id=config.eos_id,
        causal=not config.no_causal_mask,
        projection=_projection(config),
        layer_scale=config.ls_init_value is not None,
        activation=config.activation(architecture.quick_gelu),
        eps=config.eps,
    )


def sees_padding(architecture: OpenClipArchitecture) -> bool:
    """Whether what fills a text up to the context changes its embedding."""
    return hf_encoder(architecture) is None and text_form(architecture).sees_padding


def _projection(config: TextConfig) -> Any:
    # open_clip reads null as a projection, too.
    if config.proj_type == "none":
        return "none"
    return "biased" if config.proj_bias else "linear"


def _vision(architecture: OpenClipArchitecture) -> nn.Module:
    config = architecture.vision_cfg
    if config.timm_model_name:
        return timm_tower(architecture)
    if isinstance(config.layers, tuple):
        heads = config.width * 32 // config.head_width
        return ModifiedResNet(config.layers, config.width, config.image_edge, heads, architecture.embed_dim)
    return VisionTower(architecture)


def timm_tower(architecture: OpenClipArchitecture) -> nn.Module:
    """open_clip's `TimmModel`: timm's own module and the head behind it. Without weights of timm's own.

    Raises:
        InputError: timm does not have the model, or not with these choices.
    """
    import timm
    from open_clip.timm_model import TimmModel

    config = architecture.vision_cfg
    assert config.timm_model_name
    if not timm.is_model(config.timm_model_name):
        raise InputError(
            "the installed timm does not have this image encoder",
            where=f"{FILE}: model_cfg.vision_cfg.timm_model_name",
            expected=f"a model of timm {timm.__version__}",
            got=config.timm_model_name,
            fix="install the version of timm that the model was trained with, or a later one",
        )
    where = f"{FILE}: model_cfg.vision_cfg"
    try:
        tower: nn.Module = TimmModel(
            config.timm_model_name,
            architecture.embed_dim,
            image_size=config.image_edge,
            pool=config.timm_pool,
            proj=cast(str, config.timm_proj),
            proj_bias=config.timm_proj_bias,
            pretrained=False,
        )
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        # Pools and projections fit some of its models only, and it has no other way to say so.
        raise InputError(
            f"timm does not build {config.timm_model_name} with this pool and projection",
            where=where,
            expected="timm_pool and timm_proj as the model was trained with",
            got=f"timm_pool {config.timm_pool!r}, timm_proj {config.timm_proj!r}: {type(error).__name__}: {error}",
        ) from error
    # open_clip does not hand the size on: it is timm's.
    size = getattr(getattr(tower.trunk, "patch_embed", None), "img_size", None)
    if size is not None and tuple(size) != (config.image_edge, config.image_edge):
        raise InputError(
            f"timm's {config.timm_model_name} takes images of another size",
            where=f"{where}.image_size",
            expected=str(size[0]),
            got=str(config.image_edge),
        )
    return tower
