"""nanoVLM: the whole model, from an image and a prompt to the logits of the next token.

Port of huggingface/nanoVLM v0.1 (6ba9082: nanoVLM-222M), v0.2 (731d8c6: nanoVLM-450M) and 4e0c096 (images in tiles).
Its key names never changed, its prompts did: `ChatForm.layout`. What stands between the Parts is the host's: features
take the places of placeholders, or stand before the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from vlm_export.errors import InputError, UsageError
from vlm_export.family import (
    DEFAULT_BUILD,
    BuildOptions,
    Checkpoint,
    Description,
    Model,
    NoOptions,
    StoredTensorInfo,
    WeightStore,
    outlines,
    reference_from_module,
)
from vlm_export.models.nanovlm.architecture import (
    GLOBAL_IMAGE_TOKEN,
    IMAGE_TOKEN,
    NanoVlmArchitecture,
    architecture_from_checkpoint,
    config_from_architecture,
)
from vlm_export.models.nanovlm.parts import build_modules, build_parts
from vlm_export.models.nanovlm.weights import EMBEDDING_KEY, HEAD_KEY, check_tied, weight_table
from vlm_export.models.reading.image_processor import same_origin
from vlm_export.models.reading.weights import load_weights, published_tensors
from vlm_export.original import Original, TorchvisionPipeline, TransformersOriginal
from vlm_export.specs import AnyImageSpec, ImageSpec, Origins, TextSpec, TileSpec, torchvision_image_spec
from vlm_export.specs.codec import Spec
from vlm_export.specs.tasks import ChatSpec, EmbedSpec, EncoderSpec, PromptSpec, SamplingSpec, TaskSpec

# What the original's `generate` draws from, in every version.
_SAMPLING = SamplingSpec(top_k=50, top_p=0.9, temperature=0.5, order="temperature_last")
# `generate.py` of the versions.
_MAX_NEW_TOKENS = {"prepended": 20, "placeholders": 20, "tiles": 300}
_QUESTION = PromptSpec("Question: ", " Answer:")
_CHATML = PromptSpec("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


class NanoVlmFamily:
    """`vision_encoder.*`, `MP.*`, `decoder.*`."""

    name = "nanovlm"
    reads: tuple[str, ...] = ()
    options: type[Spec] = NoOptions
    marks: tuple[str, ...] = ("MP.proj.weight",)
    roots: tuple[str, ...] = ("vision_encoder", "MP", "decoder")
    config_types: Mapping[str, tuple[str, ...]] = {}

    def recognises(self, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.tensors
        own = ("MP.proj.weight", "vision_encoder.patch_embedding.conv.weight")
        return all(key in keys for key in own) and any(key in keys for key in (HEAD_KEY, EMBEDDING_KEY))

    def describe(self, checkpoint: Checkpoint) -> Description:
        architecture = architecture_from_checkpoint(checkpoint)
        parts = outlines(build_parts(architecture, build_modules(architecture)))
        return Description(
            architecture.to_json(),
            parts,
            tuple(_notes(architecture)),
            image=_image_spec(architecture),
            text=_text_spec(architecture),
            origins=_origins(architecture),
        )

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        if options != DEFAULT_BUILD:
            raise UsageError("nanoVLM takes one image size", fix="leave the size options out")
        architecture = architecture_from_checkpoint(checkpoint)
        if architecture.decoder.tied:
            check_tied(checkpoint)
        modules = build_modules(architecture)
        table = weight_table(architecture.vision.layers, architecture.decoder, frozenset(checkpoint.tensors))
        dropped = load_weights(modules, checkpoint, table, store)
        parts = tuple(build_parts(architecture, modules))
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=_image_spec(architecture),
            text=_text_spec(architecture),
            hub_config={**(checkpoint.config or {}), **_llava_config(architecture)},
            tasks=_tasks(architecture),
            dropped_keys=dropped,
            references={part.name: partial(reference_from_module, part) for part in parts},
            reference_name="unpatched eager module",
            original=_original(architecture),
            origins=_origins(architecture),
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        parsed = NanoVlmArchitecture.from_config(architecture)
        return published_tensors(build_modules(parsed), weight_table(parsed.vision.layers, parsed.decoder), "float32")

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        return config_from_architecture(NanoVlmArchitecture.from_config(architecture))


def _notes(architecture: NanoVlmArchitecture) -> Iterator[str]:
    chat, tokens = architecture.chat, architecture.tokens_per_tile
    if chat.layout == "prepended":
        yield f"an image is {tokens} features, which stand before the text (v0.1)"
    elif chat.layout == "placeholders":
        yield f"an image is {tokens} features, which take the places of {chat.extra_tokens[IMAGE_TOKEN]} (v0.2)"
    else:
        yield f"images are cut into tiles of {architecture.image_size} pixels, {tokens} features each"
    yield "values of pixels stay in [0, 1]: no version normalises them"
    yield "decoder is one graph for the prompt and for every token; grouped keys and values are never repeated"
    if architecture.decoder.tied:
        yield "the token embedding is the output matrix: embed_tokens and decoder each hold it once"


def _image_spec(architecture: NanoVlmArchitecture) -> AnyImageSpec:
    """How images become inputs of the vision part: tiles in the later generation."""
    chat = architecture.chat
    if chat.layout == "tiles":
        global_tile = GLOBAL_IMAGE_TOKEN in chat.extra_tokens
        try:
            return TileSpec(architecture.image_size, chat.max_side_pixels, chat.resize_to_max_side, global_tile)
        except InputError as error:
            raise InputError(
                "config.json asks for tiles that cannot be cut",
                where="config.json: max_img_size",
                expected=error.expected,
                got=error.got,
            ) from error
    none, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return torchvision_image_spec(architecture.image_size, "bilinear", "before_resize", none, one, "stretch")


def _origins(architecture: NanoVlmArchitecture) -> Origins:
    image = _image_spec(architecture)
    if isinstance(image, ImageSpec):
        return Origins(same_origin(image, "huggingface/nanoVLM data/processors.py"))
    return Origins(
        {
            "image.tile_size_pixels": "shape of the encoder's weights",
            "image.max_side_pixels": "config.json: max_img_size",
            "image.resize_to_max_side": "config.json: resize_to_max_side_len, false where it is not stated",
            "image.global_tile": "config.json: vlm_extra_tokens",
        }
    )


def _original(architecture: NanoVlmArchitecture) -> Original:
    """Who prepares inputs: torchvision as the original's `get_image_processor` uses it, and transformers' tokenizer.

    Tiles are cut by the original's own code, which is not run; recorded outputs of it stand in the tests.
    """
    transform = TorchvisionPipeline(
        "get_image_processor of huggingface/nanoVLM data/processors.py, by torchvision",
        "bilinear",
        crop=False,
        rgb_first=True,
        mean=None,
        std=None,
    )
    tokenizer = TransformersOriginal("llama", "", tuple(architecture.chat.extra_tokens.values()))
    return Original(None if architecture.chat.layout == "tiles" else transform, tokenizer)


def _text_spec(architecture: NanoVlmArchitecture) -> TextSpec:
    sizes, chat = architecture.decoder, architecture.chat
    return TextSpec(
        context_length=sizes.positions,
        vocab_size=sizes.vocab_size,
        end_token_id=chat.end_token_id,
        pad_token_id=chat.end_token_id,  # as the original pads
        cleaning="none",
        adds_eos=False,
        added_tokens=tuple(chat.extra_tokens.values()),
        case="kept",
    )


def _tasks(architecture: NanoVlmArchitecture) -> tuple[TaskSpec, ...]:
    """What the model can be asked; nothing was trained to make the embeddings comparable."""
    chat = architecture.chat
    places = {name: token for name, token in chat.extra_tokens.items() if name not in (IMAGE_TOKEN, GLOBAL_IMAGE_TOKEN)}
    talk = ChatSpec(
        layout=chat.layout,
        tokens_per_tile=architecture.tokens_per_tile,
        image_token=chat.extra_tokens.get(IMAGE_TOKEN),
        image_token_id=architecture.image_token_id,
        global_image_token=chat.extra_tokens.get(GLOBAL_IMAGE_TOKEN),
        tile_tokens=places,
        prompt=_CHATML if chat.has_template else _QUESTION,
        context_length=architecture.decoder.positions,
        max_prompt_tokens=chat.max_prompt_tokens,
        eos_token_ids=(chat.end_token_id,),
        pad_token_id=chat.end_token_id,
        max_new_tokens=_MAX_NEW_TOKENS[chat.layout],
        sampling=_SAMPLING,
    )
    image = EncoderSpec(talk.vision, "image_features", "mean")
    return (talk, EmbedSpec(image, EncoderSpec(talk.embed_tokens, "inputs_embeds", "mean")))


def _llava_config(architecture: NanoVlmArchitecture) -> dict[str, Any]:
    """What generic hosts need, in LLaVA's form: transformers.js v4 takes the cache's sizes from `text_config`."""
    vision, sizes, end = architecture.vision, architecture.decoder, architecture.chat.end_token_id
    image_token_id = architecture.image_token_id
    # transformers.js reads the first, transformers the second.
    placeholder = (
        {} if image_token_id is None else {"image_token_index": image_token_id, "image_token_id": image_token_id}
    )
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": architecture.tokens_per_tile,
        **placeholder,
        "eos_token_id": end,
        "pad_token_id": end,
        "text_config": {
            "model_type": "llama",
            "hidden_size": sizes.width,
            "intermediate_size": sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_width,
            "vocab_size": sizes.vocab_size,
            "max_position_embeddings": sizes.positions,
            "rms_norm_eps": sizes.eps,
            "rope_theta": sizes.rope_base,
            "tie_word_embeddings": sizes.tied,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.hidden,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": architecture.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.eps,
        },
    }
