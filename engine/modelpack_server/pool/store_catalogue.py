"""StoreCatalogue: the models in the local store, loaded from its blobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Literal

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Index, parse_manifest_or_index
from modelpack.artifacts.model import Model, Role
from modelpack.errors import InvalidReferenceError, ModelpackError, NotFoundError
from modelpack.formats.adapter import Adapter, AdapterError, read_adapter_files
from modelpack.formats.config_json import SPEECH_FAMILIES
from modelpack.hub.reference import local_name
from modelpack.operations.lookup import stored_model
from modelpack.operations.model_list import list_models
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.resolve import has_packed_weights
from modelpack.store import lookup
from modelpack.store.layout import LayoutStore
from modelpack_engine.async_engine import AsyncEngine, EngineClient
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.metrics import Meter
from modelpack_engine.errors import EngineError, ModelLoadError
from modelpack_engine.platform import blas
from modelpack_engine.process_engine import ProcessEngine
from modelpack_server.pool.adapters import Adapters, ServedAdapter, base_of
from modelpack_server.pool.catalogue import LoadedEngine, StoredModel
from modelpack_server.pool.model_defaults import (
    ModelDefaults,
    sampling_of_files,
    template_of_files,
)
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.tool_parsers.families import find_format

if TYPE_CHECKING:
    from modelpack_engine.distributed.leader import Ranks
    from modelpack_engine.embedding.async_embedder import AsyncEmbedder
    from modelpack_engine.embedding.loader import Purpose
    from modelpack_engine.models import ModelFiles
    from modelpack_engine.runner.base_engine import BaseEngine
    from modelpack_engine.speech.async_transcriber import AsyncTranscriber
    from modelpack_server.stored_models import Opened

_log = logging.getLogger(__name__)

# The bytes of the KV cache on a CPU by default, and of a step's arrays.
_KV_BYTES = 512 * 1024**2
# The factor by which quantised weights grow when the engine unpacks them to float32 on a CPU, for
# the usual 4 to 5 bits per weight.
_UNPACKED = 7
_KV_SHARE = 0.5


class StoreCatalogue:
    """A catalogue of the models in a store; `config` is the default configuration of engines.

    With `ranks`, an engine runs on all of them, so only one generating model can be loaded. If
    `remote` has a trust policy, only models that satisfy it are loaded. `files` has further models,
    whose names come first. `adapters` are loaded with the models that they change; their names come
    before all others. With `engine_process`, generating models run in processes of their own.
    """

    def __init__(
        self,
        store: LayoutStore | None = None,
        config: EngineConfig | None = None,
        ranks: Ranks | None = None,
        remote: RemoteOptions | None = None,
        files: Sequence[LayoutStore] = (),
        adapters: Adapters | None = None,
        *,
        engine_process: bool = False,
    ) -> None:
        blas.prepare()
        self.ranks = ranks
        # Models are loaded by digest, which already determines the variant.
        self.remote = replace(remote or RemoteOptions(), variant=None)
        self.store = store or LayoutStore()
        self.adapters = Adapters() if adapters is None else adapters
        self._files = files
        self._engine_process = engine_process
        self.config = config or EngineConfig()
        self._abilities: dict[Digest, tuple[Purpose, bool, bool, bool]] = {}
        self._of_templates: dict[Digest, tuple[str, ...]] = {}

    def version(self) -> object:
        """Return the time of the last change of the store's index, and the adapters' version."""
        try:
            status = (self.store.root / "index.json").stat()
        except OSError:
            return self.adapters.version
        return status.st_mtime_ns, status.st_size, status.st_ino, self.adapters.version

    def find(self, name: str) -> StoredModel:
        """Return the model or the adapter with this name; raise `NotFoundError`."""
        served = self.adapters.named(name) or self._adapter_of_base(name)
        if served is not None:
            return self._described_adapter(served)
        store = self._store_of(name)
        try:
            model = stored_model(store, name)
        except InvalidReferenceError as error:
            raise NotFoundError(f"no such model: {name!r} ({error})") from error
        served = self.adapters.named(str(model.digest))
        if served is not None:
            return self._described_adapter(served)
        names, origins = _names(store, model)
        return self._described(store, model, names, origins)

    def _adapter_of_base(self, name: str) -> ServedAdapter | None:
        """Return the adapter that `BASE:NAME` names, where BASE is any name of its base."""
        base, adapter = base_of(name)
        served = self.adapters.named(adapter) if base else None
        if served is None:
            return None
        with suppress(NotFoundError, InvalidReferenceError):
            if str(stored_model(self._store_of(base), base).digest) == served.base:
                return served
        return None

    def _described_adapter(self, served: ServedAdapter) -> StoredModel:
        """Return an adapter with the names given to it, then those in the store."""
        names = self.adapters.names(served.key)
        origins: tuple[str, ...] = ()
        if served.store is self.store:
            stored, origins = _names(served.store, served.model)
            names = tuple(dict.fromkeys((*names, *stored)))
        return replace(
            _described(served.model, names),
            origins=origins,
            base=served.base,
            adapter=served.name,
            merged=served.name if self.adapters.merges else "",
        )

    def _store_of(self, name: str) -> LayoutStore:
        """Return the store with the model `name`; for an unknown name, the local store."""
        for store in self._files:
            with suppress(NotFoundError, InvalidReferenceError):
                store.resolve(local_name(name))
                return store
        return self.store

    def uses_drafters(self, settings: ModelSettings) -> bool:
        """Return whether models with `settings` run with the drafters that the store has."""
        from modelpack_server.stored_models import looks_for_drafter

        return self.ranks is None and looks_for_drafter(settings.engine_config(self.config))

    def stored(self) -> Sequence[StoredModel]:
        """Return the readable models that can be served."""
        found = []
        for store in (*self._files, self.store):
            for model, names, origins in _stored(store):
                served = self.adapters.named(str(model.digest))
                if served is not None:
                    found.append(self._described_adapter(served))
                elif not _needs_base(model):
                    found.append(self._described(store, model, names, origins))
        return found

    def needs(self, model: StoredModel, settings: ModelSettings, limit: int | None = None) -> int:
        """Return an estimate of the loaded model's memory, in bytes.

        A drafter that the user did not ask for is left out if it would exceed `limit` bytes.
        """
        from modelpack_engine.models.adapter import dense_bytes
        from modelpack_engine.platform.device import choose_device
        from modelpack_engine.speech.loader import loaded_bytes
        from modelpack_server.stored_models import (
            context_length_of_files,
            is_quantised,
            with_drafter,
        )

        store = self._store_of(model.key)
        opened = self._opened(model, store)
        config = self._with_slots(settings.engine_config(self.config), model.key, opened.files)
        weights = self._loaded_bytes(store, opened.model, config)
        purpose = _purpose_in(opened.files, settings)
        if purpose == "transcription":
            return loaded_bytes(opened.files, choose_device(config))
        if purpose != "generation":
            return weights  # the memory of a batch is temporary
        asked, context = config.max_model_len, context_length_of_files(opened.files)
        if asked is not None and context is not None and asked > context:
            raise ModelLoadError(
                f"max_model_len is {asked}, but this model's context is {context}",
                hint=f"choose 2 to {context}",
            )
        if self.ranks is not None:
            weights //= self.ranks.size
        weights += self.adapters.bytes_of(model.key)
        adapter = self._merged(model.key, opened.files)
        if adapter is not None and is_quantised(opened.files):
            weights += dense_bytes(adapter)
        need = weights + (config.kv_cache_bytes or _KV_BYTES)
        drafting = config
        if self.ranks is None:
            drafting = with_drafter(config, opened.model, self.store, self.remote)
        optional = drafting is not config and config.speculative_method is None
        if drafting.uses_draft_model and isinstance(drafting.draft_model, str):
            try:
                draft = stored_model(self.store, drafting.draft_model)
                with_draft = need + self._loaded_bytes(self.store, draft, drafting)
            except ModelpackError:
                if not optional:
                    raise
                return need  # `load` says why it is not used
            if not optional or limit is None or with_draft <= limit:
                return with_draft
        return need

    def _with_slots(self, config: EngineConfig, key: str, files: ModelFiles) -> EngineConfig:
        """Return `config` with slots for adapters, if the model has some or is to have some.

        If requests may add adapters, a model that MLX runs anyway has slots, which cost nothing.
        """
        from modelpack_engine.llama_cpp.library import choose_backend
        from modelpack_engine.platform.device import choose_device

        adapters = self.adapters
        wanted = bool(adapters.of(key)) or key in adapters.expected
        if not wanted and adapters.grows:
            wanted = self.ranks is not None
            wanted = wanted or choose_backend(files, config, choose_device(config)) == "mlx"
        if not wanted or adapters.merges:
            return config
        return replace(config, max_loras=adapters.max_loaded)

    def _merged(self, key: str, files: ModelFiles) -> Adapter | None:
        """Return the adapter that is merged into a model as it is loaded, if any."""
        found = self.adapters.to_merge(key)
        if found is not None or files.adapter is None:
            return found
        return read_adapter_files(None, files.adapter)

    def load(
        self, model: StoredModel, settings: ModelSettings, meter: Meter, room: int | None
    ) -> LoadedEngine:
        """Load a model; raises `EngineError`, `OutOfMemoryError` if it does not fit."""
        from modelpack_engine.embedding.async_embedder import AsyncEmbedder
        from modelpack_engine.embedding.loader import load_embedder
        from modelpack_engine.platform.device import choose_device
        from modelpack_engine.speech.async_transcriber import AsyncTranscriber
        from modelpack_engine.speech.loader import load_transcriber
        from modelpack_server.stored_models import (
            draft_files,
            load_model,
            load_on_ranks,
            load_with_drafter,
            with_drafter,
        )

        store = self._store_of(model.key)
        opened = self._opened(model, store)
        adapters = self.adapters.of(model.key)
        purpose = _purpose_in(opened.files, settings)
        if purpose != "generation" and adapters:
            raise ModelLoadError(
                f"adapter {adapters[0].name}: its base generates no text",
                hint="serve adapters of models that generate text",
            )
        if purpose == "transcription":
            transcriber = AsyncTranscriber(
                lambda: load_transcriber(opened.files, device=choose_device(self.config)), meter
            )
            _wait_until_ready(transcriber)
            return LoadedEngine(transcriber, transcriber.model.architecture)
        if purpose != "generation":
            embedder = AsyncEmbedder(
                lambda: load_embedder(
                    opened.files,
                    device=choose_device(self.config),
                    ignored_fields=self.config.ignore_config_fields,
                ),
                meter,
            )
            _wait_until_ready(embedder)
            return LoadedEngine(embedder, embedder.model.config.architecture)
        merged = self.adapters.merged_into(model.key)
        if merged is not None:
            opened, adapters = opened.with_adapter(merged.verified(self.remote), merged.key), ()
        asked = chosen = settings.engine_config(self.config)
        if self.ranks is None:
            chosen = with_drafter(asked, opened.model, self.store, self.remote)
        optional = chosen is not asked and asked.speculative_method is None
        if optional and room is not None and self.needs(model, settings) > room:
            _log.warning("the drafter %s is not used: no memory for it", chosen.draft_model)
            chosen = asked
        if "gpu_memory_utilization" in settings.engine_fields():
            room = None  # the model's own settings say how much memory it may use

        def started(chosen: EngineConfig) -> EngineClient:
            chosen = self._with_slots(chosen, model.key, opened.files)
            config = partial(_within, chosen, self.adapters.bytes_of(model.key), room)
            draft = draft_files(chosen, self.store, self.remote)
            make_engine: Callable[[], BaseEngine]
            if self.ranks is None:
                files = replace(opened, store=None, remote=None)  # what is left needs neither
                make_engine = partial(load_model, files, chosen, config, draft)
            else:
                make_engine = partial(load_on_ranks, self.ranks, opened, self.config, config)
            engine: EngineClient
            if self._engine_process:
                engine = ProcessEngine(make_engine, meter)
            else:
                engine = AsyncEngine(make_engine, meter)
            _wait_until_ready(engine)
            return engine

        try:
            engine = load_with_drafter(asked, chosen, started)
        except AdapterError as error:
            raise (error if merged is None else merged.misfit(error)) from error
        try:
            self._add_adapters(engine, adapters)
        except BaseException:
            engine.close()
            raise
        own = ModelDefaults.of_model(opened.model, store)
        defaults = {**sampling_of_files(opened.files), **own.sampling()}
        return LoadedEngine(engine, engine.model_type, defaults, own.preface)

    def _add_adapters(self, engine: EngineClient, adapters: Sequence[ServedAdapter]) -> None:
        for adapter in adapters:
            try:
                adapter.add_to(engine, self.remote)
            except ModelpackError as error:
                if adapter.required:
                    raise
                _log.warning("the adapter %s is unloaded: %s", adapter.name, error)
                self.adapters.remove(adapter)

    def _opened(self, model: StoredModel, store: LayoutStore) -> Opened:
        """Open a model; raise `NotFoundError` for an adapter or a drafter, as `open_model` does."""
        from modelpack_server.stored_models import open_model

        found = stored_model(store, model.key)
        if _needs_base(found):
            kind, hint = "an adapter", "add it with --adapter, or by POST /v1/load_lora_adapter"
            if found.is_drafter:
                kind, hint = "a drafter", "name its base: the server finds the drafter"
            name = model.names[0] if model.names else model.key
            raise NotFoundError(f"{name} is {kind}, which cannot run without its base", hint=hint)
        return open_model(model.key, pull=False, store=store, remote=self.remote)

    def _described(
        self, store: LayoutStore, model: Model, names: tuple[str, ...], origins: tuple[str, ...]
    ) -> StoredModel:
        purpose, reads_pictures, reads_sounds, reads_videos = self._abilities_of(store, model)
        merged = self.adapters.merged_into(str(model.digest))
        return replace(
            _described(model, names),
            origins=origins,
            merged="" if merged is None else merged.name,
            purpose=purpose,
            reads_pictures=reads_pictures,
            reads_sounds=reads_sounds,
            reads_videos=reads_videos,
            templated=self._templated(store, model) if purpose == "generation" else (),
        )

    def _templated(self, store: LayoutStore, model: Model) -> tuple[str, ...]:
        """Return which of `tools` and `reasoning` a model's chat template has here; read it once.

        The package's config decides where `_abilities_of` opens no file.
        """
        from modelpack_engine.models.files import ModelFiles

        if self.remote.trust is not None or has_packed_weights(model):
            stated = model.config.capabilities
            return tuple(name for name in ("tools", "reasoning") if name in stated)
        if model.digest not in self._of_templates:
            try:
                template = template_of_files(ModelFiles.from_model(model, store.blob_path))
            except ModelpackError:
                return ()
            written = find_format(template)
            found = {"tools": written.family, "reasoning": written.reasoning}
            self._of_templates[model.digest] = tuple(k for k, v in found.items() if v is not None)
        return self._of_templates[model.digest]

    def _abilities_of(
        self, store: LayoutStore, model: Model
    ) -> tuple[Purpose | Literal[""], bool, bool, bool]:
        """Return a model's purpose, and whether it reads pictures, sounds and videos, by its files.

        They are read once. The purpose is "" if they cannot be loaded.

        The architecture in the package's config decides if weights are in archives, and with a
        trust policy, which must be satisfied before a file is opened.
        """
        from modelpack_engine.embedding.encoder_checkpoint import is_encoder
        from modelpack_engine.embedding.loader import purpose_of
        from modelpack_engine.llama_cpp.library import may_run_mtmd
        from modelpack_engine.models.files import ModelFiles
        from modelpack_engine.models.loader import (
            may_read_pictures,
            may_read_sounds,
            may_read_videos,
        )
        from modelpack_engine.platform.device import choose_device

        if model.is_drafter:
            return "", False, False, False
        if self.remote.trust is not None or has_packed_weights(model):
            name = model.config.architecture  # llama.cpp writes nomic-bert for nomic_bert
            if name in SPEECH_FAMILIES and model.config.format == "safetensors":
                return "transcription", False, False, False
            encodes = any(is_encoder({"model_type": n}) for n in (name, name.replace("-", "_")))
            return "embedding" if encodes else "generation", False, False, False
        if model.digest not in self._abilities:
            try:
                files = ModelFiles.from_model(model, store.blob_path)
                purpose = purpose_of(files)
                device = choose_device(self.config)
                sees = may_read_pictures(files) or may_run_mtmd(files, self.config, device)
                reads = sees, may_read_sounds(files), may_read_videos(files)
            except ModelpackError:
                return "", False, False, False
            self._abilities[model.digest] = purpose, *reads
        return self._abilities[model.digest]

    def _loaded_bytes(self, store: LayoutStore, model: Model, config: EngineConfig) -> int:
        """Return an estimate of the weights' memory in an engine with `config`, in bytes."""
        from modelpack_engine.llama_cpp.library import choose_backend
        from modelpack_engine.models.loader import runs_packed
        from modelpack_engine.models.safetensors import speech_bytes
        from modelpack_engine.platform.device import choose_device
        from modelpack_server.stored_models import stored_files

        held = (Role.WEIGHT, Role.PROJECTOR)
        size = sum(file.descriptor.size for file in model.files() if file.role in held)
        device = choose_device(config)
        files = stored_files(model, store)
        if model.config.format != "gguf":
            return size - speech_bytes(files)
        if device != "cpu":
            return size
        backend = "mlx" if self.ranks is not None else choose_backend(files, config, device)
        # llama.cpp may leave the model to the kernels.
        if backend != "mlx" and runs_packed(files, config, device):
            return size + size // 8  # codes of 4 bits take 5 with their scales
        return size if backend == "llama.cpp" else size * _UNPACKED


