"""Where the values of the preparation of inputs come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlm_export.specs.codec import Spec


@dataclass(frozen=True)
class Origins(Spec):
    """Where the values of the preparation of inputs come from, for people and for the manifest.

    Attributes:
        values: field of a spec ("image.mean", "text.pad_token_id") → what states it: a file and the field in it
            ("processor_config.json: image_processor.image_mean"), or whose default it is ("default of
            CLIPImageProcessor").
        ignored_files: name of a file that was found → why nothing was read from it.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    ignored_files: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Origins) -> Origins:
        """The origins of both; what `other` says counts where both say something."""
        return Origins({**self.values, **other.values}, {**self.ignored_files, **other.ignored_files})
