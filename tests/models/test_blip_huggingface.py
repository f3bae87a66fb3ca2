"""BLIP from Hugging Face directories, against transformers' own three classes."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.cli.main import main
from vlm_export.errors import InputError
from vlm_export.family import Model, reference_from_module
from vlm_export.models.blip.architecture import architecture_from_checkpoint
from vlm_export.specs.tasks import AnswerSpec, CaptionSpec, MatchSpec

oracle = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("blip_oracle.py"))))

CLASSES = {
    "BlipForConditionalGeneration": ["vision", "cross_key_values", "text_decoder"],
    "BlipForImageTextRetrieval": ["vision", "text", "multimodal_text"],
    "BlipForQuestionAnswering": ["vision", "vqa_encoder", "cross_key_values", "text_decoder"],
}
VOCABULARY, START = 160, 158
Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Build = Callable[..., Model]


def runner(model: Model) -> Callable[[str, Arrays], Arrays]:
    """A Part's name and its inputs by name → its outputs by name, in eager."""
    references = {part.name: reference_from_module(part) for part in model.parts}
    return lambda name, inputs: references[name](inputs)


def assert_same(found: Array, expected: Array, what: str, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape, what
    difference, limit = float(np.abs(found - expected).max()), relative * max(1.0, float(np.abs(expected).max()))
    assert difference <= limit, f"{what}: {difference:.1e}, limit {limit:.1e}"


def make_huggingface(folder: Path, kind: str, **save: Any) -> Any:
    """Saves a tiny model of that class with random weights, none of them at its default; returns it in eval mode."""
    import transformers

    # The decoder for answers reads the encoder's states, and transformers gives it the vision width for that.
    text_width = 64 if kind == "BlipForQuestionAnswering" else 32
    text = {"hidden_size": text_width, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    vision = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 80}
    config = transformers.BlipConfig(
        # Epsilons as large as the variances that they are added to.
        text_config={
            **text,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 24,
            "bos_token_id": START,
            "layer_norm_eps": 0.3,
        },
        vision_config={**vision, "image_size": 24, "patch_size": 8, "layer_norm_eps": 0.2},
        image_text_hidden_size=20,
    )
    model = getattr(transformers, kind)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(is_scale + 0.2 * torch.randn(parameter.shape, generator=generator))
    model.to(save.pop("dtype", torch.float32)).save_pretrained(folder, **save)
    return model.float()


def huggingface_inputs(kind: str) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    ids = rng.integers(1, VOCABULARY, (3, 7))
    ids[:, 0] = START if kind == "BlipForConditionalGeneration" else 101
    mask = (np.arange(7) < np.array([[7], [4], [5]])).astype(np.int64)
    return {"pixels": rng.standard_normal((3, 3, 24, 24)).astype(np.float32), "ids": ids, "mask": mask}


def transformers_outputs(original: Any, kind: str) -> dict[str, Array]:
    """What transformers' own modules compute, by names of ours."""
    inputs = {name: torch.from_numpy(array) for name, array in huggingface_inputs(kind).items()}
    ids, mask = inputs["ids"], inputs["mask"]
    with torch.inference_mode():
        tokens = original.vision_model(inputs["pixels"]).last_hidden_state
        found = {"tokens": tokens}
        if kind == "BlipForImageTextRetrieval":
            given = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixels"]}
            found["similarity"] = original(**given, use_itm_head=False).itm_score
            matched = original(**given, use_itm_head=True)
            found |= {"matching": matched.itm_score, "multimodal": matched.question_embeds}
            return {name: tensor.numpy() for name, tensor in found.items()}
        # Always ones: transformers 5.23 never hands the mask of the states to its cross-attention.
        states, states_mask = tokens, torch.ones(tokens.shape[:2], dtype=torch.int64)
        if kind == "BlipForQuestionAnswering":
            states = original.text_encoder(ids, mask, encoder_hidden_states=tokens).last_hidden_state
            states_mask, ids = torch.ones_like(ids), torch.cat([torch.full((3, 1), START), ids[:, 1:]], dim=1)
            found["states"] = states
        decoded = original.text_decoder(
            ids, mask, encoder_hidden_states=states, encoder_attention_mask=states_mask, is_decoder=True
        )
        found["logits"] = decoded.logits
    return {name: tensor.numpy() for name, tensor in found.items()}


def our_outputs(model: Model, kind: str) -> dict[str, Array]:
    run, inputs = runner(model), huggingface_inputs(kind)
    image = run("vision", {"pixel_values": inputs["pixels"]})
    tokens, given = image["last_hidden_state"], oracle.text(inputs["ids"], inputs["mask"])
    if kind == "BlipForImageTextRetrieval":
        matched = run("multimodal_text", {**given, "encoder_hidden_states": tokens})
        similarity = image["image_embeds"] @ run("text", given)["text_embeds"].T
        return {
            "tokens": tokens,
            "similarity": similarity,
            "matching": matched["itm_logits"],
            "multimodal": matched["last_hidden_state"],
        }
    found, states, ids = {"tokens": tokens}, tokens, inputs["ids"]
    if kind == "BlipForQuestionAnswering":
        states = found["states"] = run("vqa_encoder", {**given, "encoder_hidden_states": tokens})["last_hidden_state"]
        ids = oracle.starting_with(ids, START)
    cross = run("cross_key_values", {"encoder_hidden_states": states})
    step = oracle.first_step(ids, inputs["mask"], cross, heads_width=states_head_width(model))
    found["logits"] = run("text_decoder", step)["logits"]
    return found


def states_head_width(model: Model) -> int:
    sizes = model.architecture["decoder"]
    width: int = sizes["width"] // sizes["heads"]
    return width


def assert_equals_transformers(model: Model, original: Any, kind: str) -> None:
    found, expected = our_outputs(model, kind), transformers_outputs(original, kind)
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert_same(found[name], array, name, 2e-5)


@pytest.mark.parametrize(("kind", "parts"), CLASSES.items())
def test_huggingface_equals_transformers(kind: str, parts: list[str], tmp_path: Path, build_model: Build) -> None:
    original = make_huggingface(tmp_path / "model", kind)
    model = build_model(tmp_path / "model")
    assert [part.name for part in model.parts] == parts
    assert_equals_transformers(model, original, kind)
    for task in model.tasks:
        if isinstance(task, MatchSpec | CaptionSpec | AnswerSpec):
            assert (task.tokens.decoder_start, task.tokens.sep, task.tokens.pad) == (START, 102, 0)
        # transformers takes ids as they are given.
        if isinstance(task, MatchSpec):
            assert task.first_token == "cls"
        if isinstance(task, AnswerSpec):
            assert task.question_first_token == "cls"
    assert model.hub_config["architectures"] == [kind]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vision_config", "layer_norm_eps", 1e-6),
        ("text_config", "layer_norm_eps", 1e-12),
        ("vision_config", "num_attention_heads", 4),
        ("text_config", "num_attention_heads", 2),
    ],
)
def test_what_config_json_says_is_used(
    kind: str, section: str, field: str, value: float, tmp_path: Path, build_model: Build
) -> None:
    """Negative control: with the original's epsilons, or with other heads, transformers' outputs are missed."""
    original = make_huggingface(tmp_path / "model", kind)
    change_config(tmp_path / "model", lambda config: config[section].update({field: value}))
    found, expected = our_outputs(build_model(tmp_path / "model"), kind), transformers_outputs(original, kind)
    assert max(float(np.abs(found[name] - expected[name]).max()) for name in expected) > 1e-2


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("save", [{"max_shard_size": "60KB"}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}])
def test_huggingface_forms(kind: str, save: dict[str, Any], tmp_path: Path, build_model: Build) -> None:
    original = make_huggingface(tmp_path / "model", kind, **save)
    shards = len(list((tmp_path / "model").glob("*.safetensors")))
    assert (shards > 1) == ("max_shard_size" in save)
    assert_equals_transformers(build_model(tmp_path / "model"), original, kind)


