"""Requests that one device and several devices have to answer equally."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from modelpack.formats.adapter import AdapterError, read_adapter
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.batch import StepShape
from modelpack_engine.engine import Engine
from modelpack_engine.errors import OutOfMemoryError
from modelpack_engine.models.adapter import weight_shape
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.patches.lora import EMBEDDINGS, EXPERTS, LINEARS, dense_weight
from modelpack_engine.request import EngineRequest, SamplingParams
from tests.adapters import write_mlx, write_peft
from tests.engine.serving.tiny import CONTEXT, VOCAB

#: Makes an engine over the tiny model.
MakeEngine = Callable[[EngineConfig], Engine]

# One block of the tiny model: two layers of two KV heads of 16, keys and values, in float32.
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4

#: A model that the zoo does not have: heads of 32, whose keys and values can be 8-bit.
WIDE = "wide llama"

SEEDED = [
    SamplingParams(max_tokens=14, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=11, temperature=1.2, top_p=0.9, seed=4, ignore_eos=True),
    SamplingParams(max_tokens=17, temperature=0, repetition_penalty=1.3, presence_penalty=0.4),
    SamplingParams(max_tokens=9, seed=8, min_p=0.02, top_k=50, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0.7, seed=1, frequency_penalty=0.5),
]


class Vowels:
    """A mask that allows five bytes."""

    def allowed(self) -> bytes:
        bits = bytearray(VOCAB // 8 + 1)
        for byte in b"aeiou":
            bits[byte // 8] |= 1 << byte % 8
        return bytes(bits)

    def accept(self, token_id: int) -> None:
        pass


def config(**settings: Any) -> EngineConfig:
    given = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "device": "cpu"} | settings
    return EngineConfig(**given)


def prompt(number: int, length: int | None = None) -> list[int]:
    chooser = random.Random(number)
    length = length or chooser.choice([2, 7, 30, 50])
    return [chooser.randrange(256) for _ in range(length)]


def play(make: MakeEngine, devices: int) -> dict[str, Any]:
    """Return all responses; `devices` is the number that share each KV cache."""
    answers: dict[str, Any] = {}
    engine = make(config())
    engine._runner.warm_up([StepShape(4, 2), StepShape(0, 2, 16)])  # as a GPU has it
    answers["seeded"] = run_seeded(engine)
    answers["choices"] = run_choices(engine)
    answers["logprobs"] = run_logprobs(engine)
    answers["prefix"] = run_prefix(engine)
    answers["masked"] = run_masked(engine)
    answers["aborted"] = run_aborted(engine)
    answers["end"] = {"blocks_used": engine.stats().blocks_used, "tier": engine._runner.tier}
    engine.close()
    engine = make(config(speculative_method="ngram"))
    answers["proposed"] = run_proposed(engine)
    engine.close()
    engine = make(config(kv_cache_bytes=16 * BLOCK_BYTES // devices))
    answers["preempted"] = run_preempted(engine)
    engine.close()
    # A cache for one context on two devices holds half of a context on one device.
    answers["too large"] = too_large(make, 16 * BLOCK_BYTES // 2 + BLOCK_BYTES)
    return answers


def finish(engine: Engine, tokens: dict[str, list[int]], ends: dict[str, str]) -> None:
    while engine.has_work:
        note(engine.step(), tokens, ends)


def note(events: list[RequestEvent], tokens: dict[str, list[int]], ends: dict[str, str]) -> None:
    for event in events:
        name = f"{event.request_id}/{event.index}"
        tokens.setdefault(name, []).extend(event.token_ids)
        if event.finish_reason:
            ends[name] = str(event.finish_reason)


def run_seeded(engine: Engine) -> Any:
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    for number, params in enumerate(SEEDED):
        engine.add_request(f"r{number}", EngineRequest(prompt(number), params))
        note(engine.step(), tokens, ends)
    finish(engine, tokens, ends)
    return [tokens, ends]


def run_choices(engine: Engine) -> Any:
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    params = SamplingParams(max_tokens=10, seed=5, ignore_eos=True)
    engine.add_request("n", EngineRequest(prompt(9, 40), params, n=3))
    finish(engine, tokens, ends)
    return [tokens, ends]


def run_logprobs(engine: Engine) -> Any:
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=2, prompt_logprobs=1)
    [events] = engine.generate([prompt(3, 45)], params)
    entries = [entry for event in events for entry in event.logprobs or ()]
    entries += [entry for event in events for entry in event.prompt_logprobs or () if entry]
    return [[e.token_id, round(e.logprob, 3), [t for t, _ in e.top]] for e in entries]


def run_prefix(engine: Engine) -> Any:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    texts, cached = [], []
    for number in range(3):
        [events] = engine.generate([prompt(77, 64) + prompt(number, 5)], params)
        texts.append([token for event in events for token in event.token_ids])
        usage = events[-1].usage
        assert usage is not None
        cached.append(usage.cached_tokens)
    return [texts, cached]


def run_masked(engine: Engine) -> Any:
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    masked = SamplingParams(max_tokens=9, temperature=1.3, seed=2, mask=Vowels)
    engine.add_request("masked", EngineRequest(prompt(5), masked))
    engine.add_request("free", EngineRequest(prompt(6), SEEDED[1]))
    finish(engine, tokens, ends)
    assert set(tokens["masked/0"]) <= set(b"aeiou")
    return [tokens, ends]


def run_aborted(engine: Engine) -> Any:
    """One of three requests is aborted while a step is in flight."""
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    params = SamplingParams(max_tokens=15, temperature=0, ignore_eos=True)
    for number in range(3):
        engine.add_request(f"r{number}", EngineRequest(prompt(20 + number, 20), params))
    for _ in range(6):
        note(engine.step(), tokens, ends)
    note(engine.abort("r1"), tokens, ends)
    engine.add_request("late", EngineRequest(prompt(30), params))
    finish(engine, tokens, ends)
    return [tokens, ends]


def run_proposed(engine: Engine) -> Any:
    """Repeated text is proposed by prompt lookup, and some proposals are accepted."""
    bias = dict.fromkeys(b"abc", 100.0)
    params = [
        SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logit_bias=bias),
        SamplingParams(max_tokens=40, temperature=0.5, seed=3, ignore_eos=True, logit_bias=bias),
    ]
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    for number, each in enumerate(params):
        engine.add_request(f"r{number}", EngineRequest(list(b"abcabcabcabc"), each))
    finish(engine, tokens, ends)
    assert engine.stats().accepted_tokens > 0
    return [tokens, ends]


def run_preempted(engine: Engine) -> Any:
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    params = SamplingParams(max_tokens=40, temperature=1, seed=6, ignore_eos=True)
    for number in range(5):
        engine.add_request(f"r{number}", EngineRequest(prompt(40 + number, 33), params))
    finish(engine, tokens, ends)
    stats = asdict(engine.stats())
    assert stats["num_preemptions"] > 0
    return [tokens, ends, stats["num_preemptions"], stats["blocks_total"]]


def too_large(make: MakeEngine, kv_cache_bytes: int) -> bool:
    """Return whether a whole context exceeds the KV cache."""
    try:
        engine = make(config(max_model_len=CONTEXT, kv_cache_bytes=kv_cache_bytes))
    except OutOfMemoryError:
        return True
    [events] = engine.generate([prompt(1, 200)], SamplingParams(max_tokens=40, ignore_eos=True))
    assert sum(len(event.token_ids) for event in events) == 40
    engine.close()
    return False


def zoo_config(name: str) -> EngineConfig:
    """Return the configuration of a model of the zoo; the wide one has 8-bit keys and values."""
    kind = "q8" if name == WIDE else "auto"
    return config(max_model_len=128, kv_cache_dtype=kind, max_loras=2)


def run_greedy(engine: Engine) -> list[list[int]]:
    """Four prompts of the zoo's vocabulary, cut into chunks and mixed."""
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    prompts = [[token % 100 for token in prompt(60 + n, 5 + 12 * n)] for n in range(4)]
    runs = engine.generate(prompts, params)
    return [[token for event in events for token in event.token_ids] for events in runs]


