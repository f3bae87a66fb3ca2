"""The verbs on bundles of decoder-only models: what they print, what they pass on, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_export import load
from vlm_export.text_display import shown_lines

pytestmark = pytest.mark.needs_torch

Cli = Callable[..., Any]
Bundle = Callable[[str], Path]
DATA = Path(__file__).parents[1] / "data"
IMAGE, OTHER = (DATA / "nanovlm" / variant / "image.png" for variant in ("split", "450m"))
ONE = ("--threads", "1")
ASKED = "What is this?"
NO_TORCH = "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'safetensors', 'yaml'): sys.modules[name] = None"


def printed(text: str) -> str:
    """As the terminal shows it: the tiny models write control characters, of which only line ends stay."""
    return shown_lines(text) + "\n"


def test_ask(cli: Cli, nanovlm_bundle: Bundle) -> None:
    bundle = nanovlm_bundle("split")
    model = load(bundle, threads=1)
    (expected,) = model.answer([[IMAGE, OTHER]], ASKED, max_new_tokens=12)
    asked = ("ask", bundle, IMAGE, OTHER, ASKED, "--max-new-tokens", "12", *ONE)
    plain = cli(*asked)
    assert (plain.status, plain.out, plain.err) == (0, printed(expected), "")
    assert cli(*asked, "--stream").out == printed(expected)
    data = cli(*asked, "--json").data
    assert data == {"images": [str(IMAGE), str(OTHER)], "question": ASKED, "answer": expected}
    (alone,) = model.answer(IMAGE, ASKED, max_new_tokens=12)
    assert cli("ask", bundle, IMAGE, "--max-new-tokens", "12", ASKED, *ONE).out == printed(alone)
    assert alone != expected


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--seed", "3"], {"seed": 3}),
        (["--seed", "3", "--temperature", "2.5"], {"seed": 3, "temperature": 2.5}),
        (["--seed", "3", "--top-k", "3", "--temperature", "2"], {"seed": 3, "top_k": 3, "temperature": 2.0}),
        (["--seed", "3", "--top-k", "0", "--top-p", "1"], {"seed": 3, "top_k": 0, "top_p": 1.0}),
    ],
)
def test_sampling(cli: Cli, nanovlm_bundle: Bundle, options: list[str], arguments: dict[str, Any]) -> None:
    bundle = nanovlm_bundle("450m")
    model = load(bundle, threads=1)
    (expected,) = model.answer(OTHER, ASKED, sample=True, **arguments)
    for stream in ((), ("--stream",)):
        assert cli("ask", bundle, OTHER, ASKED, "--sample", *options, *stream, *ONE).out == printed(expected)
    (caption,) = model.caption(OTHER, sample=True, **arguments)
    assert cli("caption", bundle, OTHER, "--sample", *options, *ONE).out == printed(caption)


def test_caption(cli: Cli, nanovlm_bundle: Bundle) -> None:
    bundle = nanovlm_bundle("222m")
    model = load(bundle, threads=1)
    (alone,) = model.caption(IMAGE)
    assert cli("caption", bundle, IMAGE, *ONE).out == cli("caption", bundle, IMAGE, "--greedy", *ONE).out
    assert cli("caption", bundle, IMAGE, *ONE).out == printed(alone)
    expected = model.caption([IMAGE, OTHER], prompt="Where?", max_new_tokens=5)
    options = ("--prompt", "Where?", "--max-new-tokens", "5", "--batch-size", "1", "--json", "--quiet")
    data = cli("caption", bundle, IMAGE, OTHER, *options, *ONE).data
    assert data["captions"] == [
        {"image": str(image), "caption": caption} for image, caption in zip((IMAGE, OTHER), expected, strict=True)
    ]


def test_embed_match_and_search(cli: Cli, nanovlm_bundle: Bundle, tmp_path: Path) -> None:
    bundle, output = nanovlm_bundle("450m"), tmp_path / "images.npy"
    model = load(bundle, threads=1)
    cosines = model.embedding.similarity([IMAGE, OTHER], ["a cat", "what"])
    assert cli("embed", bundle, IMAGE, OTHER, "-o", output, "--quiet", *ONE).status == 0
    assert np.allclose(np.load(output), model.encode_image([IMAGE, OTHER]), atol=1e-6)
    data = cli("search", bundle, output, "a cat", "--json", *ONE).data
    assert {match["item"]: match["cosine"] for match in data["matches"]} == {
        str(image): pytest.approx(float(cosine), abs=1e-5)
        for image, cosine in zip((IMAGE, OTHER), cosines[:, 0], strict=True)
    }
    data = cli("match", bundle, IMAGE, "a cat", "what", "--json", *ONE).data
    assert {match["text"]: match["cosine"] for match in data["matches"]} == {
        text: pytest.approx(float(cosine), abs=1e-5) for text, cosine in zip(("a cat", "what"), cosines[0], strict=True)
    }
    cli("match", bundle, IMAGE, "a", "--first-token", "enc").refused(2, "--first-token", "task match")
    cli("search", bundle, output, "a", "--rerank").refused(3, "cannot match texts with images")
    cli("classify", bundle, IMAGE, "cat", "dog").refused(3, "not trained to score", "use match")


def test_inspect_shows_the_tiles(cli: Cli, nanovlm_bundle: Bundle, tmp_path: Path) -> None:
    bundle = nanovlm_bundle("split")
    data = cli("inspect", IMAGE, "--bundle", bundle, "--json").data
    assert (data["size"], data["resized"], data["grid"]) == ([120, 90], [64, 64], {"rows": 2, "columns": 2})
    assert (data["tiles"], data["tokens_per_tile"], data["tokens"]) == (5, 4, 25)
    assert data["placeholder"].startswith("<|global_image|>[4]<row_1_col_1>[4]<row_1_col_2>[4]<row_2_col_1>")
    rows = load(bundle, threads=1).chatting.rows
    (row,) = rows.question_rows([(IMAGE,)], [""])
    (bare,) = rows.question_rows([()], [""])
    assert data["tokens"] == len(row.ids) - len(bare.ids)
    lines = cli("inspect", IMAGE, "--bundle", bundle).out
    assert "120 x 90 pixels, resized to 64 x 64" in lines
    assert "2 x 2, and the whole image as one more" in lines
    cli("inspect", IMAGE, "--bundle", nanovlm_bundle("450m")).refused(3, "cuts no images", "takes whole images")
    cli("inspect", IMAGE, "--bundle", bundle, "-o", tmp_path / "x.png").refused(2, "not drawn")
    cli("inspect", "nowhere.png", "--bundle", bundle).refused(3, "nowhere.png")


def test_what_is_refused(cli: Cli, nanovlm_bundle: Bundle, refused_json: Callable[..., dict[str, Any]]) -> None:
    bundle = nanovlm_bundle("450m")
    for options in (["--beams", "2"], ["--max-length", "9"], ["--min-length", "1"], ["--candidates", "a", "b"]):
        cli("ask", bundle, OTHER, ASKED, *options).refused(2, "this bundle has no use for " + options[0])
    for options in (["--beams", "2"], ["--repetition-penalty", "2"], ["--max-length", "9"], ["--min-length", "1"]):
        cli("caption", bundle, OTHER, *options).refused(2, "this bundle has no use for " + options[0])
    for options in (["--seed", "1"], ["--temperature", "1"], ["--top-k", "3"], ["--top-p", "0.5"]):
        for command in (("ask", bundle, OTHER, ASKED), ("caption", bundle, OTHER)):
            cli(*command, *options).refused(2, options[0], "--sample")
    cli("ask", bundle, OTHER, ASKED, "--stream", "--json").refused(2, "--stream")
    cli("ask", bundle, OTHER, ASKED, "--sample", "--top-p", "2").refused(2, "top_p")
    cli("ask", bundle, OTHER, "cat " * 600).refused(3, "longer than the model's context", "at most 512 tokens")
    assert cli("ask", bundle, OTHER, "cat " * 600, "--truncate", "--max-new-tokens", "2", *ONE).status == 0
    cli("ask", bundle, "nowhere.png", ASKED, "--stream").refused(3, "nowhere.png")
    cli("ask", bundle, OTHER, "a <|image|>").refused(3, "placeholders do not match", "it is written for you")
    cli("ask", nanovlm_bundle("222m"), OTHER, OTHER, ASKED).refused(2, "exactly one image")
    assert cli("ask", bundle, ASKED).status == 2
    assert refused_json(2, "ask", nanovlm_bundle("222m"), OTHER, OTHER, ASKED)["got"] == "2"


def test_blip_names_what_it_has_no_use_for(cli: Cli, blip_bundle: Bundle) -> None:
    image_path = DATA / "blip" / "vqa" / "image.png"
    bundle = blip_bundle("vqa")
    for options in (["--stream"], ["--sample"], ["--sample", "--seed", "1"], ["--max-new-tokens", "3"]):
        cli("ask", bundle, image_path, "what", *options).refused(2, "this bundle has no use for " + options[0])
    cli("ask", bundle, image_path, image_path, "what").refused(2, "one image at a time", "2 images")
    captions = blip_bundle("caption")
    for options in (["--temperature", "1"], ["--top-k", "3"]):
        cli("caption", captions, image_path, "--sample", *options).refused(2, "no use for " + options[0])
    cli("caption", captions, image_path, "--max-new-tokens", "3").refused(2, "no use for --max-new-tokens")


def test_streaming_needs_no_torch(spawn: Callable[..., Any], nanovlm_bundle: Bundle) -> None:
    bundle = nanovlm_bundle("222m")
    (expected,) = load(bundle, threads=1).answer(IMAGE, ASKED)
    env = {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(DATA.parents[1])}
    done = spawn("ask", bundle, IMAGE, ASKED, "--stream", *ONE, code=NO_TORCH, env=env)
    assert (done.status, done.out.strip()) == (0, shown_lines(expected).strip()), done.err


def test_inspect_tells_how_images_are_cut(cli: Cli, nanovlm_bundle: Bundle) -> None:
    for source in (nanovlm_bundle("split"), DATA / "nanovlm" / "split"):
        tiles = cli("inspect", source, "--json").data["preparation"]["image"]
        assert {name: entry["value"] for name, entry in tiles.items()} == {
            "tile_size_pixels": 32,
            "max_side_pixels": 64,
            "resize_to_max_side": True,
            "global_tile": True,
        }
        assert tiles["max_side_pixels"]["from"] == "config.json: max_img_size"
        assert "image.max_side_pixels" in cli("inspect", source).out
    whole = cli("inspect", nanovlm_bundle("450m"), "--json").data["preparation"]["image"]
    assert "size_pixels" in whole
    assert "tile_size_pixels" not in whole


def test_embed_skips_what_cannot_be_read_in_a_folder(cli: Cli, nanovlm_bundle: Bundle, tmp_path: Path) -> None:
    folder, output = tmp_path / "images", tmp_path / "x.npy"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no image")
    (folder / "b.png").write_bytes(IMAGE.read_bytes())
    done = cli("embed", nanovlm_bundle("split"), folder, "-o", output, "--quiet", "--json", *ONE)
    assert (done.status, done.data["count"], done.data["skipped"]) == (0, 1, [str(folder / "a.png")])
    assert len(np.load(output)) == 1
