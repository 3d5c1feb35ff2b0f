"""What a reader has before the first block of a page, and the network that the page speaks of.

Everything is small and made here, but of its real kind: models that the engine runs, registries
with certificates, a Hugging Face Hub that is the tests' own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import modelpack
from modelpack import PackageRequest
from modelpack.store.layout import LayoutStore
from tests.models import FIXTURES
from tests.registry.auth_servers import make_pair

#: Hosts of the pages, each at a loopback address of its own, and what they have at the start.
REGISTRIES = {
    "registry-1.docker.io": {"team/model:v1": "gguf", "ai/smollm2": "gguf"},
    "registry.example": {
        "team/model:v1": "gguf",
        "team/assistant:v1": "safetensors",
        "team/embedder:v3": "safetensors",
    },
    "other.example": {},
}
#: Names that lead to the first of them.
_DOCKER_HUB = ("docker.io", "index.docker.io", "auth.docker.io")
PASSWORD = "of-a-key"


@dataclass(frozen=True)
class Models:
    """What all worlds share, made once: weights that run, and the registries' certificates."""

    gguf: Path
    safetensors: Path
    tls: Path

    @classmethod
    def tiny(cls, directory: Path) -> Models:
        """Random weights, which answer in milliseconds, and nonsense."""
        from tests.engine.loaders.tiny_models import TINY_MODELS
        from tests.engine.serving.tiny import TEMPLATE, write_tiny

        directory.mkdir()
        tiny = TINY_MODELS["llama"]

        def keys(writer: Any, config: Mapping[str, Any]) -> None:
            tiny.keys(writer, config)
            writer.add_chat_template(TEMPLATE)

        gguf = replace(tiny, keys=keys).write(directory / "model.gguf")
        return cls(gguf, write_tiny(directory / "model"), _certificates(directory / "tls"))

    @classmethod
    def real(cls, directory: Path) -> Models:
        """SmolLM2, which knows the capital of France."""
        from modelpack.testing.weights import smollm2_gguf

        models = cls.tiny(directory / "tiny")
        # Not the cached file itself, which a page might write to.
        shutil.copyfile(smollm2_gguf(), models.gguf)
        return models


def _certificates(directory: Path) -> Path:
    authority = make_pair(directory, "authority")
    for host in REGISTRIES:
        make_pair(directory, host, authority, host)
    return directory


class World:
    """A directory to work in, a home, registries' stores and the settings of a shell."""

    def __init__(self, root: Path, models: Models) -> None:
        self.root, self.models = root, models
        self.here, self.home, self.registries = (
            root / name for name in ("here", "home", "registries")
        )
        self.here.mkdir(parents=True)
        self.home.mkdir()
        self._put_files()
        self._fill_registries()

    def _put_files(self) -> None:
        shutil.copyfile(self.models.gguf, self.here / "model.gguf")
        shutil.copytree(self.models.safetensors, self.here / "model")
        shutil.copyfile(FIXTURES.parent / "LICENSE", self.here / "LICENSE")
        (self.here / "sbom.json").write_text('{"spdxVersion": "SPDX-2.3"}\n')

    def _fill_registries(self) -> None:
        licences = (self.here / "LICENSE",)
        requests = {
            "gguf": PackageRequest(gguf=self.models.gguf, licenses=licences),
            "safetensors": PackageRequest(safetensors_dir=self.here / "model"),
        }
        for host, models in REGISTRIES.items():
            store = LayoutStore(self.registries / host)
            for name, form in models.items():
                modelpack.package(name, requests[form], store=store, link=True)

    @property
    def hosts(self) -> str:
        """The file /etc/hosts."""
        lines = ["127.0.0.1 localhost"]
        for i, host in enumerate(REGISTRIES, start=2):
            names = (host, *_DOCKER_HUB) if host == "registry-1.docker.io" else (host,)
            lines.append(f"127.0.0.{i} {' '.join(names)}")
        return "\n".join(lines) + "\n"

    @property
    def environment(self) -> dict[str, str]:
        """What the shell of a reader has in its environment, besides PATH."""
        return {
            "HOME": str(self.home),
            "MODELPACK_STORE": str(self.home / "store"),
            "SSL_CERT_FILE": str(self.models.tls / "authority.crt"),
            "COSIGN_PASSWORD": PASSWORD,
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "LANG": "C.UTF-8",
        }

    def write_settings(self) -> Path:
        """Write what `tests.docs.network` reads; return its path."""
        path = self.root / "network.json"
        gguf = {"assistant-Q4_K_M.gguf": self.models.gguf, "LICENSE": self.here / "LICENSE"}
        settings = {
            "registries": str(self.registries),
            "tls": str(self.models.tls),
            "hub": {"example/Assistant-GGUF": {name: str(path) for name, path in gguf.items()}},
        }
        path.write_text(json.dumps(settings))
        return path
