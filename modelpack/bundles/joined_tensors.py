"""Join the tensor layers of Ollama's MLX models to one safetensors file that mlx-lm loads.

Each layer is a safetensors file: of a tensor with the layer's name, or of several tensors whose
names start with it (the experts of a layer). A quantised tensor `X.weight` comes with
`X.weight.scale` and, for affine types, `X.weight.bias`; `__metadata__` has its type and the size of
its groups. mlx-lm calls them `X.weight`, `X.scales` and `X.biases`, and reads bits and group size
from config.json. No value changes.

Source: ollama/ollama at fb30760996871fa9460115c753afd2c60d4ab0f7: x/create/writer.go,
x/create/quantize.go, x/create/prequant.go, x/create/plan.go, x/quant/quant.go and
x/mlxrunner/model/root.go.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from modelpack.artifacts.descriptor import Descriptor, size_mismatch
from modelpack.artifacts.json_document import decode_object
from modelpack.artifacts.model import ModelFile
from modelpack.bundles.links import open_blob
from modelpack.errors import ManifestError, UnsupportedError, WeightFormatError
from modelpack.formats.config_json import CONFIG_JSON, MAX_CONFIG_JSON_BYTES
from modelpack.formats.reader import WeightFile
from modelpack.formats.safetensors import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    SafetensorsHeader,
    read_safetensors_header,
)
from modelpack.formats.tensors import MAX_TENSORS, TensorInfo
from modelpack.progress import Action, Progress
from modelpack.storage import Watch

#: The name of the joined file.
JOINED_WEIGHTS: Final = "model.safetensors"
_SCALE, _BIAS, _GLOBAL = ".scale", ".bias", ".global_scale"
_WEIGHT: Final = ".weight"
_DRAFT: Final = "draft."
_CHUNK: Final = 1024 * 1024
_FLOATS: Final = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class _Type:
    """A quantisation of MLX: its mode and bits, the usual weights a group, and types of scales."""

    mode: str
    bits: int
    group_size: int
    scales: tuple[str, ...]


_TYPES: Mapping[str, _Type] = MappingProxyType(
    {
        **dict.fromkeys(("int4", "fp4", "q4"), _Type("affine", 4, 64, _FLOATS)),
        **dict.fromkeys(("int8", "fp8", "q8"), _Type("affine", 8, 64, _FLOATS)),
        "nvfp4": _Type("nvfp4", 4, 16, ("U8",)),
        "mxfp4": _Type("mxfp4", 4, 32, ("U8",)),
        "mxfp8": _Type("mxfp8", 8, 32, ("U8",)),
    }
)
# The experts that Ollama stacks, in the order of their numbers; mlx-lm's models call them
# `switch_mlp`, except for this one.
_EXPERTS: Final = re.compile(r"\.mlp\.experts\.(?=(?:gate|up|down)_proj\.weight\Z)")
_WITHOUT_SWITCH: Final = ("gpt_oss",)


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the joined file: its new name, and its bytes in the file of a layer."""

    name: str
    info: TensorInfo
    start: int
    layer: ModelFile
    path: Path


@dataclass(frozen=True, slots=True)
class JoinedTensors:
    """The joined file and its config.json; `notes` list omitted parts."""

    config: bytes
    notes: tuple[str, ...]
    _header: bytes
    _parts: tuple[_Part, ...]

    def pieces(self, watch: Watch) -> Iterator[bytes]:
        """Yield the bytes of the file; raise `NotFoundError` or `SizeMismatchError` for a blob."""
        total = len(self._header) + sum(part.info.size for part in self._parts)
        done = len(self._header)
        yield self._header
        for part in self._parts:
            with open_blob(part.path, part.layer.descriptor) as blob:
                blob.seek(part.start)
                left = part.info.size
                while left:
                    watch.stop.check()
                    piece = blob.read(min(left, _CHUNK))
                    if not piece:
                        raise size_mismatch(f"tensor {part.name}", part.info.size, "fewer")
                    left -= len(piece)
                    yield piece
            done += part.info.size
            watch.report(
                Progress(Action.UNPACK, part.name, part.layer.descriptor.digest, done, total)
            )


