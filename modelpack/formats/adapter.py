"""Read the configuration and header of a LoRA or DoRA adapter; no tensor data is read.

`read_adapter` accepts what PEFT writes (adapter_config.json, adapter_model.safetensors), what
mlx-lm writes (adapter_config.json, adapters.safetensors) and GGUF files of llama.cpp, and
`check_base` compares an adapter with the shapes of the model that it changes. Packaging checks
adapters with them, and the engine before it reads the tensors.

An adapter adds `scale * B(A(x))` to the output of linear layers of its base. With a magnitude
(DoRA), each row of the sum of both weights is then scaled to that length. The weight of an
embedding is [tokens, outputs]: PEFT scales its columns, and mlx-lm its rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Literal

from modelpack.errors import FormatError, NotFoundError
from modelpack.formats.config_json import read_config_json
from modelpack.formats.gguf import MetadataArray, read_gguf_header
from modelpack.formats.safetensors import read_safetensors_header
from modelpack.formats.tensors import TensorInfo

CONFIG: Final = "adapter_config.json"
#: The names of the weights that PEFT and mlx-lm write.
PEFT_WEIGHTS: Final = "adapter_model.safetensors"
MLX_WEIGHTS: Final = "adapters.safetensors"
#: Larger ranks gain nothing: training all weights costs less then.
MAX_RANK: Final = 4096
#: The longest name of a tensor: a module is looked up by each end of its name.
MAX_NAME: Final = 256

AdapterFormat = Literal["peft", "mlx", "gguf"]
#: How the matrices of a target are stored: those of a module, or PEFT's of a parameter that holds
#: all experts, of which PEFT before 0.19.1 may have exchanged the inputs and outputs.
Layout = Literal["module", "parameter", "old parameter"]


class AdapterError(FormatError):
    """An adapter does not parse, does not fit its base, or needs what Modelpack does not have."""


@dataclass(frozen=True, slots=True)
class Target:
    """A module of the base that an adapter changes, and the names of its tensors.

    `module` is the module's path in the base, as the adapter's format names it. `a` is stored as
    [rank, inputs] and `b` as [outputs, rank]; if `transposed`, both are stored the other way round
    (mlx-lm). `experts` is the number of experts that the tensors are stacked for. If
    `conv1d`, files of the base may have its weight as [inputs, outputs] (GPT-2).

    With another `layout` than `module`, `module` is the path of a parameter of experts, such as
    `layers.0.mlp.experts.gate_up_proj`. Then `a` is [experts * rank, inputs], expert by expert,
    and `b` [outputs, rank * experts], where the experts of a rank follow each other.
    """

    module: str
    rank: int
    inputs: int
    outputs: int
    scale: float
    a: str
    b: str
    magnitude: str | None = None
    transposed: bool = False
    embedding: bool = False
    experts: int | None = None
    conv1d: bool = False
    layout: Layout = "module"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA or DoRA adapter: its files, its base as the trainer named it, and its targets.

    `rank` is the largest of all targets.
    """

    format: AdapterFormat
    weights: Path
    config: Path | None
    base: str
    targets: tuple[Target, ...]
    size: int

    @property
    def rank(self) -> int:
        """The largest rank of all targets."""
        return max(target.rank for target in self.targets)

    @property
    def kind(self) -> str:
        """`dora` if a target has a magnitude, otherwise `lora`."""
        return "dora" if any(target.magnitude for target in self.targets) else "lora"

    @property
    def modules(self) -> tuple[str, ...]:
        """The last names of the targets, such as `q_proj`, sorted."""
        return tuple(sorted({target.module.rpartition(".")[2] for target in self.targets}))


def read_adapter(path: Path) -> Adapter:
    """Return the adapter in the directory or GGUF file `path`.

    Raises `AdapterError` for a configuration that is invalid or not supported, and for tensors that
    do not match it; `WeightFormatError` for a broken file; `NotFoundError` for a missing one.
    """
    if not path.is_dir():
        return read_adapter_files(None, path)
    config = path / CONFIG
    if not config.exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return read_adapter_files(None, found[0])
        raise NotFoundError(f"{path}: not an adapter: no {CONFIG} and not one GGUF file")
    for name in (PEFT_WEIGHTS, MLX_WEIGHTS):
        if (path / name).exists():
            return read_adapter_files(config, path / name)
    raise NotFoundError(f"{path}: no adapter weights: expected {PEFT_WEIGHTS} or {MLX_WEIGHTS}")


