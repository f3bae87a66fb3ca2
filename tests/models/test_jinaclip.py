"""Jina CLIP under its publisher's names, from weights of timm's Eva, transformers' text encoders and PEFT."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from timm.layers import GluMlp
from timm.models.eva import Eva
from torch import Tensor, nn
from torchvision import transforms
from transformers import BertConfig, BertModel, JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

from vlm_export.checkpoint.open import open_checkpoint
from vlm_export.checkpoint.sources.known import load_known
from vlm_export.errors import InputError, UsageError
from vlm_export.family import BuildOptions
from vlm_export.models.jinaclip.architecture import JinaClipArchitecture
from vlm_export.models.registry import identify, load_family

duals = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("dual_encoders.py"))))
# Images have a margin that fills no patch, as the published 512 pixels have for patches of 14.
EDGE, PATCH, WIDTH, HEADS, HIDDEN, LAYERS = 46, 14, 48, 3, 80, 2
LOGIT_SCALE = 2.5
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PREPROCESSOR = {
    "auto_map": {"AutoImageProcessor": "jinaai/jina-clip-implementation--processing_clip.JinaCLIPImageProcessor"},
    "image_processor_type": "JinaCLIPImageProcessor",
    **{"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0, "size": EDGE, "mean": MEAN, "std": STD},
}
TASKS = ["separation", "retrieval.query"]
# Of three heads, by `get_alibi_slopes` of jina-bert-flash-implementation: those of two, and the first one of four.
SLOPES = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2])
SIZES = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
EVA_NAMES = {
    **{"attn.q_proj.bias": "attn.q_bias", "attn.v_proj.bias": "attn.v_bias", "attn.norm": "attn.inner_attn_ln"},
    **{"mlp.norm": "mlp.ffn_ln", "fc1_g": "w1", "fc1_x": "w2", "mlp.fc2": "mlp.w3"},
}


def eva(reference: int, **changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "img_size": EDGE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": LAYERS,
        "num_heads": HEADS,
    }
    form: dict[str, Any] = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    form |= {"num_classes": 0, "global_pool": "token", "use_rot_pos_emb": True}
    sizes |= {"mlp_ratio": HIDDEN / WIDTH, "ref_feat_shape": (reference, reference)}
    return Eva(**{**sizes, **form, **changes})


def published_vision(model: Any) -> dict[str, Tensor]:
    found = {}
    for key, tensor in model.state_dict().items():
        for name, published in EVA_NAMES.items():
            key = key.replace(name, published)
        found[f"vision_model.{key}"] = tensor
    return found


def config(version: int, rows: int, **text: Any) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"use_flash_attn": False, "num_attention_heads": HEADS, "vocab_size": rows}
    if version == 2:
        kwargs |= {"rotary_emb_base": 500.0, "lora_adaptations": TASKS, "lora_rank": 4, "lora_alpha": 8}
    return {
        "model_type": "jina_clip",
        "architectures": ["JinaCLIPModel"],
        "auto_map": {"AutoModel": "jinaai/jina-clip-implementation--modeling_clip.JinaCLIPModel"},
        **{"add_projections": False, "projection_dim": WIDTH, "truncate_dim": None},
        **({"matryoshka_dimensions": [16, 32, WIDTH]} if version == 2 else {}),
        "text_config": {
            "hf_model_name_or_path": "jinaai/" + ("jina-bert-flash-implementation", "jina-embeddings-v3")[version - 1],
            "hf_model_config_kwargs": kwargs,
            **{"embed_dim": WIDTH, "pooler_type": "mean_pooler", "proj_type": None},
            **({"default_lora_task": "retrieval.query", "default_instruction_task": None} if version == 2 else {}),
            **text,
        },
        "vision_config": {
            **{"embed_dim": WIDTH, "width": WIDTH, "layers": LAYERS, "head_width": WIDTH // HEADS},
            **{"mlp_ratio": HIDDEN / WIDTH, "image_size": EDGE, "patch_size": PATCH, "patch_dropout": 0.1},
            **{"rope_embeddings": True, "naive_swiglu": True, "subln": True, "x_attention": True},
            **({"pt_hw_seq_len": 16, "intp_freq": True} if version == 2 else {"pt_hw_seq_len": EDGE // PATCH}),
        },
    }


def save(folder: Path, state: Mapping[str, Tensor], stated: Mapping[str, Any], tokenizer: Any) -> None:
    tokenizer.save_pretrained(folder)
    weights = {**state, "logit_scale": torch.tensor(LOGIT_SCALE, dtype=next(iter(state.values())).dtype)}
    save_file(
        {key: tensor.detach().contiguous().clone() for key, tensor in weights.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")


def mean_of_tokens(states: Tensor, seen: Tensor) -> Tensor:
    weights = seen.unsqueeze(-1).float()
    return (states * weights).sum(1) / weights.sum(1)


def assert_equal(folder: Path, bundle: Any, vision: Any, encode: Any, length: int, numbers: int = WIDTH) -> None:
    """Images, texts and the probabilities of one by the other, as `encode_image`, `encode_text` and `forward` do it."""
    resize = transforms.Resize(EDGE, transforms.InterpolationMode.BICUBIC)
    cut = [resize, transforms.CenterCrop(EDGE), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    prepare: Callable[[Any], Any] = transforms.Compose([lambda image: image.convert("RGB"), *cut])
    samples = duals.images(EDGE)
    with torch.inference_mode():
        images = vision(torch.stack([prepare(image) for image in samples]))[:, :numbers]
    for batch_size in (1, 7):
        got = bundle.encode_image(samples, batch_size=batch_size)
        duals.assert_equal(got, images, [f"{image.mode} {image.size}" for image in samples])
    inputs = duals.assert_texts_equal(folder, bundle, lambda inputs: encode(inputs["input_ids"])[:, :numbers], length)
    with torch.inference_mode():
        texts = encode(inputs["input_ids"])[:, :numbers]
    cosines = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
    expected = (cosines * np.exp(LOGIT_SCALE)).softmax(dim=-1)
    got = bundle.classify(samples, duals.TEXTS, template="{}", truncate=True)
    np.testing.assert_allclose(got, expected.numpy(), atol=duals.MAX_ABS, rtol=0)


def adapted_text(**sizes: Any) -> Any:
    """transformers' class with an adapter of PEFT; the matrices A of query, key and value are one, as published."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    text = JinaEmbeddingsV3Config(**{**SIZES, **sizes}, rope_parameters=rope)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "word_embeddings", "token_type_embeddings"]
    model = get_peft_model(
        JinaEmbeddingsV3Model(text, add_pooling_layer=False), LoraConfig(r=4, lora_alpha=8, target_modules=layers)
    )
    for layer in model.base_model.model.layers:
        attention = layer.self_attn
        for projection in (attention.k_proj, attention.v_proj):
            projection.lora_A.default.weight = attention.q_proj.lora_A.default.weight
    return model


