"""What `open_clip_config.json` may say: exported graphs against open_clip itself, and what is refused by name."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import CustomTextCLIP
from PIL import Image
from timm.models import register_model

from vlm_export.errors import InputError, UsageError
from vlm_export.exporting.backends import export_part
from vlm_export.exporting.finishing import finish_graph, write_graph
from vlm_export.family import BuildOptions, Checkpoint, Model, StoredTensorInfo
from vlm_export.models.openclip import apple
from vlm_export.models.openclip.config import open_clip_image
from vlm_export.models.openclip.family import OpenClipFamily, stated_by
from vlm_export.models.openclip.hf_text import Kind
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.specs import ImageSpec
from vlm_export.specs.tasks import EmbedSpec, ScoreSpec

duals = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("dual_encoders.py"))))
forms = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("open_clip_forms.py"))))
CONFIG = forms.CONFIG
WEIGHTS = forms.WEIGHTS
TEXT = forms.TEXT
VISION = forms.VISION
config = forms.config
save = forms.save
save_hf = forms.save_hf
text = forms.text
vision = forms.vision
Config = dict[str, Any]
Array = npt.NDArray[Any]
Build = Callable[..., Model]
Same = Callable[..., None]
RESNET: Config = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}
POOLER: Config = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4}
BLIND: Config = {"no_causal_mask": True}

# transformers' CLIPModel computes these.
CLIP_FORMS = {
    "quick_gelu": config(quick_gelu=True, custom_text=False),
    "gelu": config(),
    "other heads": config(vision_cfg=vision(head_width=16), text_cfg=text(heads=4)),
    "hidden widths": config(vision_cfg=vision(mlp_ratio=2.5), text_cfg=text(mlp_ratio=1.7)),
    "resnet": config(vision_cfg=RESNET),
    "resnet heads": config(vision_cfg={**RESNET, "head_width": 32}, quick_gelu=True, custom_text=False),
    "fixed positions": config(vision_cfg=vision(pos_embed_type="sin_cos_2d", patch_dropout=0.5)),
}
OTHER_FORMS = {
    "mean of normalised tokens": config(vision_cfg=vision(pool_type="avg", no_ln_pre=True)),
    "mean, then normalised": config(vision_cfg=vision(pool_type="avg", final_ln_after_pool=True)),
    "token, then normalised": config(vision_cfg=vision(final_ln_after_pool=True, no_ln_pre=True)),
    "attentional pooler": config(vision_cfg=vision(**POOLER)),
    "attentional pooler of the same width": config(vision_cfg=vision(**POOLER, pool_type="avg"), embed_dim=64),
    "layer scale": config(vision_cfg=vision(ls_init_value=0.1), text_cfg=text(ls_init_value=0.1)),
    "other norms and activations": config(
        vision_cfg=vision(act_kwargs={"approximate": "tanh"}, norm_kwargs={"eps": 1e-3}),
        text_cfg=text(norm_kwargs={"eps": 1e-2}),
    ),
    "sigmoid, last of all tokens, projection with a bias": config(
        text_cfg=text(**BLIND, pool_type="last", proj_bias=True), init_logit_bias=-10, init_logit_scale=2.0
    ),
    "first of all tokens, no projection": config(
        text_cfg=text(**BLIND, pool_type="first", proj_type="none"), embed_dim=32, nonscalar_logit_scale=True
    ),
    "end of text by id": config(text_cfg=text(pool_type="eos", eos_id=7)),
    "last token behind a causal mask": config(text_cfg=text(pool_type="last")),
}
FORMS = {**CLIP_FORMS, **OTHER_FORMS}


def inputs(stated: Config) -> tuple[Array, Array]:
    """Images, and rows of ids that end at different places."""
    vision_cfg, text_cfg = stated["model_cfg"]["vision_cfg"], stated["model_cfg"]["text_cfg"]
    rng, size, rows = np.random.default_rng(1), vision_cfg["image_size"], text_cfg["vocab_size"]
    ids = rng.integers(8, rows - 1, (3, text_cfg["context_length"]))
    for row, end in zip(ids, (text_cfg["context_length"] - 1, 4, 11), strict=True):
        row[end:] = 0
        row[end] = text_cfg["eos_id"] if text_cfg.get("pool_type") == "eos" else rows - 1
    return rng.standard_normal((3, 3, size, size)).astype(np.float32), ids


def outputs_of(original: Any, pixels: Array, ids: Array) -> tuple[Array, Array]:
    with torch.inference_mode():
        image, words = original.encode_image(torch.from_numpy(pixels)), original.encode_text(torch.from_numpy(ids))
    return image.numpy(), words.numpy()


def eager(model: Model, *feeds: Array) -> list[Array]:
    with torch.inference_mode():
        return [part.module(torch.from_numpy(feed)).numpy() for part, feed in zip(model.parts, feeds, strict=True)]


def graphs(model: Model, folder: Path, back_end: Any, *feeds: Array) -> list[Array]:
    results = []
    for part, feed in zip(model.parts, feeds, strict=True):
        path = folder / f"{part.name}.onnx"
        exported = export_part(part, 17 if back_end == "torchscript" else 18, back_end)
        write_graph(finish_graph(exported, part.signature), path)
        outputs = OrtEngine(path, threads=1).run({part.signature.input_names[0]: feed})
        results.append(outputs[part.signature.output_names[0]])
    return results


@pytest.mark.parametrize("form", FORMS)
def test_graphs_equal_open_clip(form: str, build_model: Build, tmp_path: Path, assert_same: Same) -> None:
    stated = FORMS[form]
    original = save(tmp_path / "model", stated)
    model = build_model(tmp_path / "model")
    assert model.warnings == ()
    feeds = inputs(stated)
    expected = outputs_of(original, *feeds)
    for got, rows in zip(graphs(model, tmp_path, "torchscript", *feeds), expected, strict=True):
        assert_same(got, rows)
    task = model.task(EmbedSpec)
    assert task is not None
    assert task.score is not None
    assert task.score.logit_scale == pytest.approx(float(original.logit_scale.detach()), abs=0)
    assert task.score.activation == ("sigmoid" if "init_logit_bias" in stated["model_cfg"] else "softmax")
    # What runs in the proof of the contract is open_clip's own module.
    assert model.original is not None
    for part, feed, rows in zip(model.parts, feeds, expected, strict=True):
        encode = model.original.encoders[part.name]()
        got = encode({part.signature.input_names[0]: feed})[part.signature.output_names[0]]
        np.testing.assert_array_equal(got, rows)
    # The bundle's config.json says the same to other hosts.
    if form in CLIP_FORMS:
        is_quick = stated["model_cfg"].get("quick_gelu", False)
        assert model.hub_config["text_config"]["hidden_act"] == ("quick_gelu" if is_quick else "gelu")
        assert model.hub_config["text_config"]["num_attention_heads"] == stated["model_cfg"]["text_cfg"]["heads"]
    else:
        assert model.hub_config["model_type"] == "open_clip"


def _tiny(name: str, **sizes: Any) -> None:
    """Registers a small model of timm's code as `tiny_` and that name; it has the defaults of the published one."""
    published = timm.model_entrypoint(name)

    def build(pretrained: bool = False, **kwargs: Any) -> Any:
        return published(pretrained=pretrained, **{**sizes, **kwargs})

    build.__name__, build.__module__ = f"tiny_{name}", __name__
    register_model(build)


