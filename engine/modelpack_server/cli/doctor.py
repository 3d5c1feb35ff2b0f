"""`modelpack doctor`: check device, memory, backends, store, registry and ports."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import tempfile
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import click

from modelpack._version import __version__
from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import DEFAULT_REGISTRY
from modelpack.cli.help import command
from modelpack.cli.options import Settings, common_options_without, model_names, remote_options
from modelpack.cli.output import show, table
from modelpack.deploy.local_server import PORT
from modelpack.deploy.vllm import find_program
from modelpack.errors import AuthError, ModelpackError, UsageError
from modelpack.operations.remote import RemoteOptions
from modelpack.store.layout import LayoutStore, default_store_root
from modelpack_engine.config import EngineConfig
from modelpack_engine.platform import blas
from modelpack_server.cli.engine_options import require_engine
from modelpack_server.cli.gateway import GATEWAY_PORT

#: Free bytes on the disk of the store below which doctor warns.
_LOW_DISK_SPACE = 5 * 10**9
_CONNECT_SECONDS = 5.0


class Verdict(StrEnum):
    """The outcome of a check, the worst one last."""

    OK = "ok"
    WARNING = "warning"  # some commands will fail or be slow
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its outcome. `details` is for programs, `hint` says how to fix a problem."""

    name: str
    verdict: Verdict
    message: str
    hint: str | None = None
    details: dict[str, Any] | None = None


def check_store(root: str | None = None) -> Check:
    """Check that the store at `root` (None: the default) is readable, writable and not full."""
    where = Path(root).expanduser() if root else default_store_root()
    if not where.exists():
        above = next(path for path in where.parents if path.exists())
        if not os.access(above, os.W_OK):
            return Check(
                "store", Verdict.FAILED, f"{where} does not exist, and {above} is not writable",
                hint="choose another store with --store DIR or MODELPACK_STORE",
            )  # fmt: skip
        return Check("store", Verdict.OK, f"{where} will be created on first use")
    try:
        store = LayoutStore(where, create=False)
        models = len(store.models())
    except ModelpackError as error:
        return Check("store", Verdict.FAILED, str(error), hint=error.hint)
    free = shutil.disk_usage(where).free
    details = {"path": str(where), "models": models, "free": free}
    said = f"{where}: {models} model{'' if models == 1 else 's'}, {free / 1e9:.1f} GB free"
    try:
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        return Check(
            "store", Verdict.WARNING, f"{said}; not writable: {error.strerror}",
            hint="make it writable to pull and package models", details=details,
        )  # fmt: skip
    if free < _LOW_DISK_SPACE:
        hint = "run `modelpack gc` to delete unused blobs"
        return Check("store", Verdict.WARNING, f"{said}; low disk space", hint, details)
    return Check("store", Verdict.OK, said, details=details)


def check_registry(host: str, remote: RemoteOptions | None = None) -> Check:
    """Check that a registry responds at `host`, with one try of at most five seconds."""
    from modelpack.registry import Registry, RetryPolicy, Timeouts, TlsOptions

    remote = remote or RemoteOptions()
    name = f"registry {host}"
    try:
        with Registry(
            host,
            plain_http=remote.plain_http,
            timeouts=Timeouts(connect=_CONNECT_SECONDS, idle=_CONNECT_SECONDS),
            retry=RetryPolicy(tries=1),
            tls=remote.tls or TlsOptions(),
        ) as registry:
            registry.ping()
    except AuthError:
        return Check(
            name, Verdict.WARNING, "responds, but rejects the credentials",
            hint=f"run modelpack login {host}, unless you need only public models",
        )  # fmt: skip
    except ModelpackError as error:
        return Check(name, Verdict.WARNING, str(error), hint=error.hint)
    return Check(name, Verdict.OK, "responds")


