"""A program of its own on the demo's checkpoint (open_clip, torchvision, tokenizers), right and with planted mistakes.

Nothing of the doctor makes what it is shown.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import build_model_from_openai_state_dict
from open_clip.tokenizer import basic_clean, whitespace_clean
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor
from torchvision.transforms.functional import InterpolationMode

import vlm_export
from vlm_export.bundle.opened import open_bundle
from vlm_export.lab.consumer.questions import write_questions
from vlm_export.lab.consumer.report import Diagnosis

CHECKPOINT = Path(__file__).parents[2] / "configs" / "demo" / "clip-demo.pt"
EDGE, CONTEXT, START, END = 64, 32, 436, 437
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = InterpolationMode.BICUBIC
Row = list[int]
Answers = dict[str, Any]
Vectors = np.ndarray[Any, Any]


class Program:
    """What uses the model; `questions` is what `doctor --questions` wrote."""

    def __init__(self, questions: Path, tokenizer: Path) -> None:
        self.texts: list[str] = json.loads((questions / "texts.json").read_text(encoding="utf-8"))
        self.images = [Image.open(path) for path in sorted((questions / "images").iterdir())]
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.cased = copy.deepcopy(self.tokenizer)
        self.cased.normalizer = None
        self.model = self.loaded()

    @staticmethod
    def loaded(**options: Any) -> Any:
        state = torch.load(CHECKPOINT, weights_only=True)
        return build_model_from_openai_state_dict(state, cast_dtype=torch.float32, **options).float()

    def ids(self, change: Callable[[Row], Row] = list, *, lower: bool = True, sentence: str = "") -> list[Row]:
        """Cleaned as open_clip cleans, cut to the context, changed."""
        cleaned = [whitespace_clean(basic_clean(sentence + text)) for text in self.texts]
        tokenizer = self.tokenizer if lower else self.cased
        rows = [tokenizer.encode(text.lower() if lower else text).ids for text in cleaned]
        return [change(row if len(row) <= CONTEXT else [*row[: CONTEXT - 1], END]) for row in rows]

    def pixels(self, *steps: Any) -> torch.Tensor:
        """Through torchvision's steps, those of OpenAI unless others are given."""
        chosen = steps or (*SQUARE, convert, ToTensor(), Normalize(MEAN, STD))
        return torch.stack([Compose(chosen)(image) for image in self.images])

    @torch.no_grad()
    def text_vectors(self, rows: Sequence[Row] | None = None, model: Any = None, *, pad: int = 0) -> Vectors:
        rows = self.ids() if rows is None else rows
        filled = torch.tensor([[*row, *[0] * (CONTEXT - len(row))] for row in rows])
        return unit((model or self.model).encode_text(filled))

    @torch.no_grad()
    def image_vectors(self, pixels: torch.Tensor | None = None, model: Any = None) -> Vectors:
        return unit((model or self.model).encode_image(self.pixels() if pixels is None else pixels))


def unit(rows: torch.Tensor) -> Vectors:
    found: Vectors = torch.nn.functional.normalize(rows, dim=-1).numpy()
    return found


def convert(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


SQUARE = (Resize(EDGE, interpolation=BICUBIC), CenterCrop(EDGE))
SCALED = (ToTensor(), Normalize(MEAN, STD))


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """torch's resize as it is without being told to antialias."""
    shorter = min(tensor.shape[1:])
    size = [EDGE if edge == shorter else int(EDGE * edge / shorter) for edge in tensor.shape[1:]]
    resized = torch.nn.functional.interpolate(tensor[None], size, mode="bilinear", align_corners=False)
    square: torch.Tensor = CenterCrop(EDGE)(resized[0])
    return square


def on_black(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), rgba).convert("RGB")


def lettered(image: Image.Image) -> Image.Image:
    return ImageOps.pad(image.convert("RGB"), (EDGE, EDGE), Image.Resampling.BICUBIC)


def padded_left(row: Row) -> Row:
    return [0] * (CONTEXT - len(row)) + row


def changed(**changes: Any) -> Any:
    """The model with other attributes, "visual_…" of its image encoder."""
    model = Program.loaded()
    for name, value in changes.items():
        owner = model.visual if name.startswith("visual_") else model
        setattr(owner, name.removeprefix("visual_"), value)
    return model


