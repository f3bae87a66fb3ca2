"""What captions and answers share: a decoder's state from what it attends to, and the bounds of a generation."""

from __future__ import annotations

from vlm_export.errors import UsageError
from vlm_export.runtime.decoder import CrossAttentionState
from vlm_export.runtime.engine import Array
from vlm_export.runtime.generation_options import GenerationOptions, IdArray
from vlm_export.runtime.multimodal import Multimodal

DECODER, CROSS_KEYS_VALUES = "text_decoder", "cross_key_values"


class Decoding(Multimodal):
    """A bundle with a decoder."""

    def _decoder_state(self, states: Array, mask: IdArray) -> CrossAttentionState:
        """A fresh decoder of B rows that attend to states (B, S, width) where mask (B, S) is 1."""
        keys_values = self._run(CROSS_KEYS_VALUES, {"encoder_hidden_states": states})
        return CrossAttentionState(self.engine(DECODER), keys_values, mask)

    def _checked(self, options: GenerationOptions) -> GenerationOptions:
        """The options, when the decoder has a position for every token; UsageError otherwise."""
        positions = self.manifest.part(DECODER).signature.axis("total_sequence").maximum
        if positions is not None and options.max_length is not None and options.max_length > positions:
            raise UsageError(
                "max_length is above what the decoder has positions for",
                where=self.manifest.name,
                expected=f"at most {positions}",
                got=str(options.max_length),
            )
        return options


def given_or(value: int | None, default: int) -> int:
    """What the caller gave, or the manifest's default."""
    return default if value is None else value


def shortest_length(min_length: int | None, default: int, max_length: int) -> int:
    """What the caller gave, or the manifest's default, which yields to a smaller `max_length`."""
    return min(default, max_length) if min_length is None else min_length
