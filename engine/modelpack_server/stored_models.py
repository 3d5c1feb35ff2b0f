"""Open a stored model by name and load it into an engine; blobs are read in place."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import mlx.core as mx

from modelpack.artifacts.model import Model
from modelpack.errors import ModelpackError, UntrustedError
from modelpack.formats.adapter import Adapter, AdapterError
from modelpack.formats.drafter import DrafterKind, drafter_kind
from modelpack.operations.drafters import stored_drafters
from modelpack.operations.pull import find_model
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.resolve import has_packed_weights, unpacked_files
from modelpack.progress import ProgressCallback
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.distributed.follower import Load
from modelpack_engine.distributed.leader import Ranks
from modelpack_engine.embedding.embedder import CrossEncoder, Embedder
from modelpack_engine.embedding.loader import load_embedder
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError, LoadCancelledError, ModelLoadError
from modelpack_engine.llama_cpp.library import choose_backend
from modelpack_engine.models import LoadedModel, ModelFiles, load, load_progress
from modelpack_engine.models.assistant import load_assistant
from modelpack_engine.models.eagle import load_head
from modelpack_engine.models.gguf_blocks import is_float
from modelpack_engine.models.gguf_file import GGUFFile
from modelpack_engine.models.loader import Shard, context_length_of, gguf_tokenizer_of, runs_packed
from modelpack_engine.models.mtp import load_mtp_head
from modelpack_engine.models.safetensors import read_config
from modelpack_engine.platform.device import choose_device
from modelpack_engine.runner.base_engine import BaseEngine
from modelpack_engine.speculation.speculator import DraftingHead

_log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True)
class Opened:
    """A model of the store whose files are known: what is left is to load it.

    `remote` says who is trusted; a draft model that is loaded with it has to be, too. `adapter` is
    merged into the weights; `adapter_id` stands for its content in the prefix cache.
    """

    model: Model
    files: ModelFiles
    store: LayoutStore | None = None
    remote: RemoteOptions | None = None
    adapter: Adapter | None = None
    adapter_id: str = ""

    @property
    def model_id(self) -> str:
        """The weights' name in the prefix cache."""
        return f"{self.model.digest} {self.adapter_id}".strip()

    def with_adapter(self, adapter: Adapter, identity: str) -> Opened:
        """Return the model with an adapter to merge; `identity` stands for its content."""
        return replace(self, adapter=adapter, adapter_id=identity)

    def engine(self, config: EngineConfig | None = None) -> BaseEngine:
        """Load the weights and return an engine; has to run in the thread that steps it.

        The context size in the model's config is the default of `max_model_len`.
        """

        def engine_of(chosen: EngineConfig) -> BaseEngine:
            draft = draft_files(chosen, self.store, self.remote)
            return load_model(self, chosen, lambda _context, _bytes: chosen, draft)

        asked = config or EngineConfig()
        chosen = with_drafter(asked, self.model, self.store, self.remote)
        return load_with_drafter(asked, chosen, engine_of)

    def with_context_size(self, config: EngineConfig) -> EngineConfig:
        """Return `config` with the model's own context size as the default of `max_model_len`."""
        if config.default_model_len is not None:
            return config
        return replace(config, default_model_len=self.model.config.context_size)


def load_model(
    opened: Opened,
    device: EngineConfig,
    configure: Callable[[int, int], EngineConfig],
    draft: ModelFiles | None = None,
) -> BaseEngine:
    """Load the weights; return an engine.

    `device` says where and by what to compute, `configure` how to run, once the context that the
    model holds (in tokens) and the bytes of all weights are known; `draft` are the files of a draft
    model. Has to run in the thread that steps it.
    """
    kind = _drafter_kind(opened.files)
    if kind is not None:
        raise ModelLoadError(
            f"{opened.model.reference or opened.model.digest} is a drafter ({kind}), which cannot "
            "run without its model",
            hint="serve its model with --draft-model naming the drafter",
        )
    where = choose_device(device)
    backend = choose_backend(opened.files, device, where)
    # The library for CPUs may know a model whose pictures llama.cpp is to read.
    packable = runs_packed(opened.files, device, where)
    otherwise: Literal["cpu kernels", "mlx"] = "cpu kernels" if packable else "mlx"
    if backend == "llama.cpp" and opened.adapter is not None:
        if device.backend != "auto":
            raise ModelLoadError(
                "llama.cpp does not run models with a merged adapter", hint="use --backend mlx"
            )
        backend = otherwise
    if backend == "llama.cpp":
        try:
            return _load_llama_cpp(opened, configure, needs_pictures=packable)
        except EngineError as error:
            # The library for CPUs may also run with settings that llama.cpp refuses.
            other = isinstance(error, ModelLoadError) or packable
            if device.backend != "auto" or isinstance(error, LoadCancelledError) or not other:
                raise
            backend = otherwise
            _log.warning("llama.cpp does not run the model, %s will: %s", backend, error)
    ignored = device.ignore_config_fields
    packed = backend == "cpu kernels"
    loaded = load(
        opened.files,
        device=where,
        ignored_fields=ignored,
        packed=packed,
        adapter=opened.adapter,
    )
    drafting: LoadedModel | DraftingHead | None = None
    kind = None if draft is None else _drafter_kind(draft)
    if draft is not None and kind is not None:
        with mx.stream(mx.cpu if where == "cpu" else mx.gpu):
            drafting = load_head(draft) if kind == "eagle3" else load_assistant(draft)
    elif draft is not None:
        drafting = load(draft, device=where, ignored_fields=ignored)
    elif device.speculation == "mtp":
        with mx.stream(mx.cpu if where == "cpu" else mx.gpu):
            drafting = load_mtp_head(opened.files, loaded)
    weight_bytes = loaded.weight_bytes + (drafting.weight_bytes if drafting else 0)
    config = opened.with_context_size(configure(loaded.context_length, weight_bytes))
    load_progress.warm_up()
    return Engine(loaded, config, model_id=opened.model_id, draft=drafting)