def random_model() -> Any:
    torch.manual_seed(0)
    model = Program.loaded()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def program(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Program:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("questions") / "questions"
    assert write_questions(open_bundle(demo), folder) == (16, 15)
    return Program(folder, demo / "tokenizer.json")


def mistakes_of(found: Diagnosis) -> dict[str, list[str]]:
    """Stage → mistakes, of the stages that are wrong by themselves."""
    return {stage.name: [finding.mistake for finding in stage.findings] for stage in found.wrong}


def test_a_program_that_is_right_has_no_mistake(demo: Path, program: Program) -> None:
    answers = {
        "ids": program.ids(),
        "pixels": program.pixels().numpy(),
        "text_vectors": program.text_vectors(),
        "image_vectors": program.image_vectors(),
    }
    for given in (answers, *({name: value} for name, value in answers.items())):
        found = vlm_export.doctor(demo, given)
        assert found.passed
        assert [s.verdict for s in found.stages if s.verdict != "not given"] == ["equal"] * len(given)


def test_the_runtime_has_no_mistake(demo: Path, program: Program) -> None:
    model = vlm_export.load(demo, threads=1)
    vectors = model.encode_text(program.texts, truncate=True)
    found = vlm_export.doctor(demo, {"text_vectors": vectors, "image_vectors": model.encode_image(program.images)})
    assert [stage.verdict for stage in found.stages] == ["not given", "not given", "equal", "equal"]


IDS: Mapping[str, tuple[str, Callable[[Program], list[Row]]]] = {
    "no BOS": ("no BOS", lambda p: p.ids(lambda row: row[1:])),
    "no EOS": ("no EOS", lambda p: p.ids(lambda row: row[:-1])),
    "neither": ("no BOS and no EOS", lambda p: p.ids(lambda row: row[1:-1])),
    "case": ("not lower case", lambda p: p.ids(lower=False)),
    "left": ("padded on the left", lambda p: p.ids(padded_left)),
    "short": ("cut to 16 tokens", lambda p: p.ids(lambda row: row if len(row) <= 16 else [*row[:15], END])),
    "sentence": ("put into 'a photo of a {}'", lambda p: p.ids(sentence="a photo of a ")),
    "int8": ("int width: 8 bits, unsigned", lambda p: p.ids(lambda row: np.array(row).astype(np.uint8).tolist())),
}


@pytest.mark.parametrize("name", IDS)
def test_mistakes_with_ids(demo: Path, program: Program, name: str) -> None:
    """Also where the vectors alone are known."""
    word, rows = IDS[name][0], IDS[name][1](program)
    vectors = program.text_vectors(rows)
    found = vlm_export.doctor(demo, {"ids": rows, "text_vectors": vectors})
    assert mistakes_of(found) == {"ids": [word]}
    assert found.stages[2].verdict == "follows"
    assert word in mistakes_of(vlm_export.doctor(demo, {"text_vectors": vectors}))["text vectors"]


def test_a_mistake_without_the_cleaning_of_texts(demo: Path, program: Program) -> None:
    """As a library would read the bundle's tokenizer.json, which cleans nothing."""
    rows = [program.tokenizer.encode(text).ids for text in program.texts]
    rows = [row if len(row) <= CONTEXT else [*row[: CONTEXT - 1], END] for row in rows]
    assert vlm_export.doctor(demo, {"ids": rows, "text_vectors": program.text_vectors(rows)}).passed
    rows = [row[1:] for row in rows]
    for given in ({"ids": rows}, {"text_vectors": program.text_vectors(rows)}):
        assert list(mistakes_of(vlm_export.doctor(demo, given)).values()) == [["no BOS"]]


def test_images_that_are_converted_first(demo: Path, program: Program) -> None:
    """Palettes and transparency then look otherwise, also to a program with another mistake."""
    assert vlm_export.doctor(demo, {"pixels": program.pixels(convert, *SQUARE, *SCALED).numpy()}).passed
    pixels = program.pixels(convert, Resize((EDGE, EDGE), interpolation=BICUBIC), *SCALED)
    for given in ({"pixels": pixels.numpy()}, {"image_vectors": program.image_vectors(pixels)}):
        assert list(mistakes_of(vlm_export.doctor(demo, given)).values()) == [["stretch instead of crop"]]


def test_words_of_another_vocabulary(demo: Path, program: Program) -> None:
    letters = [[START, *(ord(letter) % 400 for letter in text[: CONTEXT - 2]), END] for text in program.texts]
    assert mistakes_of(vlm_export.doctor(demo, {"ids": letters})) == {"ids": ["another tokenizer"]}


def test_texts_that_are_cut_lose_their_end(demo: Path, program: Program) -> None:
    rows = [program.tokenizer.encode(whitespace_clean(basic_clean(t)).lower()).ids[:CONTEXT] for t in program.texts]
    assert mistakes_of(vlm_export.doctor(demo, {"ids": rows})) == {"ids": ["cut without EOS"]}
    longer = [program.tokenizer.encode(whitespace_clean(basic_clean(t)).lower()).ids for t in program.texts]
    assert mistakes_of(vlm_export.doctor(demo, {"ids": longer})) == {"ids": ["not truncated"]}


PIXELS: Mapping[str, tuple[str, Callable[[Program], torch.Tensor]]] = {
    "stretch": (
        "stretch instead of crop",
        lambda p: p.pixels(Resize((EDGE, EDGE), interpolation=BICUBIC), convert, *SCALED),
    ),
    "antialias": ("no antialias", lambda p: p.pixels(convert, ToTensor(), sampled, Normalize(MEAN, STD))),
    "BGR": ("BGR", lambda p: p.pixels(*SQUARE, convert, ToTensor(), lambda x: x.flip(0), Normalize(MEAN, STD))),
    "ImageNet": (
        "mean and std",
        lambda p: p.pixels(*SQUARE, convert, ToTensor(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    ),
    "levels to 1": ("not normalised", lambda p: p.pixels(*SQUARE, convert, ToTensor())),
    "levels to 255": ("not normalised", lambda p: 255 * p.pixels(*SQUARE, convert, ToTensor())),
    "whole numbers": ("int width", lambda p: p.pixels().int().float()),
    "another filter": (
        "another filter: bilinear",
        lambda p: p.pixels(Resize(EDGE), CenterCrop(EDGE), convert, *SCALED),
    ),
    "padded": ("padded to a square", lambda p: p.pixels(lettered, *SCALED)),
    "larger": ("crop of a larger image", lambda p: p.pixels(Resize(73, BICUBIC), CenterCrop(EDGE), convert, *SCALED)),
    "mirrored": ("mirrored", lambda p: p.pixels(ImageOps.mirror, *SQUARE, convert, *SCALED)),
    "turned": ("EXIF orientation applied", lambda p: p.pixels(ImageOps.exif_transpose, *SQUARE, convert, *SCALED)),
}


@pytest.mark.parametrize("name", PIXELS)
def test_mistakes_with_images(demo: Path, program: Program, name: str) -> None:
    """Also where the vectors alone are known."""
    word, pixels = PIXELS[name][0], PIXELS[name][1](program)
    vectors = program.image_vectors(pixels)
    found = vlm_export.doctor(demo, {"pixels": pixels.numpy(), "image_vectors": vectors})
    assert mistakes_of(found)["pixels"][0] == word
    assert found.stages[3].verdict == "follows"
    assert mistakes_of(vlm_export.doctor(demo, {"image_vectors": vectors}))["image vectors"][0] == word


def test_transparency_is_a_mistake_of_those_images(demo: Path, program: Program) -> None:
    found = vlm_export.doctor(demo, {"pixels": program.pixels(on_black, *SQUARE, *SCALED).numpy()})
    findings = {finding.mistake: finding.items for finding in found.stages[1].findings}
    assert "rgba.png" in findings["transparency"]
    assert not any(name.startswith("margin") for name in found.stages[1].differing)


def test_arrays_of_another_form(demo: Path, program: Program) -> None:
    pixels = program.pixels().numpy()
    for array, word in (
        (pixels.transpose(0, 2, 3, 1), "layout"),
        (program.pixels(Resize((48, 48)), convert, *SCALED).numpy(), "another size"),
        (pixels / np.float32(0), "not finite"),
    ):
        assert mistakes_of(vlm_export.doctor(demo, {"pixels": array}))["pixels"] == [word]


def test_two_mistakes_at_once(demo: Path, program: Program) -> None:
    steps = (
        Resize((EDGE, EDGE), interpolation=BICUBIC),
        convert,
        ToTensor(),
        lambda x: x.flip(0),
        Normalize(MEAN, STD),
    )
    found = mistakes_of(vlm_export.doctor(demo, {"pixels": program.pixels(*steps).numpy()}))["pixels"]
    assert {"stretch instead of crop", "BGR"} <= set(found)


MODELS: Mapping[str, tuple[str, str, Callable[[Program], Vectors]]] = {
    "last token": ("text", "another pooling", lambda p: p.text_vectors(model=changed(text_pool_type="last"))),
    "no text projection": (
        "text",
        "projection missing",
        lambda p: p.text_vectors(model=changed(text_projection=None)),
    ),
    "GELU": ("text", "GELU instead of QuickGELU", lambda p: p.text_vectors(model=p.loaded(quick_gelu=False))),
    "another": ("text", "another model", lambda p: p.text_vectors(model=random_model())),
    "order": ("text", "another order", lambda p: np.roll(p.text_vectors(), 1, axis=0)),
    "mean of patches": (
        "image",
        "another pooling",
        lambda p: p.image_vectors(model=changed(visual_pool_type="avg")),
    ),
    "no projection": ("image", "projection missing", lambda p: p.image_vectors(model=changed(visual_proj=None))),
    "image GELU": ("image", "GELU instead of QuickGELU", lambda p: p.image_vectors(model=p.loaded(quick_gelu=False))),
    "another image model": ("image", "another model", lambda p: p.image_vectors(model=random_model())),
    "un-normalised": ("image", "un-normalised", lambda p: 3 * p.image_vectors()),
    "overflow": ("image", "not finite", lambda p: p.image_vectors() * np.float32("inf")),
    "cut": ("image", "cut vectors", lambda p: unit(torch.tensor(p.image_vectors()[:, :64]))),
    "half": ("image", "lower precision", lambda p: noisy(p.image_vectors())),
}


def noisy(vectors: Vectors) -> Vectors:
    """As far off as eight bits may be."""
    noise = 0.03 * np.random.default_rng(0).standard_normal(vectors.shape) / vectors.shape[1] ** 0.5
    return unit(torch.tensor(vectors + noise))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", MODELS)
def test_mistakes_with_the_model(demo: Path, program: Program, name: str) -> None:
    """Also where the inputs are known to be right, or not known at all."""
    kind, word, make = MODELS[name]
    answers: Answers = {f"{kind}_vectors": make(program)}
    inputs: Answers = {"ids": program.ids()} if kind == "text" else {"pixels": program.pixels().numpy()}
    for given in (answers, answers | inputs):
        assert mistakes_of(vlm_export.doctor(demo, given)) == {f"{kind} vectors": [word]}


def test_a_program_that_reads_the_bundle_and_rounds_has_one_mistake(demo: Path, program: Program) -> None:
    """Where the bundle's files cannot say all its ids and pixels are others than the original's, and no mistake."""
    rows = [program.tokenizer.encode(text).ids for text in program.texts]
    rows = [row if len(row) <= CONTEXT else [*row[: CONTEXT - 1], END] for row in rows]
    pixels = program.pixels(convert, *SQUARE, *SCALED)
    vectors = {
        "text_vectors": noisy(program.text_vectors(rows)),
        "image_vectors": noisy(program.image_vectors(pixels)),
    }
    for given in (vectors, {**vectors, "ids": rows, "pixels": pixels.numpy()}):
        expected = {"text vectors": ["lower precision"], "image vectors": ["lower precision"]}
        assert mistakes_of(vlm_export.doctor(demo, given)) == expected


def test_one_image_that_comes_near_a_mistake_is_a_coincidence(demo: Path, program: Program) -> None:
    """Nothing that is known explains inverted images, and none of them is said to be something else."""
    pixels = program.pixels(convert, ImageOps.invert, *SQUARE, *SCALED)
    for given in ({"pixels": pixels.numpy()}, {"image_vectors": program.image_vectors(pixels)}):
        (stage,) = vlm_export.doctor(demo, given).wrong
        assert (stage.findings, set(stage.unexplained)) == ((), set(stage.tried))


def test_a_mistake_of_the_model_behind_one_with_pixels(demo: Path, program: Program) -> None:
    pixels = PIXELS["BGR"][1](program)
    vectors = program.image_vectors(pixels, program.loaded(quick_gelu=False))
    found = mistakes_of(vlm_export.doctor(demo, {"pixels": pixels.numpy(), "image_vectors": vectors}))
    assert found == {"pixels": ["BGR"], "image vectors": ["GELU instead of QuickGELU"]}


def test_half_precision_is_right_where_it_is_said(demo: Path, program: Program) -> None:
    vectors = vlm_export.load(demo, precision="fp16", threads=1).encode_image(program.images)
    assert vlm_export.doctor(demo, {"image_vectors": vectors}, precision="fp16").passed


def test_quantised_variants_are_told(demo: Path, program: Program, tmp_path: Path) -> None:
    bundle = tmp_path / "int8"
    vlm_export.quantize(demo, "int8", parts=["vision"], output=bundle, threads=1)
    vectors = vlm_export.load(bundle, precision="int8", threads=1).encode_image(program.images)
    *_, stage = vlm_export.doctor(bundle, {"image_vectors": vectors}, precision="int8").stages
    assert stage.verdict == "equal"
    assert any("what int8 may lose, a cosine of 0.98" in note for note in stage.notes)
    *_, stage = vlm_export.doctor(bundle, {"image_vectors": vectors}, precision="fp32").stages
    (finding,) = stage.findings
    assert finding.mistake == "lower precision"
    assert finding.fix.startswith("compare with --precision fp16 or --precision int8 if that is what you run")


def test_another_padding_id_is_no_mistake_where_no_vector_changes(demo: Path, program: Program) -> None:
    rows = program.ids(lambda row: [*row, *[END] * (CONTEXT - len(row))])
    (stage, *_) = vlm_export.doctor(demo, {"ids": rows}).stages
    assert stage.verdict == "equal"
    assert "changes no vector" in stage.notes[0]
