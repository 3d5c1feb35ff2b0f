"""Write the fixture of the oracle: what transformers answers for tiny models.

Needs torch and transformers, which the engine and its tests do not:

    python -m tests.engine.oracle.generate transformers-5.json.gz [model_type...]

For each model type that mlx-lm has as well, a tiny model is saved by transformers, its tensors are
replaced by those of `weights.py`, and it is read again. Then each field of its config.json is
changed in turn: a change that alters the logits is kept as a case, one that never does marks the
field as inert.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine.oracle.sizes import EXTRA, KINDS, SIZES, SKIPPED
from tests.engine.oracle.weights import POSITIONS, TOKENS, weight

Config = dict[str, Any]

# Changing these is not a change of the maths of this model: sizes and names.
_UNCHANGED = {
    "model_type",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "vision_config",
    "audio_config",
    "auto_map",
}
# What transformers writes, however it was asked.
_WRITTEN = {"transformers_version", "dtype", "torch_dtype", "architectures"}
_ROPES: list[Config] = [
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 2.0,
     "original_max_position_embeddings": 16, "attention_factor": 1.7},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
     "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.5] * 8, "long_factor": [3.0] * 8,
     "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.5] * 8, "long_factor": [3.0] * 8,
     "original_max_position_embeddings": 64},
]  # fmt: skip
_ACTIVATIONS = {"silu": "gelu", "swish": "gelu"}


def main() -> None:
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    kinds = sys.argv[2:] or [k for k in KINDS if k in CONFIG_MAPPING_NAMES]
    result: Config = {"transformers": transformers.__version__, "models": {}, "failed": {}}
    for kind in kinds:
        if kind in SKIPPED:
            continue
        try:
            result["models"][kind] = _model(kind)
        except Exception as error:
            result["failed"][kind] = f"{type(error).__name__}: {str(error)[:300]}"
            print(kind, "FAILED", result["failed"][kind], file=sys.stderr, flush=True)
            continue
        model = result["models"][kind]
        print(
            kind, len(model["cases"]), "cases; inert:", *model["inert"], file=sys.stderr, flush=True
        )
    path.write_bytes(gzip.compress(json.dumps(result, separators=(",", ":")).encode(), mtime=0))


def _model(kind: str) -> Config:
    base = _tiny(kind)
    config, tensors, logits, model = _answer(base)
    found: Config = {
        "config": config,
        "tensors": tensors,
        "logits": logits,
        "inert": [],
        "cases": [],
    }
    effects: dict[str, bool] = {}
    for change in _changes(config):
        where, name, value, more = change
        edited = copy.deepcopy(config)
        part = edited[where] if where else edited
        part.update({name: value, **more})
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                got, its, answer = _changed(_parsed(kind, edited), model, tensors)
        except Exception:
            continue
        if not np.isfinite(answer).all():
            continue
        key = f"{where}.{name}" if where else name
        sized = isinstance(value, int) and not isinstance(value, bool) and its != tensors
        written = (got.get(where) or {}) if where else got
        if written.get(name) != value and "rope" not in name:
            continue  # transformers itself did not take the value
        changed = _differ(logits, answer) or its != tensors
        effects[key] = effects.get(key, False) or changed
        if changed and not sized:  # the tensors' shapes hold sizes already
            case: Config = {"field": key, "set": _difference(config, got), "logits": answer}
            if its != tensors:
                case["tensors"] = {n: s for n, s in its.items() if tensors.get(n) != s}
                case["absent"] = [n for n in tensors if n not in its]
            found["cases"].append(case)
    found["inert"] = sorted(name for name, effect in effects.items() if not effect)
    return found


def _difference(base: Config, other: Config) -> Config:
    """Return the fields of `other` that differ; a field that is gone is null."""
    base, other = ({k: v for k, v in c.items() if k not in _WRITTEN} for c in (base, other))
    return {
        name: other.get(name)
        for name in {**base, **other}
        if base.get(name, 0) != other.get(name, 0)
    }


def _differ(one: list[list[float]], other: list[list[float]]) -> bool:
    a, b = np.array(one), np.array(other)
    return bool(np.abs(a - b).max() > 2e-4 * np.abs(a).max())


def _tiny(kind: str) -> Any:
    from transformers import AutoConfig

    cls = type(AutoConfig.for_model(kind))
    return cls(**_sized(kind, cls))


def _sized(kind: str, cls: Any) -> Config:
    plain = cls().to_dict()
    given = {name: value for name, value in SIZES.items() if name in plain}
    if "rope_theta" in plain:
        given["rope_theta"] = 500.0
    for part in ("text_config", "vision_config", "audio_config", "llm_config"):
        inner = getattr(cls(), part, None)
        if part in plain and inner is not None and not isinstance(inner, dict):
            given[part] = {**_sized(inner.model_type, type(inner)), "model_type": inner.model_type}
    given.update(EXTRA.get(kind, {}))
    if "rope_parameters" in given and "rope_parameters" not in plain:  # before transformers 5
        rope = dict(given.pop("rope_parameters"))
        given["rope_theta"] = rope.pop("rope_theta")
        given["rope_scaling"] = rope
    return given


def _parsed(kind: str, config: Config) -> Any:
    from transformers import AutoConfig

    return type(AutoConfig.for_model(kind)).from_dict(_without_tags(config))


def _without_tags(value: Any) -> Any:
    """Return a copy in which {"__float__": "Infinity"}, as it is saved, is the number."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _without_tags(item) for key, item in value.items()}
    return [_without_tags(item) for item in value] if isinstance(value, list) else value


