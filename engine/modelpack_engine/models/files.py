"""The files of a model: `ModelFiles`, the only input of the loaders, and bounded JSON documents."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import (
    CHAT_TEMPLATE,
    Model,
    ModelFile,
    Role,
    format_of,
    preferred_template,
    role_of,
)
from modelpack.bundles.links import open_blob
from modelpack.bundles.tar import Allowance, Content, TarLimits, TarReader
from modelpack.errors import IntegrityError
from modelpack.formats.projector import gguf_role, identified
from modelpack.formats.shards import INDEX_SUFFIX, find_shards, read_index, shard_set
from modelpack_engine.errors import ModelLoadError

#: The most bytes of one JSON document. Parsing takes 25 times as much memory, and blocks all
#: threads; the tokenizer_config.json of speech models has 12 MB.
MAX_BYTES = 16 * 1024 * 1024


def decode_json(raw: bytes, what: str) -> Any:
    """Return the value of the JSON document `raw`; `what` names it in a `ModelLoadError`."""
    if len(raw) > MAX_BYTES:
        raise ModelLoadError(f"{what}: {len(raw)} bytes of JSON, the limit is {MAX_BYTES}")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{what}: is not JSON: {error}") from None


def decode_object(raw: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object `raw`; `what` names it in a `ModelLoadError`.

    Infinity and NaN are accepted, because the configs of some models contain them.
    """
    value = decode_json(raw, what)
    if not isinstance(value, dict):
        raise ModelLoadError(f"{what}: is not a JSON object")
    return value


WeightFormat = Literal["safetensors", "gguf"]

#: The most bytes of one file other than weights. The largest vocabularies are 35 MB of JSON.
MAX_FILE_BYTES = 128 * 1024 * 1024
#: The most bytes of all files in the archives of one model.
MAX_ARCHIVE_BYTES = 512 * 1024 * 1024