def published_text(model: Any, tasks: int = 2) -> dict[str, Tensor]:
    """The class and its adapter under the publisher's names, behind other adapters that are not asked."""
    found: dict[str, Tensor] = {}

    def add(stem: str, weight: Tensor, a: Tensor, b: Tensor) -> None:
        found[f"{stem}.parametrizations.weight.original"] = weight
        for name, matrix in (("lora_A", a), ("lora_B", b)):
            found[f"{stem}.parametrizations.weight.0.{name}"] = torch.stack(
                [*(torch.randn_like(matrix) for _ in range(1, tasks)), matrix]
            )

    inner, prefix = model.base_model.model, "text_model.transformer.roberta."
    for name in ("word_embeddings", "token_type_embeddings"):
        table = getattr(inner.embeddings, name)
        a, b = table.lora_embedding_A.default, table.lora_embedding_B.default
        add(f"{prefix}embeddings.{name}", table.base_layer.weight, a.T, b.T)
    norms = {f"{prefix}emb_ln": inner.embeddings.LayerNorm}
    for i, layer in enumerate(inner.layers):
        stem, attention = f"{prefix}encoder.layers.{i}", layer.self_attn
        packed = (attention.q_proj, attention.k_proj, attention.v_proj)
        for name, rows in (
            ("mixer.Wqkv", packed),
            ("mixer.out_proj", (attention.o_proj,)),
            ("mlp.fc1", (layer.mlp.fc1,)),
            ("mlp.fc2", (layer.mlp.fc2,)),
        ):
            weight = torch.cat([row.base_layer.weight for row in rows])
            b = torch.cat([row.lora_B.default.weight for row in rows])
            add(f"{stem}.{name}", weight, rows[0].lora_A.default.weight, b)
            found[f"{stem}.{name}.bias"] = torch.cat([row.base_layer.bias for row in rows])
        norms |= {f"{stem}.norm1": layer.post_attention_layernorm, f"{stem}.norm2": layer.post_mlp_layernorm}
    for stem, norm in norms.items():
        found |= {f"{stem}.weight": norm.weight, f"{stem}.bias": norm.bias}
    return found


