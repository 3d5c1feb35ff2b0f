"""Layouts: the text that stands for a picture in a prompt, by model type.

Each is what the model's processor in transformers writes in the place of a placeholder. `SETTINGS`
has those of transformers' image processors for files with others, and `PROCESSORS` image processors
that transformers does not have, or has with PyTorch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Protocol, cast

import numpy as np

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.vision.models import CLASSES

#: The largest side, in pixels, to which a preprocessor_config.json may scale pictures.
MAX_SIDE = 8192
#: The most tiles of a picture: processors try all grids of so many.
MAX_TILES = 64
#: Patches of the smallest picture that settings may ask for.
MAX_LEAST_PATCHES = 16_384
#: Pixels on each side of a tile of Phi-3 Vision.
PHI3_SIDE = 336
#: What image processors return.
Made = Mapping[str, Any]
#: Returns the text for one picture: from config.json and what the image processor made of it, with
#: `index`, the number of pictures before it.
Layout = Callable[[Mapping[str, Any], Made], str]
#: Returns the settings of an image processor: from config.json and preprocessor_config.json.
Settings = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


class ImageProcessor(Protocol):
    """An image processor of transformers, or one that is called like those."""

    def __call__(self, images: Any, **options: Any) -> Made: ...

    def to_dict(self) -> dict[str, Any]: ...


def _token(config: Mapping[str, Any]) -> str:
    needs = CLASSES[str(config["model_type"])]
    return needs.part or needs.placeholder


def _first(value: Any) -> int:
    """Return a size that is a number, or a list of a height and the same width."""
    return int(value[0] if isinstance(value, list | tuple) else value)


def _any_res(config: Mapping[str, Any], made: Made) -> str:
    """LLaVA-NeXT: the whole picture, then rows of all tiles without padding, each with an end."""
    from transformers.image_processing_utils import select_best_resolution

    tile = made["pixel_values"].shape[-1]
    side = tile // int(config["vision_config"]["patch_size"])
    if config["model_type"] == "granite4_vision":
        side = int(side * Fraction(config.get("downsample_rate", "4/8")))
    size = tuple(int(each) for each in made["image_sizes"][0])
    best = select_best_resolution(size, config["image_grid_pinpoints"])
    rows, columns = (side * (each // tile) for each in best)
    if size[1] / size[0] > columns / rows:
        rows -= (rows - int(size[0] * (columns / size[1]))) // 2 * 2
    else:
        columns -= (columns - int(size[1] * (rows / size[0]))) // 2 * 2
    if config["model_type"] == "llava_onevision":  # it scales large pictures down
        most = int(str(config.get("vision_aspect_ratio", "anyres_max_9")).rpartition("_")[2])
        ratio = math.sqrt(rows * columns / (most * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    end = int(config.get("use_image_newline_parameter", True))
    count: int = side * side + rows * (columns + end)
    return _token(config) * count


def check_sizes(sizes: Any, name: str) -> None:
    """Raise `ModelLoadError` unless `sizes`, the field `name`, are pairs of sides of pictures."""
    if (
        not isinstance(sizes, list)
        or not sizes
        or not all(isinstance(size, list) and len(size) == 2 for size in sizes)
        or not all(
            isinstance(side, int) and 0 < side <= MAX_SIDE for size in sizes for side in size
        )
    ):
        raise ModelLoadError(f"{name} is not a list of sizes of at most {MAX_SIDE} pixels a side")


def _any_res_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA-NeXT: the resolutions that the model knows."""
    points = config.get("image_grid_pinpoints")
    check_sizes(points, "image_grid_pinpoints")
    return {**settings, "image_grid_pinpoints": points}


def _internvl(config: Mapping[str, Any], made: Made) -> str:
    """InternVL: all tiles in one row, each of as many tokens as its patches are shuffled into."""
    vision = config["vision_config"]
    side = made["pixel_values"].shape[-1] // _first(vision["patch_size"])
    tokens = int(side * side * config.get("downsample_ratio", 0.5) ** 2)
    return f"<img>{_token(config) * tokens * len(made['pixel_values'])}</img>"


#: Fields of InternVL's config.json that nothing reads, with the value that is computed.
_INTERNVL_FIELDS = {"ps_version": "v2", "select_layer": -1, "use_thumbnail": True}


