"""Measure the Python share of the host's time for a step, without a GPU.

    PYTHONPATH=.:engine python benchmarks/host.py [--rounds 7] [--workloads load-m-32 load-m-128]

The engine schedules, builds and reads steps as on a GPU, with the same buckets and tables, but the
model computes nothing, and vocabulary and KV cache are small. Only Python remains: the graphs of
layers are not built, and only the sampling of tokens is launched. Prints a JSON object for each
workload with the microseconds per step, the minimum of all rounds, since the machine may have other
work.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
from gpu_engine import Silent
from mlx_lm.models import llama

from modelpack_engine.config import EngineConfig
from modelpack_engine.core.buckets import FEW
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_engine.runner.kv_cache_size import Sizes
from modelpack_engine.runner.model_layout import ModelLayout
from modelpack_engine.runner.model_runner import ModelRunner, make_runner
from modelpack_engine.runner.paged import Layout, PagedRunner
from modelpack_server.bench.engine_load import run_workload
from modelpack_server.bench.workloads import WORKLOADS

VOCABULARY, CONTEXT, DIM = 64, 2048, 64
#: The token ids of load M exceed this small vocabulary, but nothing reads them.
KNOWN = 1 << 20


class NothingComputed:
    """Replaces the graphs of compiled steps by precomputed logits."""

    def __init__(self) -> None:
        self._logits: dict[int, mx.array] = {}

    def graph(self, layout: Layout) -> Callable[..., Any]:
        rows = layout.sampled or layout.rows
        if rows not in self._logits:
            self._logits[rows] = mx.zeros((rows, 1, VOCABULARY))
            mx.eval(self._logits[rows])
        logits = self._logits[rows]
        return lambda token_ids, packed, pools, states, *_: (logits, [], states, [])


class HostEngine(Engine):
    """An engine with the sizes of a GPU, whose model computes nothing."""

    def _choose_sizes(
        self, layout: ModelLayout | None, context_length: int, draft_bytes: int
    ) -> Sizes:
        return replace(super()._choose_sizes(layout, context_length, draft_bytes), buckets=FEW)

    def _make_runner(self, loaded: LoadedModel, layout: ModelLayout | None) -> ModelRunner:
        runner = make_runner(
            loaded.model,
            num_blocks=self._sizes.num_blocks,
            buckets=FEW,
            exact=False,
            compiled=True,
            self_test=False,
        )
        assert isinstance(runner, PagedRunner)
        assert runner.compiled is not None
        runner.compiled._graph = NothingComputed().graph  # type: ignore[method-assign]
        # As on a GPU: a step is launched before the previous one is read.
        runner.__dict__["writes_in_place"] = True
        return runner


def make_engine(seqs: int) -> HostEngine:
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=DIM,
            num_hidden_layers=1,
            intermediate_size=DIM,
            num_attention_heads=1,
            num_key_value_heads=1,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            head_dim=DIM,
            tie_word_embeddings=True,
        )
    )
    mx.eval(model.parameters())
    loaded = LoadedModel(model, {"vocab_size": VOCABULARY}, Silent(), "llama", CONTEXT, (), 0)
    config = EngineConfig(
        max_num_seqs=seqs,
        kv_cache_bytes=1 << 29,
        max_model_len=CONTEXT,
        max_num_batched_tokens=2048,
    )
    engine = HostEngine(loaded, config)
    engine.vocab_size = KNOWN
    return engine


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Return the minimum microseconds per step over all rounds, and those of its parts."""
    workload = WORKLOADS[name]()
    engine = make_engine(workload.concurrency or 1)
    least: dict[str, float] = {}
    for again in range(1 + rounds):
        found = run_workload(engine, workload.in_other_words(again)).to_json()
        times = {"step": 1e6 * found["duration_s"] / found["steps"]}
        for part in ("build", "launch", "wait"):
            times[part] = 1e3 * found[f"host_{part}_ms_per_step"]
        times["rest"] = times["step"] - times["build"] - times["launch"] - times["wait"]
        for part, value in times.items():
            least[part] = min(least.get(part, value), value)
    return {"workload": name, "steps": found["steps"]} | {k: round(v) for k, v in least.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workloads", nargs="*", default=["load-m-32", "load-m-128"])
    args = parser.parse_args()
    print(json.dumps({"mlx": mx.__version__, "python": platform.python_version()}))  # type: ignore[attr-defined]
    for name in args.workloads:
        print(json.dumps(measure(name, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
