"""Which sizes of images a user may ask for."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from vlm_export.errors import UsageError
from vlm_export.family import BuildOptions
from vlm_export.models.layers.vit import VisionTransformer, VitForm
from vlm_export.models.reading.images import apply_image_size


@pytest.mark.parametrize("size", ["x", 0, -8, 8.0, True, 8_000_000, 10**60])
def test_a_size_that_no_model_takes_is_the_users_mistake(size: object) -> None:
    with pytest.raises(UsageError, match="--image-size is out of range") as caught:
        BuildOptions(image_size=cast(int, size))
    assert caught.value.expected == "an integer from 1 to 8192"
    assert caught.value.got == repr(size)[:80]


def test_a_size_is_a_multiple_of_the_patch_size() -> None:
    with torch.device("meta"):
        vision = VisionTransformer(VitForm(width=8, layers=1, heads=1, hidden=8, patch_size=8, grid=2))
    with pytest.raises(UsageError, match="multiple of the patch size") as caught:
        apply_image_size(vision, 16, BuildOptions(image_size=12))
    assert caught.value.got == "12"
