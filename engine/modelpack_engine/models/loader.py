"""load: load a model and its tokenizer, ready to run, from the files of a model."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx.nn.layers.base import Module

from modelpack.artifacts.model import CHAT_TEMPLATE
from modelpack.errors import ModelpackError
from modelpack.formats.adapter import Adapter, read_adapter_files
from modelpack.formats.config_json import PROCESSOR_CONFIGS, is_processor_config
from modelpack_engine.config import EngineConfig, parse_kv_cache_dtype
from modelpack_engine.cpu import program
from modelpack_engine.cpu.library import library
from modelpack_engine.cpu.weights import PackedWeights
from modelpack_engine.errors import EngineError, ModelLoadError, RequestError
from modelpack_engine.kernels import launch
from modelpack_engine.models import gguf_projector, gguf_tokenizer, json_tokenizer, load_progress
from modelpack_engine.models.adapter import merge, read_layers
from modelpack_engine.models.chat_template import as_jinja
from modelpack_engine.models.config_guard import check_fields
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.gguf import GGUFLoader
from modelpack_engine.models.gguf_architectures import ARCHITECTURES
from modelpack_engine.models.gguf_file import GGUFFile, Metadata
from modelpack_engine.models.gguf_projector import GGUFProjector
from modelpack_engine.models.load_progress import LoadCallback
from modelpack_engine.models.model_config import normalised
from modelpack_engine.models.multimodal import adapter_for_sounds, language_classes
from modelpack_engine.models.planes import KEPT, KEPT_ON_CUDA, hold_floats
from modelpack_engine.models.precision import (
    Precision,
    dense_bytes,
    evaluate,
    fits,
    position_rows,
    unpack,
)
from modelpack_engine.models.safetensors import (
    load_safetensors,
    open_packable,
    read_config,
    read_headers,
)
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_engine.patches import recurrent
from modelpack_engine.patches.corrections import TEXT_PARTS
from modelpack_engine.patches.lora import Layers, nbytes
from modelpack_engine.patches.mlx_vlm_imports import import_processors, is_installed
from modelpack_engine.platform import cuda_graphs
from modelpack_engine.vision import models as vision_models
from modelpack_engine.vision.encoder import Vision, open_vision
from modelpack_engine.vision.models import (
    CLASSES,
    INSTALL_HINT,
    TOWER_TYPES,
    language_tower,
    vision_classes,
)
from modelpack_engine.vision.processor import with_image_token
from modelpack_engine.vision.sounds import has_sounds, sound_settings, with_sound_fields
from modelpack_engine.vision.towers import open_tower, tower_weights
from modelpack_engine.vision.videos import VIDEO_CLASSES, video_settings

Device = Literal["cpu", "gpu"]

#: Reduces a model to one device's part before it is evaluated; gets the model and its config.
Shard = Callable[[Module, Mapping[str, Any]], None]

_CONTEXT_KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len",
    "seq_length", "model_max_length",
)  # fmt: skip
_DEFAULT_CONTEXT = 2048
_FLOAT32_BYTES = 4
_MAX_YARN_FACTOR = 1024  # those of published models are at most 64
_TEMPLATE = "tokenizer.chat_template"
_GO_TEMPLATE = "template.gotmpl"  # the name of a template that was pulled from Ollama
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    `config` is the config of mlx-lm's class, `architecture` the name in the files
    (`general.architecture`, or `model_type`), `context_length` in tokens. `notes` tell the user
    what differs from the files. All weights are in memory, in `weight_bytes` bytes: in `packed` if
    the library for CPUs runs the model, whose `model` then has only shapes; otherwise in `model`.
    `vision` reads pictures, if the model can; `no_vision` says why it cannot, if its files should.
    `precision` is that of a GGUF model in MLX. Prompts with files have the adapter
    `adapter_for_files`, if the model has one.
    """

    model: Module
    config: Mapping[str, Any]
    tokenizer: Tokenizer
    architecture: str
    context_length: int
    notes: tuple[str, ...]
    weight_bytes: int
    packed: PackedWeights | None = None
    vision: Vision | None = None
    no_vision: str = ""
    precision: Precision | None = None
    adapter_for_files: Layers = field(default_factory=dict)


