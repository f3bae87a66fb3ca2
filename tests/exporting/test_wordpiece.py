"""BERT's WordPiece from its vocabulary: the recorded ids of the original, and [DEC] and [ENC] where BLIP has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer as RustTokenizer

from vlm_export.errors import InputError, UsageError
from vlm_export.exporting.tokenizers import files as tokenizer_files
from vlm_export.family import Checkpoint
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.specs import TextSpec

DATA = Path(__file__).parents[1] / "data" / "blip"
VOCAB = DATA / "vocab.txt"
TINY = TextSpec(
    context_length=64,
    vocab_size=157,
    end_token_id=102,
    pad_token_id=0,
    cleaning="none",
    added_tokens=("[DEC]", "[ENC]"),
    pooling="first_token",
)
OFFICIAL = replace(TINY, context_length=512, vocab_size=30524)
RECORD = json.loads((DATA / "tokenizer.json").read_text(encoding="utf-8"))
CASES = RECORD["cases"]
Open = Callable[[TextSpec, Path], Tokenizer]


def resolve_tokenizer(source: Checkpoint, option: str | None, text: TextSpec) -> dict[str, bytes]:
    return dict(tokenizer_files.resolve_tokenizer(source, option, text).files)


def checkpoint(**side_files: Path) -> Checkpoint:
    def read(key: str) -> Any:
        raise AssertionError("a tokenizer needs no tensors")

    files = {name.replace("__", "."): path for name, path in side_files.items()}
    return Checkpoint("model.pth", "state_dict", (), {}, read, side_files=files)


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """The runtime's tokenizer from what `resolve_tokenizer` makes of a path."""

    def build(spec: TextSpec, path: Path) -> Tokenizer:
        content = resolve_tokenizer(checkpoint(), str(path), spec)["tokenizer.json"]
        (tmp_path / "resolved.json").write_bytes(content)
        return Tokenizer(tmp_path / "resolved.json", spec)

    return build


