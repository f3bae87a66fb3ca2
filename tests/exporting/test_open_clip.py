"""CLIP weights that open_clip saves: exported graphs against open_clip itself, and what a config may say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import InputError, UsageError
from vlm_export.exporting.backends import export_part
from vlm_export.exporting.simplify import finish_graph
from vlm_export.exporting.writer import write_graph
from vlm_export.family import DEFAULT_BUILD, BuildOptions, Checkpoint, Model, StoredTensorInfo
from vlm_export.models.clip.family import ClipFamily
from vlm_export.models.registry import recognise
from vlm_export.runtime.engines.onnxruntime import OrtEngine
from vlm_export.runtime.inputs.images import preprocess_image
from vlm_export.specs import ImageSpec

Array = npt.NDArray[Any]
Config = dict[str, Any]
Same = Callable[..., None]
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
VISION = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 24}
TEXT = {"context_length": 20, "vocab_size": 525, "width": 64, "heads": 1, "layers": 2}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}
OTHER_HEADS = {"vision_cfg": {**VISION, "head_width": 32}, "text_cfg": {**TEXT, "heads": 4}}


def config(**fields: Any) -> Config:
    return {"model_cfg": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, **fields}, "preprocess_cfg": {}}


FORMS = {
    "quick_gelu": config(quick_gelu=True),
    "gelu": config(),
    "other heads": config(**OTHER_HEADS),
    "hidden widths": config(vision_cfg={**VISION, "mlp_ratio": 2.5}, text_cfg={**TEXT, "mlp_ratio": 1.7}),
    "resnet": config(vision_cfg=RESNET),
    "resnet heads": config(vision_cfg={**RESNET, "head_width": 32}, quick_gelu=True),
}


@pytest.fixture(scope="session")
def open_clip() -> Any:
    import open_clip

    return open_clip


@pytest.fixture
def save(open_clip: Any) -> Callable[[Path, Config], nn.Module]:
    """Saves a model with random weights as open_clip publishes one; returns what open_clip reads from there."""

    def make(folder: Path, stated: Config) -> nn.Module:
        from safetensors.torch import save_file

        folder.mkdir(exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(stated))
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_((parameter.mean() if parameter.ndim < 2 else 0.0) + 0.2 * noise)
        save_file(model.state_dict(), folder / WEIGHTS)
        original: nn.Module = open_clip.create_model(f"local-dir:{folder}").eval()
        return original

    return make


def inputs(size: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    ids = rng.integers(1, 523, (3, 20))
    ids[[0, 1, 2], [19, 4, 11]] = 524
    return rng.standard_normal((3, 3, size, size)).astype(np.float32), ids


def outputs_of(original: Any, pixels: Array, ids: Array) -> tuple[Array, Array]:
    with torch.inference_mode():
        image: Tensor = original.encode_image(torch.from_numpy(pixels))
        text: Tensor = original.encode_text(torch.from_numpy(ids))
    return image.numpy(), text.numpy()


def build(source: Path, folder: Path, options: BuildOptions = DEFAULT_BUILD) -> Model:
    checkpoint = open_checkpoint(str(source))
    with ScratchStore(folder / "weights.bin") as store:
        return recognise(checkpoint).build(checkpoint, store, options)


def eager(model: Model, pixels: Array, ids: Array) -> list[Array]:
    return [
        part.module(torch.from_numpy(given)).numpy() for part, given in zip(model.parts, (pixels, ids), strict=True)
    ]


def graphs(model: Model, folder: Path, pixels: Array, ids: Array) -> list[Array]:
    results = []
    for part, given in zip(model.parts, (pixels, ids), strict=True):
        path = folder / f"{part.name}.onnx"
        write_graph(finish_graph(export_part(part, 17, "torchscript"), part.signature), path)
        outputs = OrtEngine(path, threads=1).run({part.signature.input_names[0]: given})
        results.append(outputs[part.signature.output_names[0]])
    return results


@pytest.mark.parametrize("form", FORMS)
def test_graphs_equal_open_clip(
    form: str, save: Callable[[Path, Config], nn.Module], tmp_path: Path, assert_same: Same
) -> None:
    stated = FORMS[form]
    original = save(tmp_path / "model", stated)
    model = build(tmp_path / "model", tmp_path)
    assert model.warnings == ()
    pixels, ids = inputs(stated["model_cfg"]["vision_cfg"]["image_size"])
    for got, expected in zip(graphs(model, tmp_path, pixels, ids), outputs_of(original, pixels, ids), strict=True):
        assert_same(got, expected)
    # The bundle's config.json says the same to other hosts.
    is_quick = stated["model_cfg"].get("quick_gelu", False)
    assert model.hub_config["text_config"]["hidden_act"] == ("quick_gelu" if is_quick else "gelu")
    heads = stated["model_cfg"]["text_cfg"]["heads"]
    assert model.hub_config["text_config"]["num_attention_heads"] == heads


def told(**choices: int | str) -> BuildOptions:
    """What the user says about weights that do not say it themselves."""
    return BuildOptions(family_options=choices)


@pytest.mark.parametrize(
    "options",
    [
        told(activation="quick_gelu", head_width=32, text_heads=4),
        told(activation="gelu", text_heads=4),
        told(activation="gelu", head_width=32),
    ],
    ids=["activation", "image heads", "text heads"],
)
def test_a_wrong_choice_is_seen(
    options: BuildOptions, save: Callable[[Path, Config], nn.Module], tmp_path: Path, assert_same: Same
) -> None:
    original = save(tmp_path / "model", config(**OTHER_HEADS))
    (tmp_path / "model" / CONFIG).unlink()
    pixels, ids = inputs(24)
    expected = outputs_of(original, pixels, ids)
    right = told(activation="gelu", head_width=32, text_heads=4)
    for got, rows in zip(eager(build(tmp_path / "model", tmp_path, right), pixels, ids), expected, strict=True):
        assert_same(got, rows)
    wrong = eager(build(tmp_path / "model", tmp_path, options), pixels, ids)
    assert max(np.abs(got - rows).max() for got, rows in zip(wrong, expected, strict=True)) > 1e-2


def test_options_describe_a_lone_training_checkpoint(
    save: Callable[[Path, Config], nn.Module], tmp_path: Path, assert_same: Same
) -> None:
    original = save(tmp_path / "model", config())
    path = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "name": "run", "state_dict": original.state_dict()}, path)
    (warning,) = build(path, tmp_path).warnings
    assert all(word in warning for word in ("--set activation=", "--set head_width=", "--set text_heads=", CONFIG))
    (warning,) = build(path, tmp_path, told(activation="gelu")).warnings
    assert "activation" not in warning
    assert "head_width" in warning
    model = build(path, tmp_path, told(activation="gelu", head_width=64, text_heads=1))
    assert model.warnings == ()
    pixels, ids = inputs(24)
    for got, expected in zip(eager(model, pixels, ids), outputs_of(original, pixels, ids), strict=True):
        assert_same(got, expected)
    # The config beside a file that is named is read as well, and recorded.
    (tmp_path / CONFIG).write_text(json.dumps(config()))
    checkpoint = open_checkpoint(str(path))
    assert [file.name for file in checkpoint.files] == ["epoch_3.pt", CONFIG]
    assert ClipFamily().describe(checkpoint).warnings == ()
    assert build(path, tmp_path).architecture["activation"] == "gelu"
    with pytest.raises(UsageError, match="says its activation"):
        build(path, tmp_path, told(activation="gelu"))
    (tmp_path / CONFIG).unlink()
    with pytest.raises(UsageError, match="multiple of head_width"):
        build(path, tmp_path, told(head_width=48))


def test_options_describe_widths_that_64_does_not_divide(
    save: Callable[[Path, Config], nn.Module], tmp_path: Path, assert_same: Same
) -> None:
    narrow = config(vision_cfg={**VISION, "width": 40, "head_width": 10}, text_cfg={**TEXT, "width": 24, "heads": 3})
    original = save(tmp_path / "model", narrow)
    (tmp_path / "model" / CONFIG).unlink()
    assert ClipFamily().describe(open_checkpoint(str(tmp_path / "model"))).warnings
    with pytest.raises(InputError, match="multiple of its heads"):
        build(tmp_path / "model", tmp_path)
    model = build(tmp_path / "model", tmp_path, told(activation="gelu", head_width=10, text_heads=3))
    pixels, ids = inputs(24)
    for got, expected in zip(eager(model, pixels, ids), outputs_of(original, pixels, ids), strict=True):
        assert_same(got, expected)


def described(stated: Config, like: Config | None = None) -> Mapping[str, Any]:
    """The architecture that the family finds: a config beside the shapes of another one's model."""
    from open_clip.model import CLIP

    with torch.device("meta"):
        shapes = CLIP(**(like or stated)["model_cfg"]).state_dict()
    infos = {key: StoredTensorInfo(tuple(tensor.shape), "float32") for key, tensor in shapes.items()}
    unread = Checkpoint("model", "safetensors", (), infos, lambda key: shapes[key], open_clip_config=stated)
    return ClipFamily().describe(unread).architecture