def load(
    files: ModelFiles,
    *,
    device: Device,
    dtype: mx.Dtype | None = None,
    dense: bool | None = None,
    requantize: bool = True,
    blocks: Collection[str] | None = None,
    ignored_fields: Collection[str] = (),
    shard: Shard | None = None,
    packed: bool = False,
    adapter: Adapter | None = None,
    progress: LoadCallback | None = None,
) -> LoadedModel:
    """Load the model in `files`; nothing is written to disk. `progress` gets the bytes read.

    With `packed`, the weights of a model that the library for CPUs can run go there as they are
    stored; MLX does not compute with it. Other models are loaded as without it.

    On a CPU the default is dense float32, or quantised weights with float32 scales where memory
    is short. On a GPU weights stay packed, and the default dtype is that of the files (bfloat16
    for GGUF). `dense` decides whether quantised weights are unpacked; `blocks` are the types of
    GGUF that linear layers and embeddings keep as they are stored, by default KEPT on a GPU that
    holds the whole model; `requantize` whether others that MLX cannot pack without loss (IQ1_S to
    IQ3_S; all in experts) are held in 8 bits rather than in `dtype`. `ignored_fields` of
    config.json are accepted although nothing reads them. With `shard`, only this device's part of
    the model is held in memory. `adapter`, or that of the files, is merged into the weights;
    quantised layers that it changes are held dense.

    Raises `ModelLoadError`, naming the cause, for errors in the files, `WeightFormatError` for a
    damaged weight file, and `AdapterError` for an adapter that does not fit the model.
    """
    if files.adapter is not None:
        if adapter is not None:
            raise ModelLoadError(
                f"{files.adapter}: the model has an adapter of its own, no other can be merged",
                hint="serve the adapter without --merge",
            )
        adapter = read_adapter_files(None, files.adapter)
    with mx.stream(mx.cpu if device == "cpu" else mx.gpu), load_progress.watched(progress):
        load_progress.begin(files.weights)
        if files.format == "gguf":
            return _load_gguf(
                files, device, dtype, dense, requantize, blocks, shard, packed, adapter
            )
        return _load_safetensors(
            files, device, dtype, dense, ignored_fields, shard, packed, adapter
        )


def may_read_pictures(files: ModelFiles) -> bool:
    """Return whether a model reads pictures here, by headers and settings."""
    if files.format == "gguf":
        return files.projector is not None and gguf_projector.runs(files.projector)
    if not vision_models.may_read_pictures(files.json("config.json") or {}):
        return False
    return _has_processor(files)


def may_read_sounds(files: ModelFiles) -> bool:
    """Return whether a model reads sounds here, by config.json and settings."""
    config = files.json("config.json") or {}
    decodes = importlib.util.find_spec("miniaudio") is not None
    can = vision_models.may_read_files(config) and has_sounds(config)
    return decodes and can and _has_processor(files)


def may_read_videos(files: ModelFiles) -> bool:
    """Return whether a model reads videos here, by config.json and settings."""
    config = files.json("config.json") or {}
    decodes = importlib.util.find_spec("av") is not None
    can = vision_models.may_read_pictures(config) and config["model_type"] in VIDEO_CLASSES
    return decodes and can and files.format != "gguf" and _has_processor(files)


def _has_processor(files: ModelFiles) -> bool:
    try:
        _processor_settings(files)
    except EngineError:
        return False
    return True


def _processor_settings(files: ModelFiles) -> Mapping[str, Any]:
    """Return the settings of a model's image processor or feature extractor.

    Raises `ModelLoadError` if it has none.
    """
    for name in PROCESSOR_CONFIGS:
        settings = files.json(name)
        if settings is not None and is_processor_config(name, settings):
            return settings
    raise ModelLoadError("the model has no preprocessor_config.json")


def runs_packed(files: ModelFiles, config: EngineConfig, device: Device) -> bool:
    """Return whether `load` should pack a model: the library for CPUs knows its architecture.

    The backend `mlx` computes with MLX alone, and only MLX has adapters and a KV cache of 8 or 4
    bits.
    """
    kind = parse_kv_cache_dtype(config.kv_cache_dtype)
    if (
        device != "cpu"
        or config.backend != "auto"
        or config.max_loras
        or kind not in ("auto", "bf16", "fp16")
    ):
        return False
    if not files.weights:
        return False
    if files.format == "gguf":
        name = GGUFFile.open(files.weights).metadata.text("general.architecture", "")
    else:
        name = normalised(read_config(files))["model_type"]
    return is_packable(files.format, name)


