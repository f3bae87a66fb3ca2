"""Questions and images to the token ids of a prompt, with a placeholder for each feature of an image.

Sources: huggingface/nanoVLM, `generate.py` and `get_image_string` (data/processors.py) of v0.1 (6ba9082), v0.2
(731d8c6) and 4e0c096. Special tokens count wherever they stand, in a question too, as in the original.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm_export.errors import InputError, UsageError
from vlm_export.runtime.inputs.texts import Tokenizer, check_unicode
from vlm_export.runtime.inputs.tiles import Grid
from vlm_export.specs.tasks import ChatSpec

MAX_CHARACTERS = 100_000
"""Longest question that is tokenized."""


class PromptForm:
    """How prompts of one layout look; needs no tokenizer."""

    def __init__(self, settings: ChatSpec) -> None:
        self.settings = settings

    def text(self, question: str, grids: Sequence[Grid]) -> str:
        """The prompt as text; `grids` holds the rows and columns of tiles of each image, (1, 1) without tiles.

        Raises:
            UsageError: the layout takes another number of images.
            InputError: a tile has no marker.
        """
        settings, images = self.settings, self._image_text(grids)
        if settings.layout == "tiles":
            return f"{settings.prompt.before}{images}{question}{settings.prompt.after}"
        return f"{images}{settings.prompt.before}{question}{settings.prompt.after}"

    def tiles(self, grid: Grid) -> int:
        """How many tiles are looked at, the global one included."""
        count = grid[0] * grid[1]
        return count + (count > 1 and self.settings.global_image_token is not None)

    def prepended(self, grids: Sequence[Grid]) -> int:
        """How many features stand before the embeddings of the ids."""
        return self.settings.tokens_per_tile * len(grids) if self.settings.layout == "prepended" else 0

    def check(self, ids: Sequence[int], grids: Sequence[Grid], name: str) -> None:
        """That ids have a placeholder for each feature of their images, and fit into the context with them.

        Raises:
            InputError: they do not.
            UsageError: the layout takes another number of images.
        """
        self._check_images(len(grids))
        settings, wanted = self.settings, sum(map(self.tiles, grids)) * self.settings.tokens_per_tile
        places = sum(token == settings.image_token_id for token in ids)
        if settings.layout != "prepended" and places != wanted:
            raise InputError(
                "a prompt's placeholders do not match its images",
                where=name,
                expected=f"{wanted} times {settings.image_token}: {len(grids)} images with "
                f"{settings.tokens_per_tile} features for each of {sum(map(self.tiles, grids))} tiles",
                got=f"{places} times",
                fix=f"leave {settings.image_token} out of the question: it is written for you",
            )
        length = len(ids) + self.prepended(grids)
        if length > settings.context_length:
            raise InputError(
                "a prompt is longer than the model's context",
                where=name,
                expected=f"at most {settings.context_length} tokens",
                got=f"{length} tokens, {wanted} of them features of {len(grids)} images",
                fix="shorten the question, take fewer images, or allow truncation of the question",
            )

    def _check_images(self, count: int) -> None:
        if self.settings.layout == "prepended" and count != 1:
            raise UsageError(
                "this model answers about exactly one image",
                where="the layout 'prepended'",
                expected="1 image for each question",
                got=str(count),
                fix="ask about one image at a time",
            )

    def _image_text(self, grids: Sequence[Grid]) -> str:
        """What stands for the images: numbered where there are several tiled ones, as in the original."""
        self._check_images(len(grids))
        settings = self.settings
        features = (settings.image_token or "") * settings.tokens_per_tile
        if settings.layout != "tiles":
            return features * len(grids)
        numbers = (f"<image: {i}>" if len(grids) > 1 else "" for i in range(len(grids)))
        return "".join(number + self._tiles_text(grid, features) for number, grid in zip(numbers, grids, strict=True))

    def _tiles_text(self, grid: Grid, features: str) -> str:
        """What stands for one image; InputError when a tile has no marker.

        Rounding cuts a few sizes one row or column further than `max_side_pixels`: see `plan_tiles`.
        """
        settings = self.settings
        whole = "" if settings.global_image_token is None else settings.global_image_token + features
        if whole and grid == (1, 1):
            return whole
        names = (f"r{row}c{column}" for row in range(1, grid[0] + 1) for column in range(1, grid[1] + 1))
        try:
            return whole + "".join(settings.tile_tokens[name] + features for name in names)
        except KeyError as error:
            raise InputError(
                "an image is cut into more tiles than the model has markers for",
                where=f"an image of {grid[0]} x {grid[1]} tiles",
                expected="a marker for each row and column",
                got=f"none for {error.args[0]}",
                fix="resize the image by a pixel: its size is rounded up to one more row or column of tiles",
            ) from error


class PromptWriter(PromptForm):
    """Writes prompts as token ids.

    Raises:
        InputError: the tokenizer lacks a token that the settings name, or gives it another id.
    """

    def __init__(self, tokenizer: Tokenizer, settings: ChatSpec, where: str) -> None:
        super().__init__(settings)
        self.tokenizer = tokenizer
        marks = {settings.image_token, settings.global_image_token, *settings.tile_tokens.values()} - {None}
        lost = sorted(str(mark) for mark in marks if tokenizer.token_id(str(mark)) is None)
        if settings.image_token is not None and not lost:
            found = tokenizer.token_id(settings.image_token)
            lost = [] if found == settings.image_token_id else [f"{settings.image_token} is {found}"]
        if lost:
            raise InputError(
                "the tokenizer lacks tokens that stand for images",
                where=where,
                expected=f"{settings.image_token} = {settings.image_token_id}, and one token for each marker",
                got=f"not so: {', '.join(lost[:4])}" + ("…" if len(lost) > 4 else ""),
                fix="export the bundle again with the checkpoint's own tokenizer",
            )

    def ids(self, question: str, grids: Sequence[Grid], *, truncate: bool = False, name: str = "question") -> list[int]:
        """Token ids of a prompt, without the features that are prepended.

        Args:
            truncate: cut the question's end where the prompt is too long; what stands for images stays.
            name: what errors call the question.

        Raises:
            InputError: the prompt is longer than the context, a tile has no marker, or the question holds placeholders
                of its own, is no Unicode string or has too many characters.
            UsageError: the layout takes another number of images.
        """
        if not isinstance(question, str):
            raise InputError("a question is not a string", where=name, got=type(question).__name__)
        check_unicode(question, name)
        if len(question) > MAX_CHARACTERS and not truncate:
            raise InputError(
                "a question has too many characters to tokenize",
                where=name,
                expected=f"at most {MAX_CHARACTERS:,} characters",
                got=f"{len(question):,}",
                fix="shorten it, or allow truncation",
            )
        question = question[:MAX_CHARACTERS]
        ids = self._encoded(question, grids)
        room = self.settings.context_length - self.prepended(grids)
        if len(ids) > room and truncate:
            ids = self._cut(question, grids, room)
        self.check(ids, grids, name)
        return ids

    def _encoded(self, question: str, grids: Sequence[Grid]) -> list[int]:
        return self.tokenizer.prompt_ids(self.text(question, grids))

    def _cut(self, question: str, grids: Sequence[Grid], room: int) -> list[int]:
        """Ids of the prompt with the longest beginning of the question, in whole tokens, that fits into `room`."""
        ends = [0, *self.tokenizer.word_ends(question)]
        # What stands around the question may merge with its ends: rarely one token more or less than alone.
        keep = min(max(room - len(self._encoded("", grids)) + 2, 0), len(ends) - 1)
        ids = self._encoded(question[: ends[keep]], grids)
        while len(ids) > room and keep:
            keep -= 1
            ids = self._encoded(question[: ends[keep]], grids)
        return ids
