"""What a manifest says about talking to a decoder-only model: prompt, placeholders and defaults, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, TypeAlias, cast, get_args

from vlm_export.bundle.strict_json import Fields
from vlm_export.errors import InputError
from vlm_export.tile_spec import TileSpec, tile_spec_from_json

Layout: TypeAlias = Literal["prepended", "placeholders", "tiles"]
CHAT, TILES = "chat", "tiles"
"""The manifest's facts that hold ChatSettings and a TileSpec."""

_MAX_TOKENS = 1 << 20
_FIELDS = (
    "layout",
    "tokens_per_tile",
    "image_token",
    "image_token_id",
    "global_image_token",
    "tile_tokens",
    "prompt",
    "context_length",
    "max_prompt_tokens",
    "eos_token_ids",
    "pad_token_id",
    "max_new_tokens",
    "sampling",
)


@dataclass(frozen=True)
class SamplingDefaults:
    """The distribution that the original draws from; None keeps all tokens."""

    top_k: int | None
    top_p: float | None
    temperature: float


@dataclass(frozen=True)
class ChatSettings:
    """How a prompt is written and answered.

    Attributes:
        layout: where a picture's features go. "prepended": before the embeddings of the text, one picture.
            "placeholders": in the places of `image_token`, before the text. "tiles": the same for each tile, between
            markers, inside the user's turn.
        tokens_per_tile: features of one tile, or of one picture without tiles.
        image_token, image_token_id: the placeholder of one feature; None when "prepended".
        global_image_token: stands before the features of the whole picture; None where the checkpoint has none.
        tile_tokens: "r1c1" → what stands before the features of the tile in the first row and column, and so on.
        before, after: around the question ("tiles": around the pictures and the question).
        context_length: positions of the decoder, features included.
        max_prompt_tokens: what the checkpoint was trained with; the original does not enforce it, nor does the runtime.
        eos_token_ids: end an answer.
        pad_token_id: fills the left of shorter rows.
        max_new_tokens: of an answer, in the original's script.
        sampling: what the original's script draws from.
        tiles: how pictures are cut, for the layout "tiles" alone.
    """

    layout: Layout
    tokens_per_tile: int
    image_token: str | None
    image_token_id: int | None
    global_image_token: str | None
    tile_tokens: Mapping[str, str]
    before: str
    after: str
    context_length: int
    max_prompt_tokens: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    max_new_tokens: int
    sampling: SamplingDefaults
    tiles: TileSpec | None


def chat_settings_from_facts(facts: Mapping[str, Any], vocab_size: int, where: str) -> ChatSettings:
    """The settings in a manifest's facts; other facts are left aside.

    Args:
        vocab_size: token ids are below it.
        where: what errors call the manifest.

    Raises:
        InputError: a field is missing, unknown, of another type or out of its range, or contradicts the layout.
    """
    top = Fields({CHAT: None, **facts}, f"{where}: facts")
    fields = top.fields(CHAT).only(_FIELDS)
    prompt = fields.fields("prompt").only(("before", "after"))
    context = fields.integer("context_length", 2, _MAX_TOKENS)
    settings = ChatSettings(
        layout=cast(Layout, fields.choice("layout", get_args(Layout))),
        tokens_per_tile=fields.integer("tokens_per_tile", 1, context),
        image_token=fields.text_or_none("image_token"),
        image_token_id=_token_or_none(fields, "image_token_id", vocab_size),
        global_image_token=fields.text_or_none("global_image_token"),
        tile_tokens=_texts_by_name(fields.fields("tile_tokens")),
        before=prompt.text("before"),
        after=prompt.text("after"),
        context_length=context,
        max_prompt_tokens=fields.integer_or_none("max_prompt_tokens", 1),
        eos_token_ids=_tokens(fields, "eos_token_ids", vocab_size),
        pad_token_id=fields.integer("pad_token_id", maximum=vocab_size - 1),
        max_new_tokens=fields.integer("max_new_tokens", 1, _MAX_TOKENS),
        sampling=_sampling(fields.fields("sampling")),
        tiles=tile_spec_from_json(top.mapping(TILES)) if TILES in facts else None,
    )
    _check_layout(settings, fields)
    return settings


def _check_layout(settings: ChatSettings, fields: Fields) -> None:
    """Placeholders where the layout has them and nowhere else, and tiles with a name for each place."""
    has_token = bool(settings.image_token) and settings.image_token_id is not None
    if has_token == (settings.layout == "prepended"):
        raise fields.fail("image_token", f"a token and its id in the layout {settings.layout!r}, unless 'prepended'")
    cut = settings.layout == "tiles"
    if cut != (settings.tiles is not None):
        raise InputError("tiles and the layout contradict each other", where=fields.where, got=settings.layout)
    if settings.tiles is None:
        if settings.tile_tokens or settings.global_image_token is not None:
            raise fields.fail("tile_tokens", f"no markers of tiles in the layout {settings.layout!r}")
        return
    side = settings.tiles.max_side_pixels // settings.tiles.tile_size_pixels
    names = (f"r{row}c{column}" for row in range(1, side + 1) for column in range(1, side + 1))
    missing = [name for name in names if name not in settings.tile_tokens]
    if missing:
        raise InputError(
            "a tile has no token that says where it is",
            where=f"{fields.where}.tile_tokens",
            expected=f"names up to r{side}c{side}",
            got=f"no {', '.join(missing[:4])}",
            fix="export the checkpoint again; its max_img_size may ask for more tiles than it has tokens for",
        )


def _sampling(fields: Fields) -> SamplingDefaults:
    fields.only(("top_k", "top_p", "temperature"))
    top_p = None if fields.data["top_p"] is None else _positive(fields, "top_p")
    if top_p is not None and top_p > 1:
        raise fields.fail("top_p", "at most 1")
    return SamplingDefaults(fields.integer_or_none("top_k", 1), top_p, _positive(fields, "temperature"))


def _positive(fields: Fields, key: str) -> float:
    value = fields.data[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value <= 0:
        raise fields.fail(key, "a finite number above 0")
    return float(value)


def _token_or_none(fields: Fields, key: str, vocab_size: int) -> int | None:
    return None if fields.data[key] is None else fields.integer(key, maximum=vocab_size - 1)


def _tokens(fields: Fields, key: str, vocab_size: int) -> tuple[int, ...]:
    values = fields.sequence(key)
    if not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size for value in values):
        raise fields.fail(key, f"a list of integers from 0 to {vocab_size - 1}")
    return tuple(values)


def _texts_by_name(fields: Fields) -> dict[str, str]:
    return {name: fields.text(name) for name in fields.data}
