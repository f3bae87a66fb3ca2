"""What tests of dual encoders share: sixty texts of many scripts, small tokenizers, and transformers on the other side.

Both sides start from one directory: AutoProcessor's parts, AutoTokenizer and the model's own class; the command and
`load` of the bundle.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, BertTokenizer, XLMRobertaTokenizer

import vlm_export
from vlm_export.cli.main import main
from vlm_export.proof.contract_inputs import contract_images

Array = npt.NDArray[Any]
# Both back ends: opset 17 is the torchscript exporter's.
BACK_ENDS = (("--exporter", "dynamo"), ("--opset", "17"))
COSINE, MAX_ABS = 0.99999, 1e-4
TEXTS = (
    *("", "a photo of a cat", "A PHOTO OF A CAT", "two dogs & one cat", "It's 3.14, isn't it?", "don't we'll they've"),
    *("café déjà vu", "crème brûlée", "naïve ﬁ ligature ½", "Straße, Größe, Übermut", "ÅNGSTRÖM", "e\u0301 and é"),
    *("el niño y la niña", "¿Dónde está el gato?", "um cão e dois gatos", "un gatto sul tetto", "een kat op de mat"),
    *(
        "kissa katolla",
        "kot na dachu",
        "kočka na střeše",
        "macska a tetőn",
        "pisică pe acoperiş",
        "İstanbul'da bir kedi",
    ),
    *("mèo trên mái nhà", "kucing di atas atap", "paka juu ya paa", "γάτα στη στέγη", "Привет, мир", "кіт на даху"),
    *("котка на покрива", "გამარჯობა", "բարև", "שלום עולם", "مرحبا بالعالم", "گربه روی بام", "چھت پر بلی"),
    *("छत पर बिल्ली", "ছাদে বিড়াল", "கூரையில் பூனை", "పైకప్పుపై పిల్లి", "แมวบนหลังคา", "អរុណ", "မင်္ဂလာပါ"),
    *(
        "日本語のテキスト",
        "屋根の上の猫",
        "寿司",
        "ネコ、ﾈｺ",
        "一只猫在屋顶上",
        "杰尼龟",
        "皮卡丘,妙蛙種子",
        "지붕 위의 고양이",
        "ＦＵＬＬ width",
    ),
    *("emoji 😀👩\u200d👩\u200d👧 test", "🇯🇵🎂", "tabs\tand\nnew lines", "nul\x00 bell\x07 zero\u200bwidth"),
    *("  spaces \u3000 around  ", "x" * 40, "</s> <pad> [CLS] [SEP]", "a very long text about cats and dogs " * 30),
)
assert len(set(TEXTS)) == 60
_WORDS = ("photo", "cat", "dogs", "text", "very", "long", "about", "ing", "gato", "猫", "皮卡丘", "屋顶", "мир", "на")
# Letters that no vocabulary here has, so that unknown tokens occur.
_UNKNOWN = set("շqZ龟မ🎂½")


def _letters(text: str) -> list[str]:
    return sorted({letter for letter in text if not letter.isspace() and letter.isprintable()} - _UNKNOWN)


def unigram_tokenizer(**settings: Any) -> Any:
    """XLM-R's class with pieces of letters and a few words; ids of the special tokens are XLM-R's."""
    letters = _letters("".join(TEXTS))
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(letter, -6.0 - 0.001 * i) for i, letter in enumerate(letters)]
    pieces += [(f"{start}{word}", -7.0 - 0.01 * i) for i, word in enumerate(_WORDS) for start in ("▁", "")]
    named = dict(pieces)
    return XLMRobertaTokenizer(vocab=[*named.items(), ("<mask>", 0.0)], **settings)


def wordpiece_tokenizer(**settings: Any) -> Any:
    """BERT's class with a vocabulary of letters and a few words, in lower case, and U+2028 as bert-base-chinese."""
    letters = _letters("".join(TEXTS).lower())
    words = [*letters, *(f"##{letter}" for letter in letters), *_WORDS, *(f"##{word}" for word in _WORDS)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2028", *dict.fromkeys(words)]
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}, **settings)


