"""Directories that transformers and open_clip wrote themselves, in odd settings: images and texts in, vectors out.

Both sides start from the same files: the library's own processor, tokenizer and model, and `load` of the bundle.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

import vlm_export
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import export_bundle
from vlm_export.exporting.tokenizers.files import find_open_clip_merges
from vlm_export.exporting.tokenizers.openai_bpe import vocab_from_bpe_merges

_shared = runpy.run_path(str(Path(__file__).parents[1] / "models" / "dual_encoders.py"))
spread, assert_equal, MAX_ABS = (_shared[name] for name in ("spread", "assert_equal", "MAX_ABS"))
HALF = (0.5, 0.5, 0.5)
TEXTS = (
    "a photo of a cat",
    "",
    "A PHOTO Of A CAT",
    "café déjà vu",
    "a zurgle and <sks> cat",
    "日本語のテキスト",
    "emoji 😀👩\u200d👩\u200d👧 test",
    "tabs\tand\nnew lines",
    "red  circle!!!  &amp; &lt;b&gt;",
    "1234567890 3.14",
    "don't we'll they've",
    "naïve ﬁ ligature ½",
    "ZURGLE zurgles <SKS>",
    "مرحبا بالعالم",
    "nul\x00 bell\x07 zero width\u200b",
    "a very long text about cats and dogs " * 40,
)
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}


def odd_images() -> list[Image.Image]:
    """Margins of 0 to 3 mod 4 around the crop, tiny and wide ones, and every mode that files commonly have."""
    noise = np.random.default_rng(0).integers(0, 255, (9, 11, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((320, 320), Image.Resampling.BICUBIC)
    transparent = large.resize((90, 70)).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((90, 70)))
    grey = large.resize((50, 51)).convert("LA")
    grey.putalpha(Image.linear_gradient("L").resize((50, 51)))
    sizes = ((320, 213), (213, 320), (35, 32), (32, 33), (34, 47), (5, 7), (200, 20))
    palette = large.resize((60, 80)).convert("P", palette=Image.Palette.ADAPTIVE)
    others = [transparent, grey, palette, large.resize((61, 80)).convert("CMYK"), large.resize((61, 83)).convert("L")]
    return [large.resize(size) for size in sizes] + others


@pytest.fixture(scope="module")
def bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte pairs, but only the first merges."""
    merges = find_open_clip_merges()
    assert merges is not None
    _, pairs = vocab_from_bpe_merges(merges)
    vocab, _ = vocab_from_bpe_merges(merges)
    ordered = sorted(vocab, key=vocab.__getitem__)
    kept = [*ordered[: 512 + 2000], "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(kept)}, pairs[:2000]


def tiny_clip(rows: int, cls: Any = CLIPModel, **changes: Any) -> Any:
    end = changes.pop("end", rows - 1)
    torch.manual_seed(0)
    special = {"bos_token_id": rows - 2, "eos_token_id": end, "pad_token_id": rows - 1}
    text = {**_SIZES, **{"vocab_size": rows, "max_position_embeddings": 77}, **special, **changes}
    vision = {**_SIZES, **{"image_size": 32, "patch_size": 16}, **changes}
    if cls is CLIPModel:
        return spread(CLIPModel(CLIPConfig(projection_dim=32, text_config=text, vision_config=vision)))
    return spread(cls(cls.config_class(**(vision if cls is CLIPVisionModelWithProjection else text))))


def processor(**changes: Any) -> Any:
    square = {"height": 32, "width": 32}
    return CLIPImageProcessorPil(**{"size": {"shortest_edge": 32}, "crop_size": square, **changes})


IMAGE_CASES: dict[str, dict[str, Any]] = {
    "published": {},
    "crop off, stretched": {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    "larger than the crop": {"size": {"shortest_edge": 37}},
    "smaller than the crop": {"size": {"shortest_edge": 24}},
    "bilinear, other mean": {"resample": 2, "image_mean": HALF, "image_std": HALF},
    "lanczos, other scale": {
        "resample": 1,
        "rescale_factor": 1 / 127.5,
        "image_mean": (1.0,) * 3,
        "image_std": (1.0,) * 3,
    },
}


@pytest.mark.parametrize("settings", IMAGE_CASES.values(), ids=IMAGE_CASES)
def test_images_of_transformers_clip(settings: dict[str, Any], tmp_path: Path) -> None:
    tiny_clip(600, hidden_act="gelu" if settings else "quick_gelu").save_pretrained(tmp_path / "clip")
    processor(**settings).save_pretrained(tmp_path / "clip")
    export_bundle(str(tmp_path / "clip"), tmp_path / "out", ExportOptions(opset=17, parts=("vision",), threads=1))
    assert_images(tmp_path, CLIPModel.from_pretrained(tmp_path / "clip").get_image_features, "clip")


@pytest.mark.parametrize("has_processor", [False, True])
def test_a_preparation_that_no_file_states_is_a_warning(has_processor: bool, tmp_path: Path) -> None:
    """transformers' own AutoImageProcessor refuses such a folder."""
    tiny_clip(600).save_pretrained(tmp_path / "clip")
    if has_processor:
        processor().save_pretrained(tmp_path / "clip")
    options = ExportOptions(opset=17, parts=("vision",), threads=1, simplify=False)
    warnings = export_bundle(str(tmp_path / "clip"), tmp_path / "out", options).manifest.export.warnings
    assert [warning.partition(":")[0] for warning in warnings] == (
        [] if has_processor else ["no file says how images are prepared"]
    )


def assert_images(folder: Path, encode: Callable[..., Any], name: str) -> None:
    images = odd_images()
    prepare = AutoImageProcessor.from_pretrained(folder / name, backend="pil")
    with torch.inference_mode():
        outputs = [encode(**prepare([image], return_tensors="pt")) for image in images]
    names = ["image_embeds" if "image_embeds" in output else "pooler_output" for output in outputs]
    expected = torch.cat([output[name] for output, name in zip(outputs, names, strict=True)])
    got = vlm_export.load(folder / "out").encode_image(images)
    assert_equal(got, expected, [f"{image.mode} {image.size}" for image in images])


def write_published(folder: Path, tokenizer: Any) -> None:
    tiny_clip(len(tokenizer)).save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)


def write_legacy_end(folder: Path, tokenizer: Any) -> None:
    tiny_clip(len(tokenizer), end=2).to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_added_tokens(folder: Path, tokenizer: Any) -> None:
    tokenizer.add_tokens(["<sks>", "zurgle"])
    tiny_clip(len(tokenizer), end=len(tokenizer) - 3).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_slow_files(folder: Path, tokenizer: Any) -> None:
    rows = len(tokenizer) + 2
    tiny_clip(rows, end=rows - 3).save_pretrained(folder)
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in pairs) + "\n")
    (folder / "added_tokens.json").write_text(json.dumps({"<sks>": rows - 2, "zurgle": rows - 1}))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "model_max_length": 77}))


