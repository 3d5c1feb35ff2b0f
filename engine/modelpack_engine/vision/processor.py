"""PictureProcessor: from decoded pictures to the tokens that stand for them, and encoder inputs.

Sounds in the same prompt have a `SoundProcessor`, and videos a `VideoProcessor`.

mlx-vlm's processors expand the placeholders of a text and tokenise it with transformers. Here the
text is tokenised already, so the placeholder tokens are replaced by those of each picture. Image
processors are those of transformers, by the model's preprocessor_config.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpack_engine.errors import RETRY_AFTER, ModelLoadError, QueueFullError, RequestError
from modelpack_engine.patches.mlx_vlm_imports import prepare
from modelpack_engine.request import Media, MediaSource
from modelpack_engine.vision.layouts import (
    LAYOUTS,
    MAX_LEAST_PATCHES,
    MAX_SIDE,
    MAX_TILES,
    PROCESSORS,
    SETTINGS,
    ImageProcessor,
)
from modelpack_engine.vision.models import (
    CLASSES,
    GEMMA3_TOKENS,
    Encode,
    VisionClass,
    sees_ahead_in_windows,
)
from modelpack_engine.vision.processor_cache import FileKey, Place, PlacedFile, ProcessorCache
from modelpack_engine.vision.sounds import Sound, SoundProcessor
from modelpack_engine.vision.videos import Video, VideoProcessor

#: Bytes of the encoder's inputs that all unfinished requests of a model hold together.
MAX_INPUT_BYTES = 2 * 1024 * 1024 * 1024
_SIZES = ("size", "max_image_size", "crop_size", "pad_size", "tile_size", "scale_resolution")
#: The inputs that mlx-vlm's models take, among those that image processors return.
_INPUTS = (
    "pixel_values", "pixel_attention_mask", "image_grid_thw", "image_grid_hws", "image_sizes",
    "image_position_ids", "images_spatial_crop", "spatial_shapes", "tgt_sizes",
    "aspect_ratio_ids", "aspect_ratio_mask", "image_input_idx", "image_masks",
)  # fmt: skip
#: What image processors raise for pictures that they cannot process.
_FAILURES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
#: Fields of an image processor with a number of tiles of a picture.
_TILES = ("max_patches", "max_tiles", "max_image_tiles", "max_slice_nums")
#: Fields of config.json with the id of the token of pictures.
_TOKEN_IDS = ("image_token_id", "image_token_index", "media_placeholder_token_id")

#: Tokens of a text around pictures that steps have room for, if all attend to each other.
MAX_PREFIX = 512
#: Kinds without M-RoPE whose image processors limit the number of pixels.
_IN_PIXELS = ("dots_ocr", "mage_vl")
#: Kinds whose image processors take the number of pictures.
_COUNTED = ("deepseek_vl_v2",)
#: Kinds whose image processors take a list of the pictures of each prompt.
_NESTED = ("idefics2", "idefics3", "mllama", "smolvlm")


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A decoded picture: RGB, uint8 [height, width, 3]. `param` names it in error messages."""

    pixels: NDArray[np.uint8]
    param: str = "messages"

    def digest(self) -> bytes:
        """Return the SHA-256 of the shape and the pixels."""
        found = hashlib.sha256(repr(self.pixels.shape).encode())
        found.update(np.ascontiguousarray(self.pixels).data)
        return found.digest()


@dataclass(frozen=True, slots=True, eq=False)
class MediaFile:
    """A file of a request that `decode` reads, unless what its prompt needs is in the cache.

    `kind` is what `decode` returns, `key` says whose file it is and what is in it.
    """

    kind: type[Picture | Sound | Video]
    key: FileKey
    param: str
    decode: Callable[[], Picture | Sound | Video]


