"""Makes tests/data/runtime: images in every mode with the pixels that torchvision gives, and a tiny bundle.

Run with the `export` extra installed: python tests/runtime/record_expected.py
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision import transforms

from vlm_export.bundle.manifest import Manifest, PartRecord, SourceRecord, VariantRecord
from vlm_export.bundle.oldest_engine import oldest_onnxruntime
from vlm_export.bundle.publish import publication
from vlm_export.exporting.tokenizers.openai_bpe import END_TOKEN, START_TOKEN, tokenizer_json_from_vocab
from vlm_export.models.clip import encoders as clip_encoders
from vlm_export.models.clip import family as clip
from vlm_export.models.clip.architecture import ClipArchitecture, TextSizes, VitSizes
from vlm_export.models.layers.blocks import build_causal_mask
from vlm_export.models.reading import images as images
from vlm_export.specs import ImageSpec, TextSpec, torchvision_image_spec
from vlm_export.specs.tasks import EmbedSpec, EncoderSpec, ScoreSpec

DATA = Path(__file__).parent.parent / "data" / "runtime"
SIZE_PIXELS = 24
MERGES = ["i n", "in g</w>", "c a", "ca t</w>", "d o", "do g</w>", "t h", "th e</w>", "p h", "ph o", "t o</w>"]
TEXTS = ["", "a cat", "a photo of a dog", "the thing", "A  CAT", "<|endoftext|> cat"]


def noise(width: int, height: int, channels: int, seed: int) -> npt.NDArray[np.uint8]:
    """Coarse noise: edges and flat places, and every value in use."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 3), -(-width // 3), channels), dtype=np.uint8)
    return np.kron(coarse, np.ones((3, 3, 1), dtype=np.uint8))[:height, :width]


def drawn_image(mode: str, width: int, height: int, seed: int) -> Image.Image:
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    raw = noise(width, height, channels, seed)
    return Image.frombytes(mode, (width, height), raw.tobytes())


def encoded_images() -> dict[str, bytes]:
    """File name → content; lossless formats only, so that every decoder gives the same pixels."""
    wide = noise(53, 37, 1, 9)[..., 0]
    rotated = Image.Exif()
    rotated[0x0112] = 6
    second = drawn_image("RGB", 40, 30, 12)
    files: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "portrait.png": (drawn_image("RGB", 37, 90, 0), {}),
        "landscape.png": (drawn_image("RGB", 97, 41, 1), {}),
        "half_pixel_down.png": (drawn_image("RGB", 24, 25, 2), {}),
        "half_pixel_up.png": (drawn_image("RGB", 27, 24, 3), {}),
        "large.png": (drawn_image("RGB", 150, 111, 4), {}),
        "one_pixel.png": (drawn_image("RGB", 1, 1, 5), {}),
        "smaller_than_crop.png": (drawn_image("RGB", 9, 14, 6), {}),
        "exact.png": (drawn_image("RGB", 24, 24, 7), {}),
        "grey.png": (drawn_image("L", 53, 37, 8), {}),
        "grey_alpha.png": (drawn_image("LA", 53, 37, 9), {}),
        "transparent.png": (drawn_image("RGBA", 53, 37, 10), {}),
        "transparent.webp": (drawn_image("RGBA", 53, 37, 10), {"lossless": True, "exact": True}),
        "cmyk.tiff": (drawn_image("CMYK", 53, 37, 11), {}),
        "palette.png": (drawn_image("RGB", 53, 37, 12).quantize(17), {}),
        "palette_transparent.png": (drawn_image("RGB", 53, 37, 13).quantize(9), {"transparency": 3}),
        "palette.gif": (drawn_image("RGB", 37, 53, 14).quantize(33), {}),
        "animated.gif": (
            drawn_image("RGB", 40, 30, 15).quantize(8),
            {"save_all": True, "append_images": [second.quantize(8)]},
        ),
        "animated.webp": (
            drawn_image("RGB", 40, 30, 15),
            {"save_all": True, "append_images": [second], "lossless": True},
        ),
        "bitmap.png": (drawn_image("L", 53, 37, 16).convert("1"), {}),
        "sixteen_bit.png": (Image.fromarray(wide.astype(np.uint16) * 5), {}),
        "integer.tiff": (Image.fromarray(wide.astype(np.int32) * 3 - 100), {}),
        "float.tiff": (Image.fromarray(wide.astype(np.float32) * 1.5 - 20), {}),
        "rotated.png": (drawn_image("RGB", 53, 37, 17), {"exif": rotated}),
        "plain.bmp": (drawn_image("RGB", 30, 40, 18), {}),
        "plain.ppm": (drawn_image("RGB", 30, 40, 19), {}),
    }
    return {name: _encoded(name, image, options) for name, (image, options) in files.items()}


def _encoded(name: str, image: Image.Image, options: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=Path(name).suffix[1:].upper(), **options)
    return stream.getvalue()


