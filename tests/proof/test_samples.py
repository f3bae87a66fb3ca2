from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, processors

from vlm_export.family import Model, Part
from vlm_export.models.minicpmv.slicing import slice_spec_from_version
from vlm_export.proof.samples import SENTENCES, sample_inputs, synthetic_photographs
from vlm_export.specs import AnyImageSpec
from vlm_export.specs.signature import Axis, Signature, TensorSpec
from vlm_export.specs.tiles import TileSpec


@pytest.fixture
def tokenizer_path(tmp_path: Path, model: Model) -> Path:
    """Words of one letter, with start- and end-of-text where the tiny model has them."""
    assert model.text is not None
    end = model.text.end_token_id
    vocabulary = {chr(ord("a") + i): i for i in range(26)} | {"[unk]": 26}
    vocabulary |= {f"[{i}]": i for i in range(27, end - 1)} | {"<|startoftext|>": end - 1, "<|endoftext|>": end}
    rust = RustTokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    rust.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    rust.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    rust.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", end - 1), ("<|endoftext|>", end)],
    )
    path = tmp_path / "tokenizer.json"
    rust.save(str(path))
    return path


def test_the_photographs_are_the_same_on_every_call_and_not_flat() -> None:
    first, second = synthetic_photographs(), synthetic_photographs()
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]
    shapes = {(image.width > image.height) - (image.width < image.height) for image in first}
    assert shapes == {-1, 0, 1}
    for image in first:
        assert image.mode == "RGB"
        assert np.asarray(image).std() > 20


