"""Model: a manifest with its config, and its layers as files with a role and a format.

Docker v0.1, Docker v0.2 and CNCF ModelPack have different media types for the same files. Here
every layer has a role and, for weights, a format. CNCF types are coarse (a `weight.v1.raw` may be
GGUF, safetensors or a projector), so the file's name decides for those. Whether a GGUF file is a
projector is in its content, which `formats.projector.identified` reads where it is at hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Final

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.paths import checked_path
from modelpack.artifacts.reference import Reference
from modelpack.errors import NotFoundError

# CNCF model-spec, docs/spec.md "Layer media types".
_CNCF_LAYER = re.compile(
    r"application/vnd\.(?:cncf|cnai)\.model\."
    r"(weight\.config|weight|doc|code|dataset)\.v1\.(raw|tar\+gzip|tar\+zstd|tar)\Z"
)
# KitOps, pkg/lib/constants/mediaType.go.
_KITOPS_LAYER = re.compile(r"application/vnd\.kitops\.modelkit\.(\w+)\.v1\.(tar\+gzip|tar)\Z")
# The file names that we give to Ollama's layers, which have none.
_OLLAMA_PATHS: Mapping[str, str] = {
    media_types.OLLAMA_LICENSE: "LICENSE",
    media_types.OLLAMA_TEMPLATE: "template.gotmpl",
    media_types.OLLAMA_PROMPT: "template.gotmpl",
    media_types.OLLAMA_PARAMS: "params.json",
    media_types.OLLAMA_SYSTEM: "system.txt",
    media_types.OLLAMA_MESSAGES: "messages.json",
}
#: The file name of a chat template for transformers, vLLM and our engine.
CHAT_TEMPLATE: Final = "chat_template.jinja"
# GGUF files of these types are weights, or projectors, whatever is in them.
_EXACT_TYPES: Final = (
    media_types.DOCKER_MMPROJ,
    media_types.OLLAMA_MODEL,
    media_types.OLLAMA_PROJECTOR,
)
_MAX_SHOWN = 50


class Role(StrEnum):
    """The purpose of a file."""

    WEIGHT = "weight"
    PROJECTOR = "projector"  # multimodal: images to the model's embeddings
    ADAPTER = "adapter"  # LoRA weights that change another model
    CHAT_TEMPLATE = "chat_template"
    LICENSE = "license"
    CONFIG = "config"  # configuration, tokenizer, index
    DOC = "doc"
    CODE = "code"
    DATASET = "dataset"
    FILE = "file"  # anything else


class Archive(StrEnum):
    """The archive format of a layer that is not a raw file."""

    TAR = "tar"
    TAR_GZIP = "tar+gzip"
    TAR_ZSTD = "tar+zstd"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One layer: a file, or an archive of files.

    `filepath` is a safe path, or None if the layer has no path. `format` is `gguf`, `safetensors`
    or `dduf` for weights and projectors, if known. `diff_id` is the digest of the uncompressed
    content, if the config has one for every layer. The path of a tensor is its name.
    """

    role: Role
    media_type: str
    filepath: str | None
    descriptor: Descriptor
    format: str = ""
    archive: Archive | None = None
    diff_id: Digest | None = None

    @property
    def is_tensor(self) -> bool:
        """Whether this is one of the tensors of an MLX model of Ollama."""
        return self.media_type == media_types.OLLAMA_TENSOR

    @property
    def may_be_projector(self) -> bool:
        """Whether this is a GGUF file whose media type may be that of weights and of projectors."""
        return (
            self.role in (Role.WEIGHT, Role.PROJECTOR)
            and self.format in ("gguf", "")
            and self.media_type not in _EXACT_TYPES
            and not self.is_packed
        )

    @property
    def is_packed(self) -> bool:
        """Whether no runtime can open the layer: it is an archive or a tensor."""
        return self.archive is not None or self.is_tensor


