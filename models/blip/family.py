"""BLIP: features, retrieval, captions and answers, from Salesforce's files and Hugging Face directories.

Port of salesforce/BLIP (3a29b74): models/blip.py, blip_itm.py, blip_vqa.py, blip_pretrain.py; transformers 5.23
models/blip. The original switches between its modes inside one `forward`, and writes special tokens into `input_ids`;
here each mode is a Part, and the runtime's tokenization puts the special tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
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
    TokenizerIds,
    WeightStore,
    outlines,
    reference_from_module,
)
from vlm_export.models.blip import weights as blip_weights
from vlm_export.models.blip.architecture import BlipArchitecture, architecture_from_checkpoint
from vlm_export.models.blip.nlvr import FIRST_MERGING_LAYER
from vlm_export.models.blip.original import original_task
from vlm_export.models.blip.parts import build_modules, build_parts
from vlm_export.models.reading.image_processor import (
    Prepared,
    image_size_origin,
    processor_files,
    same_origin,
    transformers_image,
    with_chosen_size,
)
from vlm_export.models.reading.images import IMAGE_MEAN, IMAGE_STD, apply_image_size, config_of_size
from vlm_export.models.reading.shapes import config_section
from vlm_export.models.reading.weights import Target, load_weights, published_tensors
from vlm_export.original import Original, TorchvisionPipeline, TransformersOriginal
from vlm_export.specs import Origins, TextSpec, torchvision_image_spec
from vlm_export.specs.codec import Spec
from vlm_export.specs.tasks import (
    AnswerSpec,
    CaptionSpec,
    EmbedSpec,
    EncoderSpec,
    FirstToken,
    MatchSpec,
    TaskSpec,
    limited_tasks,
)

# Where the original truncates captions for retrieval (train_retrieval.py) and questions (blip_vqa.py).
MAX_TEXT_TOKENS = 35
# What `init_tokenizer` (models/blip.py) appends to BERT's tokenizer; transformers' checkpoints have rows for both.
ADDED_TOKENS = DECODER_TOKEN, ENCODER_TOKEN = ("[DEC]", "[ENC]")


class BlipFamily:
    """Salesforce's key names and Hugging Face's."""

    name = "blip"
    reads: tuple[str, ...] = ()
    options: type[Spec] = NoOptions
    marks: tuple[str, ...] = ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding")
    roots: tuple[str, ...] = blip_weights.ROOTS
    config_types: Mapping[str, tuple[str, ...]] = {
        "blip": ("BlipForImageTextRetrieval", "BlipForConditionalGeneration", "BlipForQuestionAnswering")
    }

    def recognises(self, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.tensors
        has_text = any(key.startswith(("text_encoder.", "text_decoder.")) for key in keys)
        vision = ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding")
        return has_text and any(key in keys for key in vision)

    def describe(self, checkpoint: Checkpoint) -> Description:
        architecture = architecture_from_checkpoint(checkpoint)
        parts = outlines(build_parts(architecture, build_modules(architecture)))
        image, origins = _image(architecture, architecture.vision.image_size, checkpoint)
        return Description(
            architecture.to_json(),
            parts,
            tuple(_notes(architecture, checkpoint)),
            image=image,
            text=_text_spec(architecture),
            origins=origins | _text_origins(architecture, checkpoint),
            reserved_rows=_reserved_rows(architecture),
        )

    def build(self, checkpoint: Checkpoint, store: WeightStore, options: BuildOptions = DEFAULT_BUILD) -> Model:
        if options.dynamic_image_size:
            raise UsageError("BLIP takes one image size", got="--dynamic-image-size", fix="use --image-size")
        architecture = architecture_from_checkpoint(checkpoint)
        if architecture.key_names == "huggingface":
            blip_weights.check_tied(checkpoint)
        modules = build_modules(architecture)
        dropped = load_weights(modules, checkpoint, _table(architecture, checkpoint.tensors), store)
        published = architecture
        image_size = apply_image_size(modules.vision, architecture.vision.image_size, options)
        architecture = replace(architecture, vision=replace(architecture.vision, image_size=image_size))
        parts = tuple(build_parts(architecture, modules))
        image, origins = _image(published, image_size, checkpoint)
        return Model(
            family=self.name,
            architecture=architecture.to_json(),
            parts=parts,
            image=image,
            text=_text_spec(architecture),
            hub_config=config_of_size(checkpoint.config or _config_from_architecture(architecture), image_size),
            tasks=tuple(_tasks(architecture)),
            dropped_keys=dropped,
            references={part.name: partial(reference_from_module, part) for part in parts},
            reference_name="unpatched eager module",
            original=_original(published, checkpoint, same_size=image_size == published.vision.image_size),
            origins=origins | _text_origins(architecture, checkpoint),
            reserved_rows=_reserved_rows(architecture),
            with_tokenizer=_with_tokenizer,
        )

    def published_tensors(self, architecture: Mapping[str, Any]) -> dict[str, StoredTensorInfo]:
        parsed = BlipArchitecture.from_config(architecture)
        return published_tensors(build_modules(parsed), _table(parsed, ()), dtype="float32")

    def published_config(self, architecture: Mapping[str, Any]) -> dict[str, Any] | None:
        parsed = BlipArchitecture.from_config(architecture)
        return _config_from_architecture(parsed) if parsed.key_names == "huggingface" else None


def _table(architecture: BlipArchitecture, keys: Mapping[str, Any] | tuple[()]) -> dict[str, Target]:
    huggingface = architecture.key_names == "huggingface"
    table = blip_weights.vision_table(architecture.vision.layers, huggingface=huggingface)
    encoder, decoder = architecture.encoder, architecture.decoder
    if encoder is not None and architecture.compares_images:
        table |= blip_weights.pair_table(encoder.layers, FIRST_MERGING_LAYER)
    elif encoder is not None:
        table |= blip_weights.encoder_table(encoder.layers, has_cross_attention=bool(encoder.states_width))
    if decoder is not None:
        table |= blip_weights.decoder_table(decoder.layers, keys)
    if architecture.projection_dim:
        table |= blip_weights.PROJECTIONS
    if architecture.has_matching_head:
        table |= blip_weights.MATCHING
    return table | blip_weights.training_leftovers(keys)


def _notes(architecture: BlipArchitecture, checkpoint: Checkpoint) -> Iterator[str]:
    size = architecture.vision.image_size
    yield f"images are stretched to {size} x {size} pixels; --image-size resamples the positions, as the original does"
    yield "the original's modes are Parts of their own; [ENC] and [DEC] are put by the runtime, not inside the graph"
    if architecture.decoder is not None:
        yield "cross_key_values runs once for an image; text_decoder is one graph for the prompt and for every token"
    leftovers = blip_weights.training_leftovers(checkpoint.tensors)
    if leftovers:
        yield f"{len(leftovers)} tensors of training (momentum copies, queues) are left aside"
    if architecture.key_names == "huggingface":
        yield "as in transformers, texts keep [CLS] as their first token; Salesforce's files take [ENC]"


def _original(architecture: BlipArchitecture, checkpoint: Checkpoint, *, same_size: bool) -> Original:
    """Who prepares inputs: transformers, or the transform and the tokenizer of salesforce/BLIP.

    Args:
        same_size: images have the size that the checkpoint was trained with.
    """
    classes = TransformersOriginal("blip", "BlipImageProcessor")
    if architecture.key_names == "huggingface":
        task = original_task(architecture, checkpoint, _config_from_architecture(architecture))
        return Original(classes, classes, task=task if same_size else None)
    transform = TorchvisionPipeline(
        "load_demo_image of salesforce/BLIP demo.ipynb, by torchvision",
        "bicubic",
        crop=False,
        rgb_first=True,
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
    )
    images = classes if processor_files(checkpoint) else transform
    # `init_tokenizer` of the original: transformers' BertTokenizer with two more tokens.
    return Original(images, replace(classes, added_tokens=("[DEC]", "[ENC]")))


def _image(architecture: BlipArchitecture, image_size: int, checkpoint: Checkpoint) -> Prepared:
    """For images of `image_size`; the checkpoint states its own architecture's."""
    published = architecture.vision.image_size
    if architecture.key_names == "huggingface" or processor_files(checkpoint):
        prepared = transformers_image(checkpoint, "BlipImageProcessor", published, image_size_origin(checkpoint))
        return with_chosen_size(prepared, image_size)
    spec = torchvision_image_spec(published, "bicubic", "before_resize", IMAGE_MEAN, IMAGE_STD, "stretch")
    origins = {**same_origin(spec, "salesforce/BLIP"), "image.size_pixels": "the image encoder's weights"}
    return with_chosen_size((spec, Origins(origins)), image_size)