_BLOCKS = {"embed_dim": 48, "depth": 2, "num_heads": 3}
_tiny("vit_base_patch16_siglip_224", **_BLOCKS)
_tiny("eva02_base_patch16_clip_224", **_BLOCKS)
_tiny("eva02_enormous_patch14_clip_224", embed_dim=48, depth=2, num_heads=3)
_tiny("fastvit_mci0", layers=(1, 1, 2, 1), embed_dims=(16, 32, 64, 128))
_tiny("fastvit_mci3", layers=(1, 1, 1, 1, 1), embed_dims=(8, 16, 32, 64, 128))
_tiny("resnet50", layers=(1, 1, 1, 1), channels=(16, 16, 32, 64))
_tiny("convnext_base", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
TIMM_FORMS: dict[str, tuple[str, int, Config]] = {
    "siglip": ("tiny_vit_base_patch16_siglip_224", 224, {"timm_pool": "map", "timm_proj": "none"}),
    "eva02": ("tiny_eva02_base_patch16_clip_224", 224, {"timm_pool": "token", "timm_proj": None}),
    "eva02 enormous": ("tiny_eva02_enormous_patch14_clip_224", 224, {"timm_pool": "token", "timm_proj": None}),
    "mobileclip": ("tiny_fastvit_mci0", 256, {"timm_pool": "avg", "timm_proj": None}),
    "mobileclip 2": ("tiny_fastvit_mci3", 256, {"timm_pool": "avg", "timm_proj": None}),
    "convnext": ("tiny_convnext_base", 64, {"timm_pool": "", "timm_proj": "linear"}),
    "convnext, mlp": ("tiny_convnext_base", 64, {"timm_pool": "", "timm_proj": "mlp", "timm_proj_bias": True}),
    "resnet, attention pool": ("tiny_resnet50", 224, {"timm_pool": "abs_attn", "timm_proj": ""}),
    "vit": ("test_vit", 160, {"timm_pool": "avg", "timm_proj": "linear", "timm_proj_bias": True}),
}


# Each kind of encoder once; the others of a kind have the same operators.
BY_DYNAMO = ("siglip", "eva02", "mobileclip 2", "convnext", "resnet, attention pool")
TIMM_CASES = [*product(TIMM_FORMS, ["torchscript"]), *product(BY_DYNAMO, ["dynamo"])]


@pytest.mark.parametrize(("form", "back_end"), TIMM_CASES)
def test_image_encoders_of_timm(
    form: str, back_end: str, build_model: Build, tmp_path: Path, assert_same: Same
) -> None:
    name, size, fields = TIMM_FORMS[form]
    embed_dim = 48 if fields["timm_proj"] == "none" else 24
    tower = {"timm_model_name": name, "image_size": size, **fields}
    stated = config(vision_cfg=tower, embed_dim=embed_dim)
    original = save(tmp_path / "model", stated)
    model = build_model(tmp_path / "model")
    pixels, ids = inputs(stated)
    expected = outputs_of(original, pixels, ids)[0]
    assert_same(graphs(replace(model, parts=model.parts[:1]), tmp_path, back_end, pixels)[0], expected)
    # Branches are merged before the export. Rows of unit length, as they are compared with texts.
    merged = eager(replace(model, parts=model.parts[:1]), pixels)[0]
    assert_same(duals.unit(merged), duals.unit(expected), max_abs=1e-5)
    assert model.original is not None
    got = model.original.encoders["vision"]()({"pixel_values": pixels})["image_embeds"]
    np.testing.assert_allclose(got, expected, atol=1e-6)


_tiny("vit_base_mci_224", depth=1)


def in_apples_names(state: Mapping[str, torch.Tensor], *, is_vit: bool) -> dict[str, torch.Tensor]:
    """The inverse of what open_clip converts; it has no bias of the projection."""
    stages = sorted({int(key.split(".")[3]) for key in state if key.startswith("visual.trunk.stages.")})
    starts, position = dict[str, str](), 0
    for stage in stages:
        for part, theirs in (("downsample.proj.", "proj."), ("pos_emb.pos_enc.", "pe."), ("blocks.", "")):
            if any(key.startswith(f"visual.trunk.stages.{stage}.{part}") for key in state):
                starts[f"stages.{stage}.{part}"] = f"network.{position}.{theirs}"
                position += 1
    made = {}
    for key, value in state.items():
        if key == "logit_scale":
            made[key] = value
        elif key.startswith("text."):
            name = _back(key.removeprefix("text."), apple._TEXT_NAMES)
            made[f"text_encoder.{name}"] = value[None, None] if name.startswith("positional") else value
        elif not key.endswith(("head.fc.bias", "head.bias")):
            name = key.removeprefix("visual.trunk.")
            for ours, theirs in starts.items():
                name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
            name = re.sub(r"(layer_scale(_\d)?)\.gamma$", r"\1", name)
            name = _back(name, apple._VIT_NAMES if is_vit else apple._FASTVIT_NAMES)
            value = value.T.contiguous() if name.endswith(("head.proj", "classifier.proj")) else value
            made[f"image_encoder.model.{name}"] = value[None] if name.startswith("pos_embed") else value
    return made


def _back(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in reversed(pairs):
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize(("name", "size"), [("tiny_fastvit_mci0", 256), ("tiny_vit_base_mci_224", 224)])
def test_mobileclip_as_apple_publishes_it(
    name: str, size: int, build_model: Build, tmp_path: Path, assert_same: Same
) -> None:
    import open_clip

    pool = "avg" if "fastvit" in name else "token"
    tower: Config = {"timm_model_name": name, "image_size": size, "timm_pool": pool, "timm_proj": None}
    words = text(**BLIND, width=64, heads=2)
    stated = config(vision_cfg=tower, text_cfg=words)
    original = save(tmp_path / "model", stated)
    with torch.no_grad():
        (original.visual.trunk.head.fc if "fastvit" in name else original.visual.trunk.head).bias.zero_()
    weights = in_apples_names(original.state_dict(), is_vit="vit_base" in name)
    for key, value in convert_state_dict(original, weights).items():
        assert torch.equal(value, original.state_dict()[key]), key
    torch.save(weights, tmp_path / "mobileclip.pt")
    with pytest.raises(InputError, match="nothing says which model of open_clip"):
        build_model(tmp_path / "mobileclip.pt")
    (tmp_path / "Tiny-Mobile.json").write_text(json.dumps(stated["model_cfg"]))
    open_clip.add_model_config(tmp_path / "Tiny-Mobile.json")
    model = build_model(tmp_path / "mobileclip.pt", BuildOptions(family_options={"model": "Tiny-Mobile"}))
    (warning,) = model.warnings
    assert "how images are prepared" in warning
    feeds = inputs(stated)
    for got, expected in zip(eager(model, *feeds), outputs_of(original, *feeds), strict=True):
        assert_same(duals.unit(got), duals.unit(expected), max_abs=1e-5)


def test_a_told_name_brings_the_preparation_of_its_published_weights() -> None:
    unread = Checkpoint("model", "safetensors", (), {}, lambda key: torch.empty(0))
    image = stated_by(unread, BuildOptions(family_options={"model": "MobileCLIP2-S0"})).image(unread)[0]
    assert isinstance(image, ImageSpec)
    assert (image.mean, image.std, image.resample) == ((0.0,) * 3, (1.0,) * 3, "bilinear")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timm_model_name": "vit_of_tomorrow"}, "does not have this image encoder"),
        ({"timm_model_name": "test_vit", "image_size": 96}, "images of another size"),
        ({"timm_model_name": "test_resnet", "image_size": 160, "timm_pool": "abs_attn"}, "does not build"),
    ],
)
def test_image_encoders_that_timm_does_not_have(fields: Config, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        described(config(vision_cfg=fields), like=config())
    assert "vision_cfg" in caught.value.where


@pytest.mark.parametrize(
    "form", ["attentional pooler", "layer scale", "sigmoid, last of all tokens, projection with a bias"]
)
def test_graphs_of_the_other_back_end(form: str, build_model: Build, tmp_path: Path, assert_same: Same) -> None:
    original = save(tmp_path / "model", FORMS[form])
    feeds = inputs(FORMS[form])
    got = graphs(build_model(tmp_path / "model"), tmp_path, "dynamo", *feeds)
    for rows, expected in zip(got, outputs_of(original, *feeds), strict=True):
        assert_same(rows, expected)


def test_texts_that_see_no_padding_may_be_short(build_model: Build, tmp_path: Path, assert_same: Same) -> None:
    original = save(tmp_path / "model", FORMS["end of text by id"])
    pixels, ids = inputs(FORMS["end of text by id"])
    short = eager(build_model(tmp_path / "model"), pixels, ids[1:, :12])[1]
    assert_same(short, outputs_of(original, pixels, ids[1:])[1])


@pytest.mark.parametrize("size", [16, 40])
def test_other_sizes_of_images_as_open_clip_loads_them(
    size: int, build_model: Build, tmp_path: Path, assert_same: Same
) -> None:
    import open_clip

    save(tmp_path / "model", FORMS["mean, then normalised"])
    original = open_clip.create_model(f"local-dir:{tmp_path / 'model'}", force_image_size=size).eval()
    pixels = np.random.default_rng(1).standard_normal((2, 3, size, size)).astype(np.float32)
    with torch.inference_mode():
        expected = original.encode_image(torch.from_numpy(pixels)).numpy()
    for options in (BuildOptions(image_size=size), BuildOptions(dynamic_image_size=True)):
        model = build_model(tmp_path / "model", options)
        assert_same(eager(replace(model, parts=model.parts[:1]), pixels)[0], expected)
        assert isinstance(model.image, ImageSpec)
        assert model.image.size_pixels == (size if options.image_size else 24)


def described(stated: Config, like: Config | None = None) -> Mapping[str, Any]:
    """The architecture that the family finds: a config beside the shapes of another one's model."""
    made = {key: value for key, value in (like or stated)["model_cfg"].items() if key != "custom_text"}
    with torch.device("meta"):
        shapes = CustomTextCLIP(**made).state_dict()
    infos = {key: StoredTensorInfo(tuple(tensor.shape), "float32") for key, tensor in shapes.items()}
    unread = Checkpoint("model", "safetensors", (), infos, lambda key: shapes[key], side_configs={CONFIG: stated})
    return OpenClipFamily().describe(unread).architecture


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vision_cfg", "attentional_pool", "parallel"),
        ("vision_cfg", "pool_type", "none"),
        ("vision_cfg", "pos_embed_type", "rotary"),
        ("vision_cfg", "qk_norm", True),
        ("vision_cfg", "norm_kwargs", {"elementwise_affine": False}),
        ("vision_cfg", "act_kwargs", {"inplace": True}),
        ("vision_cfg", "a_later_field", 1),
        ("vision_cfg", "head_width", 0),
        ("vision_cfg", "head_width", "wide"),
        ("vision_cfg", "head_width", 20),
        ("vision_cfg", "mlp_ratio", 1e308),
        ("vision_cfg", "image_size", [24, 32]),
        ("vision_cfg", "image_size", 4),
        ("vision_cfg", "timm_model_name", "../resnet"),
        ("text_cfg", "embed_cls", True),
        ("text_cfg", "pool_type", "none"),
        ("text_cfg", "proj_type", "none"),
        ("text_cfg", "tokenizer_kwargs", {"strip_sep_token": True}),
        ("text_cfg", "tokenizer_mode", "clips"),
        ("text_cfg", "block_type", "custom"),
        ("text_cfg", "heads", 5),
        ("text_cfg", "heads", True),
        (None, "multimodal_cfg", {}),
        (None, "quick_gelu", "yes"),
        (None, "text_cfg", [1]),
        (None, "vision_cfg", None),
    ],
)
def test_what_is_not_computed_is_refused_by_name(section: str | None, field: str, value: Any) -> None:
    model = config()["model_cfg"]
    changed = {**model, field: value} if section is None else {**model, section: {**model[section], field: value}}
    with pytest.raises(InputError) as caught:
        described({"model_cfg": changed}, like=config())
    shown = str(caught.value)
    assert CONFIG in caught.value.where
    assert field in shown or (field, value) == ("proj_type", "none")