TEXT_CASES = (write_published, write_legacy_end, write_added_tokens, write_slow_files)


@pytest.mark.parametrize("write", TEXT_CASES, ids=lambda write: write.__name__.removeprefix("write_"))
def test_texts_of_transformers_clip(write: Callable[[Path, Any], None], bpe: Any, tmp_path: Path) -> None:
    write(tmp_path / "clip", CLIPTokenizer(vocab=bpe[0], merges=bpe[1], model_max_length=77))
    export_bundle(str(tmp_path / "clip"), tmp_path / "out", ExportOptions(opset=17, parts=("text",), threads=1))
    model = CLIPModel.from_pretrained(tmp_path / "clip", dtype=torch.float32).eval()
    assert_texts(tmp_path, lambda **inputs: model.get_text_features(**inputs).pooler_output)


def assert_texts(folder: Path, encode: Callable[..., Any]) -> None:
    tokenize = AutoTokenizer.from_pretrained(folder / "clip")
    inputs = tokenize(list(TEXTS), padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.inference_mode():
        expected = encode(**inputs)
    assert_equal(vlm_export.load(folder / "out").encode_text(TEXTS, truncate=True), expected, TEXTS)


def test_towers_of_transformers_clip(bpe: Any, tmp_path: Path) -> None:
    tokenizer = CLIPTokenizer(vocab=bpe[0], merges=bpe[1], model_max_length=77)
    (tmp_path / "vision").mkdir()
    (tmp_path / "text").mkdir()
    # The patches of 16 pixels leave a margin of 8 out.
    vision = tiny_clip(len(tokenizer), CLIPVisionModelWithProjection, image_size=40)
    prepare_image = processor(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    text = tiny_clip(len(tokenizer), CLIPTextModelWithProjection)
    for folder, model, prepare in (("vision", vision, prepare_image), ("text", text, tokenizer)):
        model.save_pretrained(tmp_path / folder / "clip")
        prepare.save_pretrained(tmp_path / folder / "clip")
        export_bundle(str(tmp_path / folder / "clip"), tmp_path / folder / "out", ExportOptions(opset=17, threads=1))
    assert_images(tmp_path / "vision", vision, "clip")
    assert_texts(tmp_path / "text", lambda **inputs: text(**inputs).text_embeds)


def write_blip(folder: Path, cls: type[Any]) -> Any:
    """Writes a tiny BLIP with a cased tokenizer of other ids than BERT's; returns the model."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'é"
    words = [*letters, "[UNK]", "[SEP]", "[CLS]", "[PAD]", "[MASK]", *(f"##{letter}" for letter in letters), "photo"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = BertTokenizer(vocab=vocab, do_lower_case=False, bos_token="[DEC]", model_max_length=64)
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    ids = {name: tokenizer.convert_tokens_to_ids(f"[{name}]") for name in ("DEC", "SEP", "PAD")}
    text = {
        **_SIZES,
        **{"vocab_size": len(tokenizer), "encoder_hidden_size": 64, "max_position_embeddings": 64},
        **{
            "bos_token_id": ids["DEC"],
            "eos_token_id": ids["SEP"],
            "sep_token_id": ids["SEP"],
            "pad_token_id": ids["PAD"],
        },
    }
    vision = {**_SIZES, **{"image_size": 40, "patch_size": 16}}
    config = BlipConfig(projection_dim=32, image_text_hidden_size=32, text_config=text, vision_config=vision)
    model = spread(cls(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 40, "width": 40}, image_mean=HALF, resample=2).save_pretrained(folder)
    return model


def test_blip_of_transformers_with_a_cased_tokenizer_of_other_ids(tmp_path: Path) -> None:
    source = tmp_path / "blip"
    model = write_blip(source, BlipForImageTextRetrieval)
    export_bundle(str(source), tmp_path / "out", ExportOptions(opset=17, threads=1))

    images, texts = odd_images(), TEXTS[:-1]
    prepare, tokenize = AutoImageProcessor.from_pretrained(source, backend="pil"), AutoTokenizer.from_pretrained(source)
    bundle = vlm_export.load(tmp_path / "out")
    with torch.inference_mode():
        pixels = [prepare([image], return_tensors="pt")["pixel_values"] for image in images]
        expected = torch.cat([model.vision_proj(model.vision_model(p)[0][:, 0]) for p in pixels])
        rows = [tokenize([t], truncation=True, max_length=35, return_tensors="pt") for t in texts]
        hidden = [model.text_encoder(row["input_ids"], row["attention_mask"])[0][:, 0] for row in rows]
        matches = [
            model(pixel_values=pixels[0], input_ids=row["input_ids"], attention_mask=row["attention_mask"]).itm_score
            for row in rows
        ]
        words_expected = model.text_proj(torch.cat(hidden))
        probabilities = torch.cat(matches).softmax(dim=-1)[:, 1].numpy()
    assert_equal(bundle.encode_image(images), expected, [f"{image.mode} {image.size}" for image in images])
    assert_equal(bundle.encode_text(texts, truncate=True), words_expected, texts)
    got = [match.probability for match in bundle.match(images[:1] * len(texts), texts, truncate=True)]
    np.testing.assert_allclose(got, probabilities, atol=MAX_ABS, rtol=0)


@pytest.mark.parametrize(
    ("cls", "task", "fault"),
    [
        (BlipForImageTextRetrieval, "match", {"first_token": "enc"}),
        (BlipForConditionalGeneration, "caption", {"decoder_start": 5}),
        (BlipForQuestionAnswering, "answer", {"question_first_token": "enc"}),
    ],
)
def test_words_of_transformers_blip_are_part_of_the_contract(
    cls: type[Any], task: str, fault: dict[str, Any], tmp_path: Path
) -> None:
    bundle = tmp_path / "out"
    write_blip(tmp_path / "blip", cls)
    contract = export_bundle(
        str(tmp_path / "blip"), bundle, ExportOptions(opset=17, threads=1, simplify=False)
    ).contract
    (check,) = [check for check in contract.checks if check.stage == task]
    assert check.compared >= 6
    assert contract.made_by["words"] == f"transformers {cls.__name__}"

    manifest = json.loads((bundle / "vlm_export.json").read_text(encoding="utf-8"))
    (spec,) = [spec for spec in manifest["tasks"] if spec["kind"] == task]
    (spec["tokens"] if "decoder_start" in fault else spec).update(fault)
    (bundle / "vlm_export.json").write_text(json.dumps(manifest), encoding="utf-8")
    failed = {check.stage: check.failures for check in vlm_export.verify(bundle).contract.checks if check.failures}
    assert set(failed) == {task, "manifest"}
    assert "expected" in failed[task][0]


OPEN_CLIP_VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
OPEN_CLIP_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
OPEN_CLIP_CASES: dict[str, dict[str, Any]] = {
    "GELU, shortest edge": {},
    "QuickGELU, stretched, bilinear, fixed positions, rows beyond the vocabulary": {
        "model": {
            "quick_gelu": True,
            "vision_cfg": {**OPEN_CLIP_VISION, "image_size": 40, "pos_embed_type": "sin_cos_2d"},
            "text_cfg": {**OPEN_CLIP_TEXT, "vocab_size": 49472},
        },
        "preprocess": {"interpolation": "bilinear", "resize_mode": "squash"},
    },
}


@pytest.mark.parametrize("settings", OPEN_CLIP_CASES.values(), ids=OPEN_CLIP_CASES)
def test_open_clip(settings: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "clip"
    source.mkdir()
    sizes: dict[str, Any] = {"embed_dim": 32, "vision_cfg": OPEN_CLIP_VISION, "text_cfg": OPEN_CLIP_TEXT}
    model_cfg = {**sizes, **settings.get("model", {})}
    preprocess = {"mean": HALF, "std": HALF, **settings.get("preprocess", {})}
    torch.manual_seed(0)
    model = spread(CLIP(**model_cfg))
    # A run of open_clip's own trainer: wrapped, and each key behind a prefix.
    wrapped = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}
    torch.save(wrapped, source / "epoch_3.pt")
    (source / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}), encoding="utf-8"
    )
    export_bundle(str(source), tmp_path / "out", ExportOptions(opset=17, threads=1))

    images, bundle = odd_images(), vlm_export.load(tmp_path / "out")
    transform: Any = image_transform_v2(
        PreprocessCfg(size=model_cfg["vision_cfg"]["image_size"], **preprocess), is_train=False
    )
    tokenize = open_clip.get_tokenizer(f"local-dir:{source}")
    with torch.inference_mode():
        pixels = torch.stack([transform(image) for image in images])
        assert_equal(bundle.encode_image(images), model.encode_image(pixels), [f"{i.mode} {i.size}" for i in images])
        texts = (*TEXTS, "<|endoftext|> and <end_of_text> inside")
        assert_equal(bundle.encode_text(texts, truncate=True), model.encode_text(tokenize(list(texts))), texts)
