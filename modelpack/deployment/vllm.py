"""vLLM over a model of the store: its directory, and the command that serves it.

Source: vLLM 0.33.0, vllm/entrypoints/cli/serve.py and vllm/engine/arg_utils.py.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from modelpack.errors import UnsupportedError, UsageError
from modelpack.formats.mlx_quantization import mlx_bits
from modelpack.operations.kept_bundles import kept_bundle
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import ProgressCallback
from modelpack.stores.layout import LayoutStore

#: What a model of Modelpack is called where vLLM takes names of models.
SCHEME = "modelpack://"


def model_directory(
    name: str,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Return the directory that vLLM is to open for the model `name`, which is pulled if need be.

    Raises `UnsupportedError` for a model that vLLM cannot read, and what `modelpack.pull` raises.
    """
    model, directory = kept_bundle(name, store=store, remote=remote, progress=progress)
    formats = {file.format for file in model.files() if file.format}
    if "safetensors" not in formats:
        raise UnsupportedError(
            f"vLLM reads safetensors, and {name} is {' and '.join(sorted(formats)) or 'none'}",
            hint="serve it with modelpack: --backend auto",
        )
    if mlx_bits(model.config) is not None:
        raise UnsupportedError(
            f"{name} was quantised by mlx-lm, which only MLX runs",
            hint="serve it with modelpack: --backend auto",
        )
    if not (directory / "config.json").is_file():
        raise UnsupportedError(
            f"vLLM needs the config.json of transformers, and {name} has none",
            hint="package the whole directory of the model: --safetensors-dir",
        )
    return directory


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