def check_port(port: int, purpose: str, host: str = "127.0.0.1") -> Check:
    """Check that a server can listen on `host`:`port`; `purpose` is the command that does so."""
    name = f"port {port}"
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            why = error.strerror or str(error)
            return Check(name, Verdict.WARNING, f"cannot listen: {why} ({purpose})")
        return Check(
            name, Verdict.WARNING, f"is in use ({purpose})",
            hint="if another program uses it, choose another port with --port",
        )  # fmt: skip
    return Check(name, Verdict.OK, f"is free ({purpose})")


_FORMATS = ("gguf", "safetensors")
#: The minimum memory for a KV cache and the arrays of a step, in bytes.
_MIN_WORKING_BYTES = 512 * 1024**2
Device = Literal["cpu", "gpu"]


def check_device() -> tuple[Check, Device]:
    """Return the check of the device that runs models, and the device."""
    blas.prepare()  # must run before MLX is imported
    cores = os.cpu_count() or 1
    machine = f"{platform.system()} {platform.machine()}, {cores} cores"
    from modelpack_engine.platform.device import choose_device

    device = choose_device(EngineConfig())
    details = {"device": device, "system": platform.system(), "machine": platform.machine(),
               "cores": cores}  # fmt: skip
    if device == "gpu":
        import mlx.core as mx

        kind = "Metal" if mx.metal.is_available() else "CUDA"
        name = mx.device_info().get("device_name", "a GPU")
        return Check("device", Verdict.OK, f"{name} by {kind}; {machine}", details=details), device
    if shutil.which("nvidia-smi") is not None:
        text, hint = f"CPU; {machine}; an NVIDIA GPU is not used", "run pip install 'mlx[cuda]'"
        return Check("device", Verdict.WARNING, text, hint, details), device
    return Check("device", Verdict.OK, f"CPU; {machine}; no GPU", details=details), device


def check_kernels(device: Device) -> Check:
    """Return the check of the engine's own kernels for CPUs, which Linux has."""
    from modelpack_engine.cpu.library import library
    from modelpack_engine.platform.device import usable_cores

    name = "cpu kernels"
    found = library()
    if found is None:
        verdict = Verdict.WARNING if device == "cpu" else Verdict.OK
        return Check(
            name, verdict, "not built; MLX runs models on the CPU, more slowly",
            hint="install g++, then install modelpack again from its source",
        )  # fmt: skip
    kernels, threads = found.mp_kernels().decode(), usable_cores()
    text = f"{kernels}, {threads} thread{'' if threads == 1 else 's'}"
    return Check(name, Verdict.OK, text, details={"kernels": kernels, "threads": threads})


def check_memory() -> Check:
    """Return the check of the memory that models may use."""
    from modelpack_server.pool.memory import device_memory

    size = device_memory(EngineConfig())
    text = f"{size / 1e9:.1f} GB for models"
    return Check("memory", Verdict.OK, text, details={"available": size})


def check_backends() -> list[Check]:
    """Return a check for each backend of this environment."""
    from modelpack_engine.llama_cpp import library

    verdict, text = Verdict.OK, f"llama-cpp-python {_version('llama-cpp-python')}"
    hint: str | None = "run pip install 'modelpack[llama-cpp]'"
    if library.is_installed():
        hint = None
    elif importlib.util.find_spec("llama_cpp") is not None:
        verdict, text = Verdict.WARNING, f"{text}, expected {library.VERSION}"
    else:
        text = "not installed; runs GGUF on a CPU"
    return [
        Check("backend mlx", Verdict.OK, f"mlx {_version('mlx')}, mlx-lm {_version('mlx-lm')}"),
        Check("backend llama.cpp", verdict, text, hint),
    ]


def check_vllm() -> Check:
    """Return the check of the vLLM that --backend vllm starts, of whatever environment."""
    name, found = "backend vllm", find_program()
    if found is None:
        return Check(name, Verdict.OK, "not installed; --backend vllm requires it")
    where, version = found
    text = f"vLLM {version or '(unknown version)'}, {where}"
    return Check(name, Verdict.OK, text, details={"version": version, "where": where})