@pytest.mark.parametrize("stored", ["once", "once, as the output matrix", "twice"])
def test_tied_weights_however_often_they_are_stored(stored: str, tmp_path: Path, build_model: Build) -> None:
    kind = "BlipForConditionalGeneration"
    original = make_huggingface(tmp_path / "model", kind)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    words, output = (
        f"text_decoder.{name}" for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    )
    bias, copy = "text_decoder.cls.predictions.bias", "text_decoder.cls.predictions.decoder.bias"
    assert set(weights) >= {words, bias}
    assert not {output, copy} & set(weights)
    if stored != "once":
        weights |= {output: weights[words].clone(), copy: weights[bias].clone()}
    if stored == "once, as the output matrix":
        del weights[words], weights[bias]
    if stored == "twice":
        # transformers before 4.31 stored this buffer too.
        weights["text_decoder.bert.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(weights, path, metadata={"format": "pt"})
    model = build_model(tmp_path / "model")
    assert_equals_transformers(model, original, kind)
    assert len(model.dropped_keys) == (3 if stored == "twice" else 0)


def test_untied_weights_are_refused(tmp_path: Path, build_model: Build) -> None:
    make_huggingface(tmp_path / "model", "BlipForConditionalGeneration")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    words = weights["text_decoder.bert.embeddings.word_embeddings.weight"]
    save_file({**weights, "text_decoder.cls.predictions.decoder.weight": words + 0.1}, path)
    with pytest.raises(InputError, match="not tied"):
        build_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c["text_config"].update(hidden_act="relu"), "activation"),
        (lambda c: c["vision_config"].update(hidden_act="quick_gelu"), "activation"),
        (lambda c: c["text_config"].update(num_attention_heads=5), "multiple of its heads"),
        (lambda c: c["vision_config"].update(layer_norm_eps="small"), "malformed"),
        (lambda c: c["text_config"].update(bos_token_id=VOCABULARY), "outside the vocabulary"),
        (lambda c: c.update(text_config=[1]), "malformed"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], what: str, tmp_path: Path, build_model: Build
) -> None:
    make_huggingface(tmp_path / "model", "BlipForConditionalGeneration")
    change_config(tmp_path / "model", change)
    with pytest.raises(InputError, match=what):
        build_model(tmp_path / "model")