#: The file in which sentence-transformers lists the parts of an embedding model.
MODULES = "modules.json"
_FORMATS: tuple[WeightFormat, ...] = ("gguf", "safetensors")
_LIMITS = TarLimits(max_bytes=MAX_ARCHIVE_BYTES)
_MODULE = re.compile(r"\w[\w-]*")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model, at their paths on disk; no weights are copied.

    `names` maps the path of each other file in the model (`config.json`, `tokenizer.json`, …) to
    its path on disk; the key of the chat template is always `chat_template.jinja`. It includes the
    weights of modules that `modules.json` lists after the model (`2_Dense/model.safetensors`).
    `archived` has the content of small files that came in a tar archive. `projector` is the GGUF
    file that encodes pictures for GGUF weights. `adapter` is a GGUF LoRA file to merge into the
    weights, which some models have in a layer of its own.
    """

    weights: tuple[Path, ...]
    format: WeightFormat
    names: Mapping[str, Path] = field(default_factory=dict)
    archived: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    projector: Path | None = None
    adapter: Path | None = None

    @classmethod
    def from_model(cls, model: Model, blob_path: Callable[[Digest], Path]) -> ModelFiles:
        """Return the files of `model`; `blob_path` finds blobs (`LayoutStore.blob_path`).

        Raises `ModelLoadError` if no weights can be loaded or the weights are of several models,
        and the store's error for a missing blob.
        """
        model = identified(model, lambda file: blob_path(file.descriptor.digest))
        located = [(file, blob_path(file.descriptor.digest)) for file in model.files()]
        return cls.from_located(model, located)

    @classmethod
    def from_located(cls, model: Model, located: Iterable[tuple[ModelFile, Path]]) -> ModelFiles:
        """Return the files of `model`, each given with its path. Raises as `from_model`."""
        weights: list[tuple[str, str, Path]] = []
        adapters: list[Path] = []
        names: dict[str, Path] = {}
        archived: dict[str, bytes] = {}
        projectors: list[Path] = []
        notes: list[str] = []
        located = tuple(located)
        sizes = [file.descriptor.size for file, _ in located if file.archive]
        allowance = Allowance(_LIMITS, sizes, others=0)
        template = preferred_template([(file.role, file.filepath or "") for file, _ in located])
        for at, (file, path) in enumerate(located):
            if file.archive:
                if file.role in (Role.WEIGHT, Role.PROJECTOR):
                    raise ModelLoadError(
                        f"{file.filepath or file.descriptor.digest.short}:"
                        " weights in a tar archive cannot be loaded",
                        hint="unpack the model with `modelpack bundle` and serve that directory",
                    )
                archived |= _content(file, path, allowance)
            elif file.role is Role.WEIGHT:
                weights.append((file.format, file.filepath or "", path))
            elif file.role is Role.PROJECTOR:
                projectors.append(path)
            elif file.role is Role.ADAPTER and model.is_adapter:
                raise ModelLoadError(
                    f"{_shown(model)} is a LoRA adapter, which cannot run without its base",
                    hint="run modelpack inspect to see the name of its base",
                )
            elif file.role is Role.ADAPTER:
                adapters.append(path)
                if file.format != "gguf" or len(adapters) > 1:
                    raise ModelLoadError(
                        f"{_shown(model)}: expected one adapter in GGUF beside the weights",
                        hint="serve the adapters with --adapter",
                    )
            elif at == template:
                names[CHAT_TEMPLATE] = path
            elif file.role is Role.CHAT_TEMPLATE:
                notes.append(f"{file.filepath} is left out: the model has another chat template")
            elif file.filepath:
                names[file.filepath] = path
        made = _assembled(
            weights, names, archived, notes, model.config.format.lower(), _shown(model)
        )
        if adapters:
            made = replace(made, adapter=adapters[0])
        return made.with_projectors(projectors)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> ModelFiles:
        """Return the files of the model in `directory`, or of one weight file and its shards.

        Raises `ModelLoadError` if there are no weights, or weights of several models.
        """
        root = Path(directory)
        shards = None
        if root.is_file():
            shards, root = find_shards(root), root.parent
        others, weights, projectors = [], [], []
        for path in _files_in(root):
            kind = format_of("", path.name)
            if not kind:
                others.append(path)
            elif shards is not None and path not in shards:
                continue
            elif kind == "gguf" and gguf_role(path, role_of("", path.name)) is Role.PROJECTOR:
                projectors.append(path)
            else:
                weights.append((kind, path.name, path))
        for module in _module_directories(root / MODULES if root / MODULES in others else None):
            others += _files_in(root / module) if (root / module).is_dir() else []
        names = {path.relative_to(root).as_posix(): path for path in others}
        for name in sorted(names):
            if name.endswith(".jinja") and "/" not in name:
                names.setdefault(CHAT_TEMPLATE, names[name])
        made = _assembled(weights, names, {}, [], "", str(directory))
        return made.with_projectors(projectors)

    def with_projectors(self, paths: Sequence[Path]) -> ModelFiles:
        """Return the files with the first projector, or a note that it is for other weights."""
        if not paths:
            return self
        if self.format != "gguf":
            note = "the multimodal projector is left out: only GGUF weights use one"
            return replace(self, notes=(*self.notes, note))
        notes = self.notes
        if len(paths) > 1:
            notes = (*notes, f"the first of {len(paths)} multimodal projectors is used")
        return replace(self, projector=paths[0], notes=notes)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file other than weights, or None if there is no such file."""
        if name in self.archived:
            return self.archived[name]
        path = self.names.get(name)
        if path is None:
            return None
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise ModelLoadError(f"{name}: {size} bytes, the limit is {MAX_FILE_BYTES}")
            return path.read_bytes()
        except OSError as error:
            raise ModelLoadError(f"{name}: cannot be read: {error.strerror}") from error

    def text(self, name: str) -> str | None:
        """Return the text of a file, or None if there is no such file."""
        raw = self.read(name)
        try:
            return None if raw is None else raw.decode()
        except UnicodeDecodeError as error:
            raise ModelLoadError(f"{name}: is not UTF-8 at byte {error.start}") from None

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in a file, or None if there is no such file."""
        raw = self.read(name)
        return None if raw is None else decode_object(raw, name)


def _assembled(
    weights: list[tuple[str, str, Path]],
    names: dict[str, Path],
    archived: dict[str, bytes],
    notes: list[str],
    wanted: str,
    what: str,
) -> ModelFiles:
    modules = _module_directories(names.get(MODULES))
    for module in [entry for entry in weights if entry[1].rpartition("/")[0] in modules]:
        weights.remove(module)
        names[module[1]] = module[2]
    kinds = {kind for kind, _, _ in weights}
    preferred = [kind for kind in _FORMATS if kind == wanted]
    chosen = next((kind for kind in (*preferred, *_FORMATS) if kind in kinds), None)
    if chosen is None and kinds == {"dduf"}:
        raise ModelLoadError(
            f"{what}: is a DDUF file, a model that generates images, which is not supported",
            hint="unpack it with `modelpack bundle`, and open the DDUF file with diffusers",
        )
    if chosen is None:
        has = f"has {', '.join(sorted(kinds - {''}))} only" if kinds - {""} else "has no weights"
        raise ModelLoadError(f"{what}: {has}, expected GGUF or safetensors")
    if len(kinds) > 1:
        notes.append(f"the weights are in several formats; {chosen} is loaded")
    of_kind = [(name, path) for kind, name, path in weights if kind == chosen]
    if chosen == "safetensors":
        # Those in folders are other models beside it, such as Phi-4 Multimodal's adapters.
        of_kind, others = [
            [entry for entry in of_kind if ("/" in entry[0]) == inside] for inside in (False, True)
        ]
        if of_kind and others:
            shown = ", ".join(name for name, _ in others[:3])
            notes.append(f"weights in folders are left out: {shown}")
        of_kind = _indexed(of_kind or others, names)
    else:
        _check_one_model([name for name, _ in of_kind], what)
    paths = tuple(path for _, path in of_kind)
    return ModelFiles(paths, chosen, names, archived, tuple(notes))


def _indexed(weights: list[tuple[str, Path]], names: Mapping[str, Path]) -> list[tuple[str, Path]]:
    """Leave out files that no index names: they have the same weights in another layout."""
    indexes = [path for name, path in names.items() if name.endswith(INDEX_SUFFIX)]
    if not indexes or not all(name for name, _ in weights):
        return weights
    wanted = frozenset().union(*(read_index(path) for path in indexes))
    present = {name.rpartition("/")[2] for name, _ in weights}
    if missing := sorted(wanted - present):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ModelLoadError(
            f"missing {', '.join(missing[:5])}{more}, which the index of the weights names",
            hint="the model is incomplete; pull or package it again",
        )
    return [(name, path) for name, path in weights if name.rpartition("/")[2] in wanted]


def _module_directories(listed: Path | None) -> tuple[str, ...]:
    """Return the directories of the modules that modules.json lists after the model.

    An invalid modules.json is ignored here: the loader of embedding models reports it.
    """
    if listed is None:
        return ()
    try:
        modules = json.loads(listed.read_bytes()[: 1 << 20])
    except (OSError, ValueError, RecursionError):
        return ()
    entries = modules[1:] if isinstance(modules, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return tuple(path for path in paths if isinstance(path, str) and _MODULE.fullmatch(path))


def _check_one_model(names: list[str], what: str) -> None:
    """Raise `ModelLoadError` unless the names are those of one GGUF file or of its shards."""
    sets = {shard_set(name) or name for name in names if name}
    if len(sets) > 1:
        listed = ", ".join(sorted(names)[:5])
        raise ModelLoadError(
            f"{what}: has the weights of several models: {listed}",
            hint="package each model separately",
        )


def _content(layer: ModelFile, path: Path, allowance: Allowance) -> dict[str, bytes]:
    """Return the files of an archive; archives of documentation and code are skipped."""
    if layer.role not in (Role.CONFIG, Role.FILE) or layer.archive is None:
        return {}
    what = f"layer {layer.filepath or layer.descriptor.digest.short}"
    found: dict[str, bytes] = {}
    with open_blob(path, layer.descriptor) as blob:
        content = Content(
            blob,
            layer.archive,
            what,
            limit=allowance.of(layer.descriptor.size),
            max_window_bytes=_LIMITS.max_window_bytes,
            on_read=lambda: None,
        )
        reader = TarReader(content, what, max_header_bytes=_LIMITS.max_header_bytes)
        for number, entry in enumerate(reader):
            if number >= _LIMITS.max_entries or entry.size > MAX_FILE_BYTES:
                raise IntegrityError(
                    f"{what}: the archive exceeds {_LIMITS.max_entries} files or"
                    f" {MAX_FILE_BYTES} bytes per file"
                )
            if entry.is_directory:
                continue
            name = entry.name.removeprefix("./")
            found[name] = b"".join(iter(lambda: reader.read(1 << 20), b""))
    allowance.spend(content.count)
    return found


def _files_in(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_file())
    except OSError as error:
        raise ModelLoadError(f"{root}: cannot be listed: {error.strerror}") from error


def _shown(model: Model) -> str:
    return str(model.reference) if model.reference else model.short_id
