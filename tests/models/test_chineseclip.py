"""Chinese-CLIP as transformers saves it, and as its authors' `.pt` files, whose encoders are OpenAI's and BERT."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from torchvision import transforms
from transformers import (
    BertConfig,
    BertModel,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessorPil,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
)

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import known_names, load_known
from vlm_export.errors import InputError
from vlm_export.models.chineseclip.architecture import ChineseClipArchitecture, stated_text
from vlm_export.models.clip.original import vision_config
from vlm_export.models.registry import identify, load_family
from vlm_export.specs import ImageSpec

duals = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("dual_encoders.py"))))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"height": 32, "width": 32}
VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 64}
# Heads of 80 channels, as the authors' widest image encoder has them and no shape tells.
WIDE_VIT = {**VIT, "layers": 1, "width": 1280, "head_width": 80}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
NAMES = [name for name in known_names() if load_known(name).family == "chineseclip"]


def config_of(rows: int, **text: Any) -> Any:
    sizes = {**SIZES, "vocab_size": rows, "max_position_embeddings": 96}
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    return ChineseCLIPConfig(projection_dim=32, text_config={**sizes, **text}, vision_config=vision)


@pytest.mark.parametrize("options", duals.BACK_ENDS, ids=" ".join)
def test_both_encoders_of_transformers(options: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = duals.wordpiece_tokenizer(model_max_length=96)
    source = tmp_path / "chinese"
    torch.manual_seed(0)
    model = duals.spread(ChineseCLIPModel(config_of(len(tokenizer))))
    model.save_pretrained(source)
    # As the published files have it: a square without regard to the shape, and no crop.
    processor = ChineseCLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_center_crop=False)
    ChineseCLIPProcessor(processor, tokenizer).save_pretrained(source)
    bundle = duals.export(source, tmp_path / "out", *options)
    assert bundle.manifest.family == "chineseclip"
    assert bundle.manifest.text.pooling == "first_token"
    duals.assert_pair_equal(source, bundle, model, edge=32, length=96)


def originals(vision: Mapping[str, Any], rows: int) -> tuple[Any, Any, torch.Tensor]:
    """open_clip's CLIP, of which the image encoder counts, transformers' BERT, and a projection, none at a default."""
    torch.manual_seed(0)
    text = {"context_length": 1, "vocab_size": 1, "width": 64, "heads": 1, "layers": 1}
    clip = duals.spread(CLIP(embed_dim=32, vision_cfg=dict(vision), text_cfg=text, quick_gelu=True))
    # The authors' BERT has a head for each 64 channels.
    bert = BertModel(BertConfig(**{**SIZES, "num_attention_heads": 1}, vocab_size=rows), add_pooling_layer=False)
    return clip, duals.spread(bert), torch.randn(64, 32) / 8


def save_original(path: Path, clip: Any, bert: Any, projection: torch.Tensor) -> None:
    """As the authors' training saves it: behind DistributedDataParallel's prefix, with the pooler that nobody reads."""
    weights = {key: tensor for key, tensor in clip.state_dict().items() if key.startswith(("visual.", "logit_scale"))}
    weights |= {f"bert.{key}": tensor for key, tensor in bert.state_dict().items()}
    weights |= {"bert.pooler.dense.weight": torch.randn(64, 64), "bert.pooler.dense.bias": torch.randn(64)}
    weights["text_projection"] = projection
    state = {f"module.{key}": tensor for key, tensor in weights.items()}
    torch.save({"epoch": 1, "name": "finetuned", "state_dict": state}, path)


@pytest.mark.parametrize("vision", [VIT, WIDE_VIT, RESNET], ids=["vit", "vit of 80 channels a head", "resnet"])
def test_the_authors_own_form(vision: Mapping[str, Any], tmp_path: Path) -> None:
    tokenizer = duals.wordpiece_tokenizer(model_max_length=512)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words), encoding="utf-8")
    clip, bert, projection = originals(vision, len(words))
    save_original(tmp_path / "model.pt", clip, bert, projection)
    bundle = duals.export(
        tmp_path / "model.pt", tmp_path / "out", "--opset", "17", "--tokenizer", str(tmp_path / "vocab.txt")
    )
    # What the proof of the contract ran, besides preparation: the encoders of open_clip and of transformers.
    assert "open_clip CLIP and transformers BertModel" in json.dumps(bundle.manifest.export.contract)
    assert bundle.manifest.text.context_length == 52

    def encode(inputs: Any) -> Any:
        return bert(**inputs).last_hidden_state[:, 0] @ projection

    duals.assert_texts_equal(tmp_path / "tokenizer", bundle, encode, 52)
    edge = vision["image_size"]
    assert isinstance(bundle.manifest.image, ImageSpec)
    resize = transforms.Resize((edge, edge), transforms.InterpolationMode.BICUBIC)
    normalise = transforms.Normalize(bundle.manifest.image.mean, bundle.manifest.image.std)
    prepare: Callable[[Any], Any] = transforms.Compose(
        [resize, lambda image: image.convert("RGB"), transforms.ToTensor(), normalise]
    )
    samples = duals.images(edge)
    with torch.inference_mode():
        expected = clip.encode_image(torch.stack([prepare(image) for image in samples]))
    what = [f"{image.mode} {image.size}" for image in samples]
    duals.assert_equal(bundle.encode_image(samples, batch_size=3), expected, what)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_act": "relu"}, "hidden_act asks for a computation"),
        ({"type_vocab_size": 3}, "type_vocab_size 3, not 2"),
        ({"num_attention_heads": 7}, "heads"),
        (None, "needs its config.json"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: dict[str, Any] | None, text: str, tmp_path: Path) -> None:
    ChineseCLIPModel(config_of(64)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    if change is None:
        path.unlink()
    else:
        stated["text_config"] |= change
        path.write_text(json.dumps(stated), encoding="utf-8")
    family, checkpoint = identify(open_checkpoint(str(tmp_path)))
    assert family.name == "chineseclip"
    with pytest.raises(InputError, match=text):
        family.describe(checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_published_keys(name: str) -> None:
    known, family = load_known(name), load_family("chineseclip")
    architecture = ChineseClipArchitecture.from_config(known.architecture)
    with torch.device("meta"):
        if (stated := family.published_config(known.architecture)) is not None:
            expected = dict(ChineseCLIPModel(ChineseCLIPConfig.from_dict(stated)).state_dict())
        else:
            text = {"context_length": 1, "vocab_size": 1, "width": 64, "heads": 1, "layers": 1}
            clip = CLIP(architecture.embed_dim, vision_config(architecture.vision), text)
            sizes = stated_text(architecture)
            bert = BertModel(BertConfig(**sizes, num_attention_heads=architecture.text.heads), add_pooling_layer=False)
            expected = {key: tensor for key, tensor in clip.state_dict().items() if key.startswith("visual.")}
            expected |= {f"bert.{key}": tensor for key, tensor in bert.state_dict().items()}
            expected["text_projection"] = torch.empty(architecture.text.width, architecture.embed_dim)
            expected["logit_scale"] = torch.empty(())
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items() if not key.endswith("num_batches_tracked")}
    assert {key: info.shape for key, info in family.published_tensors(known.architecture).items()} == shapes
