"""Choose the variant of an index that this machine runs best."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.manifest import Index, Manifest, parse_manifest_or_index
from modelpack.artifacts.model import Model
from modelpack.errors import NotFoundError, UnsupportedError
from modelpack.formats.config_json import mlx_bits
from modelpack.operations.remote import OpenedSource, RemoteOptions
from modelpack.progress import Action, Progress, ProgressCallback, silent
from modelpack.storage import Source, Watch

GPU = Literal["metal", "cuda", "none"]

#: Share of the memory that weights may take; the KV cache and everything else need the rest.
WEIGHTS_SHARE: Final = 0.75
# image-spec names processors as Go does (GOARCH).
_ARCHITECTURES: Final = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_NVIDIA: Final = Path("/proc/driver/nvidia/version")
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that runs models.

    `platform` is os/architecture as in image-spec. `memory` is in bytes, None if unknown; for a GPU
    with its own memory, it is that memory. `backend` is the requested backend, `mlx`, `llama.cpp`
    or `vllm`, or None.
    """

    platform: str
    gpu: GPU = "none"
    memory: int | None = None
    backend: str | None = None

    @classmethod
    def here(cls, backend: str | None = None) -> Machine:
        """Return the description of this machine."""
        system = "darwin" if sys.platform == "darwin" else sys.platform
        machine = platform.machine().lower()
        name = f"{system}/{_ARCHITECTURES.get(machine, machine)}"
        if name == "darwin/arm64":
            return cls(name, "metal", _physical_memory(), backend)
        if _NVIDIA.exists():
            return cls(name, "cuda", _nvidia_memory(), backend)
        return cls(name, "none", _memory_limit(), backend)

    @property
    def room(self) -> int | None:
        """Bytes that weights may take; None if unknown."""
        return None if self.memory is None else int(self.memory * WEIGHTS_SHARE)