def write_adapters(directory: Path, model: Any) -> None:
    """Write two adapters: mlx-lm's of linear layers and experts, and a DoRA with embeddings."""
    kinds = {name: m for name, m in model.named_modules() if isinstance(m, (*LINEARS, *EXPERTS))}
    shapes = {name: weight_shape(module) for name, module in kinds.items()}
    write_mlx(directory / "one", shapes, rank=3, size=0.25)
    linears = {name: s for name, s in shapes.items() if len(s) == 2}  # DoRA of experts is refused
    norms = {name: mx.linalg.norm(dense_weight(kinds[name]), axis=1) for name in linears}
    for name, module in model.named_modules():
        if isinstance(module, EMBEDDINGS) and name.endswith("embed_tokens"):
            linears[name] = weight_shape(module)[::-1]
            norms[name] = mx.linalg.norm(dense_weight(module), axis=0)
    magnitudes = {
        f"base_model.model.{name}.lora_magnitude_vector": np.array(norm * 1.3)
        for name, norm in norms.items()
    }
    write_peft(
        directory / "two", linears, rank=2, seed=1, size=0.25, use_dora=True, extra=magnitudes
    )


def run_adapted(engine: Engine, directory: Path) -> Any:
    """Prompts of the zoo's vocabulary with two adapters and without, mixed and then alone."""
    for name in ("one", "two"):
        engine.add_adapter(name, read_adapter(directory / name), name)
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    for number, adapter in enumerate(["one", None, "two", "one"]):
        prompted = [token % 100 for token in prompt(60 + number, 5 + 12 * number)]
        engine.add_request(f"r{number}", EngineRequest(prompted, params, adapter=adapter))
        note(engine.step(), tokens, ends)
    finish(engine, tokens, ends)
    engine.add_request("alone", EngineRequest([7, 8, 9], params, adapter="two"))
    finish(engine, tokens, ends)
    return [tokens, ends]