def join_tensors(
    layers: Iterable[ModelFile],
    config: ModelFile | None,
    blob_path: Callable[[Descriptor], Path],
) -> JoinedTensors:
    """Return the joined weights of tensor layers; `config` is the layer of the config.json.

    Raises `ManifestError` for a layer without the tensor of its name, and for a tensor in two
    layers; `WeightFormatError` for damaged layers and for quantised tensors whose types and shapes
    do not fit together; `UnsupportedError` for models that generate images and for codes that
    mlx-lm does not read.
    """
    if config is None:
        raise ManifestError(f"has tensors, but no {CONFIG_JSON}", path="manifest")
    with open_blob(blob_path(config.descriptor), config.descriptor) as stream:
        described = decode_object(stream.read(MAX_CONFIG_JSON_BYTES + 1), CONFIG_JSON)
    quantised = _Quantised(described)
    parts: dict[str, _Part] = {}
    drafts = 0
    for layer in layers:
        assert layer.filepath is not None
        if "/" in layer.filepath:
            raise UnsupportedError(
                f"has the tensor {layer.filepath!r} of a model that generates images",
                path="manifest",
                hint="use a model that generates text",
            )
        if layer.filepath.startswith(_DRAFT):
            drafts += 1
            continue
        path = blob_path(layer.descriptor)
        header = _header_of(layer, path)
        for info, name in quantised.named(header, layer.filepath):
            start = header.data_offset + info.offset
            if name in parts:
                raise ManifestError(f"has the tensor {name!r} twice", path="manifest")
            parts[name] = _Part(name, info, start, layer, path)
        if len(parts) > MAX_TENSORS:
            raise UnsupportedError(f"has more than {MAX_TENSORS} tensors", path="manifest")
    # The widest types first, so that the data of each tensor is aligned.
    order = sorted(parts.values(), key=lambda part: (-DTYPE_BITS[part.info.dtype], part.name))
    note = f"the draft model is left out: {drafts} layers named {_DRAFT}*"
    return JoinedTensors(
        quantised.config(), (note,) if drafts else (), _header(order), tuple(order)
    )