def _physical_memory() -> int | None:
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _memory_limit() -> int | None:
    """Return the memory of the machine, or the lower limit of its container."""
    limits = [_physical_memory()]
    with suppress(OSError, ValueError):
        limits.append(int(_CGROUP_LIMIT.read_text()))
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _nvidia_memory(
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
) -> int | None:
    """Return the memory of the first GPU as nvidia-smi reports it, else None."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
        done = run(command, capture_output=True, text=True, check=True, timeout=10)
        return int(done.stdout.split()[0]) * 1024**2
    return None


#: The format of weights quantised by mlx-lm: safetensors that only MLX runs.
MLX: Final = "mlx"
# Formats by preference. On an NVIDIA GPU, both vLLM and MLX run safetensors.
_PREFERRED: Final = {
    "metal": (MLX, "safetensors", "gguf"),
    "cuda": ("safetensors", "gguf", MLX),
    "none": ("gguf", MLX, "safetensors"),
}
_BACKENDS: Final = {
    "mlx": (MLX, "safetensors", "gguf", ""),
    "llama.cpp": ("gguf", ""),
    "vllm": ("safetensors", ""),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """An entry of an index. `format` is gguf, safetensors, dduf, mlx or empty if unknown.

    `size` is that of all its files in bytes, None if the index does not state it.
    """

    name: str
    descriptor: Descriptor
    format: str = ""
    quantization: str = ""
    size: int | None = None

    @classmethod
    def of(cls, descriptor: Descriptor, number: int) -> Variant:
        """Return the variant of an entry; without a name, its name is its number, from 1."""
        said = descriptor.annotations
        size = said.get(media_types.VARIANT_SIZE, "")
        return cls(
            said.get(media_types.VARIANT) or str(number),
            descriptor,
            said.get(media_types.VARIANT_FORMAT, ""),
            said.get(media_types.VARIANT_QUANTIZATION, ""),
            int(size) if size.isascii() and size.isdigit() and len(size) < 20 else None,
        )


@dataclass(frozen=True, slots=True)
class ChosenVariant:
    """A variant, and the reason for the choice as text for users."""

    variant: Variant
    why: str


def variants_of(index: Index) -> tuple[Variant, ...]:
    """Return the entries of an index that are manifests, in order."""
    manifests = [m for m in index.manifests if m.media_type in media_types.MANIFEST_TYPES]
    return tuple(Variant.of(descriptor, at) for at, descriptor in enumerate(manifests, start=1))


def choose_variant(
    index: Index, what: str, *, name: str | None = None, machine: Machine | None = None
) -> ChosenVariant:
    """Return the variant `name` or, without a name, the best one for `machine` (default: this one).

    Candidates are the variants for its platform and backend. Of those that fit into its memory, the
    preferred format wins, then the largest size, which has the least loss. If none fits, the
    smallest candidate is returned. Raises `NotFoundError` for an unknown name, `UnsupportedError`
    without candidates.
    """
    variants = variants_of(index)
    if name is not None:
        named = [variant for variant in variants if variant.name == name]
        if not named:
            raise NotFoundError(f"{what}: no variant {name!r}; available: {_listed(variants)}")
        return ChosenVariant(named[0], "as requested")
    machine = machine or Machine.here()
    usable = [variant for variant in variants if _runs(variant, machine)]
    if not usable:
        wanted = f" with {machine.backend}" if machine.backend else ""
        raise UnsupportedError(
            f"{what}: no variant runs on {machine.platform}{wanted}; "
            f"available: {_listed(variants)}",
            hint="give --variant NAME to select one anyway",
        )
    room = machine.room
    fitting = [v for v in usable if room is None or v.size is None or v.size <= room]
    if not fitting:
        smallest = min(usable, key=lambda variant: variant.size or 0)
        return ChosenVariant(smallest, "the smallest, though it may not fit into memory")
    order = _PREFERRED[machine.gpu]

    def rank(variant: Variant) -> tuple[int, int]:
        place = order.index(variant.format) if variant.format in order else len(order)
        return place, -(variant.size or 0)

    best = min(fitting, key=rank)
    gpu = f" with {machine.gpu}" if machine.gpu != "none" else ""
    return ChosenVariant(best, f"for {machine.platform}{gpu}")


def fetch_variant(
    source: Source,
    descriptor: Descriptor,
    raw: bytes,
    what: str,
    *,
    options: RemoteOptions | None = None,
    report: ProgressCallback = silent,
) -> tuple[Descriptor, Manifest]:
    """Return the manifest `raw` or, if it is an index, the manifest of the variant to use.

    Raises the errors of `choose_variant`, and `UnsupportedError` if the manifest is not a model.
    """
    options = options or RemoteOptions()
    document = parse_manifest_or_index(raw, what, media_type=descriptor.media_type)
    if isinstance(document, Index):
        machine = Machine.here(options.backend)
        chosen = choose_variant(document, what, name=options.variant, machine=machine)
        descriptor = replace(chosen.variant.descriptor, annotations={}, platform=None)
        raw = source.fetch_manifest(descriptor)
        note = f"{what}: the variant {chosen.variant.name}, {chosen.why}"
        report(Progress(Action.NOTE, message=note))
        document = Manifest.parse(raw, what)
    elif options.variant is not None:
        raise UnsupportedError(
            f"{what} has no variant {options.variant!r}: it is a single model, not an index",
            hint="leave out --variant",
        )
    document.check_is_model(what)
    return descriptor, document


def opened_variant(
    opened: OpenedSource, options: RemoteOptions, watch: Watch
) -> tuple[Descriptor, Manifest]:
    """Return what `fetch_variant` returns for an opened model; report the choice to `watch`."""
    source, found, raw, what = opened.source, opened.descriptor, opened.raw, opened.asked
    return fetch_variant(source, found, raw, what, options=options, report=watch.report)


def described_variant(name: str, model: Model, platform: str | None) -> Descriptor:
    """Return the index entry of a model as the variant `name`."""
    config = model.config
    kind = MLX if mlx_bits(config) is not None else config.format
    said = {media_types.VARIANT: name, media_types.VARIANT_SIZE: str(model.manifest.total_size)}
    if kind:
        said[media_types.VARIANT_FORMAT] = kind
    if config.quantization:
        said[media_types.VARIANT_QUANTIZATION] = config.quantization
    found = model.descriptor
    return Descriptor(
        found.media_type, found.digest, found.size, said, model.manifest.artifact_type, platform
    )


def _runs(variant: Variant, machine: Machine) -> bool:
    platform = variant.descriptor.platform
    if platform is not None and not f"{platform}/".startswith(f"{machine.platform}/"):
        return False
    if machine.backend is None:
        return True
    return variant.format in _BACKENDS.get(machine.backend, (variant.format,))


def _listed(variants: Iterable[Variant]) -> str:
    shown = [
        variant.name + (f" ({variant.descriptor.platform})" if variant.descriptor.platform else "")
        for variant in variants
    ]
    return ", ".join(shown[:20]) or "none"
