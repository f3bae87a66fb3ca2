"""The text that attends to two images against the original's formulas, written out with the published keys."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.exporting.backends import Exporter, export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.family import Model
from vlm_export.models.blip.family import BlipFamily
from vlm_export.runtime.engines.onnxruntime import OrtEngine

LAYERS, WIDTH, HIDDEN, STATES, VOCABULARY = 7, 64, 24, 128, 120


def published_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": random(rows, columns), f"{name}.bias": random(rows)}

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}

    vision, text = "visual_encoder.", "text_encoder."
    weights = {
        f"{vision}cls_token": random(1, 1, STATES),
        f"{vision}pos_embed": random(1, 5, STATES),
        f"{vision}patch_embed.proj.weight": random(STATES, 3, 4, 4),
        f"{vision}patch_embed.proj.bias": random(STATES),
        **norm(f"{vision}norm", STATES),
        **norm(f"{vision}blocks.0.norm1", STATES),
        **norm(f"{vision}blocks.0.norm2", STATES),
        **linear(f"{vision}blocks.0.attn.qkv", 3 * STATES, STATES),
        **linear(f"{vision}blocks.0.attn.proj", STATES, STATES),
        **linear(f"{vision}blocks.0.mlp.fc1", HIDDEN, STATES),
        **linear(f"{vision}blocks.0.mlp.fc2", STATES, HIDDEN),
        f"{text}embeddings.position_ids": torch.arange(12)[None],
        f"{text}embeddings.word_embeddings.weight": random(VOCABULARY, WIDTH),
        f"{text}embeddings.position_embeddings.weight": random(12, WIDTH),
        **norm(f"{text}embeddings.LayerNorm", WIDTH),
        **linear("cls_head.0", WIDTH, WIDTH),
        **linear("cls_head.2", 2, WIDTH),
    }
    for i in range(LAYERS):
        layer = f"{text}encoder.layer.{i}."
        for name in ("query", "key", "value"):
            weights |= linear(f"{layer}attention.self.{name}", WIDTH, WIDTH)
        weights |= linear(f"{layer}attention.output.dense", WIDTH, WIDTH)
        weights |= norm(f"{layer}attention.output.LayerNorm", WIDTH) | norm(f"{layer}output.LayerNorm", WIDTH)
        weights |= linear(f"{layer}intermediate.dense", HIDDEN, WIDTH) | linear(f"{layer}output.dense", WIDTH, HIDDEN)
        weights |= norm(f"{layer}crossattention.output.LayerNorm", WIDTH)
        for t, name in itertools.product((0, 1), ("query", "key", "value")):
            weights |= linear(f"{layer}crossattention.self{t}.{name}", WIDTH, WIDTH if name == "query" else STATES)
        for t in (0, 1):
            weights |= linear(f"{layer}crossattention.output.dense{t}", WIDTH, WIDTH)
        if i >= 6:
            weights |= linear(f"{layer}crossattention.output.merge_layer", WIDTH, 2 * WIDTH)
    return weights


class Original:
    """salesforce/BLIP nlvr_encoder.py and blip_nlvr.py (7662411), one head of 64."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-12)

    def attend(self, x: Tensor, states: Tensor, name: str, hidden: Tensor | float = 0.0) -> Tensor:
        query, key = self.linear(x, f"{name}.query"), self.linear(states, f"{name}.key")
        scores = query @ key.transpose(1, 2) / WIDTH**0.5 + hidden
        found: Tensor = scores.softmax(-1) @ self.linear(states, f"{name}.value")
        return found

    def __call__(self, ids: Tensor, mask: Tensor, image0: Tensor, image1: Tensor) -> Tensor:
        text = "text_encoder."
        x = self.weights[f"{text}embeddings.word_embeddings.weight"][ids]
        x = x + self.weights[f"{text}embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(x, f"{text}embeddings.LayerNorm")
        hidden = (1.0 - mask[:, None, :]) * -10000.0
        for i in range(LAYERS):
            layer = f"{text}encoder.layer.{i}."
            own = self.linear(self.attend(x, x, f"{layer}attention.self", hidden), f"{layer}attention.output.dense")
            x = self.norm(own + x, f"{layer}attention.output.LayerNorm")
            cross = f"{layer}crossattention."
            found = [
                self.linear(self.attend(x, image, f"{cross}self{t}"), f"{cross}output.dense{t}")
                for t, image in enumerate((image0, image1))
            ]
            merged = self.linear(torch.cat(found, dim=-1), f"{cross}output.merge_layer") if i >= 6 else sum(found) / 2
            x = self.norm(merged + x, f"{cross}output.LayerNorm")
            fed = self.linear(F.gelu(self.linear(x, f"{layer}intermediate.dense")), f"{layer}output.dense")
            x = self.norm(fed + x, f"{layer}output.LayerNorm")
        return self.linear(F.relu(self.linear(x[:, 0], "cls_head.0")), "cls_head.2")


def build(tmp_path: Path, weights: dict[str, Tensor]) -> Model:
    torch.save({"model": weights}, tmp_path / "nlvr.pth")
    checkpoint = open_checkpoint(str(tmp_path / "nlvr.pth"))
    with ScratchStore(tmp_path / "weights.bin") as store:
        return BlipFamily().build(checkpoint, store)


def test_pairs_of_images(tmp_path: Path) -> None:
    weights = published_weights()
    model = build(tmp_path, weights)
    assert [part.name for part in model.parts] == ["vision", "pair_text"]
    part, original = model.parts[1], Original(weights)
    targets: tuple[tuple[Exporter, int], ...] = (("dynamo", 18), ("torchscript", 11))
    engines = []
    for exporter, opset in targets:
        write_graph(
            finish_graph(simplify_graph(export_part(part, opset, exporter)), part.signature), tmp_path / exporter
        )
        engines.append(OrtEngine(tmp_path / exporter, threads=1))
    for seed, (batch, sequence, tokens) in enumerate([(1, 5, 5), (3, 12, 4), (2, 1, 1)]):
        inputs = part.examples({"batch": batch, "sequence": sequence, "encoder_sequence": tokens}, seed)
        tensors = [torch.from_numpy(inputs[name]) for name in part.signature.input_names]
        with torch.inference_mode():
            expected = original(*tensors).numpy()
            np.testing.assert_allclose(part.module(*tensors).numpy(), expected, atol=1e-4)
            swapped = part.module(*tensors[:2], tensors[3], tensors[2]).numpy()
        assert np.abs(swapped - expected).max() > 1e-2
        for engine in engines:
            np.testing.assert_allclose(engine.run(inputs)["logits"], expected, atol=1e-4)