def _text_spec(architecture: BlipArchitecture) -> TextSpec:
    tokens, sizes = architecture.tokens, architecture.encoder or architecture.decoder
    assert sizes is not None
    original = architecture.key_names == "original"
    truncates = original and (architecture.has_matching_head or architecture.answers_questions)
    return TextSpec(
        context_length=min(MAX_TEXT_TOKENS, sizes.positions) if truncates else sizes.positions,
        vocab_size=sizes.vocab_size,
        end_token_id=tokens.sep,
        pad_token_id=tokens.pad,
        cleaning="none",
        # transformers' tokenizer has the two only where its files say so.
        added_tokens=ADDED_TOKENS if original else (),
        pooling="first_token",
    )


def _reserved_rows(architecture: BlipArchitecture) -> int:
    return 0 if architecture.key_names == "original" else len(ADDED_TOKENS)


def _text_origins(architecture: BlipArchitecture, checkpoint: Checkpoint) -> Origins:
    """What states the fields of the TextSpec, before a tokenizer has its say."""
    original = architecture.key_names == "original"
    config = config_section(checkpoint, "text_config")

    def stated(key: str) -> str:
        if original:
            return "bert-base-uncased, which salesforce/BLIP takes"
        return f"config.json: text_config.{key}" if key in config else "default of BlipTextConfig"

    cut = "salesforce/BLIP: train_retrieval.py, blip_vqa.py" if original else "rows of the position embedding"
    return Origins(
        {
            "text.context_length": cut,
            "text.vocab_size": "rows of the word embedding",
            "text.end_token_id": stated("sep_token_id"),
            "text.pad_token_id": stated("pad_token_id"),
            "text.cleaning": "BERT's tokenizer alone",
            "text.padding": "the model does not see padding",
            "text.case": "default of BertTokenizer",
            "text.added_tokens": "salesforce/BLIP: init_tokenizer (models/blip.py)",
            "text.pooling": "BLIP: the first token",
        }
    )