def run_adapters(engine: Engine, directory: Path) -> Any:
    """Adapters of the tiny model: mixed, unloaded while they are used, evicted, and refused."""
    answers: dict[str, Any] = {}
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    empty = engine.memory_bytes
    answers["adapted"] = run_adapted(engine, directory)
    both = engine.memory_bytes
    assert both > empty
    try:
        engine.add_adapter("wide", read_adapter(directory / "wide"), "wide")
    except AdapterError as error:
        answers["refused"] = error.message
    assert engine.memory_bytes == both
    engine.add_request("used", EngineRequest(prompt(1, 20), SEEDED[0], adapter="one"))
    for _ in range(3):
        note(engine.step(), tokens, ends)
    engine.remove_adapter("one")
    engine.add_adapter("embedded", read_adapter(directory / "embedded"), "embedded")
    for number, name in enumerate(["embedded", "two", None]):
        request = EngineRequest(prompt(number, 20), SEEDED[number], adapter=name)
        engine.add_request(f"later{number}", request)
    finish(engine, tokens, ends)
    engine.remove_adapter("two")
    engine.remove_adapter("embedded")
    assert engine.memory_bytes == empty
    return {**answers, "unloaded": [tokens, ends]}


def run_texts(engine: Engine) -> list[str]:
    """Return the responses of real weights."""
    prompts = ["The capital of France is", "Once upon a time, there was a", "def fibonacci(n):"]
    runs = engine.generate(prompts, SamplingParams(max_tokens=24, temperature=0))
    return ["".join(event.text for event in events) for events in runs]