def read_adapter_files(config: Path | None, weights: Path) -> Adapter:
    """Return the adapter in these files; GGUF files have no `config`. Raises as `read_adapter`."""
    if config is None:
        return _read_gguf(weights)
    try:
        fields = read_config_json(config, strict=True)
    except ValueError as error:
        raise AdapterError(str(error), path=str(config)) from None
    header = read_safetensors_header(weights)
    reader = _Mlx if "lora_parameters" in fields or "fine_tune_type" in fields else _Peft
    made = reader(fields, str(config), str(weights)).adapter(header.tensors)
    return Adapter(made.format, weights, config, made.base, made.targets, header.file_size)


@dataclass(frozen=True, slots=True)
class _Read:
    format: AdapterFormat
    base: str
    targets: tuple[Target, ...]


class _Reader:
    """What PEFT's and mlx-lm's formats share: a configuration, and tensors grouped by module."""

    def __init__(self, fields: Mapping[str, Any], config: str, weights: str) -> None:
        self.fields, self._config, self._weights = fields, config, weights

    def error(self, message: str, *, hint: str | None = None) -> AdapterError:
        """Return an error of the configuration."""
        return AdapterError(message, path=self._config, hint=hint)

    def fault(self, message: str) -> AdapterError:
        """Return an error of the weights."""
        return AdapterError(message, path=self._weights)

    def whole(self, value: Any, name: str) -> int:
        """Return `value` if it is a rank."""
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self.error(f"{name} is {str(value)[:40]}, expected 1 to {MAX_RANK}")
        return value

    def number(self, value: Any, name: str) -> float:
        """Return `value` as a finite float."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer may be too long for `math.isfinite`.
        if not is_number or abs(value) > 1e6 or not math.isfinite(value):
            raise self.error(f"{name} is {str(value)[:40]}, expected a finite number")
        return float(value)

    def table(self, name: str) -> Mapping[str, Any]:
        """Return an object of the configuration; {} if it is absent."""
        value = self.fields.get(name) or {}
        if not isinstance(value, dict):
            raise self.error(f"{name} is not an object")
        return value

    def base(self, key: str) -> str:
        value = self.fields.get(key)
        return value if isinstance(value, str) else ""

    def grouped(
        self, tensors: Iterable[TensorInfo], split: Callable[[str], tuple[str, str] | None]
    ) -> dict[str, dict[str, TensorInfo]]:
        """Return the tensors by module and part; `split` returns both for a name, or None."""
        groups: dict[str, dict[str, TensorInfo]] = {}
        for tensor in tensors:
            if len(tensor.name) > MAX_NAME:
                raise self.fault(
                    f"{tensor.name[:200]}: the name of a tensor has {len(tensor.name)} "
                    f"characters, expected up to {MAX_NAME}"
                )
            found = split(tensor.name)
            if found is None:
                raise self.fault(
                    f"unknown tensor {tensor.name[:200]!r}: not part of a LoRA adapter"
                )
            if tensor.dtype not in ("F16", "BF16", "F32"):
                raise self.fault(
                    f"{tensor.name[:200]} is {tensor.dtype}, expected F16, BF16 or F32"
                )
            groups.setdefault(found[0], {})[found[1]] = tensor
        if not groups:
            raise self.fault("the adapter has no tensors")
        return groups

    def pair(self, module: str, parts: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
        """Return the tensors A and B of a module."""
        if "a" not in parts or "b" not in parts:
            missing = "A" if "a" not in parts else "B"
            raise self.fault(f"{module}: has no LoRA {missing} matrix")
        return parts["a"], parts["b"]

    def checked(self, target: Target, parts: Mapping[str, TensorInfo], size: int) -> Target:
        """Return `target` if its magnitude has `size` values."""
        vector = parts.get("magnitude")
        if vector is not None and math.prod(vector.shape) != size:
            raise self.fault(
                f"{target.module}: the magnitude has shape {list(vector.shape)}, expected [{size}]"
            )
        if vector is not None and target.experts:
            raise self.fault(f"{target.module}: DoRA of experts is not supported")
        return target


#: Fields of PEFT's LoraConfig that change the output and that nothing here computes.
_PEFT_REFUSED: Final = (
    "modules_to_save", "layer_replication", "trainable_token_indices",
    "alora_invocation_tokens", "lora_bias", "use_qalora", "megatron_config",
    "arrow_config", "use_bdlora",
)  # fmt: skip
_PEFT_PREFIX: Final = "base_model.model."
_PEFT_NAME: Final = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<part>[AB])\.weight|lora_embedding_(?P<table>[AB])"
    r"|lora_(?P<magnitude>magnitude_vector)(?:\.weight)?|(?P<base>base_layer)\.weight)\Z"
)
#: Initialisations that change the weights of the base too, unless PEFT converts what it saves.
_PEFT_CHANGES_BASE: Final = ("pissa", "olora", "corda", "lora_ga")


#: Parameters of experts, in the order in which PEFT wraps them, and the module that has them.
_PARAMETERS: Final = ("gate_up_proj", "up_proj", "down_proj")
_EXPERTS: Final = ".experts"
_WRAPPED: Final = ".base_layer"
#: Since this version, A has the inputs of a parameter and B the outputs.
_ORDERED_SINCE: Final = (0, 19, 1)


class _Peft(_Reader):
    def adapter(self, tensors: Sequence[TensorInfo]) -> _Read:
        fields = self.fields
        if fields.get("peft_type") != "LORA":
            raise self.error(
                f"peft_type is {str(fields.get('peft_type'))[:40]!r}, expected 'LORA'",
                hint="merge the adapter into its base with peft",
            )
        for name in _PEFT_REFUSED:
            if fields.get(name):
                raise self.error(
                    f"{name} is set, which is not supported",
                    hint="merge the adapter into its base with peft",
                )
        if fields.get("bias", "none") != "none":
            raise self.error(f"bias is {str(fields['bias'])[:40]!r}, expected 'none'")
        start = str(fields.get("init_lora_weights"))
        if start.startswith(_PEFT_CHANGES_BASE):
            raise self.error(
                f"init_lora_weights is {start[:40]!r}, which changes the base too",
                hint="save the adapter with PEFT's path_initial_model_for_weight_conversion",
            )
        rank, alpha = (
            self.whole(fields.get("r"), "r"),
            self.number(fields.get("lora_alpha", 8), "lora_alpha"),
        )
        ranks, alphas = self._patterns("rank_pattern"), self._patterns("alpha_pattern")
        groups = self.grouped(tensors, _peft_parts)
        parameters, layout = self._parameters(groups), self._layout()
        targets = []
        for wrapper, parts in groups.items():
            module = parameters.get(wrapper, wrapper)
            a, b = self.pair(module, parts)
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
                raise self.fault(
                    f"{module}: A has shape {list(a.shape)} and B {list(b.shape)}, expected "
                    "[rank, inputs] and [outputs, rank]"
                )
            weight = f"{module}.weight"
            named = weight if self._is_parameter(weight) else module
            own = self.whole(_pattern(ranks, named, rank), "rank_pattern")
            experts = a.shape[0] // own if wrapper in parameters else None
            if a.shape[0] != own * (experts or 1):
                raise self.fault(
                    f"{module}: the rank is {a.shape[0]}, expected {own}"
                    + (" or a multiple of it" if wrapper in parameters else "")
                )
            strength = self.number(_pattern(alphas, named, alpha), "alpha_pattern")
            scale = strength / (math.sqrt(own) if fields.get("use_rslora") else own)
            vector = parts.get("magnitude")
            embedding = "lora_embedding_" in a.name
            target = Target(
                module, own, a.shape[1], b.shape[0], scale, a.name, b.name,
                vector.name if vector is not None else None,
                embedding=embedding,
                experts=experts,
                layout=layout if wrapper in parameters else "module",
                # A and B are those of a linear layer: only the base's weight is stored transposed.
                conv1d=bool(fields.get("fan_in_fan_out")) and not embedding,
            )  # fmt: skip
            if fields.get("use_dora") and vector is None:
                raise self.fault(f"{module}: use_dora is set, but it has no magnitude")
            self._check_copy(target, parts.get("base"))
            targets.append(self.checked(target, parts, target.outputs))
        return _Read("peft", self.base("base_model_name_or_path"), tuple(targets))

    @cached_property
    def _target_parameters(self) -> frozenset[str]:
        targets = self.fields.get("target_parameters") or []
        if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
            raise self.error("target_parameters is not a list of names")
        for each in targets:
            if each.rpartition(".")[2] not in (*_PARAMETERS, "weight"):
                raise self.error(
                    f"target_parameters has {each[:100]!r}, expected weights, "
                    f"{', '.join(_PARAMETERS)}",
                    hint="merge the adapter into its base with peft",
                )
        return frozenset(targets)

    def _is_parameter(self, path: str) -> bool:
        """Return whether `target_parameters` names a parameter."""
        return not self._target_parameters.isdisjoint(_ends(path))

    def _parameters(self, modules: Iterable[str]) -> dict[str, str]:
        """Return the paths of the parameters of experts, by the names that PEFT's wrappers have.

        A wrapper of a second parameter holds that of the first as `base_layer`. Other parameters
        are weights of modules, whose matrices are those of the modules.
        """
        wrappers: dict[str, list[str]] = {}
        for module in modules:
            stem = module.replace(_WRAPPED, "")
            if stem.endswith(_EXPERTS):
                wrappers.setdefault(stem, []).append(module)
        found: dict[str, str] = {}
        for stem, names in wrappers.items():
            paths = [f"{stem}.{part}" for part in _PARAMETERS]
            paths = [path for path in paths if self._is_parameter(path)]
            nested = [stem + _WRAPPED * depth for depth in reversed(range(len(paths)))]
            if set(names) != set(nested):
                raise self.fault(
                    f"{stem}: has matrices of {len(names)} parameters, but target_parameters "
                    f"names {len(paths)}"
                )
            found |= dict(zip(nested, paths, strict=True))
        return found

    def _layout(self) -> Layout:
        """Return how this version of PEFT, the first of which wrote none, stores parameters."""
        text = str(self.fields.get("peft_version"))
        version = re.match(r"([0-9]+)\.([0-9]+)\.([0-9]+)", text)
        if version is not None and max(map(len, version.groups())) > 9:
            raise self.error(f"peft_version is {text[:40]!r}, expected numbers of up to 9 digits")
        is_old = version is None or tuple(map(int, version.groups())) < _ORDERED_SINCE
        return "old parameter" if is_old else "parameter"

    def _patterns(self, name: str) -> _Patterns:
        """Return a table by names of modules; those that PEFT takes as expressions are refused."""
        found: dict[str, tuple[int, Any]] = {}
        for order, (pattern, value) in enumerate(self.table(name).items()):
            if not _PATTERN.match(pattern):
                raise self.error(
                    f"{name} has the expression {pattern[:100]!r}, expected names of modules"
                )
            found.setdefault(pattern.removeprefix(_ANY), (order, value))
        return found

    def _check_copy(self, target: Target, copy: TensorInfo | None) -> None:
        """Raise `AdapterError` if PEFT's copy of an embedding or head has the shape of another.

        PEFT saves the base's weight with the adapter of such a layer. Training leaves it as it is,
        so it is not read.
        """
        wanted = (target.outputs, target.inputs)
        if target.embedding:
            wanted = wanted[::-1]
        if copy is not None and copy.shape != wanted:
            raise self.fault(
                f"{copy.name[:200]} has shape {list(copy.shape)}, expected {list(wanted)}"
            )


def _peft_parts(name: str) -> tuple[str, str] | None:
    found = _PEFT_NAME.match(name.removeprefix(_PEFT_PREFIX))
    if found is None:
        return None
    part = found["part"] or found["table"] or ("base" if found["base"] else "magnitude")
    return found["module"], part.lower()


#: A module's path or its end; after ^ only the whole path. PEFT writes `.*\.NAME` itself for
#: parameters of experts that were modules in older checkpoints.
_ANY: Final = ".*\\."
_PATTERN: Final = re.compile(r"(?:\^|\.\*\\\.)?[\w.]+\Z")


#: Values by pattern, with their order.
_Patterns = Mapping[str, tuple[int, Any]]


def _pattern(patterns: _Patterns, module: str, default: Any) -> Any:
    """Return the value of the first pattern that is `module` or its end."""
    names = (f"^{module}", *_ends(module))
    found = (patterns[name] for name in names if name in patterns)
    return min(found, key=itemgetter(0), default=(0, default))[1]


def _ends(path: str) -> Iterator[str]:
    """Yield a path, and what follows each of its dots."""
    while path:
        yield path
        path = path.partition(".")[2]


class _Mlx(_Reader):
    def adapter(self, tensors: Sequence[TensorInfo]) -> _Read:
        kind = self.fields.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora"):
            raise self.error(f"fine_tune_type is {str(kind)[:40]!r}, expected 'lora' or 'dora'")
        parameters = self.table("lora_parameters")
        rank = self.whole(parameters.get("rank"), "lora_parameters.rank")
        scale = self.number(parameters.get("scale", 20.0), "lora_parameters.scale")
        targets = []
        for module, parts in self.grouped(tensors, _mlx_parts).items():
            a, b = self.pair(module, parts)
            stacked = len(a.shape) == 3
            outer = (a.shape[:1], b.shape[:1]) if stacked else ((), ())
            if len(a.shape) not in (2, 3) or len(b.shape) != len(a.shape) or outer[0] != outer[1]:
                raise self.fault(
                    f"{module}: lora_a has shape {list(a.shape)} and lora_b {list(b.shape)}"
                )
            # mlx-lm stores experts as [experts, rank, inputs] and [experts, outputs, rank].
            inputs, first = a.shape[-1 if stacked else 0], a.shape[-2 if stacked else 1]
            outputs, second = b.shape[-2 if stacked else 1], b.shape[-1 if stacked else 0]
            if not first == second == rank:
                raise self.fault(
                    f"{module}: lora_a has shape {list(a.shape)} and lora_b {list(b.shape)}, "
                    f"expected the rank {rank}"
                )
            vector = parts.get("magnitude")
            target = Target(
                module, rank, inputs, outputs, scale, a.name, b.name,
                vector.name if vector is not None else None,
                transposed=not stacked,
                embedding=module.rpartition(".")[2] in _EMBEDDINGS,
                experts=a.shape[0] if stacked else None,
            )  # fmt: skip
            if kind == "dora" and vector is None:
                raise self.fault(f"{module}: fine_tune_type is 'dora', but it has no magnitude")
            size = inputs if target.embedding else outputs
            targets.append(self.checked(target, parts, size))
        return _Read("mlx", self.base("model"), tuple(targets))


#: The names of embeddings in mlx-lm's text models, and GGUF's.
_EMBEDDINGS: Final = (
    "embed_tokens", "wte", "embed_in", "tok_embeddings", "token_embd", "word_embeddings",
    "embeddings", "token_embeddings", "embedding", "embed", "wpe", "embed_tokens_per_layer",
)  # fmt: skip
_MLX_PARTS: Final = {"lora_a": "a", "lora_b": "b", "m": "magnitude"}


def _mlx_parts(name: str) -> tuple[str, str] | None:
    module, _, part = name.rpartition(".")
    return (module, _MLX_PARTS[part]) if module and part in _MLX_PARTS else None


def _read_gguf(path: Path) -> Adapter:
    """Return the adapter in a GGUF file, as llama.cpp's convert_lora_to_gguf.py writes it."""
    header = read_gguf_header(path)

    def value(key: str) -> object:
        found = header.metadata.get(key)
        return None if found is None or isinstance(found.value, MetadataArray) else found.value

    def fault(message: str) -> AdapterError:
        return AdapterError(message, path=str(path))

    if value("general.type") != "adapter" or value("adapter.type") != "lora":
        kind = f"{value('general.type')}, {value('adapter.type')}"
        raise fault(f"not a LoRA adapter: general.type and adapter.type are {kind}")
    if "adapter.alora.invocation_tokens" in header.metadata:
        raise fault("it is an activated LoRA (aLoRA), which is not supported")
    alpha = value("adapter.lora.alpha")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or abs(alpha) > 1e6:
        raise fault(f"adapter.lora.alpha is {alpha}, expected a finite number")
    groups: dict[str, dict[str, TensorInfo]] = {}
    for tensor in header.tensors:
        module, _, part = tensor.name.rpartition(".weight.lora_")
        if not module or part not in ("a", "b"):
            raise fault(f"unknown tensor {tensor.name[:200]!r}: not part of a LoRA adapter")
        groups.setdefault(module, {})[part] = tensor
    targets = []
    for module, parts in groups.items():
        if len(parts) < 2:
            raise fault(f"{module}: has no LoRA {'B' if 'a' in parts else 'A'} matrix")
        a, b = parts["a"], parts["b"]
        # GGUF has the dimension that moves fastest first: A is [inputs, rank], B [rank, outputs],
        # each with the number of experts as a third. The A of embeddings is [rank, tokens].
        embedding = module in _EMBEDDINGS
        shapes = f"A has shape {list(a.shape)} and B {list(b.shape)}"
        if len(a.shape) not in ((2,) if embedding else (2, 3)) or len(b.shape) != len(a.shape):
            raise fault(f"{module}: {shapes}")
        rank, inputs = a.shape[:2] if embedding else a.shape[1::-1]
        if b.shape[0] != rank or a.shape[2:] != b.shape[2:]:
            raise fault(f"{module}: {shapes}")
        if not 1 <= rank <= MAX_RANK:
            raise fault(f"{module}: the rank is {rank}, expected 1 to {MAX_RANK}")
        # llama.cpp takes no alpha for its default: a scale of 1.
        scale = alpha / rank if alpha else 1.0
        targets.append(
            Target(
                module,
                rank,
                inputs,
                b.shape[1],
                scale,
                a.name,
                b.name,
                embedding=embedding,
                experts=a.shape[2] if len(a.shape) == 3 else None,
            )
        )
    if not targets:
        raise fault("the adapter has no tensors")
    base = value("general.base_model.0.repo_url") or value("general.base_model.0.name") or ""
    return Adapter("gguf", path, None, str(base), tuple(targets), header.file_size)