@pytest.fixture(scope="module")
def official_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many lines as bert-base-uncased has: the recorded cases' pieces in their places, the others no word gives."""
    pieces = json.loads((DATA / "pieces.json").read_text(encoding="utf-8"))["pieces"]
    path = tmp_path_factory.mktemp("official") / "vocab.txt"
    lines = [pieces.get(str(i), f"[left_out_{i}]") for i in range(30522)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_ids_equal_the_original_record(opened: Open, official_vocab: Path, case: dict[str, Any]) -> None:
    tokenizer = opened(OFFICIAL, official_vocab)
    (row,) = tokenizer.encode_rows([case["text"]])
    assert row == case["plain"]
    assert [RECORD["dec_bos"], *row[1:-1]] == case["caption_prompt"]
    short = opened(replace(OFFICIAL, context_length=35), official_vocab)
    ids, mask = short.encode_masked([case["text"]], truncate=True, pad_to=35)
    assert (ids.tolist(), mask.tolist()) == ([case["itm_pad35"]], [case["itm_mask35"]])
    (question,) = short.encode_rows([case["text"]], truncate=True)
    assert [RECORD["enc"], *question[1:]] == case["vqa_question"]


@pytest.mark.parametrize("variant", ["feature_extractor", "retrieval", "caption", "vqa"])
def test_batches_equal_the_oracle_s(opened: Open, variant: str) -> None:
    golden = load_file(DATA / variant / "golden.safetensors")
    strings = json.loads((DATA / variant / "meta.json").read_text(encoding="utf-8"))["strings"]
    tokenizer = opened(TINY, VOCAB)
    width = golden["input.input_ids"].shape[1]
    ids, mask = tokenizer.encode_masked(strings["captions"] or strings["questions"], pad_to=width)
    # The original puts [DEC] or [ENC] in the place of [CLS].
    assert ids[:, 1:].tolist() == golden["input.input_ids"][:, 1:].tolist()
    assert mask.tolist() == golden["input.attention_mask"].tolist()
    if strings["answers"]:
        answers, answer_mask = tokenizer.encode_masked(strings["answers"])
        assert answers[:, 1:].tolist() == golden["input.answer_ids"][:, 1:].tolist()
        assert answer_mask.tolist() == golden["input.answer_mask"].tolist()


@pytest.mark.parametrize(("variant", "beams"), [("caption", 1), ("caption", 3), ("vqa", 3)])
def test_generated_ids_read_as_the_original_read_them(opened: Open, variant: str, beams: int) -> None:
    golden = load_file(DATA / variant / "golden.safetensors")
    strings = json.loads((DATA / variant / "meta.json").read_text(encoding="utf-8"))["strings"]
    prompt = strings["prompt"] or ""
    tokenizer = opened(TINY, VOCAB)
    texts = [tokenizer.decode(row) for row in golden[f"output.generated_ids_beam{beams}"]]
    assert all(text.startswith(prompt) for text in texts)
    assert [text[len(prompt) :] for text in texts] == strings["generated_text"][f"text_beam{beams}"]


def test_words_are_split_as_bert_does(opened: Open) -> None:
    tokenizer = opened(TINY, VOCAB)
    vocab = {token: i for i, token in enumerate(VOCAB.read_text(encoding="utf-8").split("\n"))}

    def pieces(text: str) -> list[int]:
        (row,) = tokenizer.encode_rows([text])
        assert (row[0], row[-1]) == (101, 102)
        return row[1:-1]

    def ids(*tokens: str) -> list[int]:
        return [vocab[token] for token in tokens]

    assert pieces("Cats, PLAYING") == ids("cat", "##s", ",", "play", "##ing")
    assert pieces("Ä cát\tis\u00a0réd?") == ids("a", "cat", "is", "red", "?")
    assert pieces("zebra 猫 cat") == [100, 100, vocab["cat"]]
    assert pieces("a\u0000b [cls]") == [*ids("a", "##b"), 100, 100, 100]
    assert opened(replace(TINY, context_length=200), VOCAB).encode_rows(["c" + "a" * 99]) == [
        [101, *ids("c", *["##a"] * 99), 102]
    ]
    assert pieces("c" + "a" * 100) == [100]
    assert pieces("[DEC] a [ENC][SEP]") == [155, 104, 156, 102]
    assert pieces("") == []


def test_the_two_tokens_come_last_and_are_special(opened: Open) -> None:
    rust = RustTokenizer.from_str(resolve_tokenizer(checkpoint(), str(VOCAB), TINY)["tokenizer.json"].decode())
    assert [rust.token_to_id(token) for token in ("[DEC]", "[ENC]")] == [155, 156]
    special = {token.content for token in rust.get_added_tokens_decoder().values() if token.special}
    assert special == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"}
    assert rust.get_vocab_size(with_added_tokens=True) == 157


@pytest.mark.parametrize("kind", ["vocab", "tokenizer", "plain tokenizer"])
def test_a_vocabulary_that_has_them_keeps_them(
    kind: str, tmp_path: Path, opened: Open, wordpiece_json: Callable[[str], str]
) -> None:
    lines = VOCAB.read_text(encoding="utf-8") + "[DEC]\n[ENC]\n"
    path = tmp_path / ("vocab.txt" if kind == "vocab" else "tokenizer.json")
    built = wordpiece_json(lines)
    if kind == "plain tokenizer":  # in the vocabulary, but not yet special
        data = json.loads(built)
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in ("[DEC]", "[ENC]")]
        built = json.dumps(data)
    path.write_text(lines if kind == "vocab" else built, encoding="utf-8")
    if kind == "tokenizer":
        assert resolve_tokenizer(checkpoint(), str(path), TINY)["tokenizer.json"].decode() == built
    tokenizer = opened(TINY, path)
    assert tokenizer.encode_rows(["[DEC] cat [ENC]"]) == [[101, 155, 108, 156, 102]]
    assert tokenizer.decode([155, 108, 156]) == "cat"


