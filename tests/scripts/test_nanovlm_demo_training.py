"""The nanoVLM demo's training: prompts as the runtime writes them, loss on answers alone, a start from CLIP's demo."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import train_nanovlm_demo
from demo.blip import IMAGE, clip_vision
from demo.files import CHAT, CLIP, DemoFiles
from demo.nanovlm import (
    Batch,
    Losses,
    NanoVlmSchedule,
    batch_losses,
    build_modules,
    demo_architecture,
    draw_batch,
    prompt_ids,
    warm_start,
)
from demo.questions import KINDS, ask_unambiguously, caption_question
from demo.torch_model import module_of, pixel_values, torch_model
from demo.world import COMPOSITIONS, TRAINED, draw

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.models.nanovlm.parts import NanoVlmModules
from vlm_export.models.registry import recognise
from vlm_export.runtime.tasks.chat import ChatTask
from vlm_export.specs import ImageSpec

FILES = DemoFiles(CHAT)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def chat() -> ChatTask:
    return torch_model(FILES.model(), FILES.tokenizer).chatting


def built(chat: ChatTask) -> NanoVlmModules:
    """The demo's modules, untrained."""
    return build_modules(demo_architecture(chat.session.text_spec.vocab_size), 0)


def losses_of(modules: NanoVlmModules, batch: Batch, chat: ChatTask) -> Losses:
    with torch.no_grad():
        return batch_losses(modules, batch, chat.spec.image_token_id)


def test_rows_are_the_runtimes_prompts_and_the_answers(chat: ChatTask) -> None:
    end = chat.spec.eos_token_ids[0]
    batch = draw_batch(chat, NanoVlmSchedule(1, 3, questions_each=2), np.random.default_rng(1))
    assert batch.pixels.shape == (3, 3, 64, 64)
    assert len(batch.ids) == 9
    for i, (ids, mask, targets) in enumerate(zip(batch.ids, batch.mask, batch.targets, strict=True)):
        answer = targets[targets >= 0].tolist()
        prompt = ids[: int((targets >= 0).nonzero()[0]) + 1].tolist()
        written = chat.session.tokenizer.decode(prompt)
        question = written.removeprefix("question: ").removesuffix(" answer:")
        assert written == f"question: {question} answer:"
        assert prompt == prompt_ids(chat, question)
        assert (question == "what is this?") == (i % 3 == 0)
        # A target is the next token, and the last of them ends the answer. The end is fed where the row has room.
        fed = ids[mask == 1].tolist()
        assert fed in ([*prompt, *answer], [*prompt, *answer[:-1]])
        assert answer[-1] == end
        assert end not in answer[:-1]


def test_loss_is_of_answers_alone(chat: ChatTask) -> None:
    """Other ids in the padding change nothing; another answer does."""
    modules = built(chat)
    batch = draw_batch(chat, NanoVlmSchedule(1, 2, questions_each=2), np.random.default_rng(2))
    losses = losses_of(modules, batch, chat)
    scrambled = batch._replace(ids=batch.ids.masked_fill(batch.mask == 0, 7))
    assert not torch.equal(scrambled.ids, batch.ids)
    torch.testing.assert_close(losses_of(modules, scrambled, chat), losses)
    targets = batch.targets.clone()
    targets[0, int((targets[0] >= 0).nonzero()[0])] = 7
    other = losses_of(modules, batch._replace(targets=targets), chat)
    assert other.caption != losses.caption
    assert other.answer == losses.answer
    # Nearly even at the start.
    assert losses.answer.item() == pytest.approx(np.log(len(modules.decoder.embedding.weight)), abs=0.5)


def test_trained_weights_have_little_loss_on_new_images(chat: ChatTask) -> None:
    """What training computes is what the published weights were trained for: the table of keys leads back to it."""
    modules = built(chat)
    model = FILES.model()
    vision, decoder = (module_of(model, name).state_dict() for name in ("vision_encoder", "decoder"))
    named = {f"decoder.{name}".replace("decoder.head.", "decoder.embedding."): decoder[name] for name in decoder}
    modules.load_state_dict(vision | named)
    batch = draw_batch(chat, NanoVlmSchedule(1, 16), np.random.default_rng(3))
    assert max(losses_of(modules, batch, chat)) < 0.15


def test_vision_encoder_starts_from_the_clip_demo(chat: ChatTask) -> None:
    """Patches enter the blocks nearly as CLIP's do after its norm, from pixels that nothing normalises."""
    images = [draw(composition, (8, i)).image for i, composition in enumerate(TRAINED[::100])]
    modules, checkpoint = built(chat), DemoFiles(CLIP).checkpoint
    warm_start(modules.vision, checkpoint, images)
    clip = clip_vision(checkpoint)
    spec = chat.session.image_spec
    assert isinstance(spec, ImageSpec)
    with torch.no_grad():
        theirs = clip.norm_pre(clip.patches(pixel_values(images, IMAGE)) + clip.position_embedding[1:])
        ours = modules.vision.patches(pixel_values(images, spec)) + modules.vision.position_embedding
    bias = clip.norm_pre.bias
    assert torch.cosine_similarity(ours - bias, theirs - bias, dim=-1).min() > 0.999
    assert 0.9 < ((ours - bias).norm(dim=-1) / (theirs - bias).norm(dim=-1)).mean() < 1.1
    assert torch.equal(
        modules.vision.blocks[2].get_parameter("mlp.fc1.weight"), clip.blocks[2].get_parameter("mlp.fc1.weight")
    )


def test_no_question_has_two_answers() -> None:
    rng = np.random.default_rng(5)
    for composition in COMPOSITIONS[::97]:
        asked = [caption_question(composition)]
        asked += [ask_unambiguously(composition, kind, rng) for kind in KINDS for _ in range(40)]
        answers: dict[str, str] = {}
        for question in asked:
            text = question.text.lower().removesuffix("?")
            assert answers.setdefault(text, question.answer) == question.answer, (composition, text)


def test_script_writes_a_checkpoint_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--steps", "2", "--batch", "4", "--images", "3", "--threads", "1"]
    # Two steps teach nothing, and the status says so.
    assert train_nanovlm_demo.main(["--output", str(tmp_path), *settings]) == 1
    files = DemoFiles(CHAT, tmp_path)
    assert recognise(open_checkpoint(str(files.checkpoint))).name == "nanovlm"
    written = json.loads(files.report.read_text(encoding="utf-8"))
    assert written["sha256"] == files.sha256 != FILES.sha256
    assert written["training"]["steps"] == 2
    assert files.config.read_text(encoding="utf-8").startswith("family: nanovlm\n")
    assert "24 held-out texts are exactly right" in capsys.readouterr().out