def check_choices(device: Device) -> list[Check]:
    """Return a check for each format, with the backend that `auto` selects."""
    from modelpack_engine.cpu.library import library
    from modelpack_engine.llama_cpp.library import automatic_backend

    kernels = ""
    if device == "cpu" and library() is not None:
        kernels = ", unless the kernels for CPUs know the architecture"
    return [
        Check(f"{kind} files", Verdict.OK, f"run by {backend} on the {device}{kernels}",
              details={"format": kind, "backend": backend, "device": device})
        for kind in _FORMATS
        for backend in [automatic_backend(kind, device)]
    ]  # fmt: skip


def check_model(model: Model, device: Device, available: int) -> Check:
    """Return the check of a model, which fails if it exceeds `available` bytes."""
    from modelpack_engine.llama_cpp.library import automatic_backend
    from modelpack_engine.models.loader import is_packable

    name = f"model {model.reference or model.short_id}"
    weights = [file for file in model.files() if file.format in _FORMATS]
    if not weights:
        formats = ", ".join(sorted({file.format for file in model.files() if file.format}))
        return Check(name, Verdict.FAILED, f"no backend for {formats or 'this model'}: expected "
                     "GGUF or safetensors weights")  # fmt: skip
    size = sum(file.descriptor.size for file in weights)
    kind = weights[0].format or ""
    backend: str = automatic_backend(kind, device)
    if device == "cpu" and is_packable(kind, model.config.architecture or ""):
        backend = "cpu kernels"
    details = {"format": kind, "backend": backend, "device": device, "weights": size}
    text = f"{kind}, {size / 1e9:.1f} GB: run by {backend} on the {device}"
    if size + _MIN_WORKING_BYTES > available:
        return Check(
            name, Verdict.FAILED, f"{text}, which has {available / 1e9:.1f} GB",
            hint="use a quantised variant, or --backend vllm with --tensor-parallel-size",
            details=details,
        )  # fmt: skip
    return Check(name, Verdict.OK, text, details=details)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


_PORTS = ((PORT, "serve"), (GATEWAY_PORT, "gateway"), (5000, "registry serve"))


@command()
@click.argument("models", metavar="[MODEL]...", nargs=-1, shell_complete=model_names)
@click.option(
    "--registry", "registries", metavar="HOST", multiple=True,
    help="Check this registry. May be repeated. [default: the default registry]",
)  # fmt: skip
@click.option("--offline", is_flag=True, help="Skip the check of registries.")
@remote_options
@common_options_without("quiet", "progress")
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
    checks = _engine_checks(settings, models)
    checks.append(check_store(settings.store_root))
    if not offline:
        hosts = registries or (os.environ.get("DEFAULT_REGISTRY") or DEFAULT_REGISTRY,)
        checks += [check_registry(host, remote) for host in hosts]
    checks += [check_port(port, purpose) for port, purpose in _PORTS]
    verdict = max((check.verdict for check in checks), key=list(Verdict).index)
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
    from modelpack.operations.lookup import inspect

    try:
        require_engine()
    except UsageError as error:
        # Packaging and transferring models does not need the engine.
        verdict = Verdict.FAILED if models else Verdict.WARNING
        return [Check("engine", verdict, str(error), hint=error.hint), check_vllm()]

    device, where = check_device()
    memory = check_memory()
    kernels = [check_kernels(where)] if platform.system() == "Linux" else []
    checks = [device, *kernels, memory, *check_backends(), check_vllm(), *check_choices(where)]
    available = (memory.details or {}).get("available", 0)
    for name in models:
        try:
            model = inspect(name, store=settings.existing_store())
        except ModelpackError as error:
            checks.append(Check(f"model {name}", Verdict.FAILED, str(error), error.hint))
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