def test_a_given_tokenizer_json_gets_them(tmp_path: Path, opened: Open, wordpiece_json: Callable[[str], str]) -> None:
    """As published with transformers' BLIP: BERT's own tokenizer, with padding and truncation of its own."""
    rust = RustTokenizer.from_str(wordpiece_json(VOCAB.read_text(encoding="utf-8")))
    rust.enable_padding(length=9)
    rust.enable_truncation(4)
    rust.save(str(tmp_path / "tokenizer.json"))
    given = opened(TINY, tmp_path / "tokenizer.json")
    texts = ["[ENC] how many cats are there?", "[DEC] a picture of "]
    assert given.encode_rows(texts) == opened(TINY, VOCAB).encode_rows(texts)
    side = resolve_tokenizer(checkpoint(tokenizer__json=tmp_path / "tokenizer.json"), None, TINY)
    assert RustTokenizer.from_str(side["tokenizer.json"].decode()).token_to_id("[ENC]") == 156


def test_a_model_without_room_for_them_gets_none(opened: Open) -> None:
    tokenizer = opened(replace(TINY, vocab_size=155), VOCAB)
    assert max(tokenizer.encode_rows(["[DEC] [ENC]"])[0]) < 155


@pytest.mark.parametrize(
    ("added", "spec", "says"),
    [
        ("", replace(TINY, vocab_size=156), r"\[DEC\] 154, \[ENC\] 155, after 154 others"),
        ("", replace(TINY, vocab_size=30524), "after 30522 others"),
        ("", replace(TINY, vocab_size=154), r"after 152 others"),
        ("[DEC]\n[ENC]\n[MASK2]\n", TINY, r"\[DEC\] 155, \[ENC\] 156, after|do not fit"),
        ("[ENC]\n[DEC]\n", TINY, r"\[DEC\] 156, \[ENC\] 155"),
        ("[DEC]\n[ENC]\n", replace(TINY, vocab_size=159), r"\[DEC\] 155, \[ENC\] 156"),
        ("one\n[ENC]\n", TINY, "is malformed"),
        ("other\n[ENC]\n", TINY, r"\[DEC\] 157"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(added: str, spec: TextSpec, says: str, tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text(VOCAB.read_text(encoding="utf-8") + added, encoding="utf-8")
    with pytest.raises(InputError, match=says) as caught:
        resolve_tokenizer(checkpoint(), str(path), spec)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: "", "line 1"),
        (lambda text: text.replace("cat\n", "\n", 1), "line 109"),
        (lambda text: text.replace("cat\n", "c at\n", 1), "'c at'"),
        (lambda text: text.replace("cat\n", "dog\n", 1), "line 110"),
        (lambda text: text.replace("[UNK]\n", ""), r"no \[UNK\] in 154 lines"),
        (lambda text: text.replace("[CLS]\n", "").replace("[SEP]\n", ""), r"no \[CLS\], \[SEP\]"),
        (lambda text: "<!doctype html><html></html>", "line 1"),
    ],
)
def test_a_malformed_vocabulary_is_named(change: Callable[[str], str], says: str, tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text(change(VOCAB.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(InputError, match=says) as caught:
        resolve_tokenizer(checkpoint(), str(path), TINY)
    assert caught.value.exit_status == 3
    assert "vocab.txt" in str(caught.value)


def test_a_vocabulary_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"[CLS]\n[SEP]\n\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        resolve_tokenizer(checkpoint(), str(tmp_path), TINY)


def test_line_ends_and_the_file_s_name_do_not_matter(tmp_path: Path) -> None:
    expected = resolve_tokenizer(checkpoint(), str(VOCAB), TINY)
    other = tmp_path / "bert-base-uncased.txt"
    other.write_bytes(VOCAB.read_bytes().replace(b"\n", b"\r\n"))
    assert resolve_tokenizer(checkpoint(), str(other), TINY) == expected
    (tmp_path / "vocab.txt").write_bytes(VOCAB.read_bytes().removesuffix(b"\n"))
    assert resolve_tokenizer(checkpoint(), str(tmp_path), TINY) == expected
    assert resolve_tokenizer(checkpoint(vocab__txt=tmp_path / "vocab.txt"), None, TINY) == expected


def test_transformers_reads_the_files_and_agrees(opened: Open, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    # A given configuration from before the two tokens were added must not hide them.
    (tmp_path / "vocab.txt").write_bytes(VOCAB.read_bytes())
    given = {"added_tokens_decoder": {"0": {"content": "[PAD]"}}, "bos_token": "[MASK]", "strip_accents": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**given, "auto_map": {}}), encoding="utf-8")
    for name, content in resolve_tokenizer(checkpoint(), str(tmp_path), TINY).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "vocab.txt").unlink()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    # BertTokenizer would build a decoder of its own, which does not close up what salesforce/BLIP's transformers did.
    assert type(loaded).__name__ == "TokenizersBackend"
    assert (loaded.bos_token_id, loaded.convert_tokens_to_ids("[ENC]"), len(loaded)) == (155, 156, 157)
    assert (loaded.cls_token_id, loaded.sep_token_id, loaded.pad_token_id) == (101, 102, 0)
    assert (loaded.model_max_length, loaded.model_input_names) == (64, ["input_ids", "attention_mask"])
    texts = ["An image, is it? [DEC]", "two dogs running 猫", ""]
    ours = opened(TINY, VOCAB)
    ids, mask = ours.encode_masked(texts)
    theirs = loaded(texts, padding=True)
    assert (theirs["input_ids"], theirs["attention_mask"]) == (ids.tolist(), mask.tolist())
    assert [loaded.decode(row, skip_special_tokens=True) for row in ids] == [ours.decode(row) for row in ids]


@pytest.mark.parametrize("stated", [None, False, True])
def test_spaces_before_marks_are_closed_up_where_transformers_does(stated: bool | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "'", "s", "n", "t", ",", "is", "##s", "?"]
    config = {"tokenizer_class": "BertTokenizer"} | ({} if stated is None else {"clean_up_tokenization_spaces": stated})
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="ascii")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="ascii")
    spec = TextSpec(35, len(words), 3, 0, "none", pooling="first_token")
    published = tmp_path / "published"
    published.mkdir()
    for name, content in resolve_tokenizer(checkpoint(), str(tmp_path), spec).items():
        (published / name).write_bytes(content)
    ours, original = Tokenizer(published / "tokenizer.json", spec), AutoTokenizer.from_pretrained(tmp_path)
    ids = original.convert_tokens_to_ids(["cat", "'", "s", "is", "n", "'", "t", ",", "cat", "##s", "'", "'", "'", "?"])
    expected = original.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == expected
    assert ("cat's" in expected) == bool(stated)
    assert AutoTokenizer.from_pretrained(published).decode(ids, skip_special_tokens=True) == expected


@pytest.mark.parametrize(
    ("vocab_size", "says"),
    [
        (30524, "vocab.txt of bert-base-uncased"),
        (21128, "vocab.txt of bert-base-chinese"),
        (157, "BERT's vocab.txt"),
    ],
)
def test_no_tokenizer_anywhere_says_what_to_pass(vocab_size: int, says: str) -> None:
    with pytest.raises(UsageError, match="--no-tokenizer") as caught:
        resolve_tokenizer(checkpoint(), None, replace(TINY, vocab_size=vocab_size))
    assert says in str(caught.value)
    assert "--tokenizer PATH" in str(caught.value)


def test_clip_s_merges_do_not_serve_bert_s_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "merges.txt"
    path.write_text("header\n" + "i n\n" * 10, encoding="utf-8")
    with pytest.raises(InputError):
        resolve_tokenizer(checkpoint(), str(path), TINY)
