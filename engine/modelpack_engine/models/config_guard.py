"""The guard of config.json: reject fields that change the output and that mlx-lm ignores.

mlx-lm's `ModelArgs.from_dict` drops unknown names, so a model would run and give different output.
`config_fields.json` lists, for each model type of transformers, the fields that change
transformers' logits and that mlx-lm's class does not read, with the values for which both agree.
Any other field changes nothing, is read, or is unknown to transformers too.
`tests/engine/oracle/make_fields.py` writes the file.
"""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.patches.corrections import TEXT_PARTS
from modelpack_engine.patches.modules import parsed

Config = Mapping[str, Any]

_QUANTISATIONS = (
    "awq", "bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8",
)  # fmt: skip
_WINDOW = "sliding_window"
_LAYERS, _SLIDING = "layer_types", "sliding_attention"
# Names of one activation function; exact and approximate GELU differ by less than 16-bit weights
# can show.
_SAME = {"swish": "silu", **dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_python", "gelu_accurate", "gelu_pytorch_tanh",
     "gelu_python_tanh"), "gelu",
)}  # fmt: skip
_YARN = ("yarn", "deepseek_yarn", "telechat3-yarn")
_LONG = ("longrope", "su")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits in place of a rejection: the longest context that the model computes correctly."""

    max_length: int | None = None
    notes: tuple[str, ...] = ()


@cache
def _types() -> Mapping[str, Any]:
    text = resources.files("modelpack_engine.models").joinpath("config_fields.json").read_text()
    types: Mapping[str, Any] = json.loads(text)["types"]
    return types


def check_fields(config: Config, arguments: type, ignored: Collection[str] = ()) -> Limits:
    """Raise `ModelLoadError` for a field that changes the output and that mlx-lm does not read.

    `config` is normalised; `arguments` is mlx-lm's class of arguments that it will fill. A sliding
    window that mlx-lm does not implement limits the context instead.
    """
    _check_quantisation(config)
    outer = str(config.get("model_type"))
    read = names_read(arguments.__module__)
    lengths: list[int] = []
    notes: list[str] = []
    for place in ("", *TEXT_PARTS):
        part = config.get(place) if place else config
        if not isinstance(part, dict):
            continue
        prefix, key = f"{place}." if place else "", rules_key(config, place)
        if place or getattr(arguments, "is_flat", False):  # of `multimodal`: a type of its own
            key = getattr(arguments, "text_type", key)
        elif any(isinstance(config.get(name), dict) for name in TEXT_PARTS):
            # The text model's counts: `with_tied_embeddings` has written the same here.
            part = {name: value for name, value in part.items() if name != "tie_word_embeddings"}
        check = _Part(part, prefix, key, _types().get(key, {}), read, frozenset(ignored))
        check.values()
        notes += check.ropes()
        window = check.window()
        if window is not None:
            lengths.append(window)
            notes.append(
                f"mlx-lm's {outer} has no sliding window: the context is limited to {window} tokens"
            )
    return Limits(min(lengths, default=None), tuple(notes))


def rules_key(config: Config, place: str) -> str:
    """Return the key in config_fields.json of a config, or of the text model in `place`."""
    outer = str(config.get("model_type"))
    return f"{outer}/{config[place].get('model_type')}" if place else outer


@dataclass(frozen=True, slots=True)
class _Part:
    """A config, or that of the text model in its field `where`; `kind` is its key in the rules."""

    config: Config
    where: str
    kind: str
    rules: Mapping[str, Any]
    read: frozenset[str]
    ignored: frozenset[str]

    def values(self) -> None:
        """Reject values for which mlx-lm's class computes something other than transformers."""
        for name, allowed in self.rules.get("only", {}).items():
            value = self.config.get(name)
            off = not value and not any(allowed)
            if value is None or off or any(_equal(value, other) for other in allowed):
                continue
            self._refuse(name, value)
        for name, refused in self.rules.get("never", {}).items():
            value = self.config.get(name)
            if any(_equal(value, other) for other in refused):
                self._refuse(name, value)

    def window(self) -> int | None:
        """Return the sliding window that mlx-lm's class ignores, or None."""
        rule = self.rules.get("window")
        value = self.config.get(_WINDOW)
        if rule is None or f"{self.where}{_WINDOW}" in self.ignored:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return None
        if not self.config.get("use_sliding_window", rule["used"]):
            return None
        kinds = self.config.get(_LAYERS)
        if isinstance(kinds, list):
            # A class of mlx-lm that reads both fields implements the window.
            own = {_LAYERS, _WINDOW} <= self.read
            return None if own or _SLIDING not in kinds else value
        first, layers = self.config.get("max_window_layers"), self.config.get("num_hidden_layers")
        if rule["later"] and isinstance(first, int) and isinstance(layers, int) and first >= layers:
            return None  # no layer is late enough to have the window
        longest = self.config.get("max_position_embeddings")
        return None if isinstance(longest, int) and longest <= value else value

    def ropes(self) -> Iterator[str]:
        """Reject rotations that mlx-lm does not compute; yield a note on each slight difference."""
        wrong: Mapping[str, list[str]] = self.rules.get("ropes", {})
        bases = [rope.get("rope_theta") for _, _, rope in _ropes(self.config)]
        for name, layer, rope in _ropes(self.config):
            kind = str(rope.get("rope_type", rope.get("type", "default")) or "default")
            if kind in wrong.get(layer, ()):
                if kind != "default":
                    self._refuse(f"{name}.rope_type", kind)
                elif any(base != bases[0] for base in bases):
                    field = name.partition(".")[0]
                    self._refuse(field, self.config.get(field))
            if kind not in (*_YARN, *_LONG) or self.kind not in _types():
                continue
            given = rope.get("attention_factor")
            followed = given is None or "attention_factor" in self.read
            if not followed and not _close(given, self._attention_factor(kind, rope)):
                self._refuse(f"{name}.attention_factor", given)
            if rope.get("truncate") is False and kind in _YARN and self.kind != "gpt_oss":
                yield f"{self.where}{name}.truncate is not read: frequencies differ slightly"
            if kind in _LONG and rope.get("short_factor") != rope.get("long_factor"):
                yield f"{self.where}{name}: factors of long contexts apply to short contexts too"

    def _attention_factor(self, kind: str, rope: Config) -> float | None:
        """Return the attention factor that mlx-lm computes for a rotation, or None if unknown."""
        factor = rope.get("factor")
        if kind in _YARN:
            return _scale(factor) if "mscale" not in rope else None
        before = rope.get("original_max_position_embeddings")
        after = self.config.get("max_position_embeddings")
        if not isinstance(before, int) or not isinstance(after, int) or before < 2:
            return None
        return math.sqrt(math.log(after) / math.log(before)) if after > before else 1.0

    def _refuse(self, name: str, value: Any) -> None:
        if {f"{self.where}{name}", f"{self.where}{name.partition('.')[0]}"} & self.ignored:
            return
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= 100 else f"{shown[:100]}…"
        raise ModelLoadError(
            f"config.json: {self.where}{name} = {shown} changes the model's output, and mlx-lm's"
            f" {self.kind.partition('/')[0]} does not support it",
            hint=f"to run the model without it, use --ignore-config-field {self.where}{name}",
        )