def is_packable(format: str, architecture: str) -> bool:
    """Return whether the library for CPUs is there, and knows an architecture of such files."""
    if format == "gguf":
        known = ARCHITECTURES.get(architecture)
        architecture = known.model_type if known is not None else ""
    else:
        architecture = program.OTHER_NAMES.get(architecture, architecture)
    return library() is not None and architecture in program.MODELS


def _load_gguf(
    files: ModelFiles,
    device: Device,
    dtype: mx.Dtype | None,
    dense: bool | None,
    requantize: bool,
    blocks: Collection[str] | None,
    shard: Shard | None,
    packed: bool,
    adapter: Adapter | None,
) -> LoadedModel:
    loader = GGUFLoader(GGUFFile.open(files.weights))
    notes = list(files.notes)
    tokenizer = gguf_tokenizer_of(files, loader.file.metadata)  # first: it is quick and may fail
    projector, no_vision = None, ""
    try:
        if files.projector is not None:
            loader, projector = _open_projector(files.projector, loader, tokenizer, shard)
    except ModelpackError as error:
        no_vision = _projector_reason(error, files)
    packed = packed and projector is None
    weights = precision = None
    if packed and (model := loader.skeleton()) is not None:
        weights = loader.packed(model, adapter)
    else:
        if dtype is None:
            dtype = mx.float32 if device == "cpu" else mx.bfloat16
        if dense is None:
            dense = device == "cpu" and fits(loader.dense_elements * dtype.size)
            _note_density(notes, device, dense)
        if blocks is None:
            # mlx-lm divides layers of MLX only.
            kept = KEPT_ON_CUDA if launch.backend() == "cuda" else KEPT
            blocks = kept if device != "cpu" and shard is None else ()
        precision = Precision(dtype, dense, requantize, blocks)
        model = loader.load(precision)
        if adapter is not None:
            merge(model, read_layers(adapter, model, loader.config, dtype=mx.float32))
    limits = check_fields(loader.config, type(model))
    notes += limits.notes
    context = loader.config["max_position_embeddings"]
    context = min(context, limits.max_length or context)
    loaded = _loaded(
        model, loader.config, lambda: tokenizer, loader.name, context, notes, shard, weights
    )
    loaded = replace(loaded, precision=precision)
    if projector is None:
        return _text_only(loaded, no_vision) if no_vision else loaded
    assert dtype is not None, "of a model that is not packed"
    try:
        return _with_projector(loaded, projector, dtype)
    except ModelpackError as error:
        return _text_only(loaded, _projector_reason(error, files))


def _open_projector(
    path: Path, loader: GGUFLoader, tokenizer: Tokenizer, shard: Shard | None
) -> tuple[GGUFLoader, GGUFProjector]:
    """Return how to load a language model beside its projector, and the projector."""
    if shard is not None:
        raise ModelLoadError("models that read pictures from GGUF run on one device only")
    if not is_installed():
        raise ModelLoadError("the extra 'vision' is not installed", hint=INSTALL_HINT)
    loader = GGUFLoader(loader.file, with_pictures=True)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    return loader, GGUFProjector(path, loader.config, encode)


def _with_projector(loaded: LoadedModel, projector: GGUFProjector, dtype: mx.Dtype) -> LoadedModel:
    """Return a GGUF model with its vision."""
    if "input_embeddings" not in inspect.signature(type(loaded.model).__call__).parameters:
        raise ModelLoadError(f"mlx-lm's {loaded.config['model_type']} takes no embeddings")
    encode = partial(loaded.tokenizer.encode, add_special_tokens=False)
    tower = projector.tower(loaded.model, dtype)
    weight_bytes = loaded.weight_bytes + evaluate(tower)
    vision = open_vision(tower, projector.config, projector.settings, encode)
    vision.processor.no_videos = "GGUF files do not say how videos are sampled"
    return replace(loaded, vision=vision, weight_bytes=weight_bytes)