def _internvl_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """InternVL: tiles of the size in config.json; published files have settings of CLIP's."""
    vision = config["vision_config"]
    for name, computed in _INTERNVL_FIELDS.items():
        if config.get(name, computed) != computed:
            raise ModelLoadError(f"config.json: {name} is not {computed!r}, which mlx-vlm computes")
    side = _first(config.get("force_image_size") or vision.get("image_size", 448))
    found = {
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "max_patches": config.get("max_dynamic_patch", 12),
        "min_patches": config.get("min_dynamic_patch", 1),
        "size": {"height": side, "width": side},
    }
    if str(settings.get("image_processor_type", "")).startswith("GotOcr2"):
        found |= settings
    tiled = config.get("dynamic_image_size", True) is not False
    return {**found, "crop_to_patches": tiled, "image_processor_type": "GotOcr2ImageProcessor"}


def _aya(config: Mapping[str, Any], made: Made) -> str:
    """Aya Vision: numbered tiles, then the whole picture."""
    vision = config["vision_config"]
    patch = int(vision["patch_size"]) * int(config.get("downsample_factor", 2))
    tile = _token(config) * (made["pixel_values"].shape[-1] // patch) ** 2
    tiles = "".join(f"TILE_{number}{tile}" for number in range(1, int(made["num_patches"][0])))
    return f"<|START_OF_IMG|>{tiles}TILE_GLOBAL{tile}<|END_OF_IMG|>"


def _lfm2(config: Mapping[str, Any], made: Made) -> str:
    """LFM2-VL: tiles with their places, then the whole picture, or this alone."""
    factor = int(config.get("downsample_factor", 2))
    views = [
        _token(config) * math.prod(-(-int(side) // factor) for side in shape)
        for shape in made["spatial_shapes"]
    ]
    columns = int(made["image_cols"][0])
    if not config.get("use_image_special_tokens", True):
        return "".join(views)
    tiles = len(views) - 1 if len(views) > 1 else 0
    text = "".join(
        f"<|img_row_{place // columns + 1}_col_{place % columns + 1}|>{views[place]}"
        for place in range(tiles)
    )
    last = f"<|img_thumbnail|>{views[-1]}" if tiles else views[-1]
    return f"<|image_start|>{text}{last}<|image_end|>"


def _lfm2_processor(config: Mapping[str, Any], settings: Mapping[str, Any]) -> ImageProcessor:
    """LFM2-VL: mlx-vlm's, in NumPy; large pictures are split, as the model was trained."""
    from mlx_vlm.models.lfm2_vl.processing_lfm2_vl import Lfm2VlNumpyImageProcessor

    splitting = {"do_image_splitting": True, "min_tiles": 2, "max_tiles": 10, "use_thumbnail": True}
    kept = {name: value for name, value in settings.items() if name != "image_processor_type"}
    kind: Any = Lfm2VlNumpyImageProcessor
    made: ImageProcessor = kind(**{**kept, **splitting})
    return made


def _kimi(config: Mapping[str, Any], made: Made) -> str:
    """Kimi-VL: one token for each square of patches."""
    height, width = map(int, config["vision_config"].get("merge_kernel_size", (2, 2)))
    patches = int(np.prod(made["image_grid_hws"][0]))
    return _token(config) * (patches // (height * width))


class _KimiProcessor:
    """Kimi's image processors: mlx-vlm's choice of a size, and its patches in NumPy.

    mlx-vlm's takes a Python object for each number, and Kimi-VL's its own mean instead of the
    file's.
    """

    def __init__(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        from mlx_vlm.models.kimi_k25.processing_kimi_k25 import KimiK25ImageProcessor
        from mlx_vlm.models.kimi_vl.processing_kimi_vl import KimiVLImageProcessor

        vision = config["vision_config"]
        kind: Any = KimiVLImageProcessor
        if config["model_type"] == "kimi_k25":
            kind, given = KimiK25ImageProcessor, settings.get("media_proc_cfg") or {}
            settings = {"in_token_limit": 16384, **given}
            if "in_patch_limit" in given:
                settings["in_token_limit"] = given["in_patch_limit"]
        self._settings = {
            "image_mean": settings.get("image_mean", [0.5, 0.5, 0.5]),
            "image_std": settings.get("image_std", [0.5, 0.5, 0.5]),
            "in_token_limit": settings.get("in_token_limit", 4096),
            "merge_kernel_size": list(vision.get("merge_kernel_size", (2, 2))),
            "pad_input": settings.get("pad_input", False),
            "patch_size": int(vision.get("patch_size", 14)),
        }
        if kind is KimiK25ImageProcessor:
            self._settings["patch_limit_on_one_side"] = settings.get("patch_limit_on_one_side", 512)
        self._sizes = kind(**self._settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return self._settings

    def __call__(self, images: Any, **_: Any) -> Made:
        """Return the patches [patches, 3, side, side] of a picture, and their rows and columns."""
        pixels = np.asarray(self._sizes.rescale(images[0]), np.float32) / 255
        mean, std = (np.array(self._settings[n], np.float32) for n in ("image_mean", "image_std"))
        side = self._settings["patch_size"]
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        if not rows * columns:
            raise ValueError(f"it is smaller than {side * 2} pixels on a side")
        patches = ((pixels - mean) / std).reshape(rows, side, columns, side, 3)
        patches = patches.transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
        return {"pixel_values": patches, "image_grid_hws": np.array([[rows, columns]], np.int32)}


def _deepseek(config: Mapping[str, Any], made: Made) -> str:
    """DeepSeek-VL2: rows of the whole picture, a separator, and rows of all tiles."""
    projector = config.get("projector_config") or {}
    patches = made["pixel_values"].shape[-1] // int(config["vision_config"].get("patch_size", 16))
    side = -(-patches // int(projector.get("downsample_ratio", 2)))
    columns, rows = map(int, made["images_spatial_crop"][0, 0])
    tokens: int = side * (side + 1) + 1 + rows * side * (columns * side + 1)
    return _token(config) * tokens


class _DeepSeekProcessor:
    """DeepSeek-VL2's image processor, with mlx-vlm's choice of a size; of three, none is cut."""

    def __init__(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        sizes = settings.get("candidate_resolutions", config.get("candidate_resolutions"))
        check_sizes(sizes, "candidate_resolutions")
        self._settings = {
            "candidate_resolutions": sizes,
            "image_mean": settings.get("image_mean", [0.5, 0.5, 0.5]),
            "image_std": settings.get("image_std", [0.5, 0.5, 0.5]),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return self._settings

    def __call__(self, images: Any, *, count: int = 1, **_: Any) -> Made:
        """Return the whole picture and its tiles, float32 [1, tiles, 3, side, side]."""
        from mlx_vlm.models.deepseek_vl_v2.processing_deepsek_vl_v2 import select_best_resolution
        from PIL import ImageOps

        sizes, image = self._settings["candidate_resolutions"], images[0]
        side = sizes[0][0]
        choose: Any = select_best_resolution
        width, height = choose(image.size, sizes) if count <= 2 else (side, side)
        mean, std = (np.array(self._settings[n], np.float32) for n in ("image_mean", "image_std"))
        color = tuple(int(value * 255) for value in self._settings["image_mean"])
        whole = np.asarray(ImageOps.pad(image, (side, side), color=color))
        grid = np.asarray(ImageOps.pad(image, (width, height), color=color))
        rows, columns = height // side, width // side
        tiles = grid.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        views = np.concatenate([whole[None], tiles.reshape(-1, side, side, 3)])
        pixels = (views.astype(np.float32) / 255 - mean) / std
        return {
            "pixel_values": pixels.transpose(0, 3, 1, 2)[None],
            "images_spatial_crop": np.array([[[columns, rows]]], np.int32),
        }


def _minicpm(config: Mapping[str, Any], made: Made) -> str:
    """MiniCPM-V: the number of the picture, the whole of it, and rows of its slices."""
    divisor = 4 if config.get("downsample_mode") == "4x" else 16
    views = [_token(config) * (math.prod(map(int, size)) // divisor) for size in made["tgt_sizes"]]
    columns, rows = made["grids"]
    slices = "\n".join(f"<slice>{views[-1]}</slice>" * columns for _ in range(rows))
    number = f"<image_id>{made['index']}</image_id>" if made["use_image_id"] else ""
    return f"{number}<image>{views[0]}</image>{slices}"


class _MiniCPMProcessor:
    """MiniCPM-V's image processor: mlx-vlm's, in NumPy, with the patches of all views in a row."""

    def __init__(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        from mlx_vlm.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMVImageProcessor

        self._settings = dict(settings)
        self._made = MiniCPMVImageProcessor(**self._settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return self._settings

    def __call__(self, images: Any, **_: Any) -> Made:
        """Return the patches [3, side, patches * side] of a picture and its slices."""
        made = self._made.preprocess([images])
        return {
            "pixel_values": np.concatenate(made["pixel_values"][0], axis=-1),
            "tgt_sizes": made["tgt_sizes"][0],
            "grids": made["grids"][0][0],
            "use_image_id": self._made.use_image_id,
        }


def _dots(config: Mapping[str, Any], made: Made) -> str:
    """dots.ocr and Mage-VL: one token for each square of patches."""
    vision = config["vision_config"]
    merge = int(vision.get("spatial_merge_size", vision.get("merge_size", 2)))
    return _token(config) * (int(np.prod(made["image_grid_thw"][0])) // merge**2)


def _gemma3n(config: Mapping[str, Any], made: Made) -> str:
    """Gemma 3n: always as many tokens, between two others."""
    needs = CLASSES["gemma3n"]
    count = int(config.get("vision_soft_tokens_per_image", 256))
    return f"{needs.begins}{needs.soft * count}{needs.ends}"


class _Gemma4UnifiedProcessor:
    """Gemma 4's image processor for models without encoders: mlx-vlm's, in NumPy."""

    def __init__(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        from mlx_vlm.models.gemma4_unified.processing_gemma4_unified import (
            Gemma4UnifiedImageProcessor,
        )

        kind: Any = Gemma4UnifiedImageProcessor
        given = {name: value for name, value in settings.items() if name != "image_processor_type"}
        self._made = kind(**given)
        self._settings = dict(self._made.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return self._settings

    def __call__(self, images: Any, **_: Any) -> Made:
        """Return the patches [1, tokens, pixels] of a picture, with padding, and their places."""
        made, _counts = self._made.preprocess(images)
        return cast(Made, made)


def _minicpmo(config: Mapping[str, Any], made: Made) -> str:
    """MiniCPM-o: the whole picture in one view, as mlx-vlm has it."""
    return f"<image>{_token(config) * int(config.get('query_num', 64))}</image>"


class _MiniCPMOProcessor:
    """MiniCPM-o's image processor: mlx-vlm's, in NumPy, which cuts no picture into slices."""

    def __init__(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        from mlx_vlm.models.minicpmo.processing_minicpmo import MiniCPMOImageProcessor

        kind: Any = MiniCPMOImageProcessor
        self._settings, self._made = dict(settings), kind(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return self._settings

    def __call__(self, images: Any, **_: Any) -> Made:
        """Return the pixels [3, height, width] of a picture, and its rows and columns."""
        made = self._made.preprocess([images])
        return {"pixel_values": made["pixel_values"][0][0], "tgt_sizes": made["tgt_sizes"][0]}


def _idefics2(config: Mapping[str, Any], made: Made) -> str:
    """Idefics 2: as many tokens for each view, with a token around each."""
    perceiver, edge = config.get("perceiver_config") or {}, "<fake_token_around_image>"
    view = _token(config) * int(perceiver.get("resampler_n_latents", 64))
    views: int = made["pixel_values"].shape[1]
    return f"{edge}{view}" * views + edge


def _llama4(config: Mapping[str, Any], made: Made) -> str:
    """Llama 4: rows of tiles with separators, then the whole picture, or this alone."""
    vision = config["vision_config"]
    patches = (made["pixel_values"].shape[-1] // int(vision["patch_size"])) ** 2
    tile = _token(config) * round(patches * float(vision["pixel_shuffle_ratio"]) ** 2)
    rows, columns = made["aspect_ratios"][0]
    row = "<|tile_x_separator|>".join([tile] * columns) + "<|tile_y_separator|>"
    tiles = row * rows if rows * columns > 1 else ""
    return f"<|image_start|>{tiles}<|image|>{tile}<|image_end|>"


class _Llama4Processor:
    """Llama 4's image processor, which transformers has for PyTorch only; mlx-vlm's is another.

    A picture is scaled to the grid of tiles that enlarges it least, or shrinks it least if all are
    smaller, and never enlarged beyond a tile. With several tiles, the whole picture is the last.
    """

    def __init__(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        size = settings.get("size") or {}
        self._settings = {
            "image_mean": settings.get("image_mean", [0.5, 0.5, 0.5]),
            "image_std": settings.get("image_std", [0.5, 0.5, 0.5]),
            "max_patches": int(settings.get("max_patches", 16)),
            "size": {"height": size.get("height", 336), "width": size.get("width", 336)},
        }
        if settings.get("resize_to_max_canvas") or size.get("height") != size.get("width"):
            raise ValueError("resize_to_max_canvas and tiles that are not square are not supported")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return self._settings

    def __call__(self, images: Any, **_: Any) -> Made:
        """Return the tiles [tiles, 3, side, side] of a picture, and their rows and columns."""
        from PIL import Image

        image, side = images[0], self._settings["size"]["height"]
        width, height = image.size
        rows, columns = self._grid(height, width, side)
        bounds = min(max(height, side), rows * side), min(max(width, side), columns * side)
        scale = min(bounds[1] / width, bounds[0] / height)
        if bounds[1] / width < bounds[0] / height:
            fitted = bounds[1], min(int(height * scale), bounds[0])
        else:
            fitted = min(int(width * scale), bounds[1]), bounds[0]
        canvas = Image.new("RGB", (columns * side, rows * side))
        fitted = max(fitted[0], 1), max(fitted[1], 1)
        canvas.paste(image.resize(fitted, Image.Resampling.BILINEAR), (0, 0))
        tiles = np.asarray(canvas).reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        views = tiles.reshape(-1, side, side, 3)
        if rows * columns > 1:
            whole = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
            views = np.concatenate([views, whole[None]])
        mean, std = (np.array(self._settings[n], np.float32) for n in ("image_mean", "image_std"))
        pixels = (views.astype(np.float32) / 255 - mean) / std
        return {
            "pixel_values": pixels.transpose(0, 3, 1, 2),
            "aspect_ratios": [(rows, columns)],
        }

    def _grid(self, height: int, width: int, side: int) -> tuple[int, int]:
        """Return the rows and columns of tiles for a picture."""
        most = self._settings["max_patches"]
        grids = [
            (rows, count // rows)
            for count in range(1, most + 1)
            for rows in range(1, count + 1)
            if count % rows == 0
        ]
        sides = np.array(grids, np.float32) * side / np.array([height, width], np.float32)
        scales = sides.min(axis=1)
        larger = scales[scales >= 1]
        best = larger.min() if len(larger) else scales.max()
        return next(grid for grid, scale in zip(grids, scales, strict=True) if scale == best)


def _mllama(config: Mapping[str, Any], made: Made) -> str:
    """Llama 3.2 Vision: one token, as layers attend to the picture itself."""
    return _token(config)


def _phi3(config: Mapping[str, Any], made: Made) -> str:
    """Phi-3 Vision: rows of all tiles, a separator, and the whole picture."""
    rows, columns = (int(size) // PHI3_SIDE for size in made["image_sizes"][0])
    return _token(config) * ((rows * columns + 1) * 144 + 1 + (rows + 1) * 12)


def _phi3_processor(config: Mapping[str, Any], settings: Mapping[str, Any]) -> ImageProcessor:
    """Phi-3 Vision: mlx-vlm's, in NumPy, with tiles of a fixed size."""
    from mlx_vlm.models.phi3_v.processing_phi3_v import Phi3VImageProcessor

    names = ("image_mean", "image_std", "num_crops")
    given = {name: settings[name] for name in names if name in settings}
    crops = given.setdefault("num_crops", 4)
    if not 0 < int(crops) * PHI3_SIDE**2 <= MAX_SIDE**2:
        raise ValueError(f"num_crops is {crops}, for tiles of {PHI3_SIDE} pixels a side")
    kind: Any = Phi3VImageProcessor
    made: ImageProcessor = kind(**given)
    return made


def _muse(config: Mapping[str, Any], made: Made) -> str:
    """Muse Glimmer: one token for each square of patches, between two others."""
    return f"<|image_start|>{_dots(config, made)}<|image_end|>"


def _muse_processor(config: Mapping[str, Any], settings: Mapping[str, Any]) -> ImageProcessor:
    """Muse Glimmer: mlx-vlm's, in NumPy."""
    from mlx_vlm.models.muse_glimmer.processing_muse_glimmer import MuseGlimmerImageProcessor

    names = (
        "patch_size", "temporal_patch_size", "merge_size", "max_image_tokens", "image_mean",
        "image_std", "rescale_factor",
    )  # fmt: skip
    kind: Any = MuseGlimmerImageProcessor
    made: ImageProcessor = kind(**{name: settings[name] for name in names if name in settings})
    side = made.patch_size * made.merge_size  # type: ignore[attr-defined]
    most = made.max_image_tokens  # type: ignore[attr-defined]
    if not 0 < most * side**2 <= MAX_SIDE**2:
        raise ValueError(f"max_image_tokens is {most}, for tokens of {side} pixels a side")
    return made


#: Molmo's tokens of a picture, by the numbers that its image processor gets for them.
_MOLMO_TOKENS = ("<im_patch>", "<im_col>", "<im_start>", "<im_end>")


def _molmo(config: Mapping[str, Any], made: Made) -> str:
    """Molmo: rows of the whole picture, and rows of all tiles, each with an end."""
    return "".join(_MOLMO_TOKENS[token] for token in made["tokens"])


class _MolmoProcessor:
    """Molmo's image processor: mlx-vlm's, in NumPy."""

    def __init__(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        from mlx_vlm.models.molmo.processing_molmo import MolmoImageProcessor

        names = (
            "base_image_input_size", "image_mean", "image_patch_size", "image_std",
            "image_token_length_h", "image_token_length_w", "max_crops", "overlap_margins",
        )  # fmt: skip
        self._settings = {name: settings[name] for name in names if name in settings}
        kind: Any = MolmoImageProcessor
        self._made = kind(**self._settings)
        for name in ("max_crops", "image_token_length_h", "image_token_length_w"):
            value = getattr(self._made, name)
            if not isinstance(value, int) or not 0 < value <= MAX_TILES:
                raise ValueError(f"{name} is {str(value)[:50]}, expected 1 to {MAX_TILES}")
        if min(self._made.overlap_margins) < 0:
            raise ValueError(f"overlap_margins are {self._made.overlap_margins}")
        height, width = self._made.base_image_input_size
        if not 0 < height * width * self._made.max_crops <= MAX_SIDE**2:
            raise ValueError(
                f"max_crops is {self._made.max_crops}, for tiles of {height} x {width} pixels"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return self._settings

    def __call__(self, images: Any, **_: Any) -> Made:
        """Return the patches [tiles, patches, values], and the tokens with the place of each."""
        pixels = np.asarray(images[0], np.float32) / 255
        with np.errstate(divide="ignore"):  # of a picture as small as the margins
            patches, tokens, places, masks = self._made.preprocess(pixels, *range(4))
        return {
            "pixel_values": patches.astype(np.float32), "image_masks": masks.astype(np.float32),
            "image_input_idx": places, "tokens": tokens.tolist(),
        }  # fmt: skip


_ANY_RES = ("granite4_vision", "granite_vision", "llava_next", "llava_onevision")
_INTERNVL = ("internvl", "internvl_chat")
_LFM2 = ("lfm2-vl", "lfm2_vl")
LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(_ANY_RES, _any_res),
    **dict.fromkeys(_INTERNVL, _internvl),
    **dict.fromkeys(_LFM2, _lfm2),
    "aya_vision": _aya,
    "deepseek_vl_v2": _deepseek,
    "dots_ocr": _dots,
    "gemma3n": _gemma3n,
    "idefics2": _idefics2,
    "llama4": _llama4,
    "mage_vl": _dots,
    "mllama": _mllama,
    "molmo": _molmo,
    "muse_glimmer": _muse,
    "phi3_v": _phi3,
    "kimi_k25": _kimi,
    "kimi_vl": _kimi,
    "minicpmo": _minicpmo,
    "minicpmv4_6": _minicpm,
}
SETTINGS: Mapping[str, Settings] = {
    **dict.fromkeys(_ANY_RES, _any_res_settings),
    **dict.fromkeys(_INTERNVL, _internvl_settings),
}
PROCESSORS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], ImageProcessor]] = {
    **dict.fromkeys(_LFM2, _lfm2_processor),
    "deepseek_vl_v2": _DeepSeekProcessor,
    "gemma4_unified": _Gemma4UnifiedProcessor,
    "kimi_k25": _KimiProcessor,
    "kimi_vl": _KimiProcessor,
    "minicpmo": _MiniCPMOProcessor,
    "minicpmv4_6": _MiniCPMProcessor,
    "llama4": _Llama4Processor,
    "molmo": _MolmoProcessor,
    "muse_glimmer": _muse_processor,
    "phi3_v": _phi3_processor,
}