def _ropes(config: Config) -> Iterator[tuple[str, str, Config]]:
    """Yield each rotation: the name of its field, its layer type ("" for all), and its settings."""
    name = "rope_parameters" if isinstance(config.get("rope_parameters"), dict) else "rope_scaling"
    rope = config.get(name)
    if not isinstance(rope, dict):
        return
    inner = {key: value for key, value in rope.items() if isinstance(value, dict)}
    for key, value in inner.items():
        yield f"{name}.{key}", key, value
    if not inner:
        yield name, "", rope


def _scale(factor: Any) -> float | None:
    if not isinstance(factor, int | float) or factor <= 0:
        return None
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _close(value: Any, computed: float | None) -> bool:
    if computed is None or not isinstance(value, int | float):
        return False
    # Not by `math.isclose`: the value may be an integer that is too large for a float.
    return 0.999 * computed <= value <= 1.001 * computed


def _check_quantisation(config: Config) -> None:
    ours, theirs = config.get("quantization"), config.get("quantization_config")
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in ("bits", "group_size", "mode"):
            if name in ours and name in theirs and ours[name] != theirs[name]:
                raise ModelLoadError(
                    f"config.json: quantization.{name} is {ours[name]!r}, but quantization_config"
                    f" says {theirs[name]!r}",
                    hint="remove the one that is wrong",
                )
    if ours is not None or theirs is None:
        return
    given = theirs if isinstance(theirs, dict) else {}
    method = given.get("quant_method")
    if method not in _QUANTISATIONS and (method is not None or "bits" not in given):
        raise ModelLoadError(
            f"config.json: the quantisation method {str(method)[:50]!r} is not supported",
            hint=f"use one of {', '.join(_QUANTISATIONS)}, or convert with mlx_lm.convert",
        )


def _equal(one: Any, other: Any) -> bool:
    """Return whether two values are equivalent; a list may repeat the other one for more layers."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, str) and isinstance(other, str):
        return _SAME.get(one, one) == _SAME.get(other, other)
    if isinstance(one, list) and isinstance(other, list) and one and other:
        return all(value == other[index % len(other)] for index, value in enumerate(one))
    return bool(one == other)


@cache
def names_read(module: str) -> frozenset[str]:
    """Return the names that a module of mlx_lm.models may look up in a configuration.

    These are the fields of its dataclasses that its code uses, and its string constants, with
    those of the modules of mlx_lm.models that it imports.
    """
    declared: set[str] = set()
    used: set[str] = set()
    _collect(module, declared, used, set())
    return frozenset(declared & used)


def _collect(module: str, declared: set[str], used: set[str], seen: set[str]) -> None:
    if module in seen:
        return
    seen.add(module)
    package = module.rpartition(".")[0]
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None:
        return
    for node in ast.walk(parsed(Path(path).read_bytes())):
        if isinstance(node, ast.ClassDef):
            names = (
                s.target.id
                for s in node.body
                if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
            )
            declared.update(names)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            used.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used.add(node.value)
            declared.add(node.value)
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                _collect(f"{package}.{name}", declared, used, seen)