def _header(parts: Iterable[_Part]) -> bytes:
    # "pt": mlx-lm adapts the names and layouts of other tensors as for a model of PyTorch.
    value: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        start, end = end, end + part.info.size
        value[part.name] = {
            "dtype": part.info.dtype,
            "shape": part.info.shape,
            "data_offsets": [start, end],
        }
    raw = json.dumps(value, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise UnsupportedError(
            f"the names of its tensors take {len(raw)} bytes, the limit is {MAX_HEADER_BYTES}",
            path="manifest",
        )
    return len(raw).to_bytes(8, "little") + raw


def _header_of(layer: ModelFile, path: Path) -> SafetensorsHeader:
    name = layer.filepath or ""
    with WeightFile.open(path) as file:
        file.path = f"tensor {name}"
        header = read_safetensors_header(file)
    names = {info.name for info in header.tensors}
    own = {name, name + _SCALE, name + _BIAS, name + _GLOBAL}
    strange = (
        sorted(names - own)
        if name in names
        else sorted(other for other in names if not other.startswith(f"{name}."))
    )
    if strange or not names:
        got = repr(strange[0]) if strange else "no tensor"
        raise ManifestError(f"the layer {name!r} contains {got}", path="manifest")
    return header


class _Quantised:
    """The quantised tensors of a model, and the config.json that describes them."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        # A model that mlx-lm quantised keeps its description of each module.
        stated = config.get("quantization")
        self._stated: Mapping[str, Any] = stated if isinstance(stated, dict) else {}
        self._modules: dict[str, tuple[str, int, int]] = {}
        self._switches = config.get("model_type") not in _WITHOUT_SWITCH

    def named(self, header: SafetensorsHeader, layer: str) -> Iterator[tuple[TensorInfo, str]]:
        """Yield the tensors of a layer with the names of mlx-lm."""
        infos = {info.name: info for info in header.tensors}
        for name, info in infos.items():
            base, dot, part = name.rpartition(".")
            whole = infos.get(base)
            if dot + part in (_SCALE, _BIAS, _GLOBAL) and whole is not None:
                if base + _SCALE not in infos:
                    raise _fault(base, f"has {name!r}, but no scale")
                continue
            if dot + part == _SCALE and base.endswith(_WEIGHT):
                raise _fault(base, f"is missing, and {name!r} is its scale")
            scale = infos.get(name + _SCALE)
            module = self._renamed(name).removesuffix(_WEIGHT)
            if scale is None:
                yield info, self._renamed(name)
                continue
            if not name.endswith(_WEIGHT):
                raise _fault(name, "has a scale, but is not called weight")
            if name + _GLOBAL in infos:
                raise UnsupportedError(
                    f"the tensor {name!r} has a scale for the whole tensor, which mlx-lm does not "
                    "read",
                    path=layer,
                    hint="use a model in another quantisation",
                )
            bias = infos.get(name + _BIAS)
            self._modules[module] = self._checked(info, scale, bias, header.metadata)
            yield info, f"{module}{_WEIGHT}"
            yield scale, f"{module}.scales"
            if bias is not None:
                yield bias, f"{module}.biases"

    def config(self) -> bytes:
        """Return the config.json for mlx-lm."""
        value = dict(self._config)
        for key in ("quantization", "quantization_config"):
            value.pop(key, None)
        if self._modules:
            usual, _ = Counter(self._modules.values()).most_common(1)[0]
            described = _described(usual)
            for module, own in self._modules.items():
                if own != usual:
                    described[module] = _described(own)
            value["quantization"] = value["quantization_config"] = described
        return json.dumps(value, indent=2).encode() + b"\n"

    def _renamed(self, name: str) -> str:
        return _EXPERTS.sub(".mlp.switch_mlp.", name) if self._switches else name

    def _checked(
        self,
        weight: TensorInfo,
        scale: TensorInfo,
        bias: TensorInfo | None,
        metadata: Mapping[str, str],
    ) -> tuple[str, int, int]:
        """Return the mode, the bits and the group size of a quantised tensor."""
        mode, group_size = self._stated_for(weight.name, metadata)
        bits, rest = divmod(
            32 * weight.shape[-1] if weight.shape else 0,
            (scale.shape[-1] * group_size if scale.shape else 0) or 1,
        )
        if weight.dtype != "U32":
            raise _fault(weight.name, f"is quantised, and has the type {weight.dtype}, not U32")
        types = [kind for kind in _TYPES.values() if kind.mode == mode]
        if scale.dtype not in types[0].scales:
            expected = " or ".join(types[0].scales)
            raise _fault(weight.name, f"has scales of type {scale.dtype}, expected {expected}")
        if rest or not 2 <= bits <= 8 or weight.shape[:-1] != scale.shape[:-1]:
            shapes = f"{list(weight.shape)} and {list(scale.shape)}"
            raise _fault(
                weight.name, f"and its scale have the shapes {shapes}, for groups of {group_size}"
            )
        if mode != "affine" and bits != types[0].bits:
            raise _fault(weight.name, f"has {bits} bits, expected {types[0].bits} for {mode}")
        if (bias is not None) != (mode == "affine"):
            raise _fault(weight.name, f"has {'no' if bias is None else 'a'} bias in mode {mode}")
        if bias is not None and (bias.shape, bias.dtype) != (scale.shape, scale.dtype):
            raise _fault(weight.name, "has a bias of another shape or type than its scale")
        return mode, bits, group_size

    def _stated_for(self, name: str, metadata: Mapping[str, str]) -> tuple[str, int]:
        """Return the mode and the group size of a tensor, of config.json or of its layer."""
        own = self._stated.get(name.removesuffix(_WEIGHT))
        stated = own if isinstance(own, dict) else self._stated
        group_size, mode = stated.get("group_size"), stated.get("mode", "affine")
        if type(group_size) is not int:
            named = metadata.get(f"{name}.quant_type") or metadata.get("quant_type", "")
            kind = _TYPES.get(named.strip().lower())
            if kind is None:
                raise UnsupportedError(
                    f"the tensor {name!r} has the quantisation {named[:40]!r}; expected one of "
                    + ", ".join(_TYPES),
                    path="manifest",
                )
            text = metadata.get(f"{name}.group_size") or metadata.get("group_size", "")
            group_size = int(text[:9]) if text.isascii() and text.isdigit() else kind.group_size
            mode = kind.mode
        modes = [kind.mode for kind in _TYPES.values()]
        if mode not in modes or not 8 <= group_size <= 1024:
            raise _fault(name, f"has the mode {str(mode)[:40]!r} and groups of {group_size}")
        return mode, group_size


def _described(module: tuple[str, int, int]) -> dict[str, Any]:
    mode, bits, group_size = module
    return {"group_size": group_size, "bits": bits, "mode": mode}


def _fault(name: str, fault: str) -> WeightFormatError:
    return WeightFormatError(f"the tensor {name[:200]!r} {fault}")