def test_the_photographs_have_the_spectrum_of_natural_scenes() -> None:
    grey = np.asarray(synthetic_photographs()[2].convert("L"), dtype=np.float64)
    power = np.abs(np.fft.rfft2(grey - grey.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(grey.shape[0])[:, None], np.fft.rfftfreq(grey.shape[1])[None, :])
    band = (frequency > 0.01) & (frequency < 0.2)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert -3 < slope < -1


def test_an_image_is_prepared_for_both_sides(model: Model, parts: dict[str, Part]) -> None:
    samples = sample_inputs(parts["vision"].signature, model.image, model.text, None)
    assert len(samples) == len(synthetic_photographs())
    for sample in samples:
        ours, theirs = sample.inputs["pixel_values"], sample.reference_inputs["pixel_values"]
        assert ours.shape == theirs.shape == (1, 3, 42, 42)
        assert ours.dtype == theirs.dtype == np.float32
        assert float(np.abs(ours - theirs).max()) <= 1e-6


def test_the_user_s_images_take_the_place_of_the_synthetic_ones(model: Model, parts: dict[str, Part]) -> None:
    samples = sample_inputs(parts["vision"].signature, model.image, None, None, images=[Image.new("L", (60, 50), 200)])
    assert len(samples) == 1
    assert len({float(value) for value in samples[0].inputs["pixel_values"][0, 0].ravel()}) == 1


def test_sentences_become_batches_of_token_ids(model: Model, parts: dict[str, Part], tokenizer_path: Path) -> None:
    assert model.text is not None
    samples = sample_inputs(parts["text"].signature, model.image, model.text, tokenizer_path)
    ids = [sample.inputs["input_ids"] for sample in samples]
    assert sum(len(batch) for batch in ids) == len(SENTENCES)
    for batch in ids:
        assert batch.dtype == np.int64
        assert batch.shape[1] <= model.text.context_length
        assert (batch == model.text.end_token_id).any(axis=1).all()


def test_sentences_come_with_their_mask_where_the_part_takes_it(
    model: Model, parts: dict[str, Part], tokenizer_path: Path
) -> None:
    shape = ("batch", "sequence")
    inputs = tuple(TensorSpec(name, "int64", shape) for name in ("input_ids", "attention_mask"))
    masked = Signature(inputs, OUTPUT, (Axis("batch"), Axis("sequence", 1, 20)))
    plain = sample_inputs(parts["text"].signature, None, model.text, tokenizer_path)
    samples = sample_inputs(masked, None, model.text, tokenizer_path)
    assert len(samples) == len(plain)
    lengths = set()
    for sample, unmasked in zip(samples, plain, strict=True):
        assert tuple(sample.inputs) == tuple(sample.reference_inputs) == ("input_ids", "attention_mask")
        ids, mask = sample.inputs["input_ids"], sample.inputs["attention_mask"]
        assert np.array_equal(ids, unmasked.inputs["input_ids"])
        assert mask.shape == ids.shape
        assert (np.diff(mask, axis=1) <= 0).all()
        lengths |= set(mask.sum(axis=1).tolist())
    assert len(lengths) > 3


def test_parts_with_other_inputs_have_no_samples(model: Model, parts: dict[str, Part], tokenizer_path: Path) -> None:
    ids, mask = (TensorSpec(name, "int64", ("batch",)) for name in ("input_ids", "attention_mask"))
    states = TensorSpec("encoder_hidden_states", "float32", ("batch", 9, 16))
    for inputs in ((ids, mask, states), (states,), (mask, ids)):
        attending = Signature(inputs, OUTPUT, (Axis("batch"),))
        assert sample_inputs(attending, model.image, model.text, tokenizer_path) == []
    assert sample_inputs(parts["text"].signature, model.image, model.text, None) == []
    assert sample_inputs(parts["vision"].signature, None, model.text, tokenizer_path) == []


SIZES = TensorSpec("tgt_sizes", "int64", ("batch", 2))


# Every part has an output; of which size, does not matter here.
OUTPUT = (TensorSpec("y", "float32", (1,)),)


def pixels(*shape: int | str) -> Signature:
    axes = tuple(Axis(name) for name in ("batch", *shape) if isinstance(name, str))
    values = TensorSpec("pixel_values", "float32", ("batch", *shape))
    return Signature((values,), OUTPUT, tuple(dict.fromkeys(axes)))


def packed() -> Signature:
    values = TensorSpec("pixel_values", "float32", ("batch", 3, 14, "packed_width"))
    return Signature((values, SIZES), OUTPUT, (Axis("batch"), Axis("packed_width")))


TILES = TileSpec(64, 192, resize_to_max_side=True, global_tile=True)
CUT: list[tuple[AnyImageSpec, Signature, list[tuple[int, ...]]]] = [
    (slice_spec_from_version("omnilmm", queries=4), pixels(3, "side", "side"), [(1, 3, 448, 448)]),
    (slice_spec_from_version("1.0", queries=4, size_pixels=90), pixels(3, "side", "side"), [(1, 3, 98, 98)]),
    (
        slice_spec_from_version("2.0", queries=4, size_pixels=112, max_slices=4),
        pixels(3, "height", "width"),
        [(1, 3, 70, 168), (2, 3, 126, 98), (1, 3, 126, 98)],
    ),
    (
        slice_spec_from_version("2.6", queries=4, size_pixels=112, max_slices=4),
        packed(),
        [(2, 3, 14, 14 * 63), (2, 3, 14, 14 * 63)],
    ),
    (
        TileSpec(64, 192, True, True),
        pixels(3, 64, 64),
        [(2, 3, 64, 64), (2, 3, 64, 64), (2, 3, 64, 64), (1, 3, 64, 64)],
    ),
]


@pytest.mark.parametrize(("spec", "signature", "shapes"), CUT, ids=["omnilmm", "1.0", "2.0", "2.6", "tiles"])
def test_an_image_that_is_cut_is_prepared_for_both_sides(
    spec: AnyImageSpec, signature: Signature, shapes: list[tuple[int, ...]]
) -> None:
    photograph = synthetic_photographs()[0].resize((320, 150))
    samples = sample_inputs(signature, spec, None, None, images=[photograph])
    assert [sample.inputs["pixel_values"].shape for sample in samples] == shapes
    for sample in samples:
        assert tuple(sample.inputs) == tuple(sample.reference_inputs) == signature.input_names
        for name, ours in sample.inputs.items():
            theirs = sample.reference_inputs[name]
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert float(np.abs(ours - theirs).max()) <= 1e-6
        assert float(sample.inputs["pixel_values"].std()) > 0.1


def test_of_the_project_s_own_photographs_a_few_slices_are_seen() -> None:
    spec = slice_spec_from_version("2.6", queries=4, size_pixels=56)
    rows = [len(sample.inputs["tgt_sizes"]) for sample in sample_inputs(packed(), spec, None, None)]
    assert rows == [2, 2] * 3
    every = sample_inputs(packed(), spec, None, None, images=synthetic_photographs()[:1])
    assert sum(len(sample.inputs["tgt_sizes"]) for sample in every) > 4


def test_the_sentences_vary() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES) >= 20
    lengths = [len(sentence) for sentence in SENTENCES]
    assert min(lengths) <= 5
    assert max(lengths) >= 150
    assert any(not sentence.isascii() for sentence in SENTENCES)
