"""Prompts of the three layouts: the oracle's token ids, several images, and what is cut or refused."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.inputs.chat_prompt import MAX_CHARACTERS, PromptWriter
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.runtime.inputs.tiles import plan_tiles
from vlm_export.specs import TextSpec
from vlm_export.specs.tiles import TileSpec

EXAMPLES = runpy.run_path(str(Path(__file__).with_name("chat_specs.py")))
CHATS, tokenizer_json, VOCABULARY = EXAMPLES["CHATS"], EXAMPLES["tokenizer_json"], EXAMPLES["VOCABULARY"]
ASKED = "What is this?"
QUESTION = [311, 291, 28, 316, 294, 303, 33, 315, 28]
FEATURES = [320] * 4
# `input.input_ids` of the oracle: what the original's code and tokenizer made of ASKED.
ORACLE = {
    "222m": QUESTION,
    "450m": [*FEATURES, *QUESTION],
    "split": [
        *(1, 292, 201),
        *(321, *FEATURES, 322, *FEATURES, 323, *FEATURES, 330, *FEATURES, 331, *FEATURES),
        *(274, 263, 294, 303, 33, 2, 201, 1, 262, 313, 201),
    ],
}
GRIDS = {"222m": [(1, 1)], "450m": [(1, 1)], "split": [(2, 2)]}


def writer_of(variant: str, folder: Path, **changes: Any) -> PromptWriter:
    path = folder / f"{variant}.json"
    path.write_text(tokenizer_json(variant), encoding="utf-8")
    spec = TextSpec(512, VOCABULARY[variant], 2, 2, "none", adds_eos=False)
    return PromptWriter(Tokenizer(path, spec), replace(CHATS[variant], **changes), str(path))


@pytest.mark.parametrize("variant", VOCABULARY)
def test_ids_are_the_recorded_ones(variant: str, tmp_path: Path) -> None:
    writer = writer_of(variant, tmp_path)
    assert writer.ids(ASKED, GRIDS[variant]) == ORACLE[variant]
    assert writer.ids(ASKED, GRIDS[variant], truncate=True) == ORACLE[variant]
    assert writer.prepended(GRIDS[variant]) == (4 if variant == "222m" else 0)


def test_a_single_tile_is_the_whole_image(tmp_path: Path) -> None:
    writer, features = writer_of("split", tmp_path), "<|image|>" * 4
    assert writer.text("Q", [(1, 1)]) == (
        f"<|im_start|>user\n<|global_image|>{features}Q<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (writer.tiles((1, 1)), writer.tiles((1, 2)), writer.tiles((3, 2))) == (1, 3, 7)


def test_checkpoints_from_before_the_whole_image_was_added(tmp_path: Path) -> None:
    writer, features = writer_of("split", tmp_path, global_image_token=None), "<|image|>" * 4
    assert writer.text("Q", [(1, 1)]).startswith(f"<|im_start|>user\n<row_1_col_1>{features}Q")
    cut = "".join(f"<row_{row}_col_{column}>{features}" for row, column in ((1, 1), (1, 2), (2, 1), (2, 2)))
    assert writer.text("Q", [(2, 2)]).startswith(f"<|im_start|>user\n{cut}Q")
    assert (writer.tiles((1, 1)), writer.tiles((2, 2))) == (1, 4)


def test_several_images_are_numbered_where_the_original_does(tmp_path: Path) -> None:
    features = "<|image|>" * 4
    two = writer_of("split", tmp_path).text("Q", [(1, 1), (1, 2)])
    assert two == (
        f"<|im_start|>user\n<image: 0><|global_image|>{features}"
        f"<image: 1><|global_image|>{features}<row_1_col_1>{features}<row_1_col_2>{features}"
        "Q<|im_end|>\n<|im_start|>assistant\n"
    )
    writer = writer_of("450m", tmp_path)
    assert writer.text("Q", [(1, 1)] * 2) == features * 2 + "Question: Q Answer:"
    assert writer.ids(ASKED, [(1, 1)] * 3) == [320] * 12 + QUESTION


def test_a_tile_without_a_marker_is_named(tmp_path: Path) -> None:
    marks = {f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)}
    writer = writer_of("split", tmp_path, tile_tokens=marks)
    grid = plan_tiles((187, 187), TileSpec(512, 1536, resize_to_max_side=True, global_tile=True)).grid
    assert grid == (4, 3)
    with pytest.raises(InputError, match="more tiles than the model has markers for") as caught:
        writer.ids(ASKED, [grid])
    assert "r4c1" in caught.value.got
    assert writer.ids(ASKED, [(3, 3)])


def test_half_a_surrogate_pair_is_named_by_its_question(tmp_path: Path) -> None:
    writer = writer_of("split", tmp_path)
    with pytest.raises(InputError, match="surrogate") as caught:
        writer.ids("Is it \ud800?", [(1, 1)], name="question 7")
    assert caught.value.where.startswith("question 7: 'Is it")
    assert "character 6" in caught.value.got


def test_text_alone_works_where_images_have_places(tmp_path: Path) -> None:
    assert writer_of("450m", tmp_path).ids(ASKED, []) == QUESTION
    assert writer_of("split", tmp_path).text("Q", []) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    for grids in ([], [(1, 1), (1, 1)]):
        with pytest.raises(UsageError, match="exactly one image") as caught:
            writer_of("222m", tmp_path).ids(ASKED, grids)
        assert caught.value.got == str(len(grids))


def test_placeholders_in_a_question_are_counted(tmp_path: Path) -> None:
    for variant, wanted in (("450m", "4 times"), ("split", "20 times")):
        with pytest.raises(InputError, match="placeholders do not match") as caught:
            writer_of(variant, tmp_path).ids("Is <|image|> red?", GRIDS[variant], name="question 3")
        assert caught.value.where == "question 3"
        assert wanted in caught.value.expected
    # The first generation has no placeholders: there it is text.
    assert 320 not in writer_of("222m", tmp_path).ids("Is <|image|> red?", [(1, 1)])


def test_given_ids_are_checked_too(tmp_path: Path) -> None:
    writer = writer_of("450m", tmp_path)
    writer.check([320] * 4 + [5], [(1, 1)], "prompt 0")
    for ids, grids in (([320] * 4, []), ([320] * 3, [(1, 1)]), ([320] * 4, [(1, 1)] * 2), ([5], [(1, 1)])):
        with pytest.raises(InputError, match="placeholders do not match"):
            writer.check(ids, grids, "prompt 0")


@pytest.mark.parametrize("variant", VOCABULARY)
def test_a_prompt_beyond_the_context_names_its_length(variant: str, tmp_path: Path) -> None:
    question, grids = "what is this thing " * 12, GRIDS[variant]
    longest = writer_of(variant, tmp_path)
    length = len(longest.ids(question, grids)) + longest.prepended(grids)
    assert writer_of(variant, tmp_path, context_length=length).ids(question, grids) == longest.ids(question, grids)
    with pytest.raises(InputError, match="longer than the model's context") as caught:
        writer_of(variant, tmp_path, context_length=length - 1).ids(question, grids, name="question 7")
    assert caught.value.where == "question 7"
    assert f"at most {length - 1} tokens" in caught.value.expected
    assert f"{length} tokens, {4 if variant != 'split' else 20} of them features" in caught.value.got


@pytest.mark.parametrize("variant", VOCABULARY)
@pytest.mark.parametrize("question", ["what is this thing " * 12, "🙂é日" * 20, "x" * 200])
def test_truncation_cuts_the_question_alone(variant: str, question: str, tmp_path: Path) -> None:
    grids, around = GRIDS[variant], writer_of(variant, tmp_path).ids("", GRIDS[variant])
    for room in (0, 1, 2, 3, 9, 20):
        context = len(around) + room + writer_of(variant, tmp_path).prepended(grids)
        writer = writer_of(variant, tmp_path, context_length=context)
        ids = writer.ids(question, grids, truncate=True)
        assert len(ids) + writer.prepended(grids) <= context
        # It is the prompt of a beginning of the question, and with the next word it would be too long.
        ends = sorted({0, *writer.tokenizer.word_ends(question)})
        prompts = [writer.tokenizer.prompt_ids(writer.text(question[:end], grids)) for end in ends]
        kept = max(i for i, prompt in enumerate(prompts) if prompt == ids)
        assert all(len(prompt) + writer.prepended(grids) > context for prompt in prompts[kept + 1 : kept + 2])


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="longer than the model's context"):
        writer_of("split", tmp_path, context_length=30).ids(ASKED, [(2, 2)], truncate=True)


def test_odd_questions_are_refused(tmp_path: Path) -> None:
    writer = writer_of("450m", tmp_path)
    odd: Any = 5
    with pytest.raises(InputError, match="not a string"):
        writer.ids(odd, [(1, 1)])
    with pytest.raises(InputError, match="surrogate"):
        writer.ids("a\ud800", [(1, 1)])
    with pytest.raises(InputError, match="too many characters"):
        writer.ids("a" * (MAX_CHARACTERS + 1), [(1, 1)])
    assert len(writer.ids("a " * MAX_CHARACTERS, [(1, 1)], truncate=True)) == 512


def test_a_tokenizer_without_the_images_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_text(tokenizer_json("222m"), encoding="utf-8")
    spec = TextSpec(512, 386, 2, 2, "none", adds_eos=False)
    tokenizer = Tokenizer(tmp_path / "plain.json", spec)
    for variant in ("450m", "split"):
        with pytest.raises(InputError, match="lacks tokens") as caught:
            PromptWriter(tokenizer, CHATS[variant], "tokenizer.json")
        assert "<" in caught.value.got
    other = replace(writer_of("450m", tmp_path).settings, image_token_id=319)
    with pytest.raises(InputError, match="lacks tokens") as caught:
        PromptWriter(writer_of("450m", tmp_path).tokenizer, other, "tokenizer.json")
    assert "<|image|> is 320" in caught.value.got


def test_the_tokenizer_adds_nothing(tmp_path: Path) -> None:
    tokenizer = writer_of("split", tmp_path).tokenizer
    assert tokenizer.encode_rows(["", "What"]) == [[], tokenizer.prompt_ids("What")]
    (cut,) = tokenizer.encode_rows(["a " * 600], truncate=True)
    assert (len(cut), cut[-1] == 2) == (512, False)
    assert tokenizer.decode([1, *tokenizer.prompt_ids("héllo"), 320, 2]) == "héllo"
