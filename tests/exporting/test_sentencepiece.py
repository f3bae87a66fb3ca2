"""SentencePiece models as tokenizer.json: the ids of transformers' SiglipTokenizer, and which models are refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AddedToken, AutoTokenizer, SiglipTokenizer

from vlm_export.errors import InputError
from vlm_export.exporting.tokenizers.files import ResolvedTokenizer, resolve_tokenizer
from vlm_export.family import Checkpoint
from vlm_export.runtime.inputs.texts import Tokenizer
from vlm_export.specs import TextSpec

CORPUS = (
    "a photo of two cats on the mat",
    "the dog's café, 3.14",
    "ΟΔΥΣΣΕΥΣ οδυσσευς",
    "ＦＵＬＬ ½ ﬁ straße",
    "猫 屋顶",
    "a > b",
)
TEXTS = (
    *("", " ", "!!!", "a photo of a cat", "A PHOTO OF A CAT!", "cat's-mat_of.the,dog", "it is 3.14"),
    *(
        "ΟΔΥΣΣΕΥΣ",
        "ΟΔΥΣΣΕΥΣ.",
        "ΣΑΣ ΑΣ Σ ΑΣ\u0301Α",
        "İSTANBUL",
        "ＦＵＬＬ ½ ﬁ",
        "Straße ẞ",
        "e\u0301 ÉA",
        "猫 在屋顶上",
    ),
    *(
        "a</s>",
        "a</s>b",
        "a </s> b",
        "<unk> cat",
        "<sks>CAT",
        "  <sks> <sks>  ",
        "</s></s>",
        "A.</s>.B",
        "cat </s> !",
        "<SKS>",
    ),
    *(
        "▁a▁ b▁",
        "▁",
        "a  b\tc\nd\u00a0e\u2003f\u3000g",
        "nul\0bell\x07",
        "zero\u200bwidth\u200d",
        "\ufdd0 \ufdef a",
        "🎂 👩\u200d👧",
    ),
    "a very long text about cats " * 30,
)


def trained(**settings: Any) -> bytes:
    pieces = io.BytesIO()
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=pieces,
        **{"vocab_size": 90, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2, **special, **settings},
    )
    return pieces.getvalue()


def resolved(folder: Path, rows: int) -> ResolvedTokenizer:
    side_files = {path.name: path for path in folder.iterdir()}
    checkpoint = Checkpoint("x", "huggingface", (), {}, lambda key: None, {"model_type": "siglip"}, side_files)  # type: ignore[arg-type, return-value]
    spec = TextSpec(64, rows, 1, 1, "none", pooling="last_token", padding="context")
    return resolve_tokenizer(checkpoint, None, spec)


@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize("lowers", [True, False])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_ids_are_those_of_the_library(tmp_path: Path, rule: str, lowers: bool) -> None:
    (tmp_path / "spiece.model").write_bytes(trained(normalization_rule_name=rule))
    original = SiglipTokenizer(str(tmp_path / "spiece.model"), do_lower_case=lowers)
    original.add_tokens([AddedToken("<sks>", normalized=False)])
    folder = tmp_path / "saved"
    original.save_pretrained(folder)
    original = AutoTokenizer.from_pretrained(folder)
    assert type(original) is SiglipTokenizer
    found = resolved(folder, len(original))
    assert found.text.case == ("lower" if lowers else "kept")
    published = tmp_path / "published"
    published.mkdir()
    for name, content in found.files.items():
        (published / name).write_bytes(content)
    ours = Tokenizer(published / "tokenizer.json", found.text)
    expected = original(list(TEXTS), truncation=True, max_length=64)["input_ids"]
    got = ours.encode_rows(TEXTS, truncate=True)
    wrong = [(text, a, b) for text, a, b in zip(TEXTS, got, expected, strict=True) if a != b]
    assert not wrong
    back = AutoTokenizer.from_pretrained(published)
    assert back(list(TEXTS), truncation=True, max_length=64)["input_ids"] == expected


def edited(**fields: Any) -> bytes:
    model = sentencepiece_model_pb2.ModelProto.FromString(trained())
    for path, value in fields.items():
        spec, name = path.split("__")
        setattr(getattr(model, spec), name, value)
    return bytes(model.SerializeToString())


def with_pieces(change: Any) -> bytes:
    model = sentencepiece_model_pb2.ModelProto.FromString(trained())
    change(model.pieces)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: b"\xff\xfe no protobuf", "is malformed"),
        (lambda: b"", "1 to"),
        (lambda: trained(model_type="bpe"), "unigrams"),
        (lambda: trained(byte_fallback=True, vocab_size=400), "unigrams"),
        (lambda: edited(normalizer_spec__remove_extra_whitespaces=False), "white space"),
        (lambda: edited(trainer_spec__treat_whitespace_as_suffix=True), "white space"),
        (lambda: with_pieces(lambda pieces: setattr(pieces[9], "piece", pieces[8].piece)), "each once"),
        (lambda: with_pieces(lambda pieces: setattr(pieces[9], "piece", "x" * 5000)), "at most"),
        (lambda: with_pieces(lambda pieces: setattr(pieces[9], "score", float("nan"))), "finite scores"),
        (lambda: with_pieces(lambda pieces: setattr(pieces[9], "type", 5)), "out of use"),
        (lambda: with_pieces(lambda pieces: setattr(pieces[9], "type", 4)), "no text"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, make: Any, says: str) -> None:
    (tmp_path / "spiece.model").write_bytes(make())
    with pytest.raises(InputError) as caught:
        resolved(tmp_path, 200)
    assert says in str(caught.value)
    assert "spiece.model" in caught.value.where