class InputMemory:
    """Counts the bytes of encoder inputs from their creation to their end. Thread-safe."""

    def __init__(self, max_bytes: int = MAX_INPUT_BYTES) -> None:
        self.max_bytes = max_bytes
        #: The bytes of all inputs that exist.
        self.nbytes = 0
        self._lock = threading.RLock()  # a garbage collection may free inputs while it is held

    def __reduce__(self) -> tuple[type[InputMemory], tuple[int]]:
        """Pickle the limit: inputs are counted in the process that makes them."""
        return InputMemory, (self.max_bytes,)

    def add(self, media: Media, before: int) -> None:
        """Count a picture of a request that has `before` bytes of inputs already.

        Raises `RequestError` if one request has too many bytes, and `QueueFullError` if all have.
        """
        if before + media.nbytes > self.max_bytes:
            raise RequestError(
                f"{media.param}: the files of the request take more than {self.max_bytes} bytes",
                param=media.param,
                hint="send fewer or smaller files",
            )
        with self._lock:
            if self.nbytes + media.nbytes > self.max_bytes:
                raise QueueFullError(
                    f"the files of all requests have more than {self.max_bytes} bytes",
                    retry_after=RETRY_AFTER,
                )
            self.nbytes += media.nbytes
        weakref.finalize(media, self._free, media.nbytes).atexit = False

    def _free(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes -= nbytes


class MediaProcessor(ABC):
    """Places pictures, and what else a model reads, in its prompts. Any thread may use it.

    `image_token` is the text of the placeholder in prompts, and `image_token_id` its id there; ""
    for models that read no pictures. If it `is_marker`, no chat template knows it, and it takes the
    place of pictures before. If the processor `encodes`, placing a picture takes long.
    """

    image_token: str
    image_token_id: int
    is_marker = encodes = False

    def __init__(self) -> None:
        self.memory, self.cache = InputMemory(), ProcessorCache()
        #: The most pictures of a prompt, 0 for any number.
        self.max_pictures = 0
        #: What reads sounds, if the model does; `no_sounds` says why not, if its files should.
        self.sounds: SoundProcessor | None = None
        self.no_sounds = ""
        #: The same of videos.
        self.videos: VideoProcessor | None = None
        self.no_videos = ""

    def close(self) -> None:  # noqa: B027 - most processors hold nothing
        """End what the processor has started; the engine has ended."""

    @abstractmethod
    def token_ids(self, text: str, encode: Encode) -> list[int]:
        """Return the tokens of a prompt with placeholders; `encode` is the model's tokenizer."""

    @abstractmethod
    def _picture(self, picture: Picture, place: Place) -> tuple[list[int], list[Media]]:
        """Return the tokens of a picture, and the parts of them that embeddings replace.

        Their positions count from the picture's first token.
        """

    def _known(self, place: Place) -> Place:
        """Return a place with the fields that `_picture` reads, and defaults for others."""
        return Place(owner=place.owner)

    @property
    def cross(self) -> bool:
        """Whether layers attend to pictures outside of the KV cache."""
        return False

    def _joined(self, placed: list[int], media: list[Media]) -> list[Media]:
        """Return the media of a whole prompt."""
        return media

    @property
    def why_no_pictures(self) -> str:
        """Why the model reads no pictures; empty if it does."""
        return "" if self.image_token else "only its sounds are read"

    @property
    def why_no_sounds(self) -> str:
        """Why the model reads no sounds; empty if it does."""
        return "" if self.sounds is not None else self.no_sounds or "it has no audio tower"

    @property
    def why_no_videos(self) -> str:
        """Why the model reads no videos; empty if it does."""
        return "" if self.videos is not None else self.no_videos or "its processor takes none"

    def place(
        self,
        token_ids: Sequence[int],
        files: Collection[Picture | Sound | Video | MediaFile],
        check_room: Callable[[int], None] = lambda _: None,
        owner: bytes = b"",
    ) -> tuple[list[int], tuple[Media, ...]]:
        """Return a prompt of `owner` with the tokens of each file in place of its placeholder.

        A `MediaFile` is decoded and processed unless the cache has what the prompt needs.
        Before each file, `check_room` is called with the tokens that the prompt has at least.
        Raises `RequestError` unless the prompt has one placeholder for each file, and if a file
        cannot be processed; `QueueFullError` if those of all requests are too large.
        """
        kinds: dict[int, type] = {}
        named, what = [], "pictures"
        if self.image_token:
            kinds[self.image_token_id] = Picture
            named.append(self.image_token)
        if self.sounds is not None:
            kinds[self.sounds.token_id], what = Sound, "files" if named else "sounds"
            named.append(self.sounds.token)
        if self.videos is not None:
            kinds[self.videos.token_id], what = Video, "files"
            named.append(self.videos.placeholder)
        count = sum(token_id in kinds for token_id in token_ids)
        if count != len(files):
            tokens = " and ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)
            hint = f"leave {tokens} out of the text"
            if count < len(files):
                hint = f"use a chat template that shows {what}"
            raise RequestError(
                f"the prompt has {count} placeholders {tokens} for {len(files)}"
                f" {what[:-1] if len(files) == 1 else what}",
                param="messages",
                hint=hint,
            )
        if self.max_pictures and count > self.max_pictures:
            raise RequestError(
                f"the prompt has {count} pictures, the limit is {self.max_pictures}",
                param="messages",
                hint="send fewer pictures",
            )
        placed: list[int] = []
        media: list[Media] = []
        nbytes, position = 0, 0
        left = iter(files)
        while position < len(token_ids):
            kind = kinds.get(token_ids[position])
            if kind is None:
                placed.append(token_ids[position])
                position += 1
                continue
            check_room(len(placed) + len(token_ids) - position)
            file = next(left)
            if (file.kind if isinstance(file, MediaFile) else type(file)) is not kind:
                raise RequestError(
                    f"{file.param}: the prompt has the placeholder of another kind of file here",
                    param=file.param,
                )
            place, until = Place(), 0
            if kind is Video:
                assert self.videos is not None
                position += self.videos.unwrapped(placed, token_ids[position + 1 :])
            elif kind is Picture:
                shared = placed[-1] if media and media[-1].stop == len(placed) else None
                place = self._known(Place(len(media), len(files), shared, owner))
                until = _end(token_ids, position) if self.cross else 0
            others = len(placed) + len(token_ids) - position - 1
            made = self._placed_file(file, place, others, check_room)
            for each in made.media:
                part = replace(
                    each, start=len(placed) + each.start, param=file.param, until=until,
                    source=each.source if each.lacks_inputs else None,
                )  # fmt: skip
                self.memory.add(part, nbytes)
                nbytes += part.nbytes
                media.append(part)
            placed += made.token_ids
            position += 1
        return placed, tuple(self._joined(placed, media))

    def _placed_file(
        self,
        file: Picture | Sound | Video | MediaFile,
        place: Place,
        others: int,
        check_room: Callable[[int], None],
    ) -> PlacedFile:
        """Return the tokens of a file beside so many `others`, from the cache or by a processor."""
        if isinstance(file, MediaFile):
            found = self.cache.find(file.key, place)
            if found is None:
                found = self._placed_file(file.decode(), place, others, check_room)
                self.cache.keep(file.key, found)
            return found
        if isinstance(file, Video):
            assert self.videos is not None
            check_room(others + self.videos.num_tokens(file))
            tokens, media = self.videos.place(file)
        elif isinstance(file, Sound):
            assert self.sounds is not None
            media = [self.sounds.media(file)]
            tokens = list(media[0].token_ids)
        else:
            tokens, media = self._picture(file, place)
        return PlacedFile(tuple(tokens), tuple(media), place)

    def inputs(self, media: Media) -> Mapping[str, NDArray[Any]]:
        """Return the encoder's inputs of media, made from its source if it lacks them.

        Raises `RequestError` if they cannot be made.
        """
        source = media.source
        if source is None or media.inputs:
            return media.inputs
        try:
            if source.kind == "picture":
                return self._inputs(source)
            if source.kind == "sound":
                assert self.sounds is not None
                return self.sounds.inputs(source.content)
            assert self.videos is not None
            return self.videos.inputs(source)
        except (*_FAILURES, MemoryError) as error:
            raise RequestError(
                f"{media.param}: the {source.kind} cannot be processed: {error}", param=media.param
            ) from error

    def _inputs(self, source: MediaSource) -> Mapping[str, NDArray[Any]]:
        """Return the encoder's inputs of a picture whose media has a source."""
        raise NotImplementedError


class TowerProcessor(MediaProcessor):
    """Places files in prompts for the towers of a model of mlx-vlm."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._kind = str(config["model_type"])

    def token_ids(self, text: str, encode: Encode) -> list[int]:
        return encode(self.with_spaces(text))

    def with_spaces(self, text: str) -> str:
        """Return the text of a prompt with what the model has around pictures and sounds."""
        return text if self.sounds is None else self.sounds.with_spaces(text)

    @property
    def mrope(self) -> bool:
        """Whether tokens have three positions each, so that `Media.grid` is set."""
        return False

    @property
    def largest_span(self) -> int:
        """The most tokens of a picture that attend to each other in both directions, or 0."""
        return 0

    @property
    def hidden(self) -> tuple[tuple[int, ...], int] | None:
        """The tokens that the language model must not see, and the one that it sees instead."""
        return None


class HearingProcessor(TowerProcessor):
    """Places sounds in prompts of a model that reads no pictures."""

    image_token, image_token_id = "", -1

    def _picture(self, picture: Picture, place: Place) -> tuple[list[int], list[Media]]:
        raise NotImplementedError("no placeholder stands for a picture")


class PictureProcessor(TowerProcessor):
    """Places pictures in prompts for the vision tower of a model of mlx-vlm."""

    def __init__(
        self, config: Mapping[str, Any], settings: Mapping[str, Any], encode: Encode
    ) -> None:
        """Read config.json and preprocessor_config.json (`settings`).

        Raises `ModelLoadError` if the tokenizer has no placeholder, or the settings are wrong.
        """
        super().__init__(config)
        self.image_token = CLASSES[self._kind].placeholder
        config = with_image_token(config, encode)
        self._config, self._encode = config, encode
        ids = encode(self.image_token)
        soft = self._needs.soft or self._needs.part or self.image_token
        soft_id: Any = config.get("image_token_id", config.get("image_token_index"))
        if len(ids) != 1 or encode(soft) != [soft_id]:
            raise ModelLoadError(f"{soft!r} is not the token {soft_id} of config.json")
        self.image_token_id, self._soft_id = ids[0], soft_id
        self._image_processor = _image_processor(config, settings)
        made = self._image_processor.to_dict()
        if made.get("do_pan_and_scan"):
            raise ModelLoadError("preprocessor_config.json: do_pan_and_scan is not supported")
        if self._kind.startswith("gemma4"):
            _check_patches(made, config["vision_config"])

    def with_spaces(self, text: str) -> str:
        text = super().with_spaces(text)
        needs, token = self._needs, self.image_token
        if needs.joins:
            return re.sub(rf"{re.escape(token)}(?=[^\s<])", f"{token} ", text)
        if needs.first and token in text:
            rest = text.replace(token, "").removeprefix(needs.first).lstrip()
            return f"{needs.first}{token * text.count(token)} {rest}"
        if needs.prefix and token in text:
            before, _, after = text.rpartition(token)
            ends = "" if after.startswith(needs.ends) else needs.ends
            return f"{before}{token}{ends}{after}" + ("" if after.endswith("\n") else "\n")
        return text.replace(token, f"{needs.around}{token}{needs.around}")

    def _joined(self, placed: list[int], media: list[Media]) -> list[Media]:
        return [self._prompt(placed, media)] if self._needs.prefix and media else media

    def _prompt(self, placed: list[int], media: list[Media]) -> Media:
        """Return a whole prompt as one picture, as all its tokens attend to each other."""
        found = [self.inputs(each) for each in media]
        inputs = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
        digest = hashlib.sha256(b"".join(each.digest for each in media))
        digest.update(np.array(placed, np.int32).tobytes())
        param, spans = media[0].param, ((0, len(placed)),) if self.largest_span else ()
        media.clear()  # frees their share of the memory
        made = Media(0, tuple(placed), digest.digest(), inputs, param, bidirectional=spans)
        self.memory.add(made, 0)
        return made

    def _picture(self, picture: Picture, place: Place) -> tuple[list[int], list[Media]]:
        made = self._media(picture, place)
        return list(made.token_ids), [made]

    def _known(self, place: Place) -> Place:
        return Place(
            place.index if self._kind in LAYOUTS else 0,
            place.count if self._kind in _COUNTED else 1,
            place.before if self._needs.joins else None,
        )

    def _media(self, picture: Picture, place: Place) -> Media:
        """Return the tokens and inputs of a picture at position 0."""
        source = MediaSource("picture", picture.pixels, (place.index, place.count))
        try:
            made = self._processed(source)
            inputs = _encoder_inputs(made)
            tokens = self._encode(self._text(made, inputs["pixel_values"]))
            if self._needs.joins and tokens[:1] == [place.before]:
                tokens = tokens[1:]
        except _FAILURES as error:
            height, width = picture.pixels.shape[:2]
            raise RequestError(
                f"{picture.param}: the picture of {width} x {height} pixels cannot be processed:"
                f" {error}",
                param=picture.param,
            ) from error
        grid = None
        if self.mrope:
            frames, height, width = inputs["image_grid_thw"][0].tolist()
            merge = self._merge
            grid = frames, height // merge, width // merge
        known = np.array(tokens, np.int32).tobytes()  # may depend on the other pictures
        digest = hashlib.sha256(self._settings_digest + known + picture.digest()).digest()
        spans = ((1, len(tokens) - 1),) if self.largest_span else ()  # `_prompt` has its own
        return Media(
            0,
            tuple(tokens),
            digest,
            inputs,
            picture.param,
            grid,
            spans,
            in_windows=self._kind.startswith("gemma4"),
            source=source,
        )

    def _inputs(self, source: MediaSource) -> Mapping[str, NDArray[Any]]:
        return _encoder_inputs(self._processed(source))

    def _processed(self, source: MediaSource) -> dict[str, Any]:
        """Return what the image processor makes of a picture, and its index in the prompt."""
        from PIL import Image

        index, count = source.numbers
        images: list[Any] = [Image.fromarray(source.content)]
        options: dict[str, Any] = {}
        if self._kind in _NESTED:
            images = [images]
        if self._is_tiled:
            options["return_row_col_info"] = True
        elif self._needs.in_rows:
            options["patch_size"] = {"height": self._token_side, "width": self._token_side}
        if self._kind in _COUNTED:
            options["count"] = count
        made = self._image_processor(images, return_tensors="np", **options)
        return {**made, "index": index}

    @property
    def mrope(self) -> bool:
        """Whether tokens have three positions each, so that `Media.grid` is set."""
        return self._needs.mrope

    @property
    def cross(self) -> bool:
        """Whether layers attend to pictures outside of the KV cache."""
        return self._needs.cross

    @property
    def largest_span(self) -> int:
        """The most tokens of a picture that attend to each other in both directions, or 0."""
        if self._needs.bidirectional:
            return int(self._config.get("mm_tokens_per_image", GEMMA3_TOKENS))
        text = self._config.get("text_config") or {}
        if sees_ahead_in_windows(self._config):
            of_frames = 0 if self.videos is None else self.videos.largest_group
            return max(int(self._image_processor.to_dict()["max_soft_tokens"]), of_frames)
        if self._needs.prefix and text.get("use_bidirectional_attention") is not False:
            vision = self._config["vision_config"]
            return (int(vision["image_size"]) // int(vision["patch_size"])) ** 2 + MAX_PREFIX
        return 0

    @property
    def hidden(self) -> tuple[tuple[int, ...], int] | None:
        """The tokens that the language model must not see, and the one that it sees instead."""
        shown = self._needs.hidden_id
        sounds = () if self.sounds is None else (self.sounds.soft_id,)
        videos = () if self.videos is None else (self.videos.token_id,)
        return None if shown is None else ((self._soft_id, *sounds, *videos), shown)

    @property
    def _needs(self) -> VisionClass:
        return CLASSES[self._kind]

    @property
    def _merge(self) -> int:
        """The rows and columns of patches that become one token."""
        return self._needs.merged(self._config)

    @property
    def _token_side(self) -> int:
        """The pixels on each side of a token whose picture is in rows."""
        return int(self._config["vision_config"]["patch_size"]) * self._merge

    @property
    def _is_tiled(self) -> bool:
        return self._kind in ("idefics3", "smolvlm")

    def _text(self, made: Mapping[str, Any], pixels: NDArray[Any]) -> str:
        """Return the text that stands for a picture."""
        needs = self._needs
        if (layout := LAYOUTS.get(self._kind)) is not None:
            return layout(self._config, made)
        if needs.soft:
            counts = made.get("num_soft_tokens_per_image")
            count = self.largest_span if counts is None else int(counts[0])
            return f"{needs.begins}{needs.soft * count}{needs.ends}"
        if self.mrope:
            patches = int(np.prod(made["image_grid_thw"][0]))
            return self.image_token * (patches // self._merge**2)
        if self._needs.in_rows:
            rows, columns = (int(size) // self._token_side for size in made["image_sizes"][0])
            return "[IMG_BREAK]".join([self.image_token * columns] * rows) + "[IMG_END]"
        height, width = map(int, pixels.shape[-2:])
        vision = self._config["vision_config"]
        patch = int(vision["patch_size"])
        patches = (height // patch) * (width // patch)
        if not self._is_tiled:
            with_class = self._config.get("vision_feature_select_strategy", "default") == "full"
            has_class = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
            return self.image_token * (patches + int(with_class and has_class))
        count = patches // int(self._config.get("scale_factor", 2)) ** 2
        tile = self.image_token * count
        edge = "<fake_token_around_image>"
        rows, columns = int(made["rows"][0][0]), int(made["cols"][0][0])
        tiles = "".join(
            "".join(f"{edge}<row_{y + 1}_col_{x + 1}>{tile}" for x in range(columns)) + "\n"
            for y in range(rows)
        )
        whole = f"{edge}<global-img>{tile}{edge}"
        return f"{tiles}\n{whole}" if rows else whole

    @cached_property
    def _settings_digest(self) -> bytes:
        """The SHA-256 of everything but the picture on which the encoder's inputs depend."""
        settings = self._image_processor.to_dict()
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).digest()


