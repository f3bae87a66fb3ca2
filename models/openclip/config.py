"""`open_clip_config.json`: which model it describes, and how images are prepared for it.

Its fields, their defaults and their meaning are those of open_clip 3.3.0: `CLIPVisionCfg`, `CLIPTextCfg` and `CLIP` in
model.py, `PreprocessCfg` and `image_transform` in transform.py, `create_model` and `get_tokenizer` in factory.py. The
types say which values are computed here; any other is refused with its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

from vlm_export.errors import InputError, VlmExportError
from vlm_export.models.layers.blocks import Activation
from vlm_export.models.reading.image_processor import Prepared, same_origin
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD, Channels
from vlm_export.models.reading.shapes import LARGEST_CONTEXT, is_number
from vlm_export.specs import Origins, Resample, torchvision_image_spec
from vlm_export.specs.codec import Spec, above, between, matches
from vlm_export.specs.image import MAX_IMAGE_SIZE_PIXELS

FILE = "open_clip_config.json"
_FIX = "where the field does not matter for this model, remove it; else this checkpoint cannot be exported"

Count: TypeAlias = Annotated[int, between(1, 1 << 20)]
Edge: TypeAlias = Annotated[int, between(1, MAX_IMAGE_SIZE_PIXELS)]
Ratio: TypeAlias = Annotated[float, above(0), between(0, 1024)]
# What timm's registry calls its models: no address, no path.
TimmName: TypeAlias = Annotated[str, matches(r"[a-z0-9_]+(\.[a-z0-9_]+)?", "a name of timm's registry")]
Cleaning: TypeAlias = Literal["lower", "whitespace", "canonicalize"]


@dataclass(frozen=True)
class _TowerConfig(Spec):
    """What both encoders state alike."""

    mlp_ratio: Ratio = 4.0
    ls_init_value: float | None = None
    output_tokens: bool = False
    act_kwargs: Mapping[str, Any] | None = None
    norm_kwargs: Mapping[str, Any] | None = None
    block_type: Literal["default"] | None = None
    qk_norm: Literal[False] = False
    scaled_cosine_attn: Literal[False] = False
    scale_heads: Literal[False] = False
    scale_attn_inner: Literal[False] = False
    scale_attn: Literal[False] = False
    scale_fc: Literal[False] = False

    def check(self) -> None:
        eps = (self.norm_kwargs or {}).get("eps", 1e-5)
        if set(self.norm_kwargs or ()) - {"eps"} or not is_number(eps) or not 0 < eps <= 1:
            raise self.refusal("norm_kwargs", "nothing but a positive eps")
        approximate = (self.act_kwargs or {}).get("approximate", "none")
        if set(self.act_kwargs or ()) - {"approximate"} or approximate not in ("none", "tanh"):
            raise self.refusal("act_kwargs", "nothing but approximate: none or tanh")

    @property
    def eps(self) -> float:
        """Of the layer norms."""
        return float((self.norm_kwargs or {}).get("eps", 1e-5))

    def activation(self, quick_gelu: bool) -> Activation:
        """Of the blocks."""
        is_tanh = (self.act_kwargs or {}).get("approximate") == "tanh"
        return "quick_gelu" if quick_gelu else "gelu_tanh" if is_tanh else "gelu"


@dataclass(frozen=True)
class VisionConfig(_TowerConfig):
    """`vision_cfg`: a ViT; with a list of layers a ModifiedResNet; with `timm_model_name` a model of timm."""

    layers: Count | tuple[Count, Count, Count, Count] = 12
    width: Count = 768
    head_width: Count = 64
    patch_size: Edge | tuple[Edge, Edge] | None = 16
    image_size: Edge | tuple[Edge, Edge] = 224
    patch_dropout: float = 0.0
    attentional_pool: bool = False
    attn_pooler_queries: Count = 256
    attn_pooler_heads: Count = 8
    no_ln_pre: bool = False
    # Both are saved as weights; what they begin with differs.
    pos_embed_type: Literal["learnable", "sin_cos_2d"] = "learnable"
    final_ln_after_pool: bool = False
    pool_type: Literal["tok", "avg"] = "tok"
    timm_model_name: TimmName | Literal[""] | None = None
    timm_model_pretrained: bool = False
    timm_pool: Literal["", "avg", "avgmax", "max", "token", "map", "abs_attn", "rot_attn"] = "avg"
    timm_proj: Literal["linear", "mlp", "none", ""] | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None
    # Of earlier versions.
    global_average_pool: Literal[False] = False
    input_patchnorm: Literal[False] = False

    def check(self) -> None:
        super().check()
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if isinstance(value, tuple) and value[0] != value[1]:
                raise self.refusal(name, "a square")
        if self.timm_model_name:
            return
        if self.attentional_pool and self.pool_type == "avg" and self.attn_pooler_queries < 2:
            raise self.refusal("attn_pooler_queries", "at least 2: the mean leaves the first one out")
        if isinstance(self.layers, tuple):
            heads, width = self.width * 32 // self.head_width, self.width * 32
        else:
            heads, width = self.width // self.head_width, self.width
            if self.patch_size is None:
                raise self.refusal("patch_size", "the edge of a patch in pixels")
            if self.image_edge < self.patch_edge:
                raise self.refusal("image_size", "at least one patch")
        if heads < 1 or width % heads:
            raise self.refusal("head_width", f"heads that divide the width of {width}")

    @property
    def image_edge(self) -> int:
        """Pixels of an image's side."""
        return self.image_size[0] if isinstance(self.image_size, tuple) else self.image_size

    @property
    def patch_edge(self) -> int:
        """Pixels of a patch's side."""
        edge = self.patch_size[0] if isinstance(self.patch_size, tuple) else self.patch_size
        assert edge is not None
        return edge