@pytest.mark.parametrize(
    ("options", "length", "numbers"),
    [
        (duals.BACK_ENDS[0], 512, WIDTH),
        ((*duals.BACK_ENDS[1], "--set", "max_length=96", "--set", "truncate_dim=16"), 96, 16),
    ],
    ids=["dynamo", "torchscript, other lengths"],
)
def test_version_2(options: tuple[str, ...], length: int, numbers: int, tmp_path: Path) -> None:
    tokenizer, source = duals.unigram_tokenizer(model_max_length=8194), tmp_path / "jina"
    torch.manual_seed(0)
    vision, text = duals.spread(eva(16)), duals.spread(adapted_text(vocab_size=len(tokenizer)))
    # As published; the models' own values are rounded alike.
    with torch.no_grad():
        for parameter in (*vision.parameters(), *text.parameters()):
            parameter.copy_(parameter.bfloat16())
    state = {key: tensor.bfloat16() for key, tensor in {**published_vision(vision), **published_text(text)}.items()}
    save(source, state, config(2, len(tokenizer)), tokenizer)
    bundle = duals.export(source, tmp_path / "out", *options, model_type="jina_clip")
    assert bundle.manifest.family == "jinaclip"
    assert bundle.manifest.text.pooling == "mean"
    assert bundle.manifest.architecture["matryoshka"] == [16, 32, WIDTH]
    assert "timm Eva and transformers JinaEmbeddingsV3Model" in json.dumps(bundle.manifest.export.contract)
    hub = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in hub
    assert hub["projection_dim"] == numbers

    def encode(ids: Tensor) -> Tensor:
        seen = ids != 1
        return mean_of_tokens(text(input_ids=ids, attention_mask=seen.long()).last_hidden_state, seen)

    assert_equal(source, bundle, vision, encode, length, numbers)


def gated_bert(**sizes: Any) -> Any:
    """transformers' BertModel with timm's GluMlp between its norms, and without positions."""
    config = BertConfig(**{**SIZES, **sizes}, max_position_embeddings=512)
    bert, width, hidden = BertModel(config, add_pooling_layer=False), config.hidden_size, config.intermediate_size
    for layer in bert.encoder.layer:
        layer.intermediate = GluMlp(width, 2 * hidden, width, nn.GELU, bias=(False, True), gate_last=False)
        layer.output.dense = nn.Identity()
    return bert


def published_bert(bert: Any) -> dict[str, Tensor]:
    prefix, embeddings = "text_model.transformer.", bert.embeddings
    found: dict[str, Tensor] = {
        f"{prefix}embeddings.word_embeddings.weight": embeddings.word_embeddings.weight,
        f"{prefix}embeddings.token_type_embeddings.weight": embeddings.token_type_embeddings.weight,
        f"{prefix}emb_ln.weight": embeddings.LayerNorm.weight,
        f"{prefix}emb_ln.bias": embeddings.LayerNorm.bias,
    }
    for i, layer in enumerate(bert.encoder.layer):
        stem, own, mlp = f"{prefix}encoder.layers.{i}", layer.attention.self, layer.intermediate
        for name in ("weight", "bias"):
            packed = [getattr(projection, name) for projection in (own.query, own.key, own.value)]
            found[f"{stem}.mixer.Wqkv.{name}"] = torch.cat(packed)
            found[f"{stem}.mixer.out_proj.{name}"] = getattr(layer.attention.output.dense, name)
            found[f"{stem}.norm1.{name}"] = getattr(layer.attention.output.LayerNorm, name)
            found[f"{stem}.norm2.{name}"] = getattr(layer.output.LayerNorm, name)
            found[f"{stem}.mlp.wo.{name}"] = getattr(mlp.fc2, name)
        found[f"{stem}.mlp.gated_layers.weight"] = mlp.fc1.weight
    return found