def test_what_config_json_leaves_out_is_the_default_of_transformers(tmp_path: Path) -> None:
    make_huggingface(tmp_path / "model", "BlipForConditionalGeneration")
    sections = {"text_config": {"bos_token_id": START}, "vision_config": {"num_attention_heads": 8}}
    change_config(tmp_path / "model", lambda config: config.update(sections))
    architecture = architecture_from_checkpoint(open_checkpoint(str(tmp_path / "model")))
    assert architecture.decoder is not None
    assert (architecture.decoder.heads, architecture.decoder.eps) == (8, 1e-12)
    assert architecture.vision.eps == 1e-5
    change_config(tmp_path / "model", lambda config: config.pop("vision_config"))
    with pytest.raises(InputError, match="12 heads"):
        architecture_from_checkpoint(open_checkpoint(str(tmp_path / "model")))


def test_weights_alone_do_not_tell_the_heads(tmp_path: Path, build_model: Build) -> None:
    make_huggingface(tmp_path / "model", "BlipForImageTextRetrieval")
    weights = tmp_path / "model" / "model.safetensors"
    # The config beside a file that is named is read.
    assert build_model(weights).family == "blip"
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json") as caught:
        build_model(weights)
    assert "beside the weights" in caught.value.fix


@pytest.mark.parametrize(("kind", "parts"), CLASSES.items())
def test_inspect(kind: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_huggingface(tmp_path / "model", kind)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "model"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["family"], data["format"]) == ("blip", "hf_directory")
    assert [part["name"] for part in data["parts"]] == parts
    assert "keep [CLS]" in " ".join(data["notes"])
