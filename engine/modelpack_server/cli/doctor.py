"""`modelpack doctor`: check device, memory, backends, store, registry and ports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import click

from modelpack.artifacts.model import Model
from modelpack.cli.options import Settings, common_options, model_names, remote_options
from modelpack.cli.output import show, table
from modelpack.errors import ModelpackError, UsageError
from modelpack.operations.doctor import Check, Verdict
from modelpack.operations.remote import RemoteOptions
from modelpack_engine.config import EngineConfig
from modelpack_engine.platform import blas
from modelpack_server.cli.engine_options import require_engine

if TYPE_CHECKING:
    from modelpack.operations.doctor import Check

_FORMATS = ("gguf", "safetensors")
#: The least memory that a KV cache and the arrays of a step take besides the weights, in bytes.
_MIN_WORKING_BYTES = 512 * 1024**2
Device = Literal["cpu", "gpu"]


def check_device() -> tuple[Check, Device]:
    """Return the device that runs models."""
    blas.prepare()  # before MLX
    cores = os.cpu_count() or 1
    machine = f"{platform.system()} {platform.machine()}, {cores} cores"
    from modelpack_engine.platform.memory import choose_device

    device = choose_device(EngineConfig())
    details = {"device": device, "system": platform.system(), "machine": platform.machine(),
               "cores": cores}  # fmt: skip
    if device == "gpu":
        import mlx.core as mx

        kind = "Metal" if mx.metal.is_available() else "CUDA"
        name = mx.device_info().get("device_name", "a GPU")
        return Check("device", Verdict.OK, f"{name} by {kind}; {machine}", details=details), device
    idle = shutil.which("nvidia-smi") is not None
    if idle:
        return (
            Check(
                "device", Verdict.WARNING, f"CPU; {machine}; an NVIDIA GPU is not used",
                hint="run pip install 'mlx[cuda]'", details=details,
            ),
            device,
        )  # fmt: skip
    return Check("device", Verdict.OK, f"CPU; {machine}; no GPU", details=details), device


def check_memory() -> Check:
    """Return the memory that models may use."""
    from modelpack_server.pool.memory import device_memory

    size = device_memory(EngineConfig())
    return Check(
        "memory", Verdict.OK, f"{size / 1e9:.1f} GB for models", details={"available": size}
    )


def check_backends() -> list[Check]:
    """Return the installed backends."""
    from modelpack_engine.llama_cpp import library

    checks = [
        Check("backend mlx", Verdict.OK, f"mlx {_version('mlx')}, mlx-lm {_version('mlx-lm')}")
    ]
    found = _version("llama-cpp-python")
    if library.is_installed():
        checks.append(Check("backend llama.cpp", Verdict.OK, f"llama-cpp-python {found}"))
    elif importlib.util.find_spec("llama_cpp") is not None:
        checks.append(
            Check(
                "backend llama.cpp", Verdict.WARNING,
                f"llama-cpp-python {found}, expected {library.VERSION}",
                hint="run pip install 'modelpack[llama-cpp]'",
            )
        )  # fmt: skip
    else:
        checks.append(
            Check(
                "backend llama.cpp", Verdict.OK, "not installed; runs GGUF on a CPU",
                hint="run pip install 'modelpack[llama-cpp]'",
            )
        )  # fmt: skip
    where = shutil.which("vllm") or (importlib.util.find_spec("vllm") and "in this environment")
    found = f"vLLM {_version('vllm') or ''} {where}".replace("  ", " ")
    checks.append(
        Check(
            "backend vllm",
            Verdict.OK,
            found if where else "not installed; --backend vllm requires it",
        )
    )
    return checks


def check_choices(device: Device) -> list[Check]:
    """Return the backend that `auto` selects for each format."""
    from modelpack_engine.llama_cpp.library import automatic_backend

    checks = []
    for kind in _FORMATS:
        backend = automatic_backend(kind, device)
        checks.append(
            Check(
                f"{kind} files", Verdict.OK, f"run by {backend} on the {device}",
                details={"format": kind, "backend": backend, "device": device},
            )
        )  # fmt: skip
    return checks


def check_model(model: Model, device: Device, available: int) -> Check:
    """Return the backend that runs a model; fail if it does not fit into `available` bytes."""
    from modelpack_engine.llama_cpp.library import automatic_backend

    name = f"model {model.reference or model.short_id}"
    weights = [file for file in model.files() if file.format in _FORMATS]
    if not weights:
        formats = ", ".join(sorted({file.format for file in model.files() if file.format}))
        return Check(name, Verdict.FAILED, f"no backend for {formats or 'this model'}: expected "
                     "GGUF or safetensors weights")  # fmt: skip
    size = sum(file.descriptor.size for file in weights)
    kind = weights[0].format
    backend = automatic_backend(kind, device)
    details = {"format": kind, "backend": backend, "device": device, "weights": size}
    text = f"{kind}, {size / 1e9:.1f} GB: run by {backend} on the {device}"
    if size + _MIN_WORKING_BYTES > available:
        return Check(
            name, Verdict.FAILED, f"{text}, which has {available / 1e9:.1f} GB",
            hint="use a quantised variant, or --backend vllm with --tensor-parallel-size",
            details=details,
        )  # fmt: skip
    return Check(name, Verdict.OK, text, details=details)


def failed(name: str, error: ModelpackError) -> Check:
    """Return the failed check for an error."""
    return Check(name, Verdict.FAILED, str(error), hint=error.hint)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


#: The default ports of the servers.
_PORTS = ((12434, "serve"), (12435, "gateway"), (5000, "registry serve"))


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1, shell_complete=model_names)
@click.option(
    "--registry", "registries", metavar="HOST", multiple=True,
    help="A registry to check. May be repeated. [default: the default registry]",
)  # fmt: skip
@click.option("--offline", is_flag=True, help="Skip the check of registries.")
@remote_options
@common_options
def doctor(
    settings: Settings,
    models: tuple[str, ...],
    registries: tuple[str, ...],
    offline: bool,
    remote: RemoteOptions,
) -> int:
    """Check device, memory, store, registry, backends and ports, and which backend runs MODELs.

    Exit code 1 if a check failed. Missing parts that only some commands need are warnings.
    """
    import os

    from modelpack._version import __version__
    from modelpack.artifacts.reference import DEFAULT_REGISTRY
    from modelpack.operations.doctor import Verdict, check_port, check_registry, check_store, worst

    checks = _engine_checks(settings, models)
    checks.append(check_store(settings.store_root))
    if not offline:
        hosts = registries or (os.environ.get("DEFAULT_REGISTRY") or DEFAULT_REGISTRY,)
        checks += [check_registry(host, remote) for host in hosts]
    checks += [check_port(port, purpose) for port, purpose in _PORTS]
    verdict = worst(checks)
    value = {
        "modelpack": __version__,
        "verdict": str(verdict),
        "checks": [
            {key: item for key, item in asdict(check).items() if item is not None}
            for check in checks
        ],
    }
    show(settings, value, _shown(checks))
    return 1 if verdict is Verdict.FAILED else 0


def _engine_checks(settings: Settings, models: tuple[str, ...]) -> list[Check]:
    from modelpack.operations.doctor import Check, Verdict
    from modelpack.operations.lookup import inspect

    try:
        require_engine()
    except UsageError as error:
        # Packaging and transferring models does not need the engine.
        verdict = Verdict.FAILED if models else Verdict.WARNING
        return [Check("engine", verdict, str(error), hint=error.hint)]

    device, where = check_device()
    memory = check_memory()
    checks = [device, memory, *check_backends(), *check_choices(where)]
    available = (memory.details or {}).get("available", 0)
    for name in models:
        try:
            model = inspect(name, store=settings.store())
        except ModelpackError as error:
            checks.append(failed(f"model {name}", error))
        else:
            checks.append(check_model(model, where, available))
    return checks


def _shown(checks: list[Check]) -> str:
    rows = []
    for check in checks:
        rows.append((str(check.verdict), check.name, check.message))
        if check.hint:
            rows.append(("", "", f"hint: {check.hint}"))
    return table(("", "CHECK", "RESULT"), rows)