_LAYER: Final = re.compile(r"(?:.*\.)?(?P<tail>(?:layers|h|blocks)\.\d+\..+)\Z")


def canonical(module: str) -> str:
    """Return a module's path from `layers.N` on, or its last name: prefixes differ by tool."""
    found = _LAYER.match(module)
    return found["tail"] if found is not None else module.rpartition(".")[2]


def check_base(adapter: Adapter, tensors: Iterable[TensorInfo], *, format: str) -> None:
    """Raise `AdapterError` unless each target is in the base and has its shape.

    `tensors` are those of all files of the base, `format` is `gguf` or `safetensors`. Experts that
    mlx-lm stacks, and the inputs of quantised weights are compared when the engine loads both. So
    is an adapter in GGUF with a base that is not, or the reverse: the names of modules differ, so
    that only the numbers of layers are compared.
    """
    if (adapter.format == "gguf") != (format == "gguf"):
        _check_layers(adapter, tensors)
        return
    shapes: dict[str, tuple[int, ...]] = {}
    packed = set()
    for tensor in tensors:
        module, _, part = tensor.name.rpartition(".")
        if part == "weight":
            shape = tensor.shape if format != "gguf" else tensor.shape[::-1]
            shapes[canonical(module) if format != "gguf" else module] = shape
        elif part in ("scales", "qweight"):
            packed.add(canonical(module))
    for target in adapter.targets:
        if target.experts is not None:
            continue
        name = canonical(target.module) if format != "gguf" else target.module
        if name not in shapes:
            raise AdapterError(f"the base has no module {target.module}", path=str(adapter.weights))
        shape = shapes[name]
        wanted = (target.outputs, target.inputs)
        if target.embedding:
            wanted = (target.inputs, target.outputs)
        if target.conv1d and shape == wanted[::-1]:
            continue
        if len(shape) != 2 or shape[0] != wanted[0] or (name not in packed and shape != wanted):
            raise AdapterError(
                f"{target.module}: the adapter is for a weight of shape {list(wanted)}, but the "
                f"base has {list(shape)}",
                path=str(adapter.weights),
            )


_NUMBER: Final = re.compile(r"\b(?:layers|h|blocks|blk)\.(?P<number>\d+)\.")


def _check_layers(adapter: Adapter, tensors: Iterable[TensorInfo]) -> None:
    """Raise `AdapterError` for a target in a layer that the base lacks."""
    found = (_NUMBER.search(tensor.name) for tensor in tensors)
    layers = {match["number"] for match in found if match is not None}
    for target in adapter.targets:
        match = _NUMBER.search(target.module)
        if match is not None and match["number"] not in layers:
            raise AdapterError(
                f"the base has no layer {match['number'][:20]}, which {target.module[:200]} is in",
                path=str(adapter.weights),
            )