def _answer(config: Any) -> tuple[Config, dict[str, list[int]], list[list[float]], Any]:
    """Return config.json, the tensors' shapes, the logits of the model with our weights, and it."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM
    if hasattr(config, "text_config"):
        with contextlib.suppress(Exception):
            AutoModelForImageTextToText._model_mapping[type(config)]
            auto = AutoModelForImageTextToText
    with tempfile.TemporaryDirectory() as directory:
        model = auto.from_config(config, attn_implementation="eager").float()
        model.save_pretrained(directory)
        path = Path(directory) / "model.safetensors"
        tensors: dict[str, list[int]] = {}
        arrays = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                array = file.get_tensor(name)
                tensors[name] = list(array.shape)
                arrays[name] = (
                    torch.from_numpy(np.asarray(weight(name, array.shape)))
                    if (array.is_floating_point())
                    else array
                )
        save_file(arrays, path, metadata={"format": "pt"})
        model = (
            type(model)
            .from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
            .eval()
        )
        written = json.loads((Path(directory) / "config.json").read_text())
    return written, tensors, _logits(model), model


def _logits(model: Any) -> list[list[float]]:
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    rows = logits[list(POSITIONS), :64].double().numpy()
    return [[float(f"{x:.5g}") for x in row] for row in rows]


def _changed(
    config: Any, base: Any, tensors: dict[str, list[int]]
) -> tuple[Config, dict[str, list[int]], list[list[float]]]:
    """Answer as `_answer`; quicker where the tensors are those of the model `base`."""
    model = type(base)._from_config(config, attn_implementation="eager").float().eval()
    ours, theirs = model.state_dict(), base.state_dict()
    tied = _ties(config) != _ties(base.config)
    if tied or {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in theirs.items()}:
        return _answer(config)[:3]
    model.load_state_dict(theirs)
    written = json.loads(model.config.to_json_string())
    written["architectures"] = [type(model).__name__]
    return written, tensors, _logits(model)


def _ties(config: Any) -> tuple[bool, ...]:
    """Return `tie_word_embeddings` of the config and of its text model."""
    parts = (config, config.get_text_config())
    return tuple(part.tie_word_embeddings for part in parts)


def _changes(config: Config) -> Iterator[tuple[str, str, Any, Config]]:
    for part in ("", "text_config"):
        fields = config.get(part) if part else config
        if not isinstance(fields, dict):
            continue
        for name, value in fields.items():
            if name in _UNCHANGED or name == "text_config":
                continue
            for other in _others(name, value, fields):
                yield part, name, other, {}
        if "use_sliding_window" in fields:
            windows = {"sliding_window": 6, "max_window_layers": 2, "layer_types": None}
            windows = {name: value for name, value in windows.items() if name in fields}
            yield part, "use_sliding_window", True, windows


def _others(name: str, value: Any, fields: Config) -> Iterator[Any]:
    if name == "rope_scaling":
        yield from _ROPES
    elif name == "rope_parameters" and isinstance(value, dict):
        yield from _rope_changes(value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        if "window" in name:
            yield None
            yield from (6,) if value > 12 else ()  # shorter than what the model reads
        yield value * 2
        yield value // 2 if value > 1 else 3
    elif isinstance(value, float):
        yield value * 1.7 + 0.1
    elif isinstance(value, str):
        if "act" in name and (
            "gelu" in value or "silu" in value or "relu" in value or value == "swish"
        ):
            yield _ACTIVATIONS.get(value, "silu")
        elif value in ("softmax", "sigmoid"):
            yield "sigmoid" if value == "softmax" else "softmax"
    elif value is None:
        yield from (True, 3, 0.7)
    elif isinstance(value, list) and value:
        turned = value[1:] + value[:1]
        yield turned if turned != value else []


def _rope_changes(value: Config) -> Iterator[Config]:
    nested = [key for key, inner in value.items() if isinstance(inner, dict)]
    for key in nested:
        for inner in _rope_changes(value[key]):
            yield {**value, key: inner}
    if nested:
        return
    yield {**value, "rope_theta": 77.0}
    for rope in _ROPES:
        yield {
            **{k: v for k, v in value.items() if k in ("rope_theta", "partial_rotary_factor")},
            **rope,
        }
    if "partial_rotary_factor" in value:
        yield {**value, "partial_rotary_factor": value["partial_rotary_factor"] / 2}
    else:
        yield {**value, "partial_rotary_factor": 0.5}
    if "mrope_section" in value:
        yield {**value, "mrope_interleaved": not value.get("mrope_interleaved", False)}


if __name__ == "__main__":
    main()
