"""Manifests as text and as files: YAML documents, and a base and an overlay for kustomize."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from modelpack.errors import UsageError

#: The overlay of an example, which is named like the namespace that it sets.
OVERLAY = "production"


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # repeat shared labels instead of aliases
        return True


def to_yaml(objects: Sequence[Any]) -> str:
    """Return a document of YAML for each object."""
    text: str = yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, width=100)
    return text


def kustomization(objects: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the files of a base with these objects, and of an overlay that changes it, by path.

    The overlay sets the namespace, the number of pods where no autoscaler does, and the versions of
    the images.
    """
    overlay: dict[str, Any] = {"resources": ["../../base"], "namespace": OVERLAY}
    replicas = [
        {"name": item["metadata"]["name"], "count": item["spec"]["replicas"]}
        for item in objects
        if item["kind"] == "Deployment" and "replicas" in item["spec"]
    ]
    if replicas:
        overlay["replicas"] = replicas
    if images := _images(objects):
        overlay["images"] = images
    return {
        "base/kustomization.yaml": _kustomization({"resources": ["model.yaml"]}),
        "base/model.yaml": to_yaml(objects),
        f"overlays/{OVERLAY}/kustomization.yaml": _kustomization(overlay),
    }


def write_files(directory: Path, files: Mapping[str, str], what: str) -> None:
    """Write `what` into a directory that is empty or does not exist; raise `UsageError`."""
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UsageError(
                f"cannot write {what} to {directory}: it is not an empty directory",
                hint="give a new directory",
            )
        for path, text in files.items():
            file = directory / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {what} to {directory}: {error.strerror}") from error


def _kustomization(fields: Mapping[str, Any]) -> str:
    about = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    return to_yaml([{**about, **fields}])


def _images(objects: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the tag of each image of containers that has one, and no digest.

    An entry changes all images of a name, so names with several tags have none.
    """
    found: dict[str, set[str]] = {}
    for image in _containers_images(objects):
        name, _, digest = image.partition("@")
        head, colon, tag = name.rpartition(":")
        if colon and "/" not in tag:
            name = head
        else:
            tag = ""
        found.setdefault(name, set()).add("" if digest else tag)
    single = {name: tags.pop() for name, tags in found.items() if len(tags) == 1}
    return [{"name": name, "newTag": tag} for name, tag in single.items() if tag]


def _containers_images(value: Any) -> list[str]:
    """Return the images of all containers in a value, in order."""
    if isinstance(value, Mapping):
        own = [item["image"] for name in ("initContainers", "containers")
               for item in value.get(name, ())]  # fmt: skip
        return own + [image for each in value.values() for image in _containers_images(each)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [image for each in value for image in _containers_images(each)]
    return []