@dataclass(frozen=True)
class TextConfig(_TowerConfig):
    """`text_cfg`: open_clip's own transformer, or with `hf_model_name` a model of transformers."""

    context_length: Annotated[int, between(1, LARGEST_CONTEXT)] = 77
    vocab_size: Annotated[int, between(1, 1 << 31)] = 49408
    hf_tokenizer_name: str | None = None
    tokenizer_mode: Literal[""] | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None
    width: Count = 512
    heads: Count = 8
    layers: Count = 12
    embed_cls: Literal[False] = False
    pad_id: Annotated[int, between(0)] = 0
    eos_id: Annotated[int, between(0)] = 2
    no_causal_mask: bool = False
    final_ln_after_pool: bool = False
    pool_type: Literal["first", "last", "argmax", "eos"] = "argmax"
    proj_bias: bool = False
    proj_type: Literal["linear", "none"] | None = "linear"
    hf_model_name: str | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: Literal["linear", "mlp"] | None = "mlp"
    hf_pooler_type: Literal["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"] | None = "mean_pooler"

    def check(self) -> None:
        super().check()
        if not self.hf_model_name and self.width % self.heads:
            raise self.refusal("heads", f"a divisor of the width {self.width}")
        kwargs = self.tokenizer_kwargs or {}
        allowed = ("lower", "whitespace", "canonicalize") if self.hf_tokenizer_name else ("lower",)
        if set(kwargs) - {"clean"} or kwargs.get("clean", allowed[0]) not in allowed:
            raise self.refusal("tokenizer_kwargs", f"nothing but clean: {' or '.join(allowed)}")

    @property
    def clean(self) -> Cleaning:
        """What `get_clean_fn` in tokenizer.py does to a text first."""
        default: Cleaning = "whitespace" if self.hf_tokenizer_name else "lower"
        stated: Cleaning = (self.tokenizer_kwargs or {}).get("clean", default)
        return stated


@dataclass(frozen=True)
class OpenClipArchitecture(Spec):
    """`model_cfg`: everything that determines the modules, apart from weights.

    Attributes:
        custom_text: the text encoder's keys begin with `text.`, as of open_clip's `CustomTextCLIP`.
        init_logit_bias: where there is one, scores are sigmoids.
    """

    embed_dim: Count
    vision_cfg: VisionConfig
    text_cfg: TextConfig
    quick_gelu: bool = False
    custom_text: bool = False
    init_logit_scale: float | None = None
    init_logit_bias: float | None = None
    nonscalar_logit_scale: bool = False
    output_dict: bool | None = False
    multimodal_cfg: None = None

    def check(self) -> None:
        for tower in (self.vision_cfg, self.text_cfg):
            if self.quick_gelu and tower.act_kwargs is not None:
                raise self.refusal("quick_gelu", "false beside act_kwargs")
        vision = self.vision_cfg
        if vision.attentional_pool and self.embed_dim % vision.attn_pooler_heads:
            raise self.refusal("embed_dim", f"a multiple of the {vision.attn_pooler_heads} heads of the pooler")
        text = self.text_cfg
        if text.proj_type == "none" and not text.hf_model_name and text.width != self.embed_dim:
            raise self.refusal("embed_dim", f"{text.width}, the text encoder's width, which has no projection")


