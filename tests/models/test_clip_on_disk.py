"""CLIP as people have it on disk: what trainers, torch and open_clip make of one and the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.errors import InputError, UsageError
from vlm_export.family import BuildOptions, Description, Model
from vlm_export.models.recognition.claims import left_out_warnings
from vlm_export.models.registry import identify
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec

Weights = dict[str, torch.Tensor]
Build = Callable[..., Model]


@pytest.fixture(scope="module")
def make_weights() -> Callable[..., Weights]:
    """The state dict of a tiny `open_clip.model.CLIP` whose fields the keywords replace."""
    from open_clip.model import CLIP

    def make(**vision: Any) -> Weights:
        torch.manual_seed(0)
        model = CLIP(
            embed_dim=32,
            vision_cfg={"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 64, **vision},
            text_cfg={"context_length": 77, "vocab_size": 600, "width": 64, "heads": 1, "layers": 2},
            quick_gelu=True,
        )
        return {key: value.detach().clone() for key, value in model.state_dict().items()}

    return make


@pytest.fixture(scope="module")
def weights(make_weights: Callable[..., Weights]) -> Weights:
    return make_weights()


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


def describe(path: Path) -> Description:
    family, checkpoint = identify(open_checkpoint(str(path)))
    return family.describe(checkpoint)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        describe(path)
    return str(caught.value)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_scale_with_axes_of_one(tmp_path: Path, weights: Weights, build_model: Build, shape: tuple[int, ...]) -> None:
    boxed = {**weights, "logit_scale": weights["logit_scale"].reshape(shape)}
    model = build_model(saved(boxed, tmp_path / "scale.pt"))
    task = model.task(EmbedSpec)
    assert task is not None
    assert task.score is not None
    assert task.score.logit_scale == pytest.approx(float(weights["logit_scale"]), abs=0)


def test_a_sigmoid_loss_is_named(tmp_path: Path, weights: Weights) -> None:
    message = refusal(saved({**weights, "logit_bias": torch.tensor(-10.0)}, tmp_path / "bias.pt"))
    assert "sigmoid" in message
    assert "delete logit_bias" in message


def test_positions_of_no_square_are_named(tmp_path: Path, make_weights: Callable[..., Weights]) -> None:
    message = refusal(saved(make_weights(image_size=(64, 32)), tmp_path / "tall.pt"))
    assert "the position table has 8 patches, which is no square" in message
    assert "images that are not square are not supported" in message


@pytest.mark.parametrize("shape", [(64, 1, 16, 16), (64, 4, 16, 16), (64, 3, 16, 8)])
def test_an_encoder_of_other_images_is_named(tmp_path: Path, weights: Weights, shape: tuple[int, ...]) -> None:
    message = refusal(saved({**weights, "visual.conv1.weight": torch.zeros(shape)}, tmp_path / "grey.pt"))
    assert "does not take square patches of RGB images" in message
    assert str(shape) in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "clipmodel.", "module._orig_mod.net.clip."])
def test_one_common_prefix(tmp_path: Path, weights: Weights, prefix: str) -> None:
    value = {f"{prefix}{key}": tensor for key, tensor in weights.items()}
    family, checkpoint = identify(open_checkpoint(str(saved(value, tmp_path / "prefixed.pt"))))
    assert (family.name, list(checkpoint.tensors), checkpoint.left_out) == ("clip", list(weights), ())
    assert checkpoint.notes == (f"the prefix '{prefix}' was taken off the keys",)
    assert torch.equal(checkpoint.read("visual.proj"), weights["visual.proj"])


def test_heads_beside_the_towers_are_named(tmp_path: Path, weights: Weights) -> None:
    head = {"ff_head.weight": torch.ones(5, 32), "ff_head.bias": torch.zeros(5)}
    for prefix in ("", "clip."):
        value = {**{f"{prefix}{key}": tensor for key, tensor in weights.items()}, **head}
        family, checkpoint = identify(open_checkpoint(str(saved(value, tmp_path / "head.pt"))))
        assert (family.name, checkpoint.left_out) == ("clip", tuple(head))
        assert left_out_warnings(checkpoint) == (
            "2 tensors beside the model were left out: ff_head. What is exported does not compute them",
        )


def test_a_copy_of_training_is_left_out(tmp_path: Path, weights: Weights) -> None:
    value = {f"{prefix}{key}": tensor for prefix in ("model.", "ema_model.") for key, tensor in weights.items()}
    checkpoint = identify(open_checkpoint(str(saved(value, tmp_path / "ema.pt"))))[1]
    assert checkpoint.notes[0] == "the prefix 'model.' was taken off the keys"
    assert "ema_model.*" in checkpoint.notes[1]
    value = {f"{prefix}{key}": tensor for prefix in ("first.", "second.") for key, tensor in weights.items()}
    message = refusal(saved(value, tmp_path / "two.pt"))
    assert "several models side by side" in message
    assert "first.* (clip), second.* (clip)" in message


def test_text_keys_of_custom_text(tmp_path: Path, build_model: Build) -> None:
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(1)
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 64}
    text = {"context_length": 20, "vocab_size": 60, "width": 64, "heads": 1, "layers": 1}
    original = CustomTextCLIP(32, vision, text, quick_gelu=True).eval()
    model = build_model(saved(original.state_dict(), tmp_path / "custom.pt"))
    for part, encode in zip(model.parts, (original.encode_image, original.encode_text), strict=True):
        (feed,) = part.examples({"batch": 2, "sequence": 20}, 0).values()
        with torch.no_grad():
            expected, found = encode(torch.from_numpy(feed)), part.module(torch.from_numpy(feed))
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5, rtol=0)


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"projection_dim": 16}
WORDS = {"vocab_size": 60, "max_position_embeddings": 20}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `vision`, `text` and `legacy` (pooled at the highest id), as transformers' own classes save them."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("towers")
    config = CLIPVisionConfig(image_size=32, patch_size=16, hidden_act="gelu", **TOWER)
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "vision")
    for name, ids in (("text", (58, 59, 59)), ("legacy", (0, 2, 1))):
        special = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids, strict=True))
        CLIPTextModelWithProjection(CLIPTextConfig(**TOWER, **WORDS, **special)).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", ["vision", "text", "legacy"])
def test_single_towers(towers: Path, build_model: Build, name: str) -> None:
    import transformers

    model = build_model(towers / name)
    (part,) = model.parts
    stated = model.hub_config["architectures"]
    assert part.name == ("vision" if name == "vision" else "text")
    assert model.reference_name == f"transformers {stated[0]}"
    encoder = EncoderSpec(part.name, part.signature.output_names[0])
    assert model.tasks == (EmbedSpec(*((encoder, None) if name == "vision" else (None, encoder))),)
    assert (model.image is None, model.text is None) == (name != "vision", name == "vision")
    inputs = part.examples({"batch": 3, "sequence": 9}, 0)
    original = getattr(transformers, stated[0]).from_pretrained(towers / name).eval()
    with torch.no_grad():
        (feed,) = (torch.from_numpy(array) for array in inputs.values())
        expected = original(feed)[part.signature.output_names[0]].numpy()
        found = part.module(feed).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    (reference,) = model.references[part.name]()(inputs).values()
    np.testing.assert_allclose(reference, expected, atol=1e-6, rtol=0)


def test_a_tower_is_no_whole_model(towers: Path, tmp_path: Path, build_model: Build) -> None:
    notes = describe(towers / "vision").notes
    assert "this is one tower of a CLIP: the checkpoint has no text encoder" in notes
    with pytest.raises(UsageError, match="no image encoder"):
        build_model(towers / "text", BuildOptions(image_size=64))
    (tmp_path / "model.safetensors").write_bytes((towers / "text" / "model.safetensors").read_bytes())
    assert "needs its config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("projection_dim", 17, "projection_dim 17, not 16"),
        ("eos_token_id", 60, "config.json: eos_token_id"),
        ("vocab_size", 61, "vocab_size 61, not 60"),
    ],
)
def test_a_config_that_contradicts_the_weights(towers: Path, tmp_path: Path, key: str, value: int, text: str) -> None:
    shutil.copytree(towers / "text", tmp_path / "text")
    file = tmp_path / "text" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    assert text in refusal(tmp_path / "text")