@pytest.mark.parametrize("options", duals.BACK_ENDS, ids=" ".join)
def test_version_1(options: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer, source = duals.wordpiece_tokenizer(model_max_length=8192), tmp_path / "jina"
    torch.manual_seed(0)
    vision, bert = duals.spread(eva(EDGE // PATCH)), duals.spread(gated_bert(vocab_size=len(tokenizer)))
    nn.init.zeros_(bert.embeddings.position_embeddings.weight)
    save(source, {**published_vision(vision), **published_bert(bert)}, config(1, len(tokenizer)), tokenizer)
    bundle = duals.export(source, tmp_path / "out", *options, model_type="jina_clip")
    assert "timm Eva and transformers BertModel" in json.dumps(bundle.manifest.export.contract)

    def encode(ids: Tensor) -> Tensor:
        seen, places = ids != 0, torch.arange(ids.shape[1])
        bias = torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None, None]
        bias = bias - SLOPES[:, None, None] * (places[:, None] - places).abs()
        return mean_of_tokens(bert(ids, attention_mask=bias).last_hidden_state, seen)

    assert_equal(source, bundle, vision, encode, 512)


def small(version: int) -> dict[str, Any]:
    text: dict[str, Any] = {
        "width": WIDTH,
        "layers": 1,
        "heads": HEADS,
        "hidden": HIDDEN,
        "vocab_size": 32,
        "eps": 1e-5,
    }
    if version == 1:
        text |= {"kind": "jina-bert", "token_types": 2, "rotary_base": 0.0, "pad_id": 0}
    else:
        lora = {"tasks": TASKS, "rank": 4, "alpha": 4.0, "task": "retrieval.query"}
        text |= {"kind": "jina-xlm-roberta", "token_types": 1, "rotary_base": 2e4, "pad_id": 1, "lora": lora}
    vision = {"width": WIDTH, "layers": 1, "heads": HEADS, "hidden": HIDDEN, "patch_size": PATCH, "image_size": EDGE}
    return {"vision": {**vision, "reference_grid": 3}, "text": text}


def save_small(folder: Path, version: int) -> dict[str, Any]:
    family, architecture = load_family("jinaclip"), small(version)
    tensors = family.published_tensors(architecture)
    save_file({key: torch.zeros(info.shape) for key, info in tensors.items()}, folder / "model.safetensors")
    stated = family.published_config(architecture)
    assert stated is not None
    return stated


@pytest.mark.parametrize(
    ("version", "section", "change", "text"),
    [
        (1, "", {"add_projections": True}, "add_projections asks for a computation"),
        (1, "vision_config", {"subln": False}, "subln asks for a computation"),
        (1, "vision_config", {"rope_embeddings": False}, "rope_embeddings asks for a computation"),
        (1, "vision_config", {"ls_init_value": 0.1}, "ls_init_value asks for a computation"),
        (1, "vision_config", {"pt_hw_seq_len": 16}, "nothing stretches them"),
        (1, "vision_config", {"head_width": 0}, "rotary positions cannot turn"),
        (1, "vision_config", {"mlp_ratio": 4.0}, "mlp_ratio 4.0, not"),
        (1, "vision_config", {"embed_dim": 32}, "embed_dim 32, not 48"),
        (1, "text_config", {"pooler_type": None}, "pooler_type asks for a computation"),
        (1, "text_config", {"hf_model_name_or_path": "jinaai/jina-embeddings-v2"}, "text encoder that is not computed"),
        (1, "text_config.hf_model_config_kwargs", {"use_qk_norm": True}, "use_qk_norm asks for a computation"),
        (1, "text_config.hf_model_config_kwargs", {"mlp_type": "mlp"}, "mlp_type asks for a computation"),
        (1, "text_config.hf_model_config_kwargs", {"num_attention_heads": 5}, "heads"),
        (
            2,
            "text_config.hf_model_config_kwargs",
            {"position_embedding_type": "absolute"},
            "position_embedding_type asks",
        ),
        (2, "text_config.hf_model_config_kwargs", {"lora_rank": 8}, "adapters of the text encoder do not fit"),
        (2, "text_config.hf_model_config_kwargs", {"intermediate_size": 96}, "intermediate_size 96, not 80"),
        (2, "text_config", {"default_lora_task": "code"}, "field 'task'"),
        (2, "text_config", {"default_instruction_task": "retrieval.query"}, "default_instruction_task asks"),
        (2, "", {"truncate_dim": 64}, "truncate_dim"),
        (2, None, {}, "needs its config.json"),
    ],
)
def test_what_is_not_computed_is_refused(
    version: int, section: str | None, change: dict[str, Any], text: str, tmp_path: Path, build_model: Any
) -> None:
    stated = save_small(tmp_path, version)
    if section is not None:
        inner = stated
        for name in filter(None, section.split(".")):
            inner = inner[name]
        inner |= change
        (tmp_path / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    with pytest.raises(InputError, match=text):
        build_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": 224}, "different sizes"),
        ({"image_processor_type": "CLIPImageProcessor"}, "another class than Jina CLIP's"),
        ({"resize_mode": "stretch"}, "preprocessor_config.json is malformed"),
    ],
)
def test_a_processor_that_does_not_fit_is_refused(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(save_small(tmp_path, 1)), encoding="utf-8")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **change}), encoding="utf-8")
    family, checkpoint = identify(open_checkpoint(str(tmp_path)))
    with pytest.raises(InputError, match=text):
        family.describe(checkpoint)