def _names(store: LayoutStore, model: Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a model's names in a store, the one that the user pulled first, and its origins.

    A variant also has the names of the indexes that list it.
    """
    listed = [found for found in store.models() if found.digest == model.digest]
    listed += [index for index in store.indexes() if _lists(store, index, model.digest)]
    references = [reference for found in listed for reference in found.references]
    references.sort(key=lambda reference: reference != model.reference)
    origins = [origin for found in listed for origin in found.origins]
    names = [reference.familiar for reference in references]
    return tuple(dict.fromkeys(names)), tuple(dict.fromkeys(origins))


def _lists(store: LayoutStore, index: lookup.StoredModel, digest: Digest) -> bool:
    """Return whether an index in the store lists a manifest; False for a damaged index."""
    try:
        raw = store.fetch_manifest(index.descriptor)
        parsed = parse_manifest_or_index(raw, str(index.digest))
    except ModelpackError:
        return False
    return isinstance(parsed, Index) and any(m.digest == digest for m in parsed.manifests)


def _stored(store: LayoutStore) -> Iterator[tuple[Model, tuple[str, ...], tuple[str, ...]]]:
    """Yield the readable models of a store, with their names and origins."""
    origins = {model.digest: model.origins for model in store.models()}
    for listed in list_models(store):
        if listed.model is not None:
            names = tuple(ref.familiar for ref in listed.references)
            yield listed.model, names, origins.get(listed.model.digest, ())


def _needs_base(model: Model) -> bool:
    """Return whether a model is an adapter or a drafter without weights of its own."""
    if model.is_drafter:
        return True
    return model.is_adapter and all(file.role is not Role.WEIGHT for file in model.files())


def _purpose_in(files: ModelFiles, settings: ModelSettings) -> Purpose:
    """Return what a model is loaded for: its own purpose, or an embedding if settings say so."""
    from modelpack_engine.embedding.loader import purpose_of

    purpose = purpose_of(files)
    return "embedding" if purpose == "generation" and settings.mode != "completion" else purpose


def _wait_until_ready(engine: EngineClient | AsyncEmbedder | AsyncTranscriber) -> None:
    """Return when the engine is loaded; raise what loading it raised."""
    try:
        engine.wait_until_ready()
    except EngineError:
        engine.close()
        if isinstance(engine.error, ModelpackError):
            raise engine.error from None
        raise


def _described(model: Model, names: tuple[str, ...]) -> StoredModel:
    config = model.config
    created = 0
    with suppress(ValueError):  # missing or invalid
        created = int(datetime.fromisoformat(config.created or "").timestamp())
    return StoredModel(
        key=str(model.digest),
        names=names,
        size=sum(layer.size for layer in model.manifest.layers),
        created=max(0, created),
        context_size=config.context_size or None,
        architecture=config.architecture,
        parameters=config.parameters,
        quantization=config.quantization,
        format=config.format,
    )


def _within(
    config: EngineConfig, adapter_bytes: int, room: int | None, _context: int, weight_bytes: int
) -> EngineConfig:
    """Return `config` with a KV cache that fits into `room` together with the weights.

    A function of the module, since a process of an engine has to find it.
    """
    if room is None or config.kv_cache_bytes is not None:
        return config
    from modelpack_engine.runner.kv_cache_size import on_gpu

    left = max(0, room - weight_bytes - adapter_bytes)
    if on_gpu():  # leave memory for other models: by default the engine would use nearly all of it
        return replace(config, kv_cache_bytes=int(left * _KV_SHARE))
    return replace(config, kv_cache_bytes=left) if left < _KV_BYTES else config