def original_transform(spec: ImageSpec) -> transforms.Compose:
    """The steps of `_transform` in openai/CLIP clip.py, in torchvision."""
    return transforms.Compose(
        [
            transforms.Resize(spec.size_pixels, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(spec.size_pixels),
            transforms.Lambda(lambda image: image.convert("RGB")),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )


def record_images() -> None:
    folder = DATA / "images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    after = original_transform(
        torchvision_image_spec(SIZE_PIXELS, "bicubic", "after_crop", images.IMAGE_MEAN, images.IMAGE_STD)
    )
    expected: dict[str, Any] = {}
    for name, content in encoded_images().items():
        (folder / name).write_bytes(content)
        with Image.open(folder / name) as image:
            image.load()
            expected[f"after_crop/{name}"] = after(image).numpy()
            expected[f"before_resize/{name}"] = after(image.convert("RGB")).numpy()
    np.savez_compressed(DATA / "images.npz", **expected)


def tiny_tokenizer() -> tuple[str, int]:
    """tokenizer.json with CLIP's byte symbols and a few merges, and its vocabulary size."""
    from vlm_export.exporting.tokenizers.openai_bpe import byte_symbols

    merges = [(left, right) for left, right in (line.split() for line in MERGES)]
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(left + right for left, right in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, START_TOKEN, END_TOKEN])}
    return tokenizer_json_from_vocab(vocab, merges, "tiny"), len(vocab)


def tiny_model(vocab_size: int) -> tuple[clip_encoders.ClipEncoders, ClipArchitecture]:
    """CLIP with 16 channels and seeded weights large enough that rows differ."""
    architecture = ClipArchitecture(
        key_names="openai",
        embed_dim=12,
        activation="quick_gelu",
        eps=1e-5,
        vision=VitSizes(width=16, layers=1, heads=2, hidden=32, patch_size=8, image_size=SIZE_PIXELS),
        text=TextSizes(16, 1, 2, 32, 20, vocab_size, "argmax", vocab_size - 1),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoders = clip_encoders.build_encoders(architecture).to_empty(device="cpu").eval()
        for name, parameter in encoders.named_parameters():
            scale = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, mean=scale, std=0.3)
        encoders.logit_scale.data.fill_(np.log(20.0))
    # `to_empty` leaves buffers without content.
    encoders.text.causal_mask = build_causal_mask(architecture.towers[1].context_length)
    return encoders, architecture


def record_bundle() -> None:
    tokenizer_json, vocab_size = tiny_tokenizer()
    encoders, architecture = tiny_model(vocab_size)
    image_spec = torchvision_image_spec(SIZE_PIXELS, "bicubic", "after_crop", images.IMAGE_MEAN, images.IMAGE_STD)
    text_spec = TextSpec(architecture.towers[1].context_length, vocab_size, vocab_size - 1, 0, "openai")
    vision_sizes, text_sizes = architecture.towers
    vision_signature = clip.vision_signature(architecture, vision_sizes, dynamic_image_size=False)
    parts = (
        (encoders.vision, vision_signature, torch.randn(2, 3, SIZE_PIXELS, SIZE_PIXELS)),
        (encoders.text, clip.text_signature(architecture, text_sizes), torch.randint(1, vocab_size - 1, (2, 7))),
    )
    with publication(DATA / "tiny_bundle", overwrite=True) as staging:
        records = []
        for name, (module, signature, example) in zip(("vision", "text"), parts, strict=True):
            file = f"onnx/{name}_model.onnx"
            torch.onnx.export(
                module,
                (example,),
                str(staging.file(file)),
                dynamo=False,
                opset_version=17,
                input_names=list(signature.input_names),
                output_names=list(signature.output_names),
                dynamic_axes=signature.dynamic_axes(),
            )
            records.append(
                PartRecord(
                    name,
                    signature,
                    (
                        VariantRecord(
                            "fp32",
                            file,
                            opset=17,
                            exporter="torchscript",
                            oldest_onnxruntime=oldest_onnxruntime(staging.path / file)[0],
                        ),
                    ),
                )
            )
        staging.file("tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        staging.commit(
            Manifest(
                name="tiny",
                source=SourceRecord("seeded", "random", random_weights_seed=0),
                family="clip",
                architecture=architecture.to_json(),
                image=image_spec,
                text=text_spec,
                tasks=(
                    EmbedSpec(
                        EncoderSpec("vision", "image_embeds"),
                        EncoderSpec("text", "text_embeds"),
                        ScoreSpec("softmax", float(encoders.logit_scale)),
                    ),
                ),
                parts=tuple(records),
            )
        )
    record_embeddings(encoders, image_spec, DATA / "tiny_bundle" / "tokenizer.json")


def record_embeddings(encoders: clip_encoders.ClipEncoders, image_spec: ImageSpec, tokenizer_json: Path) -> None:
    """What the modules give in torch for the recorded images and for ids of TEXTS from the tokenizers library."""
    from tokenizers import Tokenizer

    rust = Tokenizer.from_file(str(tokenizer_json))
    names = sorted(path.name for path in (DATA / "images").iterdir())
    transform = original_transform(image_spec)
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(DATA / "images" / name)) for name in names])
        images = encoders.vision(pixels)
        # One row at a time, at its own length: padding is the runtime's affair.
        rows = [torch.tensor([rust.encode(text).ids]) for text in TEXTS]
        texts = torch.cat([encoders.text(row) for row in rows])
    np.savez_compressed(DATA / "tiny_embeddings.npz", images=images.numpy(), texts=texts.numpy())
    listing = {"files": names, "texts": TEXTS, "ids": [row[0].tolist() for row in rows]}
    (DATA / "tiny_embeddings.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record_images()
    record_bundle()