def _text_only(loaded: LoadedModel, reason: str) -> LoadedModel:
    note = f"pictures are not read: {reason}"
    return replace(loaded, notes=(*loaded.notes, note), no_vision=reason)


def _projector_reason(error: ModelpackError, files: ModelFiles) -> str:
    """Return why a projector does not run, for clients too: without its path on disk."""
    return _reason(error).replace(str(files.projector), "the projector")


def _reason(error: ModelpackError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)


def gguf_tokenizer_of(files: ModelFiles, metadata: Metadata | None = None) -> Tokenizer:
    """Return the tokenizer of a GGUF model; read its metadata unless they are given."""
    if metadata is None:
        metadata = GGUFFile.open(files.weights).metadata
    # A template in its own file was packaged on purpose.
    template = files.text(CHAT_TEMPLATE)
    if template is None and not metadata.text(_TEMPLATE, ""):
        template = _template_of_go(files)
    try:
        return gguf_tokenizer.tokenizer_of(metadata, template)
    except ModelLoadError:
        if files.text("tokenizer.json") is None:
            raise
    return json_tokenizer.tokenizer_of(files, {})


def _template_of_go(files: ModelFiles) -> str | None:
    """Return Ollama's template for weights that have none, as Jinja, or None."""
    text = files.text(_GO_TEMPLATE)
    if text is None:
        return None
    try:
        return as_jinja(text)
    except RequestError as error:  # completions work without a template
        _log.warning("the chat template is ignored: %s", error)
        return None


def _load_safetensors(
    files: ModelFiles,
    device: Device,
    dtype: mx.Dtype | None,
    dense: bool | None,
    ignored_fields: Collection[str],
    shard: Shard | None,
    packed: bool,
    adapter: Adapter | None,
) -> LoadedModel:
    config = read_config(files)
    # Tested while weights are read.
    json_tokenizer.begin_check(json_tokenizer.text_of(files))
    notes = list(files.notes)
    named = config
    if (seeing := vision_classes(config)) is not None and shard is not None:
        raise ModelLoadError(
            f"the architecture {config['model_type']!r} runs on one device only",
            hint="leave out --tensor-parallel-size",
        )
    opened = open_packable(files, config, ignored_fields=ignored_fields) if packed else None
    weights = None
    if opened is not None:
        model, config, limits = opened.model, opened.config, opened.limits
        weights = opened.pack(adapter)
    else:
        model, config, limits = load_safetensors(
            files,
            config,
            classes=language_classes(config) if seeing is None else lambda config: seeing,
            ignored_fields=ignored_fields,
        )
    if seeing is not None:
        import_processors()
    notes += limits.notes
    if weights is None and dtype is None and device == "cpu":
        dtype = mx.float32
    if dense is None and weights is None:
        dense = device == "cpu" and fits(dense_bytes(model, _FLOAT32_BYTES))
        if config.get("quantization"):
            _note_density(notes, device, dense)
    if dtype is not None and weights is None:
        model.set_dtype(dtype)
    if dense:
        left = unpack(model, dtype)
        if left:
            notes.append(f"{len(left)} modules stay quantised, for example {left[0]}")
    if weights is None and shard is None and launch.backend() == "cuda":
        hold_floats(model, dtype or mx.bfloat16)
    if adapter is not None and weights is None:
        language = model if seeing is None else language_tower(model)
        merge(language, read_layers(adapter, language, config, dtype=mx.float32))
    context, known = context_length_of(config)
    if not known:
        notes.append(f"the config names no context length; {context} tokens are assumed")
    context = min(context, limits.max_length or context)
    make_tokenizer = partial(json_tokenizer.tokenizer_of, files, named)
    loaded = _loaded(
        model, config, make_tokenizer, config["model_type"], context, notes, shard, weights
    )
    if seeing is None and (shard is not None or config["model_type"] not in TOWER_TYPES):
        return loaded
    return _with_vision(loaded, files, dtype, whole=seeing is not None)


