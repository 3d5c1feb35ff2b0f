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
    from modelpack import errors as errors
    from modelpack.artifacts.config import ModelConfig as ModelConfig
    from modelpack.artifacts.descriptor import Descriptor as Descriptor
    from modelpack.artifacts.digest import Digest as Digest
    from modelpack.artifacts.manifest import Manifest as Manifest
    from modelpack.artifacts.model import Model as Model
    from modelpack.artifacts.model import ModelFile as ModelFile
    from modelpack.artifacts.reference import Reference as Reference
    from modelpack.builder.request import PackageRequest as PackageRequest
    from modelpack.errors import ModelpackError as ModelpackError
    from modelpack.operations.diff import diff as diff
    from modelpack.operations.docker import export_to_docker as export_to_docker
    from modelpack.operations.docker import import_from_docker as import_from_docker
    from modelpack.operations.headers import read_headers as read_headers
    from modelpack.operations.lock import lock as lock
    from modelpack.operations.lock import pull_locked as pull_locked
    from modelpack.operations.lookup import inspect as inspect
    from modelpack.operations.package import package as package
    from modelpack.operations.pull import Selection as Selection
    from modelpack.operations.pull import pull as pull
    from modelpack.operations.push import copy as copy
    from modelpack.operations.push import push as push
    from modelpack.operations.referrers import attach as attach
    from modelpack.operations.referrers import detach as detach
    from modelpack.operations.referrers import referrers as referrers
    from modelpack.operations.remote import RemoteOptions as RemoteOptions
    from modelpack.operations.repair import repair as repair
    from modelpack.operations.resolve import bundle as bundle
    from modelpack.operations.resolve import resolve as resolve
    from modelpack.progress import Progress as Progress
    from modelpack.progress import Stop as Stop
    from modelpack.registry import Registry as Registry
    from modelpack.registry import Repository as Repository
    from modelpack.store.docker_store import DockerStore as DockerStore
    from modelpack.store.layout import LayoutStore

    Store = LayoutStore

# name -> (module, attribute)
_EXPORTS = {
    "Descriptor": ("modelpack.artifacts.descriptor", "Descriptor"),
    "Digest": ("modelpack.artifacts.digest", "Digest"),
    "DockerStore": ("modelpack.store.docker_store", "DockerStore"),
    "Manifest": ("modelpack.artifacts.manifest", "Manifest"),
    "Model": ("modelpack.artifacts.model", "Model"),
    "ModelConfig": ("modelpack.artifacts.config", "ModelConfig"),
    "ModelFile": ("modelpack.artifacts.model", "ModelFile"),
    "ModelpackError": ("modelpack.errors", "ModelpackError"),
    "PackageRequest": ("modelpack.builder.request", "PackageRequest"),
    "Progress": ("modelpack.progress", "Progress"),
    "Reference": ("modelpack.artifacts.reference", "Reference"),
    "Registry": ("modelpack.registry", "Registry"),
    "RemoteOptions": ("modelpack.operations.remote", "RemoteOptions"),
    "Repository": ("modelpack.registry", "Repository"),
    "Selection": ("modelpack.operations.pull", "Selection"),
    "Stop": ("modelpack.progress", "Stop"),
    "Store": ("modelpack.store.layout", "LayoutStore"),
    "attach": ("modelpack.operations.referrers", "attach"),
    "bundle": ("modelpack.operations.resolve", "bundle"),
    "copy": ("modelpack.operations.push", "copy"),
    "detach": ("modelpack.operations.referrers", "detach"),
    "diff": ("modelpack.operations.diff", "diff"),
    "export_to_docker": ("modelpack.operations.docker", "export_to_docker"),
    "import_from_docker": ("modelpack.operations.docker", "import_from_docker"),
    "inspect": ("modelpack.operations.lookup", "inspect"),
    "lock": ("modelpack.operations.lock", "lock"),
    "package": ("modelpack.operations.package", "package"),
    "pull": ("modelpack.operations.pull", "pull"),
    "pull_locked": ("modelpack.operations.lock", "pull_locked"),
    "push": ("modelpack.operations.push", "push"),
    "read_headers": ("modelpack.operations.headers", "read_headers"),
    "referrers": ("modelpack.operations.referrers", "referrers"),
    "repair": ("modelpack.operations.repair", "repair"),
    "resolve": ("modelpack.operations.resolve", "resolve"),
}

__all__ = ["__version__", "errors", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("modelpack.errors")
    try:
        module, attribute = _EXPORTS[name]
    except KeyError:
        raise AttributeError(f"module 'modelpack' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