def test_a_mean_of_no_queries_is_refused() -> None:
    pooler = {**POOLER, "attn_pooler_queries": 1, "pool_type": "avg"}
    with pytest.raises(InputError, match="attn_pooler_queries"):
        described(config(vision_cfg=vision(**pooler)), like=config())


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vision_cfg", "layers", 3),
        ("vision_cfg", "width", 96),
        ("vision_cfg", "image_size", 32),
        ("vision_cfg", "patch_size", 4),
        ("vision_cfg", "mlp_ratio", 3.0),
        ("vision_cfg", "ls_init_value", 1e-4),
        ("vision_cfg", "no_ln_pre", True),
        ("text_cfg", "context_length", 77),
        ("text_cfg", "vocab_size", 600),
        ("text_cfg", "layers", 1),
        ("text_cfg", "proj_bias", True),
        (None, "embed_dim", 32),
    ],
)
def test_a_config_of_other_weights_is_refused(
    section: str | None, field: str, value: Any, build_model: Build, saved: Path, tmp_path: Path
) -> None:
    model = config()["model_cfg"]
    changed = {**model, field: value} if section is None else {**model, section: {**model[section], field: value}}
    for file in saved.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": changed}))
    with pytest.raises(InputError, match="do not fit"):
        build_model(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain form on disk."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    save(folder, config())
    return folder


def test_defaults_may_be_written_out() -> None:
    off: Config = {"ls_init_value": None, "output_tokens": False, "act_kwargs": None, "norm_kwargs": {}}
    off |= {"block_type": None}
    seen = {**VISION, **off, "timm_model_name": None, "timm_pool": "avg", "image_size": [24, 24], "pool_type": "tok"}
    words = {**TEXT, **off, "hf_model_name": None, "hf_tokenizer_name": "", "pool_type": "argmax"}
    stated = config(vision_cfg=seen, text_cfg=words, init_logit_bias=None)
    stated["model_cfg"]["text_cfg"]["proj_type"] = stated["preprocess_cfg"] = None
    assert described(stated, like=config())["embed_dim"] == described(config())["embed_dim"] == 24


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"},
        {"mean": 0.5, "std": 0.25, "interpolation": "random", "resize_mode": None, "size": 99, "later": 1},
        {"resize_mode": "longest"},
        {"resize_mode": "longest", "fill_color": 200, "interpolation": "bilinear"},
        {"resize_mode": "squash", "fill_color": 200},
    ],
    ids=["defaults", "squash", "numbers", "longest", "longest, filled", "squash, filled"],
)
def test_images_are_prepared_as_by_open_clip(stated: Config) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    image, _ = open_clip_image(stated, 24)
    assert isinstance(image, ImageSpec)
    known = {key: value for key, value in stated.items() if key not in ("size", "later") and value is not None}
    original: Any = image_transform_v2(PreprocessCfg(size=24, **known), is_train=False)
    noise = np.random.default_rng(2).integers(0, 256, (61, 61, 4), dtype=np.uint8)
    for mode in ("RGB", "RGBA", "L", "P", "CMYK"):
        for height, width in ((37, 61), (61, 37), (24, 24), (7, 23), (5, 60), (60, 2), (47, 46)):
            source = Image.fromarray(noise[:height, :width]).convert("RGB").convert(mode)
            np.testing.assert_allclose(preprocess_image(source, image), original(source).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "stated",
    [
        {"resize_mode": "both"},
        {"interpolation": "lanczos"},
        {"mode": "L"},
        {"mean": [0.5, 0.5]},
        {"mean": True},
        {"std": [0.5, 0, 0.5]},
        {"std": "x"},
        {"fill_color": 300},
        {"fill_color": [1, 2, 3]},
    ],
)
def test_other_preprocessing_is_refused(stated: Config) -> None:
    with pytest.raises(InputError, match="open_clip"):
        described({**config(), "preprocess_cfg": stated}, like=config())


