"""Package, push, pull, verify and resolve models as OCI artifacts.

    import modelpack

    made = modelpack.package("registry.example/team/m:v1", modelpack.PackageRequest(gguf=path))
    modelpack.push("registry.example/team/m:v1")
    weights = modelpack.resolve("registry.example/team/m:v1", media_types=["gguf"], pull=True)

Names are loaded on first use, so that `import modelpack` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modelpack._version import __version__ as __version__

if TYPE_CHECKING:
    from modelpack import errors, testing
    from modelpack.artifacts.config import ModelConfig
    from modelpack.artifacts.descriptor import Descriptor
    from modelpack.artifacts.digest import Digest
    from modelpack.artifacts.manifest import Manifest
    from modelpack.artifacts.model import Model, ModelFile
    from modelpack.artifacts.reference import Reference
    from modelpack.builder.request import PackageRequest
    from modelpack.errors import ModelpackError
    from modelpack.operations.diff import diff
    from modelpack.operations.docker import export_to_docker, import_from_docker
    from modelpack.operations.headers import read_headers
    from modelpack.operations.lock import lock, pull_locked
    from modelpack.operations.lookup import inspect
    from modelpack.operations.package import package
    from modelpack.operations.pull import Selection, pull
    from modelpack.operations.push import copy, push
    from modelpack.operations.referrers import attach, detach, referrers
    from modelpack.operations.remote import RemoteOptions
    from modelpack.operations.repair import repair
    from modelpack.operations.resolve import bundle, resolve
    from modelpack.progress import Progress, Stop
    from modelpack.registry import Registry, Repository
    from modelpack.store.docker_store import DockerStore
    from modelpack.store.layout import LayoutStore as Store

# module -> public names
_EXPORTS = {
    "modelpack.artifacts.config": "ModelConfig",
    "modelpack.artifacts.descriptor": "Descriptor",
    "modelpack.artifacts.digest": "Digest",
    "modelpack.artifacts.manifest": "Manifest",
    "modelpack.artifacts.model": "Model ModelFile",
    "modelpack.artifacts.reference": "Reference",
    "modelpack.builder.request": "PackageRequest",
    "modelpack.errors": "ModelpackError",
    "modelpack.operations.diff": "diff",
    "modelpack.operations.docker": "export_to_docker import_from_docker",
    "modelpack.operations.headers": "read_headers",
    "modelpack.operations.lock": "lock pull_locked",
    "modelpack.operations.lookup": "inspect",
    "modelpack.operations.package": "package",
    "modelpack.operations.pull": "Selection pull",
    "modelpack.operations.push": "copy push",
    "modelpack.operations.referrers": "attach detach referrers",
    "modelpack.operations.remote": "RemoteOptions",
    "modelpack.operations.repair": "repair",
    "modelpack.operations.resolve": "bundle resolve",
    "modelpack.progress": "Progress Stop",
    "modelpack.registry": "Registry Repository",
    "modelpack.store.docker_store": "DockerStore",
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = [
    "__version__", "errors", "Descriptor", "Digest", "DockerStore", "Manifest", "Model",
    "ModelConfig", "ModelFile", "ModelpackError", "PackageRequest", "Progress", "Reference",
    "Registry", "RemoteOptions", "Repository", "Selection", "Stop", "Store", "attach", "bundle",
    "copy", "detach", "diff", "export_to_docker", "import_from_docker", "inspect", "lock",
    "package", "pull", "pull_locked", "push", "read_headers", "referrers", "repair", "resolve",
    "testing",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("errors", "testing"):
        return importlib.import_module(f"modelpack.{name}")
    if name == "Store":
        return importlib.import_module("modelpack.store.layout").LayoutStore
    if name not in _MODULES:
        raise AttributeError(f"module 'modelpack' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
