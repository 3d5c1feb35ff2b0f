"""Flags, presets, durations and the defaults of a model's publisher."""

from __future__ import annotations

import math

import pytest

from modelpack.errors import UsageError
from modelpack_engine.config import EngineConfig
from modelpack_engine.request import SamplingParams
from modelpack_server.pool.model_defaults import sampling_defaults
from modelpack_server.pool.settings import (
    PRESETS,
    WHOLE_CONTEXT,
    ModelSettings,
    parse_flags,
    parse_keep_alive,
    show_keep_alive,
)


@pytest.mark.parametrize(
    ("flags", "sampling", "engine"),
    [
        ("--temp 0.7 --top-p=0.9", {"temperature": 0.7, "top_p": 0.9}, {}),
        ("--top-k 40 --min-p 0.1 --seed 7", {"top_k": 40, "min_p": 0.1, "seed": 7}, {}),
        ("--repeat-penalty 1.1 -n 5", {"repetition_penalty": 1.1, "max_tokens": 5}, {}),
        ("--n-predict -1 --seed -1", {}, {}),
        ("--ctx-size 4096", {}, {"max_model_len": 4096}),
        ("-c 4096 --max-model-len 8k", {}, {"max_model_len": 8000}),
        ("--ctx-size 0", {}, {}),
        ("--max-model-len 8K", {}, {"max_model_len": 8192}),
        ("--gpu-memory-utilization 0.5 --max-num-seqs 3", {},
         {"gpu_memory_utilization": 0.5, "max_num_seqs": 3}),
        ("--kv-cache-dtype bfloat16", {}, {"kv_cache_dtype": "bf16"}),
        ("--kv-cache-dtype=q4", {}, {"kv_cache_dtype": "q4"}),
        ("--scheduling-policy fcfs", {}, {"scheduling_policy": "fcfs"}),
        ("--speculative-method ngram --draft-max 6", {},
         {"speculative_method": "ngram", "num_speculative_tokens": 6}),
        ("-md ai/small --draft-p-min 0.5", {},
         {"draft_model": "ai/small", "speculative_min_acceptance": 0.5}),
        ("--speculative-disable-by-batch-size 0", {}, {"speculative_disable_by_batch_size": 0}),
        ("--no-enable-prefix-caching", {}, {"enable_prefix_caching": False}),
        ("--temp 1 --temp 0", {"temperature": 0.0}, {}),
        ("", {}, {}),
    ],
)  # fmt: skip
def test_flags(flags: str, sampling: dict[str, object], engine: dict[str, object]) -> None:
    parsed = parse_flags(flags.split())
    assert parsed.sampling == sampling
    assert parsed.engine == engine


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tmep", "1"], "--tmep"),
        (["--temp"], "number"),
        (["--temp", "hot"], "hot"),
        (["--temp", "7"], "at most 2"),
        (["--temp", "nan"], "at most 2"),
        (["--top-p", "0"], "above 0"),
        (["--repeat-penalty", "0"], "above 0"),
        (["--max-num-seqs", "0"], "at least 1"),
        (["--ctx-size", "1"], "at least 2"),
        (["--gpu-memory-utilization", "1.5"], "at most 1"),
        (["--ignore-eos=1"], "no value"),
        (["--kv-cache-dtype", "fp8"], "no such KV cache type: 'fp8'"),
        (["--speculative-method", "guess"], "is 'guess'"),
        (["--scheduling-policy", "priority"], "--scheduling-policy is 'priority'"),
        (["--draft-model"], "no name"),
        (["--draft", "0"], "at least 1"),
        (["--speculative-method", "mtp", "-md", "ai/small"], "mtp does not use --draft-model"),
        (["--draft-p-min", "2"], "at most 1"),
        (["--kv-cache-dtype"], "no such KV cache type: ''"),
        (["0.7"], "0.7"),
    ],
)
def test_flags_that_are_none(flags: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_flags(flags)
    if "unknown" in str(caught.value):
        assert "--ctx-size" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("1h30m", 5400), ("90", 90), (90, 90), (0, 0), ("0", 0), ("-1", math.inf),
     (-1, math.inf), ("-1s", math.inf), ("250ms", 0.25), ("1.5h", 5400), ("24h0m0s", 86400),
     (10**400, math.inf), ("9" * 400 + "s", math.inf), (1e300, math.inf)],
)  # fmt: skip
def test_keep_alive(text: str | float, seconds: float) -> None:
    assert parse_keep_alive(text) == seconds
    assert parse_keep_alive(show_keep_alive(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5 m", "m", "5x", "1h-2m", "nan"])
def test_no_keep_alive(text: str) -> None:
    with pytest.raises(UsageError):
        parse_keep_alive(text)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_valid_sampling(name: str) -> None:
    SamplingParams(**PRESETS[name].sampling).check(10)


def test_what_wins() -> None:
    settings = ModelSettings(
        preset="code", runtime_flags=("--top-p", "0.8", "-c", "64"), sampling={"top_k": 3}
    )
    defaults = settings.sampling_defaults({"temperature": 0.9, "min_p": 0.1, "top_p": 0.1})
    assert defaults == {"temperature": 0.2, "min_p": 0.1, "top_p": 0.8, "top_k": 3}
    config = settings.engine_config(EngineConfig(max_num_seqs=5))
    assert (config.max_model_len, config.max_num_seqs) == (64, 5)
    assert (
        ModelSettings(context_size=99).over(settings).engine_config(EngineConfig()).max_model_len
        == 99
    )
    long = ModelSettings(preset="long-context").engine_config(EngineConfig())
    assert (long.max_model_len, long.default_model_len) == (None, WHOLE_CONTEXT)


def test_settings_over_others() -> None:
    base = ModelSettings(preset="chat", keep_alive=5, runtime_flags=("--temp", "1"))
    over = ModelSettings(keep_alive=0, runtime_flags=("--top-k", "2")).over(base)
    assert over.preset == "chat"
    assert over.keep_alive == 0
    assert over.runtime_flags == ("--temp", "1", "--top-k", "2")
    with pytest.raises(UsageError, match="no such preset: 'loud'"):
        ModelSettings(preset="loud").check()


def test_generation_config() -> None:
    found = sampling_defaults(
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "eos_token_id": 2,
         "repetition_penalty": "x", "min_p": 7}
    )  # fmt: skip
    assert found == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert sampling_defaults({"do_sample": False, "temperature": 0.6}) == {"temperature": 0.0}
    assert sampling_defaults(None) == {}
