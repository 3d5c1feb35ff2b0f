"""vLLM over a model of the store: its directory, and the command that serves it.

Source: vLLM 0.33.0, vllm/entrypoints/cli/serve.py and vllm/engine/arg_utils.py.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from modelpack.deployment.vllm_settings import VllmSettings
from modelpack.errors import ModelpackError, NotFoundError, UnsupportedError, UsageError
from modelpack.formats.mlx_quantization import mlx_bits
from modelpack.formats.model_json import context_size
from modelpack.gojson import decode_object
from modelpack.model import CHAT_TEMPLATE, Model
from modelpack.operations.find import inspect, stored_model
from modelpack.operations.kept_bundles import kept_bundle
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import ProgressCallback
from modelpack.reference import is_model_id
from modelpack.stores.layout import LayoutStore

_CONFIG = "config.json"
#: What a model of Modelpack is called where vLLM takes names of models.
SCHEME = "modelpack://"


@dataclass(frozen=True, slots=True)
class VllmModel:
    """A model laid out for vLLM: its directory, and what its package says beyond that."""

    directory: Path
    settings: VllmSettings

    def options(self) -> dict[str, object]:
        """Return the options of `vllm serve` that the package asks for, by their long names."""
        return self.settings.options(str(self.directory / CHAT_TEMPLATE))


def open_model(
    name: str,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    until: ExitStack | None = None,
) -> VllmModel:
    """Return the model `name` as vLLM is to open it; it is pulled if need be.

    With `until` the model is not removed before that is closed or this process ends. Raises
    `UnsupportedError` for a model that vLLM cannot read, before any weight is fetched, and what
    `modelpack.pull` raises.
    """
    store = store or LayoutStore()
    _check_before_pull(name, store, remote, progress)
    model, directory = kept_bundle(name, store=store, remote=remote, progress=progress, until=until)
    _check_readable(model, name)
    path = directory / _CONFIG
    if not path.is_file():
        raise _without_config(name)
    try:
        config = decode_object(path.read_bytes(), _CONFIG)
    except ModelpackError:
        config = {}  # vLLM says what is wrong with it
    own_context = context_size(config, nested=True)
    return VllmModel(directory, VllmSettings.of(model, own_context))


def model_directory(
    name: str,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    until: ExitStack | None = None,
) -> Path:
    """Return the directory that vLLM is to open for the model `name`, as `open_model` does."""
    opened = open_model(name, store=store, remote=remote, progress=progress, until=until)
    return opened.directory


def _check_before_pull(
    name: str, store: LayoutStore, remote: RemoteOptions | None, progress: ProgressCallback | None
) -> None:
    """Raise `UnsupportedError` for a model that is not stored and that vLLM cannot read.

    Its manifest and its config are fetched for that.
    """
    try:
        stored_model(store, name, remote)
    except (NotFoundError, UnsupportedError):
        if not is_model_id(name):  # otherwise it cannot be pulled
            model = inspect(name, remote=remote, from_registry=True, progress=progress)
            _check_readable(model, name)


def _check_readable(model: Model, name: str) -> None:
    files = model.files()
    formats = {file.format for file in files if file.format}
    if "safetensors" not in formats:
        raise UnsupportedError(
            f"vLLM reads safetensors, and {name} is {' and '.join(sorted(formats)) or 'none'}",
            hint="serve it with modelpack: --backend auto takes its engine or llama.cpp",
        )
    if mlx_bits(model.config) is not None:
        raise UnsupportedError(
            f"{name} was quantised by mlx-lm, which only MLX runs",
            hint="serve it with modelpack: --backend auto",
        )
    if not any(file.archive or file.filepath == _CONFIG for file in files):
        raise _without_config(name)


def _without_config(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"vLLM needs the config.json of transformers, and {name} has none",
        hint="package the whole directory of the model: --safetensors-dir",
    )


def vllm_command(
    directory: Path, names: Sequence[str], options: Mapping[str, object], flags: Sequence[str] = ()
) -> list[str]:
    """Return the command line that serves `directory` under `names`.

    `options` are vLLM's by their long names without dashes; True is a bare flag. `flags` come
    last. Raises `UsageError` where vLLM is not installed.
    """
    command = [*_program(), "serve", str(directory), "--served-model-name", *names]
    for name, value in options.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [*command, *flags]


def _program() -> list[str]:
    found = shutil.which("vllm")
    if found is not None:
        return [found]
    if importlib.util.find_spec("vllm") is not None:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    raise UsageError(
        "--backend vllm needs vLLM, which is not installed",
        hint="pip install vllm, into the environment of modelpack or onto the PATH",
    )