def test_no_adapter_where_the_config_names_none(tmp_path: Path, build_model: Any) -> None:
    stated = save_small(tmp_path, 2)
    stated["text_config"]["default_lora_task"] = None
    (tmp_path / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    state = {key: torch.randn(info.shape) for key, info in load_family("jinaclip").published_tensors(small(2)).items()}
    save_file(state, tmp_path / "model.safetensors")
    model = build_model(tmp_path)
    expected = state["text_model.transformer.roberta.embeddings.word_embeddings.parametrizations.weight.original"]
    assert torch.equal(dict(model.parts[1].module.named_parameters())["word.weight"], expected)


def test_embeddings_are_not_cut_to_more_than_they_have(tmp_path: Path, build_model: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(save_small(tmp_path, 1)), encoding="utf-8")
    with pytest.raises(UsageError, match="not that long"):
        build_model(tmp_path, BuildOptions(family_options={"truncate_dim": 64}))
    model = build_model(tmp_path, BuildOptions(family_options={"truncate_dim": 40}))
    assert any("trained to be cut to" in warning for warning in model.warnings)


@pytest.mark.parametrize(("name", "numbers"), [("jinaclip-v1", None), ("jinaclip-v2", 865_278_477)])
def test_published_keys(name: str, numbers: int | None) -> None:
    """Keys and shapes are those of the libraries' classes at the published sizes; and so many numbers are published."""
    known, family = load_known(name), load_family("jinaclip")
    architecture = JinaClipArchitecture.from_config(known.architecture)
    vision, text = architecture.vision, architecture.text
    sizes = {"hidden_size": text.width, "num_hidden_layers": text.layers, "num_attention_heads": text.heads}
    sizes |= {"intermediate_size": text.hidden, "vocab_size": text.vocab_size, "type_vocab_size": text.token_types}
    edges: dict[str, Any] = {"img_size": vision.image_size, "patch_size": vision.patch_size, "embed_dim": vision.width}
    edges |= {"depth": vision.layers, "num_heads": vision.heads, "mlp_ratio": vision.hidden / vision.width}
    with torch.device("meta"):
        expected = published_vision(eva(vision.reference_grid, **edges))
        if text.lora is None:
            expected |= published_bert(gated_bert(**sizes))
        else:
            expected |= published_text(adapted_text(**sizes), tasks=1)
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items()} | {"logit_scale": ()}
    published = {key: info.shape for key, info in family.published_tensors(known.architecture).items()}
    assert published == shapes
    if numbers is not None:
        assert sum(math.prod(shape) for shape in published.values()) == numbers
