"""The classes and model types of transformers that the proof of the contract runs on checked copies of side files.

All are part of transformers itself (5.23, models/auto) and read plain numbers; a file that names another one, or code
of its own, is never loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

IMAGE_CLASSES = frozenset(
    f"{name}ImageProcessor{suffix}"
    for name in ("CLIP", "ChineseCLIP", "Blip", "Siglip", "Siglip2", "ViT")
    for suffix in ("", "Fast", "Pil")
) | {"CLIPFeatureExtractor", "ChineseCLIPFeatureExtractor"}
TOKENIZER_CLASSES = frozenset(
    {
        *("BertTokenizer", "BertTokenizerFast", "CLIPTokenizer", "CLIPTokenizerFast", "GPT2Tokenizer"),
        *("GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
        *("SiglipTokenizer", "Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast"),
        *("XLMRobertaTokenizer", "XLMRobertaTokenizerFast"),
    }
)
READ_AS: Mapping[str, str] = {"fgclip2": "siglip2"}
"""Types that transformers does not know → the one whose classes read such checkpoints; bundles state that one."""
MODEL_TYPES = frozenset(
    {
        *("clip", "blip", "clip_text_model", "clip_vision_model", "llava", "chinese_clip", "altclip"),
        *("siglip", "siglip_text_model", "siglip_vision_model"),
        *("siglip2", "siglip2_text_model", "siglip2_vision_model"),
        *("metaclip_2", "metaclip_2_text_model", "metaclip_2_vision_model"),
    }
)