@pytest.mark.parametrize(
    ("name", "activation", "heads"),
    [
        ("ViT-B-32", "gelu", (12, 8)),
        ("ViT-B-32-quickgelu", "quick_gelu", (12, 8)),
        ("ViT-H-14", "gelu", (16, 16)),
        ("ViT-g-14", "gelu", (16, 16)),
        ("ViT-bigG-14", "gelu", (16, 20)),
        ("RN50-quickgelu", "quick_gelu", (32, 8)),
    ],
)
def test_published_configs(open_clip: Any, name: str, activation: str, heads: tuple[int, int]) -> None:
    found = described({"model_cfg": open_clip.get_model_config(name)})
    assert (found["activation"], (found["vision"]["heads"], found["text"]["heads"])) == (activation, heads)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vision_cfg", "timm_model_name", "vit_base_patch16"),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "ls_init_value", 1e-4),
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "output_tokens", True),
        ("vision_cfg", "pos_embed_type", "rotary"),
        ("vision_cfg", "qk_norm", True),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}),
        ("vision_cfg", "act_kwargs", {"approximate": "tanh"}),
        ("vision_cfg", "a_later_field", 1),
        ("text_cfg", "hf_model_name", "xlm-roberta-base"),
        ("text_cfg", "embed_cls", True),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "proj_bias", True),
        ("text_cfg", "proj_type", "none"),
        ("text_cfg", "tokenizer_kwargs", {"clean": "canonicalize"}),
        ("text_cfg", "block_type", "custom"),
        (None, "multimodal_cfg", {}),
        (None, "init_logit_bias", -10),
        (None, "quick_gelu", "yes"),
        (None, "text_cfg", [1]),
        ("vision_cfg", "head_width", 0),
        ("vision_cfg", "head_width", "wide"),
        ("vision_cfg", "mlp_ratio", 1e308),
        ("text_cfg", "heads", 5),
        ("text_cfg", "heads", True),
        ("vision_cfg", "layers", 3),
        ("vision_cfg", "width", 768),
        ("vision_cfg", "image_size", 32),
        ("vision_cfg", "image_size", [24, 32]),
        ("vision_cfg", "patch_size", 4),
        ("vision_cfg", "mlp_ratio", 3.0),
        ("text_cfg", "context_length", 77),
        ("text_cfg", "vocab_size", 49408),
        ("text_cfg", "width", 32),
        ("text_cfg", "layers", 1),
        (None, "embed_dim", 32),
    ],
)
def test_configs_of_other_models_are_refused(section: str | None, field: str, value: Any) -> None:
    model = config()["model_cfg"]
    changed = {**model, field: value} if section is None else {**model, section: {**model[section], field: value}}
    with pytest.raises(InputError) as caught:
        described({"model_cfg": changed}, like=config())
    assert field in caught.value.where or field in ("heads", "head_width")