def spread(model: Any) -> Any:
    """The model with no parameter at its default, so that each of them is seen in the outputs."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (0.6 if "embed" in name else parameter[0].numel() ** -0.5))
            elif "scale" not in name:
                parameter.add_(0.2 * noise)
    return model.eval()


def export(source: Path, target: Path, *options: str, model_type: str = "") -> Any:
    """The bundle that the command makes, opened; its contract left nothing out.

    Args:
        model_type: of a config.json that no class of transformers reads.
    """
    assert main(["export", str(source), "-o", str(target), "--threads", "1", *options]) == 0
    model = vlm_export.load(target)
    contract = model.manifest.export.contract
    assert contract is not None
    assert contract["passed"]
    assert [line for line in contract["not_run"] if not (model_type and model_type in line)] == []
    return model


def images(edge: int) -> list[Image.Image]:
    """The contract's images that transformers opens: odd margins and modes, tiny and wide ones."""
    return [Image.open(io.BytesIO(image.content)) for image in contract_images(edge)]


def unit(rows: Any) -> Array:
    array: Array = np.asarray(rows, np.float64)
    lengths: Array = np.linalg.norm(array, axis=-1, keepdims=True)
    unit_rows: Array = array / lengths
    return unit_rows


def assert_equal(got: Any, expected: Any, what: Sequence[object]) -> None:
    left, right = unit(got), unit(expected)
    cosines, largest = (left * right).sum(axis=-1), np.abs(left - right).max(axis=-1)
    wrong = [what[i] for i in range(len(what)) if not (cosines[i] >= COSINE and largest[i] <= MAX_ABS)]
    assert not wrong, f"cosine {cosines.min():.6f}, max-abs {largest.max():.2e} at {wrong}"


def assert_images_equal(source: Path, bundle: Any, encode: Callable[[Any], Any], edge: int) -> Any:
    """Embeddings of images, in batches of one and of several; returns the original's pixels."""
    samples = images(edge)
    prepare = AutoImageProcessor.from_pretrained(source, backend="pil")
    pixels = torch.cat([prepare([image], return_tensors="pt")["pixel_values"] for image in samples])
    with torch.inference_mode():
        expected = encode(pixels)
    for batch_size in (1, 7):
        got = bundle.encode_image(samples, batch_size=batch_size)
        assert_equal(got, expected, [f"{image.mode} {image.size}" for image in samples])
    return pixels


def assert_texts_equal(
    source: Path,
    bundle: Any,
    encode: Callable[[Any], Any],
    length: int,
    *,
    padding: bool | str = True,
    first: Callable[[str], str] = str,
) -> Any:
    """Ids, and embeddings in batches of one and of several; returns the original's inputs.

    Args:
        first: what the original's users do with a text before its tokenizer.
    """
    tokenize = AutoTokenizer.from_pretrained(source)
    inputs = tokenize(
        list(map(first, TEXTS)),
        padding=padding,
        truncation=True,
        max_length=length,
        return_tensors="pt",
        return_attention_mask=True,
    )
    rows = [row[mask == 1].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    assert bundle.session.tokenizer.encode_rows(TEXTS, truncate=True) == rows
    with torch.inference_mode():
        expected = encode(inputs)
    for batch_size in (1, 7, 60):
        assert_equal(bundle.encode_text(TEXTS, batch_size=batch_size, truncate=True), expected, TEXTS)
    return inputs


def assert_pair_equal(source: Path, bundle: Any, model: Any, *, edge: int, length: int) -> None:
    """Images, texts and the probabilities of one by the other."""
    pixels = assert_images_equal(
        source, bundle, lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output, edge
    )
    inputs = assert_texts_equal(source, bundle, lambda inputs: model.get_text_features(**inputs).pooler_output, length)
    with torch.inference_mode():
        expected = model(pixel_values=pixels, **inputs).logits_per_image.softmax(dim=-1)
    got = bundle.classify(images(edge), TEXTS, template="{}", truncate=True)
    np.testing.assert_allclose(got, expected.numpy(), atol=MAX_ABS, rtol=0)
