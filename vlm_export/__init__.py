"""Vision-language checkpoints to verified static-graph ONNX encoders that run without PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlm_export.runtime.pair import EncoderPair, load
    from vlm_export.runtime.slice_features import SliceEncoder, SliceFeatures, load_slice_encoder
    from vlm_export.runtime.vision_chat import VisionChat, load_vision_chat
    from vlm_export.runtime.vision_language import VisionLanguage, load_vision_language

__all__ = [
    "EncoderPair",
    "SliceEncoder",
    "SliceFeatures",
    "VisionChat",
    "VisionLanguage",
    "__version__",
    "load",
    "load_slice_encoder",
    "load_vision_chat",
    "load_vision_language",
]


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `import vlm_export` costs milliseconds and `--help` stays fast.
    if name in {"EncoderPair", "load"}:
        from vlm_export.runtime import pair

        return getattr(pair, name)
    if name in {"VisionLanguage", "load_vision_language"}:
        from vlm_export.runtime import vision_language

        return getattr(vision_language, name)
    if name in {"VisionChat", "load_vision_chat"}:
        from vlm_export.runtime import vision_chat

        return getattr(vision_chat, name)
    if name in {"SliceEncoder", "SliceFeatures", "load_slice_encoder"}:
        from vlm_export.runtime import slice_features

        return getattr(slice_features, name)
    raise AttributeError(f"module 'vlm_export' has no attribute {name!r}")