def test_defaults_may_be_written_out() -> None:
    off: Config = {"ls_init_value": None, "output_tokens": False, "act_kwargs": None, "norm_kwargs": {}}
    off |= {"block_type": None}
    vision: Config = {**VISION, **off, "timm_model_name": None, "timm_pool": "avg", "patch_dropout": 0.5}
    vision |= {"pool_type": "tok", "image_size": [24, 24], "final_ln_after_pool": True, "attentional_pool": False}
    text = {**TEXT, **off, "hf_model_name": None, "hf_tokenizer_name": "", "pool_type": "argmax"}
    stated = config(vision_cfg=vision, text_cfg=text, custom_text=False, init_logit_bias=None)
    assert described(stated, like=config()) == described(config())


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"},
        {"mean": 0.5, "std": 0.25, "interpolation": "random", "resize_mode": None, "size": 99, "later": 1},
    ],
    ids=["defaults", "squash", "numbers"],
)
def test_images_are_prepared_as_by_open_clip(
    open_clip: Any, stated: Config, save: Callable[[Path, Config], nn.Module], tmp_path: Path
) -> None:
    save(tmp_path / "model", {**config(), "preprocess_cfg": stated})
    image = build(tmp_path / "model", tmp_path).image
    assert isinstance(image, ImageSpec)
    _, original = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'model'}")
    noise = np.random.default_rng(2).integers(0, 256, (37, 61, 4), dtype=np.uint8)
    for mode in ("RGB", "RGBA", "L"):
        source = Image.fromarray(noise).convert(mode)
        np.testing.assert_allclose(preprocess_image(source, image), original(source).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "stated",
    [
        {"resize_mode": "longest"},
        {"interpolation": "lanczos"},
        {"mode": "L"},
        {"mean": [0.5, 0.5]},
        {"mean": True},
        {"std": [0.5, 0, 0.5]},
        {"std": "x"},
    ],
)
def test_other_preprocessing_is_refused(
    stated: Config, save: Callable[[Path, Config], nn.Module], tmp_path: Path
) -> None:
    save(tmp_path / "model", config())
    (tmp_path / "model" / CONFIG).write_text(json.dumps({**config(), "preprocess_cfg": stated}))
    with pytest.raises(InputError, match="open_clip"):
        build(tmp_path / "model", tmp_path)