@dataclass(frozen=True, slots=True)
class Model:
    """A model in any store or registry; `descriptor` is that of its manifest.

    `projectors` are the GGUF files that are projectors by their content; where it is None, names
    decide for the files of coarse media types.
    """

    reference: Reference | None
    descriptor: Descriptor
    manifest: Manifest
    config: ModelConfig
    projectors: frozenset[Digest] | None = None

    @property
    def digest(self) -> Digest:
        """The digest of the manifest: the model's id."""
        return self.descriptor.digest

    @property
    def short_id(self) -> str:
        """The first 12 hex digits of the id, as in `docker model list`."""
        return self.digest.short

    @property
    def is_adapter(self) -> bool:
        """Whether this is an adapter of another model, which cannot run without it."""
        roles = self._roles()
        return Role.ADAPTER in roles and Role.WEIGHT not in roles

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter in a layer of its own has to be applied to the weights."""
        roles = self._roles()
        return Role.ADAPTER in roles and Role.WEIGHT in roles

    @property
    def is_drafter(self) -> bool:
        """Whether this drafts tokens for another model, and cannot run without it."""
        return self.manifest.artifact_type == media_types.DRAFTER

    def _roles(self) -> frozenset[Role]:
        layers = self.manifest.layers
        return frozenset(role_of(layer.media_type, layer.filepath) for layer in layers)

    def files(self) -> tuple[ModelFile, ...]:
        """Return the layers as files, in the order of the manifest.

        Raises `UnsafePathError` if the path of a layer would leave the model's directory.
        """
        layers, diff_ids = self.manifest.layers, self.config.diff_ids
        known = len(layers) == len(diff_ids)
        return tuple(
            self._file(layer, diff_ids[i] if known else None) for i, layer in enumerate(layers)
        )

    def select(
        self,
        media_types: Sequence[str] = (),
        paths: Sequence[str] = (),
        *,
        among: Sequence[ModelFile] | None = None,
    ) -> tuple[ModelFile, ...]:
        """Return the files that match one of `media_types` and one of `paths`, in layer order.

        A media type is a full type, a glob (`*gguf*`), or one of `SHORT_NAMES`, which mean the same
        in every generation of the format. A path is a full path, a file name or a glob. An empty
        sequence matches every file. `among` replaces the layers as the files to select from, for
        files inside archives. Raises `NotFoundError`, listing the files, if no file has a matching
        type or if one of the paths matches no file.
        """
        found = files = self.files() if among is None else tuple(among)
        if media_types:
            tests = [_type_test(text) for text in media_types]
            found = tuple(file for file in files if any(test(file) for test in tests))
            if not found:
                hint = "use a media type or a short name: " + ", ".join(SHORT_NAMES)
                raise self._not_found("type " + " or ".join(map(repr, media_types)), files, hint)
        if not paths:
            return found
        chosen: set[int] = set()
        for text in paths:
            matches = _matching_paths(text, found)
            if not matches:
                hint = "use a path, a file name or a glob, such as '*.json'"
                raise self._not_found(f"path {text!r}", found, hint)
            chosen |= matches
        return tuple(file for i, file in enumerate(found) if i in chosen)

    def _file(self, layer: Descriptor, diff_id: Digest | None) -> ModelFile:
        archive = archive_of(layer.media_type)
        path = layer.name if layer.filepath is None else layer.filepath
        if path is None:
            path = self.config.layer_paths.get(layer.digest) or _OLLAMA_PATHS.get(layer.media_type)
        if archive and path is not None and path.rstrip("/") == ".":
            path = None  # modctl writes "." for a whole directory
        filepath = None if path is None else checked_path(path.rstrip("/") if archive else path)
        role = role_of(layer.media_type, filepath)
        weights = role in (Role.WEIGHT, Role.PROJECTOR, Role.ADAPTER)
        kind = format_of(layer.media_type, filepath) if weights else ""
        if role is Role.WEIGHT and not kind:
            kind = self.config.format.lower().replace("diffusers", "dduf")
        file = ModelFile(role, layer.media_type, filepath, layer, kind, archive, diff_id)
        if self.projectors is None or not file.may_be_projector:
            return file
        role = Role.PROJECTOR if layer.digest in self.projectors else Role.WEIGHT
        return replace(file, role=role)

    def _not_found(self, wanted: str, among: Sequence[ModelFile], hint: str) -> NotFoundError:
        name = str(self.reference) if self.reference else str(self.digest)
        lines = [f"{file.filepath or '(no path)'} ({file.media_type})" for file in among]
        if len(lines) > _MAX_SHOWN:
            lines = [*lines[:_MAX_SHOWN], f"and {len(lines) - _MAX_SHOWN} more"]
        there = "; ".join(lines) or "nothing"
        return NotFoundError(
            f"{name}: no file with {wanted}; there is: {there}",
            hint=hint,
        )


def archive_of(media_type: str) -> Archive | None:
    """Return the archive format of a layer of this type, or None for a raw file."""
    if media_type in (media_types.DOCKER_VLLM_CONFIG_TAR, media_types.DOCKER_DIR_TAR):
        return Archive.TAR
    match = _CNCF_LAYER.match(media_type) or _KITOPS_LAYER.match(media_type)
    return Archive(match[2]) if match and match[2] != "raw" else None


def role_of(media_type: str, path: str | None) -> Role:
    """Return the role of a file by its layer's type, and by its path if the type is coarse.

    Files inside an archive have the type of the archive.
    """
    name = (path or "").rpartition("/")[2].lower()
    match media_type:
        case media_types.DOCKER_MMPROJ | media_types.OLLAMA_PROJECTOR:
            return Role.PROJECTOR
        case (
            media_types.DOCKER_GGUF_LORA
            | media_types.ADAPTER_SAFETENSORS
            | media_types.OLLAMA_ADAPTER
        ):
            return Role.ADAPTER
        case media_types.DOCKER_LICENSE | media_types.OLLAMA_LICENSE:
            return Role.LICENSE
        case media_types.DOCKER_CHAT_TEMPLATE:
            # Docker also uses this type for chat_template.json, which is not Jinja.
            return Role.CONFIG if name.endswith(".json") else Role.CHAT_TEMPLATE
        case media_types.DOCKER_GGUF | media_types.CNCF_WEIGHT_GGUF:
            return Role.PROJECTOR if "mmproj" in name else Role.WEIGHT
        case (
            media_types.DOCKER_SAFETENSORS
            | media_types.CNCF_WEIGHT_SAFETENSORS
            | media_types.DOCKER_DDUF
            | media_types.OLLAMA_MODEL
            | media_types.OLLAMA_TENSOR
        ):
            return Role.WEIGHT
        case media_types.DOCKER_VLLM_CONFIG_TAR:
            return _role_by_name(name, Role.CONFIG)
        case media_types.DOCKER_MODEL_FILE:
            return _role_beside_weights(name, Role.FILE)
        case media_types.OLLAMA_JSON:
            return _role_beside_weights(name, Role.CONFIG)
        case media_types.OLLAMA_PARAMS | media_types.OLLAMA_MESSAGES | media_types.OLLAMA_SYSTEM:
            return Role.CONFIG
    kitops = _KITOPS_LAYER.match(media_type)
    if kitops:
        return _kitops_role(kitops[1], name)
    cncf = _CNCF_LAYER.match(media_type)
    match cncf[1] if cncf else None:
        case "weight":
            return _weight_role(name)
        case "weight.config":
            return _role_beside_weights(name, Role.CONFIG)
        case "doc":
            # Docker Model Runner uses documents only for licenses, sometimes without a path.
            return Role.LICENSE if not name or _is_license(name) else Role.DOC
        case "code" | "dataset" as kind:
            return Role(kind)
    return _role_by_name(name, Role.FILE)


def preferred_template(files: Sequence[tuple[Role, str]]) -> int | None:
    """Return the index of the chat template to use, given all layers as (role, path) in order.

    The file of `package --chat-template` wins; it follows the directory's files, which are sorted
    by path. Otherwise `chat_template.jinja` wins, then the first template. A template in a
    subdirectory has a special purpose and is used only if there is no other.
    """
    templates = [at for at, (role, _) in enumerate(files) if role is Role.CHAT_TEMPLATE]
    if not templates:
        return None
    least = min(files[at][1].count("/") for at in templates)
    templates = [at for at in templates if files[at][1].count("/") == least]
    keys = [path.encode().split(b"/") for _, path in files]
    added = [at for at in templates if any(key > keys[at] for key in keys[:at])]
    named = [at for at in added or templates if files[at][1] == CHAT_TEMPLATE]
    return next(iter(named), added[-1] if added else templates[0])


def format_of(media_type: str, path: str | None) -> str:
    """Return the format of weights (`gguf`, `safetensors`, `dduf`), or "" if unknown."""
    if media_type in _FORMATS_BY_TYPE:
        return _FORMATS_BY_TYPE[media_type]
    extension = (path or "").lower().rpartition(".")[2]
    return extension if extension in _WEIGHT_FORMATS else ""


def _kitops_role(kind: str, name: str) -> Role:
    match kind:
        case "model":
            # The name is that of the layer, possibly a directory, or of a file inside it.
            return Role.WEIGHT if not _suffix(name) else _role_by_name(name, Role.FILE)
        case "docs":
            return Role.LICENSE if _is_license(name) else Role.DOC
        case "code" | "dataset":
            return Role(kind)
    return _role_beside_weights(name, Role.FILE)


_WEIGHT_FORMATS = ("gguf", "safetensors", "dduf")
_WEIGHT_SUFFIXES = tuple(f".{name}" for name in _WEIGHT_FORMATS)
_FORMATS_BY_TYPE = {
    media_types.DOCKER_GGUF: "gguf",
    media_types.DOCKER_MMPROJ: "gguf",
    media_types.DOCKER_GGUF_LORA: "gguf",
    media_types.ADAPTER_SAFETENSORS: "safetensors",
    media_types.CNCF_WEIGHT_GGUF: "gguf",
    media_types.DOCKER_SAFETENSORS: "safetensors",
    media_types.CNCF_WEIGHT_SAFETENSORS: "safetensors",
    media_types.DOCKER_DDUF: "dduf",
    media_types.OLLAMA_MODEL: "gguf",
    media_types.OLLAMA_PROJECTOR: "gguf",
    media_types.OLLAMA_ADAPTER: "gguf",
    media_types.OLLAMA_TENSOR: "safetensors",
}
_ROLES_BY_SUFFIX = {
    ".jinja": Role.CHAT_TEMPLATE,
    **dict.fromkeys((".md", ".rst"), Role.DOC),
    **dict.fromkeys((".py", ".sh", ".ipynb"), Role.CODE),
    **dict.fromkeys((".json", ".txt", ".vocab", ".model", ".tiktoken"), Role.CONFIG),
    **dict.fromkeys((".yaml", ".yml", ".toml"), Role.CONFIG),
}
_LICENSE = re.compile(
    r"(?:\A|.*[._-])(?:licen[sc]es?|unlicen[sc]e|copying|notices?)(?:[._-]|\Z)", re.DOTALL
)
_TEXT_SUFFIXES = ("", ".md", ".rst", ".txt")


def _suffix(name: str) -> str:
    stem, dot, extension = name.rpartition(".")
    return dot + extension if stem else ""


def _is_license(name: str) -> bool:
    # LICENSE-MIT is a license; license_head.bin and notice_me.py are not.
    suffix = _suffix(name)
    other = suffix in _ROLES_BY_SUFFIX or suffix in (*_WEIGHT_SUFFIXES, ".bin")
    return bool(_LICENSE.match(name)) and (suffix in _TEXT_SUFFIXES or not other)


def _weight_role(name: str) -> Role:
    if "mmproj" in name:
        return Role.PROJECTOR
    # Another file, such as model.safetensors.index.json, may have this type too.
    return _role_by_name(name, Role.WEIGHT) if _suffix(name) in _ROLES_BY_SUFFIX else Role.WEIGHT


def _role_beside_weights(name: str, otherwise: Role) -> Role:
    # An adapter.gguf that was packaged as another file is not the model's weights.
    role = _role_by_name(name, otherwise)
    return otherwise if role in (Role.WEIGHT, Role.PROJECTOR) else role


def _role_by_name(name: str, otherwise: Role) -> Role:
    if name.endswith(_WEIGHT_SUFFIXES):
        return Role.PROJECTOR if name.endswith(".gguf") and "mmproj" in name else Role.WEIGHT
    if _is_license(name):
        return Role.LICENSE
    return _ROLES_BY_SUFFIX.get(_suffix(name), otherwise)


_Test = Callable[[ModelFile], bool]


def _has_role(*roles: Role) -> _Test:
    return lambda file: file.role in roles


def _has_format(format: str) -> _Test:
    # An archive without a known format may contain weights of any format.
    return lambda file: (
        file.role is Role.WEIGHT
        and (file.format == format or (file.archive is not None and not file.format))
    )


_TESTS: Mapping[str, _Test] = {
    "weight": _has_role(Role.WEIGHT),
    "gguf": _has_format("gguf"),
    "safetensors": _has_format("safetensors"),
    "dduf": _has_format("dduf"),
    "mmproj": _has_role(Role.PROJECTOR),
    "adapter": _has_role(Role.ADAPTER),
    "chat-template": _has_role(Role.CHAT_TEMPLATE),
    "license": _has_role(Role.LICENSE),
    "config": _has_role(Role.CONFIG),
    "doc": _has_role(Role.DOC),
    "code": _has_role(Role.CODE),
    "dataset": _has_role(Role.DATASET),
    "file": _has_role(Role.CONFIG, Role.DOC, Role.CODE, Role.DATASET, Role.FILE),
}
_ALIASES = {
    "weights": "weight",
    "projector": "mmproj",
    "lora": "adapter",
    "chat_template": "chat-template",
    "template": "chat-template",
    "licence": "license",
}
#: Names that `Model.select` accepts instead of a media type. `file` is any file without another
#: name here: configuration, documents, code, data and the rest.
SHORT_NAMES: Final = tuple(_TESTS)


def _type_test(text: str) -> _Test:
    wanted = text.lower()
    short = _TESTS.get(_ALIASES.get(wanted, wanted))
    if short:
        return short
    return lambda file: fnmatchcase(file.media_type.lower(), wanted)


def _matching_paths(text: str, files: Sequence[ModelFile]) -> set[int]:
    """Return the indices of the files with this path, else this name, else matching this glob."""
    paths = [(i, file.filepath) for i, file in enumerate(files) if file.filepath is not None]
    return (
        {i for i, path in paths if path == text}
        or {i for i, path in paths if path.rpartition("/")[2] == text}
        or {i for i, path in paths if fnmatchcase(path, text)}
    )
