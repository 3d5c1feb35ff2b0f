"""A new model from an existing one: more layers, another context size, another format.

The layers of the existing model are taken over as they are. Docker Model Runner relabels configs as
v0.1 here and drops artifact types; we keep both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.model import role_of
from modelpack.builder.build import Built, assemble, file_layers
from modelpack.builder.classify import WEIGHT_TYPES, is_projector_name
from modelpack.builder.config import (
    CNCF_WEIGHT_TYPES,
    cncf_config,
    cncf_layers,
    docker_config,
    docker_layers,
)
from modelpack.builder.files import LayerFiles, shown
from modelpack.builder.plan import Plan, named_files
from modelpack.builder.request import (
    PackageRequest,
    check_context_size_fits,
    check_template_wins,
)
from modelpack.builder.times import created_time
from modelpack.errors import PackagingError, UsageError

#: Of these a model uses one: with two, Docker Model Runner uses none.
_SINGLE_TYPES = (media_types.DOCKER_CHAT_TEMPLATE, media_types.DOCKER_MMPROJ)
_WEIGHT_TYPES = (*WEIGHT_TYPES, *CNCF_WEIGHT_TYPES)


def plan_extras(request: PackageRequest, *, environ: Mapping[str, str] = os.environ) -> Plan:
    """Return the plan of the layers that `request` adds to an existing model, maybe none.

    Raises `UsageError` if it names weights, and as `plan` does for the files.
    """
    request.check()
    if request.sources:
        flags = ", ".join(flag for flag, _ in request.sources)
        raise UsageError(f"weights ({flags}) and a model to start from exclude each other")
    created = None if request.created is None else created_time(request.created, environ)
    files, notes = named_files(request, LayerFiles.of(request, environ))
    return Plan(files, created=created, notes=notes)


def repackage(
    manifest: Manifest,
    config: ModelConfig,
    request: PackageRequest,
    extra: Plan | None,
    digests: Sequence[Digest],
    *,
    environ: Mapping[str, str] = os.environ,
) -> Built:
    """Return the model in `manifest` and `config` with the changes that `request` asks for.

    `extra` are the layers to add (`plan_extras`), `digests` those of its files. A chat template or
    a projector takes the place of the one of the same name, and in a v0.1 config of any name;
    other layers are added. The time of creation stays, unless `request.created` names one.
    Raises `PackagingError` if two different files would have one path, and `UnsupportedError` for
    layers that the other format cannot hold.
    """
    request.check()
    to_cncf = config.is_cncf if request.format is None else request.format == "cncf"
    check_context_size_fits(request, cncf=to_cncf)
    layers, diff_ids = manifest.layers, _diff_ids(manifest, config)
    config = config.with_changes(diff_ids=diff_ids)
    artifact_type = manifest.artifact_type
    if to_cncf != config.is_cncf:
        artifact_type = None
        if to_cncf:
            config, layers = cncf_config(config), cncf_layers(layers)
        else:
            layers = docker_layers(layers, config)
            config = docker_config(config, layers)
    added = file_layers(extra.files if extra else (), digests)
    merged = _Merge(layers, config.diff_ids, config, keep_all=request.preserve)
    for layer in added:
        merged.add(layer, cncf_layers([layer])[0] if to_cncf else layer)
    check_template_wins(
        request,
        [
            (role_of(layer.media_type, layer.filepath), layer.filepath or "")
            for layer in merged.layers
        ],
    )
    changes: dict[str, object] = {"diff_ids": tuple(merged.diff_ids)}
    if request.context_size is not None:
        changes["context_size"] = request.context_size
    if request.created is not None:
        changes["created"] = created_time(request.created, environ)
    return assemble(
        config.with_changes(**changes),
        merged.layers,
        {**manifest.annotations, **request.annotations},
        artifact_type=artifact_type,
        notes=(*(extra.notes if extra else ()), *merged.notes),
    )


def _diff_ids(manifest: Manifest, config: ModelConfig) -> tuple[Digest, ...]:
    """Return one for each layer, as Docker Model Runner fills the gaps: the layer's digest."""
    own = config.diff_ids[: len(manifest.layers)]
    return own + tuple(layer.digest for layer in manifest.layers[len(own) :])


class _Merge:
    def __init__(
        self,
        layers: Sequence[Descriptor],
        diff_ids: Sequence[Digest],
        config: ModelConfig,
        *,
        keep_all: bool,
    ) -> None:
        self.layers = list(layers)
        self.diff_ids = list(diff_ids)
        self.notes: list[str] = []
        self._keep_all = keep_all
        self._by_type = config.media_type == media_types.DOCKER_CONFIG_V01

    def add(self, docker: Descriptor, layer: Descriptor) -> None:
        """Add `layer`; `docker` is the same with Docker's type, which says more."""
        places = range(len(self.layers)) if not self._keep_all else ()
        for place in reversed(places):
            old = self.layers[place]
            if (old.filepath, old.digest, old.media_type) == (
                layer.filepath,
                layer.digest,
                layer.media_type,
            ):
                self.notes.append(f"{_name(layer)} is in the model already")
                return
            if self._takes_place_of(old, docker, layer):
                self.notes.append(f"{_name(layer)} takes the place of {_name(old)}")
                del self.layers[place], self.diff_ids[place]
        self.layers.append(layer)
        self.diff_ids.append(layer.digest)

    def _takes_place_of(self, old: Descriptor, docker: Descriptor, layer: Descriptor) -> bool:
        is_single = docker.media_type in _SINGLE_TYPES
        if old.filepath != layer.filepath:
            return is_single and self._by_type and old.media_type == layer.media_type
        is_weight = old.media_type in _WEIGHT_TYPES and not is_projector_name(old.filepath or "")
        if is_weight or not (is_single or old.digest == layer.digest):
            raise PackagingError(
                f"the model has another file at {_name(layer)} already",
                hint="rename the file that you add",
            )
        return True


def _name(layer: Descriptor) -> str:
    return repr(shown(layer.filepath or f"layer {layer.digest.short}"))