def _encoder_inputs(made: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return the encoder's inputs among what an image processor made."""
    inputs = {name: np.asarray(made[name]) for name in _INPUTS if name in made}
    if (places := inputs.get("image_position_ids")) is not None:  # without padding
        kept = int((places[0, :, 0] >= 0).sum())
        inputs = {name: array[:, :kept].copy() for name, array in inputs.items()}
    return inputs


def _end(token_ids: Sequence[int], position: int) -> int:
    """Return up to which position tokens see the picture at `position`: to the next one.

    Pictures that follow each other are seen together. Nothing ends the last one.
    """
    later = (at for at in range(position, len(token_ids)) if token_ids[at] == token_ids[position])
    for at in later:
        if at > position + 1:
            return at
        position = at
    return sys.maxsize


def with_image_token(config: Mapping[str, Any], encode: Encode) -> dict[str, Any]:
    """Return config.json with the id of the token of pictures under both usual names.

    Raises `ModelLoadError` if it is another one than that of the tokenizer.
    """
    needs = CLASSES[config["model_type"]]
    token = needs.soft or needs.part or needs.placeholder
    ids = encode(token)
    named = next((config[name] for name in _TOKEN_IDS if config.get(name) is not None), None)
    if len(ids) != 1 or named not in (None, ids[0]):
        raise ModelLoadError(f"{token!r} is not the token {named} of config.json")
    # Published files of Molmo have none: all models have the same tower.
    vision = config.get(needs.vision_part, {} if needs.first else None)
    return {
        **config, "image_token_id": ids[0], "image_token_index": ids[0], "vision_config": vision
    }  # fmt: skip


def _check_patches(settings: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """Raise `ModelLoadError` unless the settings are for the vision tower, and not too large."""
    for name, default in (("patch_size", 16), ("pooling_kernel_size", 3)):
        if settings[name] != vision.get(name, default):
            raise ModelLoadError(
                f"preprocessor_config.json: {name} {settings[name]} is not that of config.json"
            )
    side = settings["patch_size"] * settings["pooling_kernel_size"]
    if settings["max_soft_tokens"] * side**2 > MAX_SIDE**2:
        raise ModelLoadError(
            f"preprocessor_config.json: pictures have more than {MAX_SIDE**2} pixels"
        )


def _image_processor(config: Mapping[str, Any], settings: Mapping[str, Any]) -> ImageProcessor:
    """Return the image processor of transformers for these settings; it runs no code of models."""
    inner = settings.get("image_processor")  # transformers 5 writes it in processor_config.json
    settings = dict(inner if isinstance(inner, Mapping) else settings)
    settings.pop("auto_map", None)
    if (change := SETTINGS.get(config["model_type"])) is not None:
        settings = change(config, settings)
    # Sizes are numbers of pixels, not sides.
    in_pixels = CLASSES[config["model_type"]].mrope or config["model_type"] in _IN_PIXELS
    limit = MAX_SIDE**2 if in_pixels else MAX_SIDE
    for name in (*_SIZES, "min_pixels", "max_pixels"):
        sizes = settings.get(name)
        for value in sizes.values() if isinstance(sizes, Mapping) else [sizes]:
            if isinstance(value, int | float) and not 0 < value <= limit:
                raise ModelLoadError(
                    f"preprocessor_config.json: {name} is {value}, the limit is {limit}"
                )
    if in_pixels:
        _check_pixels(settings)
    _check_tiles(settings)
    prepare()
    if (own := PROCESSORS.get(config["model_type"])) is not None:
        try:
            return own(config, settings)
        except (AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
            raise ModelLoadError(f"preprocessor_config.json: {error}") from error
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory(prefix="modelpack-") as directory:
        path = Path(directory)
        (path / "preprocessor_config.json").write_text(json.dumps(settings))
        (path / "config.json").write_text(json.dumps({"model_type": config["model_type"]}))
        try:
            made: ImageProcessor = AutoImageProcessor.from_pretrained(
                directory, backend="pil", trust_remote_code=False, local_files_only=True
            )
        except (AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
            raise ModelLoadError(f"preprocessor_config.json: {error}") from error
    complete = made.to_dict()  # with the defaults of what the file leaves out
    if in_pixels:
        _check_pixels(complete)
    _check_tiles(complete)
    return made


def _check_pixels(settings: Mapping[str, Any]) -> None:
    """Raise `ModelLoadError` if the fewest pixels are above the most, or would take very long.

    Smaller pictures are enlarged to the fewest pixels, those of the test at load too.
    """
    given = settings.get("size")
    size = given if isinstance(given, Mapping) else {}
    least = settings.get("min_pixels") or size.get("shortest_edge")
    most = settings.get("max_pixels") or size.get("longest_edge")
    if isinstance(least, int | float) and isinstance(most, int | float) and least > most:
        raise ModelLoadError(
            f"preprocessor_config.json: min_pixels is {least}, expected at most {most}"
        )
    edge = settings.get("patch_size")
    limit = MAX_LEAST_PATCHES * edge**2 if isinstance(edge, int | float) else math.inf
    if isinstance(least, int | float) and least > limit:
        raise ModelLoadError(
            f"preprocessor_config.json: min_pixels is {least}, the limit is {limit}, which is"
            f" {MAX_LEAST_PATCHES} patches"
        )


def _check_tiles(settings: Mapping[str, Any]) -> None:
    """Raise `ModelLoadError` for too many tiles, or more pixels than a picture may have."""
    size = settings.get("size")
    sides = list(size.values()) if isinstance(size, Mapping) else [size]
    sides += [settings.get("tile_size"), settings.get("scale_resolution")]
    tile = settings.get("max_image_size")  # Idefics 3 enlarges a picture and cuts it into tiles
    if isinstance(tile, Mapping) and isinstance(size, Mapping):
        longest, edge = size.get("longest_edge"), tile.get("longest_edge")
        if isinstance(longest, int | float) and isinstance(edge, int | float) and edge > 0:
            tiles = math.ceil(longest / edge) ** 2
            if tiles > MAX_TILES:
                raise ModelLoadError(
                    f"preprocessor_config.json: pictures of {longest} pixels a side have {tiles} "
                    f"tiles of {edge}, the limit is {MAX_TILES}"
                )
    side = max((value for value in sides if isinstance(value, int | float)), default=1)
    for name in _TILES:
        count = settings.get(name)
        if count is None:
            continue
        if not isinstance(count, int) or not 0 < count <= MAX_TILES:
            raise ModelLoadError(
                f"preprocessor_config.json: {name} is {str(count)[:50]}, expected 1 to {MAX_TILES}"
            )
        if count * side**2 > MAX_SIDE**2:
            raise ModelLoadError(
                f"preprocessor_config.json: {name} is {count}, for tiles of {side} pixels a side"
            )