def _with_tokenizer(model: Model, ids: TokenizerIds) -> Model:
    """The special tokens of texts as the tokenizer has them.

    Salesforce's code takes all ids from its tokenizer (`init_tokenizer`, models/blip.py). transformers takes what
    decoding starts and ends with from config.json, and only texts from the tokenizer.
    """
    if not ids.start:
        raise InputError(
            "the tokenizer begins texts with no token of its own, and BLIP reads a text at its first",
            expected="a tokenizer that begins texts with [CLS], whatever its name",
            fix="pass --tokenizer PATH with the tokenizer that the checkpoint was trained with",
        )
    architecture = BlipArchitecture.from_config(model.architecture)
    tokens = replace(architecture.tokens, cls=ids.start[0], pad=ids.pad)
    tokens = replace(tokens, encoder_start=ids.vocabulary.get(ENCODER_TOKEN, tokens.encoder_start))
    if architecture.key_names == "original":
        decoder_start = ids.vocabulary.get(DECODER_TOKEN, tokens.decoder_start)
        tokens = replace(tokens, sep=ids.end, decoder_start=decoder_start)
    architecture = replace(architecture, tokens=tokens)
    tasks = limited_tasks(tuple(_tasks(architecture)), [part.name for part in model.parts])
    return replace(model, tasks=tasks, architecture=architecture.to_json())


def _tasks(architecture: BlipArchitecture) -> Iterator[TaskSpec]:
    """What the model can be asked; defaults of salesforce/BLIP's own functions."""
    huggingface, sizes = architecture.key_names == "huggingface", architecture.encoder or architecture.decoder
    assert sizes is not None
    tokens = architecture.tokens
    first_token: FirstToken = "cls" if huggingface else "enc"
    # transformers cuts texts where its tokenizer says, at the latest where positions end.
    longest = sizes.positions if huggingface else MAX_TEXT_TOKENS
    if architecture.projection_dim:
        yield EmbedSpec(EncoderSpec("vision", "image_embeds"), EncoderSpec("text", "text_embeds"))
    if architecture.has_matching_head:
        yield MatchSpec(tokens, first_token, max_text_tokens=longest)
    if architecture.answers_questions:
        yield AnswerSpec(
            tokens,
            question_first_token=first_token,
            max_question_tokens=longest,
            beams=3,
            max_length=10,
            min_length=1,
            label_smoothing=0.1,
            attend_padding=True,
        )
    elif architecture.decoder is not None:
        yield CaptionSpec(tokens, prompt="a picture of ", beams=3, max_length=20, min_length=5)


def _config_from_architecture(architecture: BlipArchitecture) -> dict[str, Any]:
    """`config.json` in the form of transformers' `BlipConfig`."""
    vision, sizes, tokens = architecture.vision, architecture.encoder or architecture.decoder, architecture.tokens
    assert sizes is not None
    name = "BlipForImageTextRetrieval"
    if architecture.decoder is not None:
        name = "BlipForQuestionAnswering" if architecture.answers_questions else "BlipForConditionalGeneration"
    return {
        "model_type": "blip",
        "architectures": [name],
        "image_text_hidden_size": architecture.projection_dim or 256,
        "text_config": {
            "model_type": "blip_text_model",
            "hidden_size": sizes.width,
            "encoder_hidden_size": (architecture.decoder or sizes).states_width,
            "intermediate_size": sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "max_position_embeddings": sizes.positions,
            "vocab_size": sizes.vocab_size,
            "layer_norm_eps": sizes.eps,
            "bos_token_id": tokens.decoder_start,
            "sep_token_id": tokens.sep,
            "pad_token_id": tokens.pad,
        },
        "vision_config": {
            "model_type": "blip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.hidden,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.eps,
        },
    }
