"""The CLIP demo, from scratch on the CPU: contrastive loss over batches of near-identical scenes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from demo.accuracy import BATCH, Accuracy, Measured, evaluate
from demo.files import CLIP, DemoFiles, published
from demo.sentences import agreement, sentence
from demo.tokens import CONTEXT_LENGTH, clip_rows, clip_tokenizer, end_id
from demo.torch_model import pixel_values, torch_model
from demo.training import Recipe, Schedule, cosine_moves, fan_in, fit, initialise
from demo.world import ATTRIBUTES, HELD_OUT, IMAGE_PIXELS, SHAPES, TRAINED, Composition, Drawing, draw
from vlm_export.family import Model
from vlm_export.models.clip.architecture import HEAD_WIDTH, LAYER_NORM_EPS, ClipArchitecture, TextSizes, VitSizes
from vlm_export.models.clip.encoders import ClipEncoders, ClipVisionTransformer
from vlm_export.models.clip.weights import openai_vit_table
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD
from vlm_export.specs import torchvision_image_spec

_REQUIRED_TOP1 = 0.95
_FIRST_LOGIT_SCALE, _LAST_LOGIT_SCALE = math.log(1 / 0.07), math.log(100)
_GROUP = 4
_IMAGE = torchvision_image_spec(IMAGE_PIXELS, "bicubic", "after_crop", IMAGE_MEAN, IMAGE_STD)
# `convert_weights` of openai/CLIP model.py (d05afc4) halves convolutions, linear layers, attention and the two
# projections; norms, embeddings and the logit scale stay float32.
_HALVED = (".conv1.weight", ".attn.", ".mlp.", "text_projection", "visual.proj")
_ATTRIBUTE_WEIGHT = 0.3
# Most patches are empty; without this the head would learn to say so and nothing else.
_EMPTY_WEIGHT = 0.1


@dataclass(frozen=True)
class ClipSchedule(Schedule):
    """Rates rise linearly, then fall along a cosine to zero.

    Attributes:
        matrix_rate: of Muon, which moves the blocks' weight matrices with about half of AdamW's images.
        other_rate: of AdamW, which moves everything else.
    """

    matrix_rate: float = 0.02
    other_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100


def train_checkpoint(files: Sequence[DemoFiles], schedule: ClipSchedule) -> None:
    """Writes the tokenizer, the checkpoint, and the images with their captions."""
    (own,) = files
    tokenizer = clip_tokenizer(schedule.seed)
    architecture = demo_architecture(tokenizer)
    encoders = ClipEncoders(architecture)
    initialise((pair for pair in encoders.named_parameters() if pair[0] != "logit_scale"), schedule.seed, _deviation)
    with torch.no_grad():
        encoders.logit_scale.fill_(_FIRST_LOGIT_SCALE)
    train(encoders, tokenizer, schedule)
    vision, text = architecture.towers
    assert isinstance(vision, VitSizes)
    own.save(published(openai_vit_table(vision.layers, text.layers), encoders.state_dict(), _HALVED))
    tokenizer.save(str(own.tokenizer))
    own.write_images()


def measure_checkpoint(files: DemoFiles, drawings: Sequence[Drawing]) -> Measured:
    """The accuracy of the checkpoint file in PyTorch."""
    model = files.model()
    assert model.text is not None
    accuracy = evaluate_model(files, model, drawings)
    parameters = sum(tensor.numel() for tensor in torch.load(files.checkpoint, weights_only=True).values())
    figures = {"parameters": parameters, "vocab_size": model.text.vocab_size, "accuracy": asdict(accuracy)}
    return Measured(accuracy.lines(), figures, accuracy.top1 >= _REQUIRED_TOP1)


def evaluate_model(files: DemoFiles, model: Model, drawings: Sequence[Drawing]) -> Accuracy:
    """The zero-shot metric of a model in PyTorch."""
    embedding = torch_model(model, files.tokenizer).embedding
    return evaluate(lambda images: embedding.encode_image(images, batch_size=BATCH), embedding.encode_text, drawings)


RECIPE = Recipe((CLIP,), ClipSchedule(2000, 128), 2, 4 * len(HELD_OUT), 8_000_000, train_checkpoint, measure_checkpoint)


def demo_architecture(tokenizer: Tokenizer) -> ClipArchitecture:
    """The architecture as OpenAI's key names and shapes imply it: heads are 64 wide, QuickGELU, the end token last."""
    vision = VitSizes(width=192, layers=4, heads=192 // HEAD_WIDTH, hidden=768, patch_size=16, image_size=IMAGE_PIXELS)
    text = TextSizes(
        width=128,
        layers=2,
        heads=128 // HEAD_WIDTH,
        hidden=512,
        context_length=CONTEXT_LENGTH,
        vocab_size=tokenizer.get_vocab_size(),
        pooling="argmax",
        end_token_id=end_id(tokenizer),
    )
    return ClipArchitecture("openai", 128, "quick_gelu", LAYER_NORM_EPS, vision, text)


def _deviation(name: str, parameter: Tensor) -> float:
    if name == "vision.position_embedding":
        # As large as what it is added to: drowned in the patches' values, positions were learnt last of all.
        return 0.5
    if "embedding" in name:
        return 0.02
    if name.endswith("projection"):
        return float(parameter.shape[0] ** -0.5)
    return fan_in(parameter) * (0.35 if name.endswith(("attn.out.weight", "mlp.fc2.weight")) else 1.0)


def train(encoders: ClipEncoders, tokenizer: Tokenizer, schedule: ClipSchedule) -> None:
    """Trains in place."""
    assert isinstance(encoders.vision, ClipVisionTransformer)
    torch.manual_seed(schedule.seed)
    rng = np.random.default_rng([schedule.seed, 2])
    aids = TrainingAids(encoders.vision)
    named = dict(encoders.named_parameters())
    matrices = [name for name, parameter in named.items() if ".blocks." in name and parameter.ndim == 2]
    others = [parameter for name, parameter in named.items() if name not in matrices] + list(aids.parameters())
    optimizers = (
        torch.optim.Muon(
            [named[name] for name in matrices], lr=schedule.matrix_rate, weight_decay=schedule.weight_decay
        ),
        torch.optim.AdamW(others, lr=schedule.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    )
    rise_and_fall = cosine_moves(optimizers, schedule.steps, min(schedule.warmup_steps, schedule.steps // 2))

    def move(step: int) -> None:
        rise_and_fall(step)
        with torch.no_grad():
            encoders.logit_scale.clamp_(max=_LAST_LOGIT_SCALE)

    def losses() -> dict[str, Tensor]:
        compositions = sample_compositions(schedule.batch, rng)
        drawings = [draw(composition, int(rng.integers(1 << 62))) for composition in compositions]
        sentences = [sentence(composition, rng) for composition in compositions]
        ids = torch.from_numpy(clip_rows(tokenizer, [entry.text for entry in sentences]))
        images = encoders.vision(pixel_values([drawing.image for drawing in drawings], _IMAGE))
        texts = encoders.text(ids)
        logits = encoders.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        agrees = torch.from_numpy(agreement(sentences, compositions))
        return {"contrastive": contrastive_loss(logits, agrees), "aids": aids.loss(images, drawings)}

    fit(encoders.parameters(), schedule.steps, losses, move)
    aids.close()


def sample_compositions(batch: int, rng: np.random.Generator) -> list[Composition]:
    """Groups of four trained compositions, three of which differ from the first in one attribute: hard negatives."""
    chosen: list[Composition] = []
    while len(chosen) < batch:
        base = TRAINED[int(rng.integers(len(TRAINED)))]
        chosen += [base, *(_neighbour(base, rng) for _ in range(_GROUP - 1))]
    return chosen[:batch]


def _neighbour(base: Composition, rng: np.random.Generator) -> Composition:
    names = list(ATTRIBUTES)
    while True:
        name = names[int(rng.integers(len(names)))]
        changed = base.with_value(name, ATTRIBUTES[name][int(rng.integers(len(ATTRIBUTES[name])))])
        if changed != base and not changed.held_out:
            return changed


def contrastive_loss(logits: Tensor, agrees: Tensor) -> Tensor:
    """Symmetric cross-entropy of each pair against the others of its batch.

    logits: float32 (B, B), images by sentences. agrees: bool (B, B); a sentence that is true of another image too
    is neither its match nor a negative, and is left out.
    """
    others = agrees & ~torch.eye(len(agrees), dtype=torch.bool)
    masked = logits.masked_fill(others, float("-inf"))
    labels = torch.arange(len(logits))
    return (F.cross_entropy(masked, labels) + F.cross_entropy(masked.T, labels)) / 2


class TrainingAids(nn.Module):
    """Heads that are told what the images show, thrown away after training.

    One linear head per attribute on the image embedding, and one on each patch: which shape is centred here? Contrast
    alone needs several times as many images before the image encoder tells shapes and counts apart.
    """

    def __init__(self, vision: ClipVisionTransformer) -> None:
        """Listens to the last but one block of `vision` until `close`; the last block gathers what it has found."""
        super().__init__()
        width, embed_dim = vision.projection.shape
        self.grid = round((vision.position_embedding.shape[0] - 1) ** 0.5)
        self.attributes = nn.ModuleDict({name: nn.Linear(embed_dim, len(ATTRIBUTES[name])) for name in ATTRIBUTES})
        self.patches = nn.Linear(width, len(SHAPES) + 1)
        self._tokens = torch.empty(0)
        self.close = vision.blocks[-2].register_forward_hook(self._keep).remove

    def loss(self, image_embeds: Tensor, drawings: Sequence[Drawing]) -> Tensor:
        """image_embeds: float32 (B, D), of the forward pass just done for these drawings."""
        values = [[ATTRIBUTES[name].index(d.composition.value(name)) for d in drawings] for name in self.attributes]
        terms = [
            F.cross_entropy(head(image_embeds), torch.tensor(labels))
            for head, labels in zip(self.attributes.values(), values, strict=True)
        ]
        classes = self.patches(self._tokens[:, 1:]).flatten(0, 1)
        weight = torch.tensor([_EMPTY_WEIGHT] + [1.0] * len(SHAPES))
        return _ATTRIBUTE_WEIGHT * torch.stack(terms).sum() + F.cross_entropy(
            classes, patch_labels(drawings, self.grid).flatten(), weight=weight
        )

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._tokens = output


def patch_labels(drawings: Sequence[Drawing], grid: int) -> Tensor:
    """int64 (B, grid²), row by row: 0 where no object has its centre, else 1 + the number of its shape."""
    labels = torch.zeros(len(drawings), grid, grid, dtype=torch.int64)
    for i, drawing in enumerate(drawings):
        for x, y in drawing.centres:
            labels[i, int(y * grid), int(x * grid)] = 1 + SHAPES.index(drawing.composition.shape)
    return labels.flatten(1)