def _with_vision(
    loaded: LoadedModel, files: ModelFiles, dtype: mx.Dtype | None, *, whole: bool
) -> LoadedModel:
    """Return a model with its vision, or with a note why it reads text only.

    With `whole`, it is a model of `vision_classes`; otherwise the vision tower is in the files.
    """
    vision, reason, weight_bytes = None, "", loaded.weight_bytes
    layers: Layers = {}
    encode = partial(loaded.tokenizer.encode, add_special_tokens=False)
    sees = CLASSES[loaded.config["model_type"]].pictures
    try:
        settings = _processor_settings(files)
        tower: Any = loaded.model
        config = loaded.config
        config = with_image_token(config, encode) if sees else with_sound_fields(config)
        if not whole:
            parts = config.get("vision_config")
            if sees and not isinstance(parts, Mapping):
                raise ModelLoadError("config.json: vision_config is missing")
            bounds, _ = read_headers(files)
            if isinstance(parts, Mapping):
                bounds.check(parts, "config.json: vision_config")
            if isinstance(audio := config.get("audio_config"), Mapping):
                bounds.check(audio, "config.json: audio_config")
            with bounds.building("config.json: vision_config"):
                weights = tower_weights(files.weights, str(config["model_type"]))
                tower = open_tower(config, weights, loaded.model, dtype)
            weight_bytes += evaluate(tower)
        sounds = None
        if has_sounds(config):
            sounds = sound_settings(settings, files.json("processor_config.json"))
        videos = None
        if config["model_type"] in VIDEO_CLASSES:
            videos = video_settings(
                config["model_type"],
                settings,
                files.json("processor_config.json"),
                files.json("video_preprocessor_config.json"),
            )
        layers = adapter_for_sounds(files.weights, config, loaded.model)
        weight_bytes += 2 * nbytes(layers.values())  # the engine holds them by slot, too
        vision = open_vision(tower, config, settings, encode, sounds, videos)
    except EngineError as error:
        reason = _reason(error)
    notes = [*loaded.notes]
    if reason:
        notes.append(f"{'pictures' if sees else 'sounds'} are not read: {reason}")
    elif vision is not None and vision.processor.no_sounds:
        notes.append(f"sounds are not read: {vision.processor.no_sounds}")
    elif vision is not None and vision.processor.no_videos:
        notes.append(f"videos are not read: {vision.processor.no_videos}")
    return replace(
        loaded,
        model=language_tower(loaded.model) if whole else loaded.model,
        notes=tuple(notes),
        vision=vision,
        no_vision=reason,
        weight_bytes=weight_bytes,
        adapter_for_files=layers if vision is not None else {},
    )


def _loaded(
    model: Module,
    config: Mapping[str, Any],
    make_tokenizer: Callable[[], Tokenizer],
    architecture: str,
    context_length: int,
    notes: list[str],
    shard: Shard | None,
    packed: PackedWeights | None,
) -> LoadedModel:
    model.eval()
    if shard is not None:
        shard(model, config)
    rows = position_rows(model) or context_length
    if note := cuda_graphs.choose(model, recurrent.count(model)):
        notes = [*notes, note]
    weight_bytes = evaluate(model) if packed is None else packed.nbytes
    tokenizer, length = make_tokenizer(), min(context_length, rows)
    return LoadedModel(
        model, config, tokenizer, architecture, length, tuple(notes), weight_bytes, packed
    )


def _note_density(notes: list[str], device: Device, dense: bool) -> None:
    if device == "cpu" and not dense:
        notes.append(
            "weights stay quantised because memory is short, which is several times slower"
        )


def context_length_of(config: Mapping[str, Any]) -> tuple[int, bool]:
    """Return the context length in tokens, and whether the config names it.

    With yarn it is at least the original length times the factor, as vLLM computes it.
    """
    inner = (config.get(part) for part in TEXT_PARTS)
    for part in (config, *(each for each in inner if isinstance(each, dict))):
        for key in _CONTEXT_KEYS:
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return max(value, _extended(part.get("rope_scaling"))), True
    return _DEFAULT_CONTEXT, False


def _extended(rope: Any) -> int:
    """Return the context length to which yarn extends a model, 0 for other rotations."""
    if not isinstance(rope, dict) or rope.get("rope_type") != "yarn":
        return 0
    length, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if not isinstance(length, int) or not isinstance(factor, int | float):
        return 0
    return int(length * Fraction(factor)) if 1 < factor < _MAX_YARN_FACTOR else 0
