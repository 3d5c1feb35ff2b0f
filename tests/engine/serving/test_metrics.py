"""/metrics has the series of vLLM's Grafana dashboards, even before the first request."""

from __future__ import annotations

import re

import pytest

from modelpack.deploy.kubernetes import SCALED_BY
from tests.conftest import ROOT
from tests.engine.serving.conftest import Scripted

# Source: vLLM's vllm/v1/metrics/loggers.py, and the dashboards in its repository, which query
# `_total` of counters and `_bucket`, `_sum` and `_count` of histograms.
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
          "gpu_cache_usage_perc", "cache_config_info")  # fmt: skip
COUNTERS = ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens",
            "generation_tokens", "request_success")  # fmt: skip
FIRST = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
         160, 640, 2560)  # fmt: skip
BETWEEN = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
LONG = (
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
)
HISTOGRAMS: dict[str, tuple[float, ...] | None] = {
    "time_to_first_token_seconds": FIRST,
    "inter_token_latency_seconds": BETWEEN,
    "time_per_output_token_seconds": BETWEEN,
    "request_time_per_output_token_seconds": BETWEEN,
    "e2e_request_latency_seconds": LONG,
    "request_queue_time_seconds": LONG,
    "request_prefill_time_seconds": LONG,
    "request_decode_time_seconds": LONG,
    "request_inference_time_seconds": LONG,
    "request_prompt_tokens": None,
    "request_generation_tokens": None,
    "request_max_num_generation_tokens": None,
    "request_params_max_tokens": None,
    "request_params_n": (1, 2, 5, 10, 20),
    "iteration_tokens_total": (1, 8, *(2**power for power in range(4, 15))),
}


def text(api: Scripted, *, used: bool) -> str:
    if used:
        api.chat("a")
    found: str = api.http.get("/metrics").text
    return found


@pytest.mark.parametrize("used", [False, True])
def test_all_families_are_there(api: Scripted, used: bool) -> None:
    lines = text(api, used=used).splitlines()
    model = "m" if used else ""
    label = f'engine="0",model_name="{model}"'
    types = dict(re.findall(r"^# TYPE vllm:(\S+) (\S+)$", "\n".join(lines), re.MULTILINE))
    for name in GAUGES:
        assert types[name] == "gauge"
    for name in COUNTERS:
        assert types[f"{name}_total"] == "counter"
    for name in HISTOGRAMS:
        assert types[name] == "histogram"
    series = {line.split(" ")[0] for line in lines if not line.startswith("#")}
    for name in (*GAUGES[:4], *(f"{name}_total" for name in COUNTERS[:5])):
        assert f"vllm:{name}{{{label}}}" in series
    for reason in ("stop", "length", "abort", "error"):
        labels = f'engine="0",finished_reason="{reason}",model_name="{model}"'
        assert f"vllm:request_success_total{{{labels}}}" in series
    for name in ("restores_total", "disk_hits_total", "restored_bytes_total", "memory_bytes"):
        assert f"modelpack:kv_offload_{name}{{{label}}}" in series
    for name in HISTOGRAMS:
        assert {f"vllm:{name}_{part}{{{label}}}" for part in ("sum", "count")} <= series


@pytest.mark.long
@pytest.mark.parametrize(("name", "bounds"), HISTOGRAMS.items())
def test_buckets_are_vllms(api: Scripted, name: str, bounds: tuple[float, ...] | None) -> None:
    line = rf'^vllm:{name}_bucket{{engine="0",le="(.+)",model_name=""}} 0.0$'
    found = re.findall(line, text(api, used=False), re.M)
    assert found.pop() == "+Inf"
    numbers = tuple(map(float, found))
    if bounds is None:  # 1, 2, 5, 10 … up to the longest contexts
        assert numbers[:6] == (1, 2, 5, 10, 20, 50)
        assert numbers[-1] >= 1_000_000
    else:
        assert numbers == bounds


def test_an_autoscaler_finds_its_metrics(api: Scripted) -> None:
    """`modelpack k8s --max-replicas` scales by gauges that the adapter renames by docs' rule."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    [query] = re.findall(r'__name__=~"([^"]+)"', page)
    [(matches, name)] = re.findall(r'name: \{matches: "([^"]+)", as: "([^"]+)"\}', page)
    served = set(re.findall(r"^# TYPE (\S+) gauge", text(api, used=False), re.MULTILINE))
    renamed = {
        re.sub(matches, name.replace("$", "\\"), one) for one in served if re.fullmatch(query, one)
    }
    assert renamed == {*SCALED_BY}
