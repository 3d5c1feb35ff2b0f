"""GET /metrics: the engine's counters in Prometheus's text format, under vLLM's names."""

from __future__ import annotations

from modelpack_engine.outputs import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SERIES = (
    ("vllm:num_requests_running", "gauge", "Requests that are being computed", "num_running"),
    ("vllm:num_requests_waiting", "gauge", "Requests that wait", "num_waiting"),
    ("vllm:num_preemptions_total", "counter", "Preemptions", "num_preemptions"),
    ("vllm:prompt_tokens_total", "counter", "Prompt tokens", "prompt_tokens"),
    ("vllm:generation_tokens_total", "counter", "Generated tokens", "generated_tokens"),
    ("vllm:prefix_cache_queries_total", "counter", "Prompt tokens looked up", "prompt_tokens"),
    ("vllm:prefix_cache_hits_total", "counter", "Prompt tokens found cached", "cached_tokens"),
    ("vllm:request_success_total", "counter", "Requests that ended", "num_finished"),
    ("modelpack:engine_steps_total", "counter", "Steps of the engine", "num_steps"),
)


def render(model: str, stats: EngineStats) -> str:
    """Return the text; `model` becomes the label `model_name`."""
    name = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    label = f'{{model_name="{name}"}}'
    used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0
    rows = [(name, kind, text, float(getattr(stats, field))) for name, kind, text, field in _SERIES]
    rows.append(("vllm:kv_cache_usage_perc", "gauge", "Share of KV blocks in use", used))
    lines = []
    for series, kind, text, value in rows:
        lines += [
            f"# HELP {series} {text}.",
            f"# TYPE {series} {kind}",
            f"{series}{label} {value:g}",
        ]
    return "\n".join(lines) + "\n"