def test_a_negative_deviation_is_refused_as_what_it_is() -> None:
    """open_clip divides by it."""
    with pytest.raises(InputError, match="negative deviation, by which open_clip divides") as caught:
        described({**config(), "preprocess_cfg": {"std": [0.5, -0.5, 0.5]}}, like=config())
    assert "preprocess_cfg.std" in caught.value.where


def test_a_bias_that_the_weights_lack_is_zero(saved: Path, build_model: Build, tmp_path: Path) -> None:
    """As where open_clip loads weights that were trained without one."""
    import open_clip

    (tmp_path / WEIGHTS).symlink_to(saved / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config(init_logit_bias=-10)))
    original = open_clip.create_model(f"local-dir:{tmp_path}")
    assert original.logit_bias.item() == 0
    model = build_model(tmp_path)
    (task,) = model.tasks
    assert isinstance(task, EmbedSpec)
    assert task.score == ScoreSpec("sigmoid", original.logit_scale.item(), 0.0)
    (warning,) = model.warnings
    assert "init_logit_bias" in warning


def test_names_of_open_clip_say_what_lone_weights_do_not(build_model: Build, tmp_path: Path) -> None:
    stated = FORMS["sigmoid, last of all tokens, projection with a bias"]
    save(tmp_path / "model", stated)
    (tmp_path / "model" / CONFIG).unlink()
    with pytest.raises(InputError, match="nothing says which model of open_clip"):
        build_model(tmp_path / "model")
    with pytest.raises(UsageError, match="no model of this name"):
        build_model(tmp_path / "model", BuildOptions(family_options={"model": "ViT-Z"}))
    with pytest.raises(InputError, match="do not fit"):
        build_model(tmp_path / "model", BuildOptions(family_options={"model": "ViT-B-16"}))


