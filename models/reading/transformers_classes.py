"""The classes and model types of transformers that the proof of the contract runs on checked copies of side files.

All are part of transformers itself (5.23, models/auto) and read plain numbers; a file that names another one, or code
of its own, is never loaded.
"""

from __future__ import annotations

IMAGE_CLASSES = frozenset(
    f"{name}{suffix}"
    for name in ("CLIPImageProcessor", "BlipImageProcessor", "SiglipImageProcessor", "ViTImageProcessor")
    for suffix in ("", "Fast", "Pil")
) | {"CLIPFeatureExtractor"}
TOKENIZER_CLASSES = frozenset(
    {
        *("BertTokenizer", "BertTokenizerFast", "CLIPTokenizer", "CLIPTokenizerFast", "GPT2Tokenizer"),
        *("GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
        *("SiglipTokenizer", "Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast"),
        *("XLMRobertaTokenizer", "XLMRobertaTokenizerFast"),
    }
)
MODEL_TYPES = frozenset(
    {
        *("clip", "blip", "clip_text_model", "clip_vision_model", "llava"),
        *("siglip", "siglip_text_model", "siglip_vision_model"),
        *("metaclip_2", "metaclip_2_text_model", "metaclip_2_vision_model"),
    }
)