def _drafter_kind(files: ModelFiles) -> DrafterKind | None:
    """Return which drafter the files are, or None for those of a model."""
    return drafter_kind(files.json("config.json")) if files.format == "safetensors" else None


def _load_llama_cpp(
    opened: Opened, configure: Callable[[int, int], EngineConfig], *, needs_pictures: bool
) -> BaseEngine:
    from modelpack_engine.llama_cpp.engine import LlamaCppEngine
    from modelpack_engine.llama_cpp.model import LlamaModel, try_out
    from modelpack_engine.llama_cpp.mtmd import MtmdProcessor

    files, notes, no_vision, pictures = opened.files, opened.files.notes, "", None
    tokenizer = gguf_tokenizer_of(files)
    load_progress.begin(files.weights)
    try_out(files.weights)
    if files.projector is not None:
        try:
            pictures = MtmdProcessor(files.weights, files.projector)
        except ModelpackError as error:
            no_vision = str(error).replace(str(files.projector), "the projector")
            notes = (*notes, f"pictures are not read: {no_vision}")
            if needs_pictures:
                raise ModelLoadError(no_vision) from error
    try:
        model = LlamaModel(files.weights)
        load_progress.warm_up()
        weight_bytes = model.weight_bytes + (0 if pictures is None else pictures.weight_bytes)
        config = opened.with_context_size(configure(model.context_length, weight_bytes))
        engine = LlamaCppEngine(
            model, tokenizer, config, notes=notes, no_vision=no_vision, pictures=pictures
        )
    except BaseException:
        if pictures is not None:
            pictures.close()
        raise
    _log.info("%s: %s", opened.model.reference or opened.model.digest, engine.notes[-1])
    return engine