HF_FORMS: dict[str, tuple[Kind, int, Config]] = {
    "xlm-r": ("xlm-roberta", 1, {}),
    "roberta, linear": ("roberta", 1, {"hf_proj_type": "linear", "hf_pooler_type": "cls_last_hidden_state_pooler"}),
    "bert, pooled first token": ("bert", 0, {"hf_pooler_type": "cls_pooler"}),
    "bert, no projection": ("bert", 0, {"hf_pooler_type": None, "hf_proj_type": None}),
}


# Positions that follow the padding, and pooled tokens behind positions that do not.
HF_CASES = [*product(HF_FORMS, ["torchscript"]), *product(["xlm-r", "bert, pooled first token"], ["dynamo"])]


@pytest.mark.parametrize(("form", "back_end"), HF_CASES)
def test_text_encoders_of_transformers(
    form: str, back_end: str, build_model: Build, tmp_path: Path, assert_same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, pad, fields = HF_FORMS[form]
    words = {"hf_model_name": "tiny", "context_length": 16, **fields}
    stated = config(text_cfg=words, embed_dim=48 if "hf_proj_type" in fields and not fields["hf_proj_type"] else 24)
    original = save_hf(tmp_path / "model", kind, pad, 300, stated, monkeypatch)
    model = build_model(tmp_path / "model")
    ids = np.random.default_rng(1).integers(2, 300, (3, 16))
    ids[1, 5:], ids[2, 12:] = pad, pad
    # A text may spell the padding.
    ids[0, 3] = pad
    with torch.inference_mode():
        expected = original.encode_text(torch.from_numpy(ids)).numpy()
    part = replace(model, parts=model.parts[1:])
    assert_same(graphs(part, tmp_path, back_end, ids)[0], expected)
    assert_same(graphs(part, tmp_path, back_end, ids[1:, :12])[0], expected[1:])
    assert model.original is not None
    got = model.original.encoders["text"]()({"input_ids": ids})["text_embeds"]
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["google/mt5-base", "facebook/nllb-200-distilled-600M", "xlm-roberta-bas", "/tmp/x"])
def test_other_text_encoders_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match="not computed here") as caught:
        described(config(text_cfg={"hf_model_name": name}), like=config())
    assert "hf_model_name" in caught.value.where
    assert name in str(caught.value)