def read_architecture(config: Mapping[str, Any], where: str) -> OpenClipArchitecture:
    """What the file's data describe.

    Raises:
        InputError: they are malformed, or describe a model that is not computed here.
    """
    if config.get("model_cfg") is None:
        raise InputError(f"{where} is malformed", where=f"{where}: model_cfg", expected="an object", got="nothing")
    try:
        return OpenClipArchitecture.from_json(config["model_cfg"], f"{where}: model_cfg", complete=False, fix=_FIX)
    except VlmExportError as error:
        raise InputError(
            f"open_clip's config is malformed, or describes a model that is not computed here: {error.what}",
            where=error.where,
            expected=error.expected,
            got=error.got,
            fix=error.fix,
        ) from error


_RESIZES: Mapping[str, Literal["shortest_edge", "longest_edge", "stretch"]] = {
    "shortest": "shortest_edge",
    "longest": "longest_edge",
    "squash": "stretch",
}
# `image_transform`: "x or default".
_DEFAULT_FOR_EMPTY = ("mean", "std", "interpolation", "resize_mode")


def open_clip_image(
    section: Any,
    image_size: int,
    where: str = FILE,
    ignored: Iterable[str] = (),
    *,
    fields: str = "preprocess_cfg.",
    library: str = "open_clip",
) -> Prepared:
    """How a `preprocess_cfg` has images prepared; InputError for what is not done here.

    Missing and null fields have open_clip's defaults; of four fields it takes the default for zero and empty values
    too. It ignores the stated size, and fields that it does not know.

    Args:
        where: what states it.
        ignored: other files about the preparation, which open_clip does not read.
        fields: how the fields are named there, before their own names.
        library: whose defaults they are: another one may have copied open_clip's transform.
    """
    if not isinstance(section, Mapping):
        raise _malformed(f"{where}: {fields.rstrip('.')}", "an object", section)
    config = {k: v for k, v in section.items() if v is not None and (v or k not in _DEFAULT_FOR_EMPTY)}
    place = f"{where}: {fields}"
    _choose(config, "mode", ("RGB",), place)
    # "random" is for training; images are then resized with the default.
    resample = _choose(config, "interpolation", ("bicubic", "bilinear", "random"), place)
    resize = _RESIZES[_choose(config, "resize_mode", tuple(_RESIZES), place)]
    mean, std = _channels(config, "mean", IMAGE_MEAN, place), _channels(config, "std", IMAGE_STD, place)
    if 0 in std:
        raise _malformed(f"{place}std", "numbers other than zero", std)
    if min(std) < 0:
        raise InputError(
            f"a negative deviation, by which {library} divides, is not computed here",
            where=f"{place}std",
            expected="positive numbers",
            got=f"{list(std)}",
            fix="correct the file: no training prepares images so",
        )
    fill = config.get("fill_color", 0)
    if type(fill) is not int or not 0 <= fill <= 255:
        raise _malformed(f"{place}fill_color", "an integer from 0 to 255", fill)
    filter_: Resample = "bilinear" if resample == "bilinear" else "bicubic"
    spec = torchvision_image_spec(image_size, filter_, "after_crop", mean, std, resize)
    spec = replace(spec, fill=fill if resize == "longest_edge" else 0)
    stated = {"resample": "interpolation", "mean": "mean", "std": "std", "fill": "fill_color"}
    stated |= dict.fromkeys(("resize", "resize_pixels", "crop"), "resize_mode")
    own = {f"image.{name}": f"{place}{key}" for name, key in stated.items() if key in config}
    defaults = {**same_origin(spec, f"default of {library}"), "image.size_pixels": f"{where}: model_cfg.vision_cfg"}
    return spec, Origins({**defaults, **own}, dict.fromkeys(ignored, f"open_clip reads {FILE} alone"))


def _choose(section: Mapping[str, Any], key: str, choices: tuple[str, ...], place: str) -> str:
    """The field's value, the first choice without it; InputError when it is no choice."""
    value = section.get(key, choices[0])
    if value not in choices:
        raise _malformed(f"{place}{key}", " or ".join(choices), value)
    return str(value)


def _channels(config: Mapping[str, Any], key: str, default: Channels, place: str) -> Channels:
    value = config.get(key, default)
    values = [value] * 3 if isinstance(value, int | float) else value
    if isinstance(values, list) and len(values) == 1:
        values = values * 3
    is_triple = isinstance(values, list | tuple) and len(values) == 3
    if not is_triple or not all(map(is_number, values)):
        raise _malformed(f"{place}{key}", "a number or three", value)
    red, green, blue = map(float, values)
    return red, green, blue


def _malformed(where: str, expected: str, got: Any) -> InputError:
    what = f"{where.partition(':')[0]} is malformed, or asks for a preparation of images that open_clip does not have"
    return InputError(what, where=where, expected=expected, got=f"{got!r:.200}")