def open_model(
    name: str,
    *,
    pull: bool = True,
    drafter: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Opened:
    """Find the model `name` in the store; with `pull`, one that is not there is pulled first.

    With `drafter`, its drafter is pulled with it. Raises `NotFoundError`, `ModelLoadError` for
    files that cannot be loaded, and what `modelpack.pull` raises.
    """
    store = store or LayoutStore()
    watch = watching(progress)
    model = find_model(name, store, pull=pull, remote=remote, watch=watch, drafter=drafter)
    return Opened(model, stored_files(model, store), store, remote)


def stored_files(model: Model, store: LayoutStore) -> ModelFiles:
    """Return the files of `model`; weights in archives are unpacked into the store, once.

    Raises `ModelLoadError` for files that cannot be loaded, `NotFoundError` for a missing blob.
    """
    if not has_packed_weights(model):
        return ModelFiles.from_model(model, store.blob_path)
    return ModelFiles.from_located(model, unpacked_files(model, store, watching(None)))


def context_length_of_files(files: ModelFiles) -> int | None:
    """Return the context in tokens that the files' headers name, None if they name none."""
    if files.format == "gguf":
        metadata = GGUFFile.open(files.weights).metadata
        name = metadata.text("general.architecture", "")
        return metadata.integer(f"{name}.context_length", 0) or None
    return context_length_of(read_config(files))[0]


def is_quantised(files: ModelFiles) -> bool:
    """Return whether weights are quantised, by the files' headers."""
    if files.format == "gguf":
        tensors = GGUFFile.open(files.weights)
        return any(not is_float(tensor.dtype) for tensor in tensors)
    config = read_config(files)
    return bool(config.get("quantization") or config.get("quantization_config"))


def looks_for_drafter(config: EngineConfig) -> bool:
    """Return whether an engine with `config` uses the stored drafter of its model, if there is one.

    It does not if `config` names a draft model or another method than EAGLE-3. Only MLX runs
    drafters, which is not the default on a CPU.
    """
    method = config.speculative_method
    if config.draft_model is not None or method not in (None, "eagle3"):
        return False
    return method is not None or config.backend == "mlx" or choose_device(config) != "cpu"


def with_drafter(
    config: EngineConfig, model: Model, store: LayoutStore | None, remote: RemoteOptions | None
) -> EngineConfig:
    """Return `config` with a stored drafter of `model`, if `looks_for_drafter`.

    It is the first by digest whose files can be opened and that satisfies the policy in `remote`.
    Without such a one, raises what `draft_files` raised if `config` names EAGLE-3.
    """
    if store is None or not looks_for_drafter(config):
        return config
    name = model.reference or model.digest
    failure: ModelpackError | None = None
    for digest in stored_drafters(model.digest, store):
        chosen = replace(config, draft_model=str(digest))
        try:
            draft_files(chosen, store, remote)
        except ModelpackError as error:
            _log.warning("%s: the drafter %s is not used: %s", name, digest, error)
            failure = error
        else:
            _log.info("%s: drafts with %s", name, digest)
            return chosen
    if failure is not None and config.speculative_method is not None:
        raise failure
    return config


def load_with_drafter(
    asked: EngineConfig, chosen: EngineConfig, load: Callable[[EngineConfig], Loaded]
) -> Loaded:
    """Return what `load` returns for `chosen`, which is `asked` or has a drafter from the store.

    If loading fails and the user did not ask for the drafter, load with `asked`.
    """
    if chosen is asked or asked.speculative_method is not None:
        return load(chosen)
    try:
        return load(chosen)
    except (LoadCancelledError, AdapterError):
        raise
    except ModelpackError as error:
        failure = str(error)
    gc.collect()  # the frames of the failed load are in cycles, with its weights
    loaded = load(asked)
    _log.warning("the drafter %s is not used: %s", chosen.draft_model, failure)
    return loaded


def draft_files(
    config: EngineConfig, store: LayoutStore | None, remote: RemoteOptions | None
) -> ModelFiles | None:
    """Return the files of the draft model that `config` asks for, None if it asks for none.

    A name is one of the store's. Raises as `open_model` does, and `UntrustedError` for a directory
    where `remote` says who is trusted: nobody can have signed it.
    """
    if not config.uses_draft_model or config.draft_model is None:
        return None
    if isinstance(config.draft_model, str):
        remote = None if remote is None else replace(remote, variant=None)
        return open_model(config.draft_model, pull=False, store=store, remote=remote).files
    if remote is not None and remote.trust is not None:
        raise UntrustedError(
            f"draft model {config.draft_model}: a directory has no signatures",
            hint="package it, sign the model, and name that",
        )
    return ModelFiles.from_directory(config.draft_model)


def open_embedder(
    name: str,
    *,
    pull: bool = True,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    device: Literal["auto", "gpu", "cpu"] = "auto",
) -> Embedder:
    """Open the embedding model `name` of the store; with `pull`, a missing one is pulled first.

    Raises `NotFoundError`, `ModelLoadError` for files that cannot be loaded or are no embedding
    model's, and what `modelpack.pull` raises.
    """
    model = _open(name, pull, store, remote, progress, device)
    if isinstance(model, CrossEncoder):
        raise ModelLoadError(
            f"{name}: ranks documents, and has no vectors", hint="use open_cross_encoder"
        )
    return model


def open_cross_encoder(
    name: str,
    *,
    pull: bool = True,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    device: Literal["auto", "gpu", "cpu"] = "auto",
) -> CrossEncoder:
    """Open the cross-encoder `name`, as `open_embedder` opens an embedding model."""
    model = _open(name, pull, store, remote, progress, device)
    if isinstance(model, Embedder):
        raise ModelLoadError(f"{name}: is no cross-encoder", hint="use open_embedder")
    return model


def _open(
    name: str,
    pull: bool,
    store: LayoutStore | None,
    remote: RemoteOptions | None,
    progress: ProgressCallback | None,
    device: Literal["auto", "gpu", "cpu"],
) -> Embedder | CrossEncoder:
    opened = open_model(name, pull=pull, store=store, remote=remote, progress=progress)
    return load_embedder(opened.files, device=choose_device(EngineConfig(device=device)))


def load_on_ranks(
    ranks: Ranks,
    opened: Opened,
    device: EngineConfig,
    configure: Callable[[int, int], EngineConfig],
) -> Engine:
    """Load a model on all ranks; return an engine.

    As `load_model`, where the bytes of the weights are those of this rank's part.
    """

    def settings(loaded: LoadedModel) -> EngineConfig:
        load_progress.warm_up()
        return opened.with_context_size(configure(loaded.context_length, loaded.weight_bytes))

    part = partial(_part, opened.files, device, opened.adapter)
    return ranks.engine(str(opened.model.digest), part, settings)


def parts_of(
    store: LayoutStore, device: EngineConfig, merged: Callable[[str], Adapter | None]
) -> Load:
    """Return what loads a follower's part of the models of its own store, by their digests.

    `merged` returns the adapter to merge into the model with a digest.
    """

    def load_part(digest: str, shard: Shard) -> LoadedModel:
        files = open_model(digest, pull=False, store=store).files
        return _part(files, device, merged(digest), shard)

    return load_part


def _part(
    files: ModelFiles, device: EngineConfig, adapter: Adapter | None, shard: Shard
) -> LoadedModel:
    return load(
        files,
        device=choose_device(device),
        ignored_fields=device.ignore_config_fields,
        shard=shard,
        adapter=adapter,
    )
